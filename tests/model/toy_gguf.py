"""A two-block Llama with random weights and a 15-token vocabulary, written as GGUF."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np

TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "cd", "<|endoftext|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write(
    path: Path,
    *,
    eot: int | None = None,
    without: Collection[str] = (),
    arch: str = "llama",
    scale: float = 1.0,
    matrices: type[np.floating] = np.float32,
) -> Path:
    """Write it to `path`, its `matrices` in fp32 or fp16; `without` leaves tensors out (`output.weight`: a tied head).

    `arch` is llama, or gemma3 with the norms that it has besides.
    """
    file = gguf.GGUFWriter(str(path), arch)
    file.add_name("toy")
    file.add_context_length(64)
    file.add_embedding_length(16)
    file.add_block_count(2)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(1e-5)
    if arch == "gemma3":
        file.add_key_length(8)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(8)
    file.add_vocab_size(len(TOKENS))
    add_tokenizer(file, TOKENS)
    if eot is not None:
        file.add_eot_token_id(eot)
    shapes = {"token_embd": (len(TOKENS), 16), "output_norm": (16,), "output": (len(TOKENS), 16)}
    for block in range(2):
        shapes |= {f"blk.{block}.{norm}": (16,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.attn_{part}": (16, 16) for part in ("q", "output")}
        shapes |= {f"blk.{block}.attn_{part}": (8, 16) for part in ("k", "v")}
        shapes |= {f"blk.{block}.ffn_{part}": (32, 16) for part in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down"] = (16, 32)
        if arch == "gemma3":
            shapes |= {f"blk.{block}.{norm}": (16,) for norm in ("post_attention_norm", "post_ffw_norm")}
            shapes |= {f"blk.{block}.attn_{part}_norm": (8,) for part in "qk"}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if f"{name}.weight" not in without:
            values = scale * random.normal(size=shape)
            kind = matrices if values.ndim > 1 else np.float32
            file.add_tensor(f"{name}.weight", values.astype(kind))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def add_tokenizer(file: gguf.GGUFWriter, tokens: list[str]) -> None:
    """Give a file a tokenizer of these tokens, the first three of them special, and a chat template."""
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    kinds = gguf.TokenType
    file.add_token_types([kinds.CONTROL] * 3 + [kinds.NORMAL] * (len(tokens) - 3))
    file.add_token_merges(["a b", "c d"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
