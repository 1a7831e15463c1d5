"""Check during training what midtune promises: only the chosen blocks change, in fp32."""

from __future__ import annotations

import math

import torch

from midtune.errors import MidtuneError, RunStopped
from midtune.model.policy import Policy
from midtune.rollout.sampling import Rollout

# Largest mean |Δ log-prob| between sampling and update that rounding can explain.
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def check_trainable(policy: Policy) -> None:
    """Raise MidtuneError unless trained parameters are fp32 and, if not all are trained, in the chosen blocks.

    It means that an underlying library has changed its behaviour.
    """
    prefixes = tuple(f"{policy.stack_name}.{k}." for k in policy.trained)
    for name, parameter in policy.trained_parameters().items():
        if parameter.dtype != torch.float32:
            raise MidtuneError(f"{name} is trained in {parameter.dtype}, not in fp32.")
        if not (policy.whole or name.startswith(prefixes)):
            raise MidtuneError(f"{name} requires a gradient outside blocks {policy.trained}.")


def compare_log_probs(policy: Policy, rollout: Rollout, log_probs: torch.Tensor) -> None:
    """Check that the update computes the sampler's log-probs with the same weights.

    Raises RunStopped if they are not numbers, since values overflow fp16, and MidtuneError if they differ: the
    architecture changes something between blocks and logits, such as their scale, that the tail leaves out.
    """
    mask = rollout.scored.bool()
    difference = (log_probs.detach() - rollout.log_probs)[mask].abs().mean().item()
    if not math.isfinite(difference) and policy.compute_dtype == torch.float16:
        raise RunStopped(
            f"activations of {policy.source.name} overflow in fp16; add --set model.dtype=fp32, or bf16 where the "
            "device has it."
        )
    if not difference < MOST_DIFFERENCE[policy.compute_dtype]:
        raise MidtuneError(
            f"log-probs of {type(policy.model).__name__} in the update differ from those of sampling by "
            f"{difference:.2g} on average, so midtune cannot train this architecture; please report it."
        )


def frozen_checksums(policy: Policy) -> dict[str, int]:
    """Name → byte checksum of every tensor that is not trained."""
    tensors = [*policy.model.named_parameters(), *policy.model.named_buffers()]
    return {
        name: _checksum(tensor.detach().contiguous().flatten().view(torch.uint8))
        for name, tensor in tensors
        if not tensor.requires_grad and tensor.numel() > 0 and tensor.dim() > 0
    }


def _checksum(octets: torch.Tensor) -> int:
    """The sum of bytes [N] taken eight at a time as integers, modulo 2⁶⁴; single bytes would each grow to eight."""
    whole = len(octets) // 8 * 8
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())
