"""Make a model folder that other programs load as it was trained: weights, chat template, stop tokens and dtype."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from midtune.errors import InputError
from midtune.model.architectures import auto_class
from midtune.model.configs import read_config
from midtune.model.policy import Policy, stop_ids
from midtune.model.quantize import compute_in, nf4_config
from midtune.model.sources import Source

# Largest activation on one prompt that leaves room in fp16 for other prompts.
HALF_ROOM = torch.finfo(torch.float16).max / 2


def save_quantized(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write a policy with trained blocks as transformers stores bitsandbytes' 4-bit models, to compute in `dtype`."""
    model: Any = policy.model
    trained = tuple(f"{policy.stack_name}.{block}." for block in policy.trained)
    depth = policy.stack_name.count(".") + 3
    # vLLM joins layers of a block, so the module around them is named; to older transformers a block's own name, such
    # as layers.1, would mean layers.11 too.
    keep = dict.fromkeys(
        ".".join(name.split(".")[:depth]) if name.startswith(trained) else name
        for name, part in model.named_modules()
        if type(part) is nn.Linear
    )
    stored = getattr(read_config(policy.source.folder, policy.source.name), "quantization_config", None)
    quantization = nf4_config(dtype, list(keep)).to_dict() if stored is None else dict(stored)
    model.config.quantization_config = {**quantization, "llm_int8_skip_modules": list(keep)}
    # The base's own settings, which save_pretrained may find fault with, are put in by `complete`.
    model.generation_config = GenerationConfig()
    compute_in(model, dtype)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    model.save_pretrained(folder)


def complete(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
) -> None:
    """Add to a model folder what training had: chat template, stop tokens, padding; and the dtype to compute in."""
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    file = source.folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    declared = (
        settings.get("eos_token_id") or read_config(source.folder, source.name).get_text_config().eos_token_id
    )
    settings["eos_token_id"] = stop_ids(declared, tokenizer)
    settings.setdefault("pad_token_id", tokenizer.pad_token_id)
    _write_json(folder / file.name, settings)
    if dtype is not None:
        path = folder / "config.json"
        _write_json(
            path, _with_dtype(json.loads(path.read_text(encoding="utf-8")), dtype) | {"dtype": _name(dtype)}
        )


@torch.no_grad()
def largest_activation(policy: Policy, ids: Sequence[int]) -> float:
    """Largest absolute value that any module of the model gives on a prompt."""
    largest = [0.0]

    def see(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        largest.extend(
            float(part.abs().max())
            for part in parts
            if isinstance(part, torch.Tensor) and part.dtype.is_floating_point
        )

    hooks = [part.register_forward_hook(see) for part in policy.model.modules()]
    with policy.autocast():
        policy.model(torch.tensor([list(ids)], device=policy.device))
    for hook in hooks:
        hook.remove()
    return max(largest)


@torch.no_grad()
def require_finite(folder: Path, ids: Sequence[int], device: torch.device) -> None:
    """Sample from a model folder in plain transformers; raises InputError if it gives anything but finite logits."""
    auto = auto_class(AutoConfig.from_pretrained(folder))
    model: Any = auto.from_pretrained(folder, device_map={"": device}, use_safetensors=True)
    given = torch.tensor([list(ids)], device=device)
    tokens = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False)
    if not bool(model(tokens).logits.isfinite().all()):
        raise InputError(
            f"the model gives no finite logits in {_name(model.dtype)}; export it with --dtype bf16."
        )


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration with each dtype replaced that it or a part of it names."""
    return {
        key: _name(dtype)
        if key in ("dtype", "torch_dtype")
        else (_with_dtype(value, dtype) if isinstance(value, dict) else value)
        for key, value in config.items()
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
