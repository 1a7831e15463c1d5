"""A model without data: the architecture's own code on tensors that have a shape but no content."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_impls import register_op_impl
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from midtune.model.architectures import built, stored_method
from midtune.model.blocks import config_from, find_blocks
from midtune.model.policy import Policy
from midtune.model.quantize import Lower, expert_weights, hold_packed, lower_experts
from midtune.model.sizes import blocks_of
from midtune.planning.budget import Loaded, packed_bytes
from midtune.rl.tail import ROWS, SHARED, WHOLE

# Attention masks with more values (rows · tokens · tokens) than this get no data.
LARGE_MASK = 2**28
# Tile of TRL's chunked head: tokens by vocabulary entries (`trl.kernels.chunked_logprob`).
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


def skeleton(
    model: Loaded, depth: int, vocabulary: int | None = None, trained: int = 0
) -> tuple[PreTrainedModel, FakeTensorMode]:
    """Build the last `depth` blocks of a model without data, and the mode that makes further tensors of its kind.

    `vocabulary` is the size of the embeddings and the head; None: the model's own. The first `trained` of the built
    blocks are not in 4-bit, except for experts that stay frozen.
    """
    blocks = blocks_of(model.config)
    cut = config_from(model.config, blocks - depth, blocks)
    if vocabulary is not None:
        text = cut.get_text_config()
        text.vocab_size, text.pad_token_id = vocabulary, None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        found = built(cut, dtype=model.weight_dtype)
        for number, block in enumerate(find_blocks(found)[1]):
            for name, part in list(block.named_modules()):
                if isinstance(part, nn.Linear) and model.quantized and number >= trained:
                    block.set_submodule(name, PackedLinear(part, model.dtype))
                if number < trained and model.with_experts:
                    continue
                if model.quantized or stored_method(model.config) == "mxfp4":
                    _pack_experts(part, model.dtype)
                elif model.weight_dtype != model.dtype:
                    hold_packed(part, {weight: Lower() for weight in expert_weights(part)})
    return found, mode


@register_op_impl(torch.ops.aten._grouped_mm.default)
def _grouped_mm(mode: Any, func: Any, left: torch.Tensor, right: torch.Tensor, offs: Any, *_: Any) -> Any:
    """The product of experts in any dtype; torch's own shape function knows bf16 alone."""
    groups = (len(offs),) if left.dim() == right.dim() == 2 else ()
    with mode:
        return left.new_empty(*groups, left.size(-2), right.size(-1))


def planned_tail(config: PretrainedConfig, block: int) -> str:
    """The kind of tail (`rl.tail.TAILS`) from `block` on that a policy will find, by what blocks keep in a cache."""
    text = config.get_text_config()
    sharing = getattr(text, "kv_sharing_modes", None) or []
    if "reuse" in sharing and block > sharing.index("store"):
        return WHOLE
    plain = (DynamicLayer, DynamicSlidingWindowLayer, *[DummyLayer] * ("reuse" in sharing))
    kept = DynamicCache(config=text).layers[block:]
    return SHARED if all(type(layer) in plain for layer in kept) else ROWS


class SkeletonPolicy(Policy):
    """A policy without data: its tensors have the shapes, dtypes and lifetimes of the real one; see `skeleton`.

    Its update runs as the tail `kind` does; a whole model is planned without the blocks below, which keep nothing.
    """

    def __init__(
        self, model: Loaded, depth: int, trained: int, vocabulary: int | None = None, kind: str = SHARED
    ) -> None:
        built, self.mode = skeleton(model, depth, vocabulary, trained)
        super().__init__(built, cast(Any, None), cast(Any, None), compute_dtype=model.dtype)
        # Without data nothing can be compared.
        self.tails = {0: kind}
        for block in range(trained):
            self.thaw(block)

    def thaw(self, block: int) -> None:
        """Replace the frozen layers of `block` by fp32 masters."""
        frozen = self.blocks[block]
        with self.mode:
            for part in frozen.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if not parameter.is_floating_point():
                        continue
                    # Module.float() cannot replace parameters without data.
                    setattr(part, name, nn.Parameter(parameter.detach().float()))
            lower_experts(frozen)
        self._frozen[block] = frozen

    def tail(self, first: int, states: torch.Tensor | None, *, checkpointing: bool = False) -> nn.Module:
        """As in `Policy`, but large masks get no data, so transformers cannot see that they mask nothing."""

        def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # Views of a model share its hooks, and the head's gives no mask.
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.numel() * mask.size(1) > LARGE_MASK:
                kwargs["attention_mask"] = self.mode.from_tensor(mask)
            return args, kwargs

        found = super().tail(first, states, checkpointing=checkpointing)
        found.register_forward_pre_hook(enter, with_kwargs=True)
        return found


