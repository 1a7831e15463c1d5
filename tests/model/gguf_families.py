"""A small random GGUF of any family that transformers reads, with its names and shapes in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from tests.model import toy_gguf

# Gemma's tokenizer adds the last one where it is missing.
TOKENS = [*toy_gguf.TOKENS, *(f"<{number}>" for number in range(48)), "<mask>"]

# The name in a file, where it is not transformers' own.
NAMES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
}
# Without names that no file has, encoder-decoders, Deci, whose configuration transformers has not, gpt-oss, whose
# experts the reader drops, and Gemma 4, whose tables for each block have the published size whatever a file says.
LEFT_OUT = {"general", "tokenizer", "mistral", "t5", "umt5", "deci", "gpt_oss", "gemma4"}
FAMILIES = sorted({*GGUF_SUPPORTED_ARCHITECTURES, "qwen35"} - LEFT_OUT)
SIZES = {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 128,
    "feed_forward_length": 128,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_ctx": 64,
    "head_dim": 16,
    "global_head_dim": 16,
    "rotary_dim": 8,
    "vocab_size": len(TOKENS),
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "conv_L_cache": 3,
    "conv_kernel": 4,
    "state_size": 8,
    "time_step_rank": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "lfm2": {"num_key_value_heads": [0, 2, 0, 2]},
    "mamba": {"intermediate_size": 128},
    "falcon": {"num_key_value_heads": 1},
}


# Qwen3.5 is read by transformers' newer reader, which has no such tables.
QWEN35_KEYS = {
    **{"context_length": 64, "embedding_length": 64, "block_count": 4, "feed_forward_length": 128},
    **{"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16},
    **{"attention.layer_norm_rms_epsilon": 1e-5, "full_attention_interval": 2, "ssm.conv_kernel": 4},
    **{"ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 64},
    **{"rope.freq_base": 1e4, "rope.dimension_count": 6, "rope.dimension_sections": [1, 1, 1, 0]},
}
QWEN35_NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
    },
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{
        "self_attn.o_proj": "attn_output",
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.dt_": "ssm_dt.",
    },
    **{
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.A_log": "ssm_a",
    },
    **{
        "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.norm": "ssm_norm",
    },
    **{"linear_attn.out_proj": "ssm_out"},
}


def qwen35_name(name: str) -> str:
    for inner, outer in QWEN35_NAMES.items():
        name = name.replace(inner, outer)
    return name


def write(path: Path, family: str) -> Path:
    """Write a random model of four blocks and a vocabulary of 64 tokens, in fp16 and fp32."""
    _write(path, family, {})
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    known = model.state_dict()
    if family == "qwen35":
        places = {qwen35_name(name): name for name in known}
    else:
        processor = TENSOR_PROCESSORS.get(NAMES.get(family, family), TensorProcessor)(config=config.to_dict())
        places = get_gguf_hf_weights_map(model, processor)
    tied = {"output.weight"} if config.tie_word_embeddings else set()
    random = np.random.default_rng(0)
    tensors = {}
    for name, inner in places.items():
        if name in tied:
            continue
        shape = list(known[inner].shape)
        if "_exps" in name and [*places.values()].count(inner) == 2:
            shape[1] //= 2
        if family == "gpt2" and len(shape) == 2 and name.startswith("blk."):
            shape.reverse()
        if "conv" in name or name.endswith("gate_inp_shexp.weight"):
            shape = [size for size in shape if size != 1]
        values = 0.3 * random.normal(size=shape)
        if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight")):
            values += 1
        if "ssm_a" in name:
            values = -np.exp(values)
        # Experts are parameters in memory, and a module's weight in a file.
        name += ".weight" * name.endswith("_exps")
        tensors[name] = values.astype(np.float16 if len(shape) > 1 else np.float32)
    _write(path, family, tensors)
    return path


def _write(path: Path, family: str, tensors: dict[str, Any]) -> None:
    arch = NAMES.get(family, family)
    file = gguf.GGUFWriter(str(path), arch)
    file.add_name("toy")
    known = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(family, {})
    sizes = {**SIZES, **OWN.get(family, {})}
    for key, value in (
        QWEN35_KEYS if family == "qwen35" else {k: sizes.get(known[k]) for k in known}
    ).items():
        if isinstance(value, list):
            file.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            file.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            file.add_uint32(f"{arch}.{key}", value)
    toy_gguf.add_tokenizer(file, TOKENS)
    for name, values in tensors.items():
        file.add_tensor(name, values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
