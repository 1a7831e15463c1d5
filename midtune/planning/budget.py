"""Memory of a training run, by part and phase: pure arithmetic over a model's sizes.

Activations and workspace do not follow from sizes; `planning.trace` measures them on tensors without data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from midtune.model.architectures import stored_method
from midtune.model.quantize import MXFP4_BYTES
from midtune.model.sizes import Sizes

# bitsandbytes: weights that share a scale, and scales that share a second-level scale.
GROUP, NESTED_GROUP = 64, 256
# CUDA's context, kernels and cuBLAS workspace: what nvidia-smi shows before there is a tensor. Assumed.
CONTEXT_BYTES = 600 * 2**20

# glibc heap overhead as a share of the tensors in it: 0.49 to 0.54 in the six settings of SmolLM2-135M, five of
# midtune's and one of TRL's, in recipes/results/memory.md.
HEAP_SHARE = 0.5

Phases = dict[str, dict[str, int]]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model as a trainer loads it."""

    config: PretrainedConfig
    dtype: torch.dtype  # of activations, and of unquantized frozen weights
    quantized: bool  # linear layers of frozen blocks are in 4-bit
    on_card: bool  # on a GPU, where TRL's head has its own kernels
    full: bool = False  # every parameter is trained, in fp32
    with_experts: bool = True  # the experts of a trained block are trained

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.full else self.dtype


@dataclass(frozen=True)
class Held:
    """Bytes above those held all the time."""

    kept: int  # after the phase's forward pass, for the backward pass or the next token
    peak: int
    small: int = 0  # the most at once in tensors on a CPU's heap; larger ones are mapped one by one


@dataclass(frozen=True)
class Standing:
    """Bytes that a trainer holds throughout a step.

    `accumulated` gradients last from the first backward pass to the last; the optimizer's step receives `gradients`
    of them, and needs `step` of temporary memory on top.
    """

    parts: dict[str, int]
    accumulated: int
    gradients: int
    step: int


def packed_bytes(weights: int) -> int:
    """Bytes of weights in NF4 with double quantization: 4 bits each, 8 a group, 32 a group of groups."""
    return weights // 2 + weights // GROUP + 4 * (weights // GROUP // NESTED_GROUP)


def frozen_bytes(model: Loaded, sizes: Sizes) -> int:
    """Bytes of a frozen block's linear layers and experts."""

    def held(weights: int) -> int:
        return packed_bytes(weights) if model.quantized else weights * model.weight_dtype.itemsize

    if stored_method(model.config) == "mxfp4" and not model.full:
        return held(sizes.linear - sizes.experts) + sizes.experts * MXFP4_BYTES // 32
    return held(sizes.linear)


def unpacked_bytes(model: Loaded, sizes: Sizes) -> int:
    """Bytes that midtune's sampler needs to hold weights unpacked, as decoding reads them fastest."""
    linear = sizes.blocks * sizes.linear
    if model.on_card:
        return linear * model.dtype.itemsize if model.quantized else 0
    # A CPU also copies the head, and layers that are not quantized.
    return (linear + sizes.projection) * model.dtype.itemsize


def step_phases(
    held: Standing,
    process: int,
    *,
    sampling: Held,
    update: Held,
    on_card: bool,
    states: int | None = None,
    unpacked: int | None = None,
) -> Phases:
    """Parts of each phase of a step, in bytes; `process` is process memory other than tensors.

    midtune also holds boundary `states` of all rows and, while sampling, `unpacked` weights; both are None for TRL.
    """
    parts = {"process": process, **held.parts}
    boundary = {} if states is None else {"boundary states": states}
    heap_share = 0 if on_card else HEAP_SHARE
    return {
        "sampling": {
            **parts,
            **({} if unpacked is None else {"unpacked weights": unpacked}),
            "keys and values": sampling.kept,
            **boundary,
            # Concatenating the states of all steps holds them twice, beside the keys and values.
            "workspace": max(sampling.peak - sampling.kept, states or 0),
            "heap": round(heap_share * sampling.small),
        },
        "update": {
            **parts,
            "gradients": held.accumulated,
            **boundary,
            "activations": update.kept,
            "workspace": update.peak - update.kept,
            "heap": round(heap_share * update.small),
        },
        "optimizer": {**parts, "gradients": held.gradients, **boundary, "workspace": held.step},
    }


def totals(phases: Phases) -> dict[str, int]:
    """Bytes of each phase."""
    return {name: sum(parts.values()) for name, parts in phases.items()}


def peak(phases: Phases) -> tuple[str, int]:
    """The phase that holds most, and its bytes."""
    return max(totals(phases).items(), key=lambda item: item[1])
