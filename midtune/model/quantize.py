"""Hold frozen linear layers in 4-bit NF4, and thaw a block to fp32."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from midtune.model.memory import freed_at_once
from midtune.model.products import unpacked_is_faster

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def nf4_config(compute_dtype: torch.dtype, keep: list[str]) -> BitsAndBytesConfig:
    """NF4 with double quantization for every linear layer except the modules in `keep`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=keep,
    )


def weights_read_directly(model: nn.Module) -> list[str]:
    """Linear layers whose weight the parent's forward pass reads, as state-space blocks do: 4-bit would break them."""
    found = []
    for name, parent in model.named_modules():
        children = [child for child, part in parent.named_children() if type(part) is nn.Linear]
        source = inspect.getsource(type(parent).forward) if children else ""
        prefix = f"{name}." if name else ""
        found += [
            f"{prefix}{child}"
            for child in children
            if re.search(rf"self\.{child}\.weight\b(?!\.(dtype|device|shape))", source)
        ]
    return found


def clear_quantized_markers(model: PreTrainedModel) -> None:
    """Remove transformers' marks of a quantized model.

    With them, its Trainer demands a PEFT adapter, and TRL silently casts fp32 master weights to bf16.
    """
    for marker in "is_loaded_in_4bit is_loaded_in_8bit is_quantized hf_quantizer quantization_method".split():
        vars(model).pop(marker, None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config


def forbid_cpu_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It repacks in the first forward pass without gradients; from then on it computes in bf16 and silently passes no
    gradient to the layers below.
    """
    for part in model.modules():
        if isinstance(part, bnb.nn.Linear4bit):
            part.support_avx512bf16_for_cpu = False


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute in `dtype`, plain weights too, which transformers leaves as they are in a model stored in 4-bit."""
    for part in model.modules():
        if isinstance(part, bnb.nn.Linear4bit):
            part.compute_dtype = part.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` holds 4-bit linear layers."""
    return any(isinstance(part, bnb.nn.Linear4bit) for part in module.modules())


def thawed(block: nn.Module, originals: Mapping[str, torch.Tensor]) -> nn.Module:
    """A trainable fp32 copy of a frozen block, with ordinary layers on the same device.

    `originals` are the checkpoint's tensors by name inside the block; missing ones come from `block`, dequantized.
    """
    # The copy shares linear layers with the frozen block, so 4-bit data is never duplicated.
    linears = {id(part): part for part in block.modules() if isinstance(part, bnb.nn.Linear4bit)}
    fresh = copy.deepcopy(block, dict(linears))
    for name, part in list(fresh.named_modules()):
        if isinstance(part, bnb.nn.Linear4bit):
            fresh.set_submodule(name, _as_linear(part, originals.get(f"{name}.weight")))
    fresh = fresh.float()
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if name in originals:
                parameter.copy_(originals[name])
            parameter.requires_grad_(True)
    return fresh


def _as_linear(part: bnb.nn.Linear4bit, original: torch.Tensor | None) -> nn.Module:
    linear: nn.Module = nn.Linear(
        part.in_features, part.out_features, bias=part.bias is not None, device="meta"
    )
    weight = original if original is not None else dequantized(part.weight)
    if getattr(part, "source_cls", None) is Conv1D:
        # GPT-2 stores its weights as [in, out].
        linear = cast(Any, Conv1D)(part.out_features, part.in_features)
        weight = weight if original is not None else weight.T.contiguous()
    linear.weight = nn.Parameter(weight.to(part.weight.device, torch.float32))
    if part.bias is not None:
        linear.bias = nn.Parameter(part.bias.detach().clone())
    return linear


def dequantized(weight: Any) -> torch.Tensor:
    """The full-precision values of a 4-bit parameter, [out, in]."""
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def nf4_error(device: torch.device, compute_dtype: torch.dtype) -> float:
    """Largest error of 4-bit kernels against dequantized weights, as a share of the largest value.

    Covers a product, its gradient, and the product of a single row, which has its own kernel.
    """
    source = torch.Generator().manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 128, bias=False, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True
    )
    layer.load_state_dict({"weight": torch.randn(128, 128, generator=source)})
    layer = layer.to(device).requires_grad_(False)
    forbid_cpu_packing(layer)
    plain = partial(F.linear, weight=dequantized(layer.weight).to(compute_dtype))
    rows = torch.randn(16, 128, generator=source).to(device, compute_dtype).requires_grad_()
    found = []
    for product in (layer, plain):
        whole = product(rows)
        (slope,) = torch.autograd.grad(whole.sum(), rows)
        found.append((whole.detach(), slope, product(rows[:1].detach())))
    errors = [(ours - right).abs().max() / right.abs().max() for ours, right in zip(*found, strict=True)]
    return float(torch.stack(errors).max())


@contextlib.contextmanager
def unpacked(model: nn.Module, dtype: torch.dtype, *, rows: int, most_bytes: int) -> Iterator[None]:
    """Inside the context, hold linear weights in the layout that decodes fastest.

    4-bit weights are dequantized once instead of every step; on a card, where that is faster for so many rows. On a
    CPU weights are also laid out for oneDNN, which multiplies a few rows up to three times as fast. Results differ only
    by rounding. Weights must not change inside the context, and no gradient is taken.

    `dtype` is that of inputs and of dequantized weights, and `rows` about how many rows a step computes. Layers whose
    copies would exceed `most_bytes` stay as they are.
    """
    changed = []
    try:
        for part in model.modules():
            if not isinstance(part, nn.Linear):
                continue
            packed = isinstance(part, bnb.nn.Linear4bit)
            # Routers and the like may do more than a product.
            if not packed and type(part) is not nn.Linear:
                continue
            wanted = dtype if packed else part.weight.dtype
            # oneDNN's product needs inputs of the weight's dtype, and inputs have the compute dtype.
            fast = wanted == dtype and _has_fast_layout(part.weight.device, dtype)
            if not (packed or fast):
                continue
            # Few rows may be faster through bitsandbytes' own product.
            if packed and part.weight.is_cuda and not unpacked_is_faster(part, rows, dtype):
                continue
            most_bytes -= part.in_features * part.out_features * wanted.itemsize
            if most_bytes < 0:
                break
            with freed_at_once():
                weight = dequantized(part.weight).to(dtype) if packed else part.weight.detach()
                product = partial(F.linear, weight=weight, bias=part.bias)
                if fast:
                    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                    arguments = {
                        "W": laid_out,
                        "B": part.bias,
                        "attr": "none",
                        "scalars": [],
                        "algorithm": "",
                    }
                    product = partial(torch.ops.mkldnn._linear_pointwise, **arguments)
            part.forward = product  # type: ignore[method-assign]
            changed.append(part)
        yield
    finally:
        for part in changed:
            del part.forward


def _has_fast_layout(device: torch.device, dtype: torch.dtype) -> bool:
    # Torch has these operators for its own compiler; builds without oneDNN lack them.
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
