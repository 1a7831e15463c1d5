"""Hold frozen linear layers and experts in 4-bit, and thaw a block to fp32."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from midtune.model.memory import freed_at_once
from midtune.model.products import unpacked_is_faster

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What a quantizer is registered as with transformers, for linear layers and experts.
METHOD = "nf4_with_experts"
# Bytes of 32 values in MXFP4: two a byte, and the exponent that they share.
MXFP4_BYTES = 17
# Groups of 32 values that are unpacked at once; each takes 256 bytes meanwhile.
MXFP4_ROWS = 2**19


def nf4_config(compute_dtype: torch.dtype, keep: list[str], *, experts: bool = False) -> BitsAndBytesConfig:
    """NF4 with double quantization for every linear layer except the modules in `keep`, and with `experts` for those.

    Packed experts compute after `unpack_on_use`.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=keep,
    )
    if experts:
        config.quant_method = METHOD
    return config


def expert_weights(part: nn.Module) -> list[str]:
    """Names of a module's own parameters that hold a matrix for each expert, [experts, rows, columns]."""
    if isinstance(part, nn.modules.conv._ConvNd):
        return []
    own = part.named_parameters(recurse=False)
    return [name for name, weight in own if weight.dim() == 3 and min(weight.shape) > 1]


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name in the model → module, for those that hold experts, packed or not."""
    return {
        name: part
        for name, part in model.named_modules()
        if expert_weights(part) or parametrize.is_parametrized(part)
    }


@register_quantizer(METHOD)
class _Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit for experts too, one tensor at a time while a checkpoint is read.

    Experts that are stored in MXFP4 stay as they are.
    """

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        place, _, name = param_name.rpartition(".")
        is_expert = name in expert_weights(model.get_submodule(place))
        return is_expert or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        stored = [
            WeightConverter([f"{name}_blocks", f"{name}_scales"], name, [_JoinMxfp4()])
            for name in ("gate_up_proj", "down_proj")
        ]
        return [*super().update_weight_conversions(weight_conversions, model), *stored]


class _Quantize(Bnb4bitQuantize):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        ((name, value),) = input_dict.items()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), bnb.nn.Linear4bit):
            return super().convert(input_dict, model=model, **kwargs)
        value = value[0] if isinstance(value, list) else value
        if value.dtype == torch.uint8:
            return {name: nn.Parameter(value, requires_grad=False)}
        packed = bnb.nn.Params4bit(value, compress_statistics=True, quant_type="nf4")
        return {name: packed.to(value.device)}


class _JoinMxfp4(ConversionOps):
    """Blocks [experts, rows, groups, 16] and scales [experts, rows, groups] → [experts, rows, groups, 17]."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        blocks, scales = (input_dict[name][0] for name in source_patterns)
        # transformers casts what it reads, and floating-point numbers of every kind hold a byte exactly.
        return {target_patterns[0]: torch.cat([blocks, scales[..., None]], -1).to(torch.uint8)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class Lower(nn.Module):
    """Parametrization of trained experts: under autocast, in its dtype, as autocast does for linear layers alone."""

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        kind = master.device.type
        return master.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else master


def lower_experts(block: nn.Module) -> None:
    """Let the trained experts of a block compute in autocast's dtype."""
    for part in list(block.modules()):
        for name in expert_weights(part):
            parametrize.register_parametrization(part, name, Lower())


def plain_name(name: str) -> str:
    """The name that a parameter has without a parametrization."""
    return name.replace("parametrizations.", "").removesuffix(".original")


class Unpack(nn.Module):
    """Parametrization of packed experts: their values in `dtype`, [experts, rows, columns]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = dtype
        self.held: torch.Tensor | None = None

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        if self.held is not None:
            return self.held
        if _is_mxfp4(packed):
            return convert_moe_packed_tensors(
                packed[..., :-1], packed[..., -1], dtype=self.compute_dtype, rows_per_chunk=MXFP4_ROWS
            )
        return dequantized(packed).to(self.compute_dtype)


def unpack_on_use(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the packed experts of a model that was just loaded compute in `dtype`."""
    for part in list(model.modules()):
        own = dict(part.named_parameters(recurse=False))
        packed = [name for name, value in own.items() if value.dtype == torch.uint8]
        if packed and not isinstance(part, bnb.nn.Linear4bit):
            hold_packed(part, {name: Unpack(dtype) for name in packed})


def hold_packed(part: nn.Module, unpack: Mapping[str, nn.Module]) -> None:
    """Unpack packed parameters of an experts' module whenever it computes, and again for its gradient."""
    if not unpack:
        return
    for name, unpacking in unpack.items():
        parametrize.register_parametrization(part, name, unpacking, unsafe=True)
    part.forward = partial(_unpacked_again, part.forward)