class PackedLinear(nn.Linear):
    """The footprint of bitsandbytes' `Linear4bit`, whose parameter type needs data.

    It dequantizes for each product, forward and backward, and keeps nothing for the backward pass.
    """

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = compute_dtype
        packed = layer.weight.new_empty(packed_bytes(layer.weight.numel()), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        found: torch.Tensor = _Product.apply(inputs.to(self.compute_dtype), self.weight, shape)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias


def _pack_experts(part: nn.Module, dtype: torch.dtype) -> None:
    unpack: dict[str, nn.Module] = {}
    for name in expert_weights(part):
        weight: torch.Tensor = getattr(part, name)
        packed = weight.new_empty(packed_bytes(weight.numel()), dtype=torch.uint8)
        setattr(part, name, nn.Parameter(packed, requires_grad=False))
        unpack[name] = PackedExperts(weight.shape, dtype)
    hold_packed(part, unpack)


class PackedExperts(nn.Module):
    """The footprint of `Unpack`."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.new_empty(self.shape, dtype=self.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return inputs @ inputs.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


def chunked_log_probs(head: nn.Module, states: torch.Tensor, *, on_card: bool) -> torch.Tensor:
    """Log-probs [T] from states [T, H] with the footprint of TRL's chunked head, without values.

    On a card, kernels work inside a tile; on a CPU torch copies it several times.
    """
    found: torch.Tensor = _ChunkedLogProbs.apply(states, head.weight, on_card)  # type: ignore[no-untyped-call]
    return found


class _ChunkedLogProbs(torch.autograd.Function):
    """The footprint of TRL's `ChunkedLogProbFunction`; a test compares the two."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, on_card: bool) -> torch.Tensor:
        ctx.on_card = on_card
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        per_token = partial(states.new_empty, len(states), dtype=torch.float32)
        targets = per_token(dtype=torch.long)
        # Running maxima and sums; below, normalizers and entropies for the backward pass.
        statistics = [per_token() for _ in range(7)]
        for _, _, tile in _tiles(states, weight, ctx.dtype):
            if not on_card:
                _work_on(tile, gradients=False)
        del statistics
        ctx.save_for_backward(states, weight, targets, per_token(), per_token())
        return per_token()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        states, weight, *_ = ctx.saved_tensors
        needed = [
            torch.zeros_like(part, dtype=torch.float32) if wanted else None
            for part, wanted in zip((states, weight), ctx.needs_input_grad, strict=False)
        ]
        for tokens, words, tile in _tiles(states, weight, ctx.dtype):
            if not ctx.on_card:
                _work_on(tile, gradients=True)
            for gradients, factor in zip(needed, (words, tokens), strict=True):
                if gradients is not None:
                    # Products accumulate in fp32.
                    tile.float(), factor.float()
        found = [
            None if gradients is None else gradients.to(part.dtype)
            for gradients, part in zip(needed, (states, weight), strict=True)
        ]
        return found[0], found[1], None


def _tiles(
    states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield a chunk of states, a chunk of the head's rows, and space for their logits, all in `dtype`."""
    logits = states.new_empty(min(len(states), HEAD_TOKENS), HEAD_WORDS, dtype=dtype)
    for some in states.split(HEAD_TOKENS):
        tokens = some.to(dtype)
        for rows in weight.split(HEAD_WORDS):
            yield tokens, rows.to(dtype), logits[: len(some), : len(rows)]


def _work_on(tile: torch.Tensor, *, gradients: bool) -> None:
    """Hold the temporaries of torch for reducing a tile of logits to statistics, or for its gradients."""
    copy = partial(tile.new_empty, tile.shape, dtype=torch.float32)
    _held = [copy() for _ in range(5 if gradients else 3)]
    if gradients:
        words = tile.new_empty(tile.size(1), dtype=torch.long)
        _targets = tile.new_empty(tile.shape, dtype=torch.bool)
        del words
        _held += [copy(), copy()]
