"""A model without data: the architecture's own code over tensors that have a shape and nothing in them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from midtune.model.blocks import config_from, find_blocks
from midtune.model.policy import Policy

# What bitsandbytes keeps beside packed NF4 weights with double quantization.
GROUP, NESTED_GROUP = 64, 256


class SkeletonPolicy(Policy):
    """A policy without data: what it computes has the shapes, dtypes and lifetimes of the real one.

    Args:
        config: of the model.
        depth: blocks to build; the first ones of the model.
        quantized: linear layers of frozen blocks are packed in 4-bit.
        compute_dtype: of activations and of unquantized frozen weights.

    Attributes:
        mode: makes tensors without data.
    """

    def __init__(
        self, config: PretrainedConfig, *, depth: int, quantized: bool, compute_dtype: torch.dtype
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        cut = config_from(config, len_of(config) - depth, len_of(config))
        with self.mode:
            model = AutoModelForCausalLM.from_config(cut, dtype=compute_dtype)
            super().__init__(model, cast(Any, None), cast(Any, None), compute_dtype=compute_dtype)
            self._whole = [dict(block.named_modules()) for block in self.blocks]
            if quantized:
                for block in self.blocks:
                    _pack(block, compute_dtype)

    def thaw(self, block: int) -> None:
        """Make `block` trainable: fp32 masters in place of its frozen layers."""
        for name, part in self._whole[block].items():
            if isinstance(part, nn.Linear):
                self.blocks[block].set_submodule(name, part)
        for part in self.blocks[block].modules():
            for name, parameter in part.named_parameters(recurse=False):
                # Module.float() cannot replace parameters without data.
                setattr(part, name, nn.Parameter(parameter.detach().float()))
        self._frozen[block] = self.blocks[block]

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


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return inputs @ inputs.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient @ gradient.new_empty(ctx.shape), None, None


def packed_bytes(weights: int) -> int:
    """Bytes of so many weights in NF4 with double quantization: 4 bits each, 8 a group, 32 a group of groups."""
    return weights // 2 + weights // GROUP + 4 * (weights // GROUP // NESTED_GROUP)


def len_of(config: PretrainedConfig) -> int:
    """Blocks of a model."""
    return int(config.get_text_config().num_hidden_layers)


def _pack(block: nn.Module, compute_dtype: torch.dtype) -> None:
    for name, part in list(block.named_modules()):
        if isinstance(part, nn.Linear):
            block.set_submodule(name, PackedLinear(part, compute_dtype))
