"""A model without data: the architecture's own code over tensors that have a shape and nothing in them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from midtune.model.blocks import config_from, find_blocks
from midtune.model.policy import Policy
from midtune.planning.budget import Sizes, packed_bytes

# Values of a mask, all rows by all tokens by all tokens, that are too many to write.
LARGE_MASK = 2**28


def skeleton(
    config: PretrainedConfig,
    *,
    depth: int,
    dtype: torch.dtype,
    quantized: bool = False,
    vocabulary: int | None = None,
) -> tuple[PreTrainedModel, FakeTensorMode]:
    """A model without data, and the mode that makes further tensors of its kind.

    Args:
        config: of the whole model.
        depth: how many of its last blocks to build.
        dtype: of its parameters; linear layers of blocks are packed in 4-bit and compute in it if `quantized`.
        vocabulary: tokens of the embeddings and of the head; None: the model's own.
    """
    cut = config_from(config, blocks_of(config) - depth, blocks_of(config))
    if vocabulary is not None:
        cut = config_from(cut, 0, depth)
        cut.vocab_size, cut.pad_token_id = vocabulary, None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(cut, dtype=dtype)
        if quantized:
            for block in find_blocks(model)[1]:
                for name, part in list(block.named_modules()):
                    if isinstance(part, nn.Linear):
                        block.set_submodule(name, PackedLinear(part, dtype))
    return model, mode


class SkeletonPolicy(Policy):
    """A policy without data: what it computes has the shapes, dtypes and lifetimes of the real one.

    Args:
        trained: how many of the first of its blocks are trained.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        depth: int,
        trained: int,
        compute_dtype: torch.dtype,
        quantized: bool,
        vocabulary: int | None = None,
    ) -> None:
        model, self.mode = skeleton(
            config, depth=depth, dtype=compute_dtype, quantized=quantized, vocabulary=vocabulary
        )
        super().__init__(model, cast(Any, None), cast(Any, None), compute_dtype=compute_dtype)
        for block in range(trained):
            self.thaw(block)

    def thaw(self, block: int) -> None:
        """Make `block` trainable: fp32 masters in place of its frozen layers."""
        frozen = self.blocks[block]
        with self.mode:
            for name, part in list(frozen.named_modules()):
                if isinstance(part, PackedLinear):
                    frozen.set_submodule(name, part.unpacked())
            for part in frozen.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    # Module.float() cannot replace parameters without data.
                    setattr(part, name, nn.Parameter(parameter.detach().float()))
        self._frozen[block] = frozen

    def tail(self, first: int, *, checkpointing: bool = False) -> nn.Module:
        """As a policy's, but that large masks have no data either; it is then not seen that they mask nothing."""

        def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["attention_mask"]
            if mask.numel() * mask.size(1) > LARGE_MASK:
                kwargs["attention_mask"] = self.mode.from_tensor(mask)
            return args, kwargs

        found = super().tail(first, checkpointing=checkpointing)
        found.register_forward_pre_hook(enter, with_kwargs=True)
        return found

    def empty(self, *shape: int) -> torch.Tensor:
        """Activations without data."""
        with self.mode:
            return torch.empty(*shape, dtype=self.compute_dtype)


class PackedLinear(nn.Linear):
    """The footprint of bitsandbytes' `Linear4bit`, whose parameters are a kind of tensor that needs data.

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

    def unpacked(self) -> nn.Linear:
        """The layer that it was made from."""
        return nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, dtype=self.compute_dtype
        )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return inputs @ inputs.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


def blocks_of(config: PretrainedConfig) -> int:
    """How many decoder blocks a model has."""
    return int(config.get_text_config().num_hidden_layers)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """How many parameters a model has, and where."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_from(config, 0, 1))
    block = find_blocks(model)[1][0]
    linear = [part for part in block.modules() if isinstance(part, nn.Linear)]
    weights = sum(part.weight.numel() for part in linear)
    own = sum(p.numel() for p in block.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head_size = 0 if head is embedding else head.numel()
    whole = sum(p.numel() for p in model.parameters())
    return Sizes(
        blocks=blocks_of(config),
        linear=weights,
        rest=own - weights,
        widths=sum(part.in_features + part.out_features for part in linear),
        embedding=embedding.numel(),
        head=head_size,
        outside=whole - own - embedding.numel() - head_size,
        hidden=int(config.get_text_config().hidden_size),
    )