def _unpacked_again(forward: Callable[..., torch.Tensor], *args: Any, **named: Any) -> torch.Tensor:
    def run(*args: Any) -> torch.Tensor:
        # Some architectures look at a weight once for each expert.
        with parametrize.cached():
            return forward(*args, **named)

    # Autograd would hold the unpacked weights of every block until its backward pass.
    if torch.is_grad_enabled() and any(
        getattr(part, "requires_grad", False) for part in (*args, *named.values())
    ):
        found: torch.Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        return found
    return run(*args)


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
    """Whether `module` holds 4-bit weights."""
    return any(isinstance(part, bnb.nn.Linear4bit | Unpack) for part in module.modules())


def thawed(
    block: nn.Module, originals: Mapping[str, torch.Tensor], *, with_experts: bool = True
) -> nn.Module:
    """A trainable fp32 copy of a frozen block, with ordinary layers on the same device.

    `originals` are the checkpoint's tensors by name inside the block; missing ones come from `block`, dequantized.
    Unless `with_experts`, experts stay frozen, and as they are held.
    """
    experts = expert_modules(block)
    # The copy shares layers with the frozen block, so 4-bit data is never duplicated.
    shared: list[Any] = [part for part in block.modules() if isinstance(part, bnb.nn.Linear4bit)]
    if with_experts:
        shared += [packed for part in experts.values() for packed in part.parameters()]
    else:
        shared += experts.values()
    device = next(block.parameters()).device
    fresh = copy.deepcopy(block, {id(part): part for part in shared})
    frozen = set() if with_experts else {id(inner) for part in experts.values() for inner in part.modules()}
    with torch.no_grad():
        for name, part in list(fresh.named_modules()):
            if isinstance(part, bnb.nn.Linear4bit):
                fresh.set_submodule(name, _as_linear(part, originals.get(f"{name}.weight")))
            elif with_experts and name in experts and parametrize.is_parametrized(part):
                _replace_packed(part)
        for name, part in fresh.named_modules():
            if id(part) in frozen:
                continue
            for key, value in part._buffers.items():
                if value is not None and value.is_floating_point():
                    part._buffers[key] = value.float()
            for key, value in part._parameters.items():
                if value is not None:
                    value = originals.get(f"{name}.{key}".lstrip("."), value)
                    part._parameters[key] = nn.Parameter(value.to(device, torch.float32, copy=True))
    if with_experts:
        lower_experts(fresh)
    return fresh


def _replace_packed(part: nn.Module) -> None:
    """Make packed experts ordinary parameters again."""
    values = {name: getattr(part, name) for name in part.parametrizations}  # type: ignore[union-attr]
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part.parametrizations, part.forward
    part._parameters.update(values)


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


def count_values(weight: Any) -> int:
    """Number of values that a parameter holds, packed or not."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        return state.shape.numel()
    return weight.numel() // MXFP4_BYTES * 32 if _is_mxfp4(weight) else weight.numel()


def _is_mxfp4(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.uint8 and weight.dim() == 4 and weight.size(-1) == MXFP4_BYTES


def dequantized(weight: Any) -> torch.Tensor:
    """The full-precision values of a 4-bit parameter, [out, in]."""
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def linears_in_4_bit(module: nn.Module) -> dict[str, nn.Linear]:
    """Name in `module` → layer, for its linear layers that are held in 4-bit."""
    return {name: part for name, part in module.named_modules() if isinstance(part, bnb.nn.Linear4bit)}


def set_codes(weight: Any, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Give a 4-bit parameter, whose scales are quantized too, other codes under the same scales.

    `choose` gets the scale of each weight [O, I] and the values [16] of the codes, and returns codes [O, I].
    """
    state = weight.quant_state
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = absmax.float().repeat_interleave(state.blocksize)[: state.shape.numel()].view(state.shape)
    codes = choose(scales, state.code.float()).flatten().to(torch.uint8)
    weight.data.copy_((codes[::2] << 4 | codes[1::2]).view_as(weight.data))


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
    """Inside the context, hold linear weights and experts in the layout that decodes fastest.

    4-bit weights are dequantized once instead of every step; on a card, where that is faster for so many rows. On a
    CPU weights are also laid out for oneDNN, which multiplies a few rows up to three times as fast. Results differ only
    by rounding. Weights must not change inside the context, and no gradient is taken.

    `dtype` is that of inputs and of dequantized weights, and `rows` about how many rows a step computes. Layers whose
    copies would exceed `most_bytes` stay as they are.
    """
    changed: list[nn.Linear] = []
    held: list[Unpack] = []
    try:
        for part in model.modules():
            if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], Unpack):
                most_bytes -= count_values(part.original) * dtype.itemsize
                if most_bytes < 0:
                    break
                part[0].held = part()
                held.append(part[0])
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
        for unpack in held:
            unpack.held = None


def _has_fast_layout(device: torch.device, dtype: torch.dtype) -> bool:
    # Torch has these operators for its own compiler; builds without oneDNN lack them.
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
