"""What a training run holds in memory, part by part and phase by phase: pure arithmetic over a model's sizes.

Activations and workspace cannot be worked out from sizes; `planning.trace` measures them on tensors without data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from midtune.model.sizes import Sizes

# Weights in a group that bitsandbytes scales together, and groups whose scales share one in turn.
GROUP, NESTED_GROUP = 64, 256
# CUDA's context, kernels and cuBLAS workspace: what nvidia-smi shows before there is a tensor. Assumed.
CONTEXT_BYTES = 600 * 2**20

# What glibc's heap holds beyond the tensors in it, as a share of them: between 0.49 and 0.54 in the six
# settings of SmolLM2-135M, five of midtune's and one of TRL's, that it was read from; recipes/results/memory.md.
HEAP_SHARE = 0.5

Phases = dict[str, dict[str, int]]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model as a trainer loads it.

    Attributes:
        dtype: of activations, and of unquantized frozen weights.
        quantized: linear layers of frozen blocks are in 4-bit.
        on_card: it works on a GPU, where TRL's head has kernels of its own.
        full: every parameter is trained, so weights are in fp32.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    quantized: bool
    on_card: bool
    full: bool = False

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.full else self.dtype


@dataclass(frozen=True)
class Held:
    """Bytes above what is held throughout.

    Attributes:
        kept: after the phase's forward pass, for the backward pass or the next token.
        peak: the most at once.
        small: the most at once in tensors that a CPU's heap holds; larger ones are mapped one by one.
    """

    kept: int
    peak: int
    small: int = 0


@dataclass(frozen=True)
class Standing:
    """What a trainer holds throughout a step, in bytes.

    Attributes:
        parts: bytes by name.
        accumulated: gradients from the first backward pass to the last.
        gradients: what the optimizer's step gets of them.
        step: what the optimizer's step works with, on top of both.
    """

    parts: dict[str, int]
    accumulated: int
    gradients: int
    step: int


def packed_bytes(weights: int) -> int:
    """Bytes of weights in NF4 with double quantization: 4 bits each, 8 a group, 32 a group of groups."""
    return weights // 2 + weights // GROUP + 4 * (weights // GROUP // NESTED_GROUP)


def unpacked_bytes(model: Loaded, sizes: Sizes) -> int:
    """What midtune's sampler takes for weights as a decoding step reads them fastest."""
    linear = sizes.blocks * sizes.linear
    if model.on_card:
        return linear * model.dtype.itemsize if model.quantized else 0
    # A CPU also gets a copy of what is not packed, the head among it.
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
    """Parts of each phase of a step, in bytes.

    Args:
        process: what the process holds besides tensors.
        on_card: there is no heap that keeps what was freed.
        states: midtune's boundary states of all rows; TRL has none.
        unpacked: weights that midtune unpacks while sampling.
    """
    parts = {"process": process, **held.parts}
    boundary = {} if states is None else {"boundary states": states}

    def heap(phase: Held) -> int:
        return 0 if on_card else round(HEAP_SHARE * phase.small)

    return {
        "sampling": {
            **parts,
            **({} if unpacked is None else {"unpacked weights": unpacked}),
            "keys and values": sampling.kept,
            **boundary,
            # States are put in place from a list of every step's, beside the keys and values.
            "workspace": max(sampling.peak - sampling.kept, states or 0),
            "heap": heap(sampling),
        },
        "update": {
            **parts,
            "gradients": held.accumulated,
            **boundary,
            "activations": update.kept,
            "workspace": update.peak - update.kept,
            "heap": heap(update),
        },
        "optimizer": {**parts, "gradients": held.gradients, **boundary, "workspace": held.step},
    }


def totals(phases: Phases) -> dict[str, int]:
    """Bytes of each phase."""
    return {name: sum(parts.values()) for name, parts in phases.items()}


def peak(phases: Phases) -> tuple[str, int]:
    """The phase that holds most, and its bytes."""
    return max(totals(phases).items(), key=lambda item: item[1])
