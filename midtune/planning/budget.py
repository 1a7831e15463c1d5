"""What a training run holds in memory, part by part and phase by phase: pure arithmetic over a model's sizes.

What cannot be worked out from sizes alone, activations and workspace, comes in as traced; see `rl.trace`.
"""

from __future__ import annotations

from dataclasses import dataclass

from midtune.model.sizes import Sizes

# Weights in a group that bitsandbytes scales together, and groups whose scales share one in turn.
GROUP, NESTED_GROUP = 64, 256
# CUDA's context, kernels and cuBLAS workspace: what nvidia-smi shows before there is a tensor. Assumed.
CONTEXT_BYTES = 600 * 2**20
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}

# What glibc's heap holds beyond the tensors in it, as a share of them: between 0.49 and 0.54 in the six
# settings of SmolLM2-135M, five of midtune's and one of TRL's, that it was read from; recipes/results/memory.md.
HEAP_SHARE = 0.5

Phases = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Held:
    """Bytes above what is held throughout.

    Attributes:
        kept: what is left when the phase's forward pass is done, for the backward pass or the next token.
        peak: the most at once.
        small: the most at once in tensors that a CPU's heap holds, which larger ones have no part in.
    """

    kept: int
    peak: int
    small: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.kept + other.kept, self.peak + other.peak, self.small + other.small)

    def __sub__(self, other: Held) -> Held:
        return self + other * -1

    def __mul__(self, times: int) -> Held:
        return Held(self.kept * times, self.peak * times, self.small * times)


@dataclass(frozen=True)
class Standing:
    """What a trainer holds throughout a step, in bytes.

    Attributes:
        parts: what it is, by name.
        accumulated: gradients from the first backward pass to the last.
        gradients: what the optimizer's step gets of them.
        step: what the optimizer's step works with, on top of both.
    """

    parts: dict[str, int]
    accumulated: int
    gradients: int
    step: int


def packed_bytes(weights: int) -> int:
    """Bytes of so many weights in NF4 with double quantization: 4 bits each, 8 a group, 32 a group of groups."""
    return weights // 2 + weights // GROUP + 4 * (weights // GROUP // NESTED_GROUP)


def standing(
    sizes: Sizes,
    arm: str,
    *,
    trained: int,
    quantized: bool,
    dtype_bytes: int,
    optimizer: str,
    reference: bool,
    on_card: bool,
    lora_rank: int = 0,
    host_embedding: bool = False,
    bf16_gradients: bool = False,
) -> Standing:
    """What an arm holds throughout.

    Args:
        arm: `midtune`, or one of TRL's: `trl-full`, `trl-block`, `trl-qlora`.
        trained: blocks that midtune or `trl-block` trains.
        dtype_bytes: of a frozen unquantized weight.
        reference: there is a KL term; TRL loads a second model for it unless it trains adapters.
        on_card: the optimizer works on all tensors at once, with a temporary copy of what it trains.
        lora_rank: of the adapters of `trl-qlora`; others have none.
        host_embedding: the input embedding is elsewhere, unless it is the head too.
        bf16_gradients: those of fp32 parameters are kept in bf16; only one is in fp32 at a time.
    """
    full = arm == "trl-full"
    weight_bytes = 4 if full else dtype_bytes
    kept = packed_bytes(sizes.linear) if quantized and not full else sizes.linear * weight_bytes
    embedding = 0 if host_embedding and sizes.head else sizes.embedding
    parts = {
        "frozen blocks" if not full else "blocks": sizes.blocks * (kept + sizes.rest * weight_bytes),
        "embeddings and head": (embedding + sizes.head + sizes.outside) * weight_bytes,
    }
    if full:
        parameters, bytes_each, largest = sizes.total, 4, max(sizes.embedding, sizes.linear // 2)
    elif arm == "trl-qlora":
        # TRL casts the adapters of a quantized model to bf16, and Adam's moments are of their kind.
        parameters, bytes_each = sizes.blocks * lora_rank * sizes.widths, 2
        largest = parameters // sizes.blocks
        parts["adapters"] = parameters * bytes_each
    else:
        parameters, bytes_each, largest = trained * sizes.block, 4, sizes.linear // 2
        parts["trained blocks, fp32"] = parameters * 4
    moments = ADAM_BYTES[optimizer] * (bytes_each / 4 if optimizer == "adamw" else 1)
    parts["optimizer"] = round(parameters * moments)
    if reference and arm != "trl-qlora":
        second = sizes.total if arm.startswith("trl") else parameters
        parts["reference"] = second * 4
    temporary = parameters if on_card else 2 * largest
    return Standing(
        {name: size for name, size in parts.items() if size},
        parameters * 2 + largest * 4 if bf16_gradients else parameters * bytes_each,
        parameters * bytes_each,
        temporary * bytes_each if optimizer == "adamw" else 0,
    )


def unpacked_bytes(sizes: Sizes, *, quantized: bool, dtype_bytes: int, laid_out: bool) -> int:
    """What midtune's sampler takes for weights as a decoding step reads them fastest.

    Args:
        laid_out: a CPU also gets a copy of what is not packed, the head among it.
    """
    linear = sizes.blocks * sizes.linear if quantized or laid_out else 0
    head = (sizes.head or sizes.embedding) if laid_out else 0
    return (linear + head) * dtype_bytes


def block_phases(
    held: Standing,
    process: int,
    *,
    sampling: Held,
    update: Held,
    states: int,
    unpacked: int,
    on_card: bool,
) -> Phases:
    """Parts of each phase of a midtune step, in bytes.

    Args:
        process: what the process holds besides tensors.
        states: boundary states of all rows of a step.
        unpacked: weights that are unpacked while sampling.
        on_card: there is no heap that keeps what was freed.
    """
    parts = {"process": process, **held.parts}
    # They are put in place from a list of every step's, beside the keys and values.
    work = max(sampling.peak - sampling.kept, states)
    return {
        "sampling": {
            **parts,
            "unpacked weights": unpacked,
            "keys and values": sampling.kept,
            "boundary states": states,
            "workspace": work,
            "heap": _heap(sampling, on_card),
        },
        "update": {
            **parts,
            "gradients": held.accumulated,
            "boundary states": states,
            "activations": update.kept,
            "workspace": update.peak - update.kept,
            "heap": _heap(update, on_card),
        },
        "optimizer": {
            **parts,
            "gradients": held.gradients,
            "boundary states": states,
            "workspace": held.step,
        },
    }


def whole_phases(held: Standing, process: int, *, sampling: Held, update: Held, on_card: bool) -> Phases:
    """Parts of each phase of a step of TRL, in bytes; see `block_phases`."""
    parts = {"process": process, **held.parts}
    return {
        "sampling": {
            **parts,
            "keys and values": sampling.kept,
            "workspace": sampling.peak - sampling.kept,
            "heap": _heap(sampling, on_card),
        },
        "update": {
            **parts,
            "gradients": held.gradients,
            "activations": update.kept,
            "workspace": update.peak - update.kept,
            "heap": _heap(update, on_card),
        },
        "optimizer": {**parts, "gradients": held.gradients, "workspace": held.step},
    }


def _heap(held: Held, on_card: bool) -> int:
    return 0 if on_card else round(HEAP_SHARE * held.small)


def peak(phases: Phases) -> tuple[str, int]:
    """The phase that holds most, and its bytes."""
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    highest = max(totals, key=lambda name: totals[name])
    return highest, totals[highest]
