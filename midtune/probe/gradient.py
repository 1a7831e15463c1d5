"""Reward gradient of every block from one set of rollouts, over frozen 4-bit weights.

The score of a block is an estimate of ‖E g‖², the squared norm of its true reward gradient: the mean of
⟨g_i, g_j⟩ over pairs of different prompts of a backward pass. Two prompts are independent, so their noise
averages to zero, where the plain norm of a gradient is mostly noise. That mean over all pairs is the mean,
over all ways of halving the pass, of the product of the two halves. Passes are independent of each other, and
the interval is over passes.

What is known: before training, on one small model and task, this stands out in the middle blocks while
the plain norm does not. What is not known: whether it predicts what training a block gains. It is a lead, and
it has to beat the geometric middle of the stack, which costs nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from midtune.errors import RunStopped
from midtune.model.policy import Policy
from midtune.rl.tail import completion_log_probs
from midtune.rollout.sampler import Rollout, Sampling, sample
from midtune.savings.meter import Meter

# TRL's, so that the gradient is the one that training would follow.
STD_FLOOR = 1e-4


@dataclass(frozen=True)
class BlockSignal:
    """The reward gradient of the weights of one block's linear layers.

    Attributes:
        score: unbiased estimate of its squared norm; below zero when it is lost in noise.
        low, high: 95% interval of `score` over passes (Student's t).
        signal_share: `score` as a share of the mean squared norm of a pass's gradient, noise included.
        norm: root mean square norm of a pass's gradient, noise included.
    """

    block: int
    score: float
    low: float
    high: float
    signal_share: float
    norm: float


def gradient_probe(
    policy: Policy,
    prompts: list[list[int]],
    reward_of: Callable[[Rollout, int], Any],
    *,
    blocks: Sequence[int],
    sampling: Sampling,
    group_size: int,
    micro_prompts: int,
    sample_prompts: int | None = None,
    meter: Meter | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[BlockSignal]:
    """Measure the reward gradient of every block in `blocks`; nothing in the policy changes.

    Args:
        policy: sampled from with torch's global random state.
        prompts: token ids; their number is a multiple of `micro_prompts`, and at least twice that.
        reward_of: (rollout, number of its first prompt) → rewards, N·G values, a prompt's adjacent.
        micro_prompts: prompts of one backward pass, at least 2; more of them give more pairs and less noise,
            and hold more: inputs and output gradients of every linear layer from the lowest block on.
        sample_prompts: prompts sampled together, a multiple of `micro_prompts` (default: as many).
        meter: receives the phases `rollout` and `reward`.
        on_progress: called with the number of prompts finished since the last call.

    Returns:
        One signal per block, in the order of `blocks`.

    Raises:
        RunStopped: all completions of every prompt got equal rewards, or a reward is not finite.
    """
    together = sample_prompts or micro_prompts
    if (
        micro_prompts < 2
        or len(prompts) < 2 * micro_prompts
        or len(prompts) % micro_prompts
        or together % micro_prompts
    ):
        raise ValueError(
            f"{len(prompts)} prompts cannot go in passes of {micro_prompts}, sampled {together} at a time"
        )
    meter = meter or Meter(policy.device)
    passes: list[dict[int, tuple[float, float]]] = []
    seen: list[NDArray[np.float64]] = []
    for start in range(0, len(prompts), together):
        with meter.phase("rollout"):
            rollout = sample(
                policy,
                prompts[start : start + together],
                sampling,
                group_size=group_size,
                boundary_block=min(blocks),
            )
        with meter.phase("reward"):
            rewards = np.asarray(reward_of(rollout, start), dtype=np.float64).reshape(-1, group_size)
        if not np.isfinite(rewards).all():
            raise RunStopped(
                "a reward was not a finite number, so no advantage can be computed; mend the reward."
            )
        advantages = group_advantages(rewards)
        seen.append(rewards)
        for first in range(0, len(rewards), micro_prompts):
            part = slice(first, first + micro_prompts)
            passes.append(
                pair_products(
                    policy,
                    rollout.groups(part.start, part.stop),
                    advantages[part],
                    blocks,
                    sampling.temperature,
                )
            )
            if on_progress is not None:
                on_progress(micro_prompts)
    rewards = np.concatenate(seen)
    if not group_advantages(rewards).any():
        raise RunStopped(_nothing_to_compare(rewards))
    return [_signal(block, np.array([estimates[block] for estimates in passes])) for block in blocks]


def group_advantages(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """(reward − mean) / standard deviation of each group, as in GRPO (arXiv 2402.03300); [N, G] → [N, G].

    A group of equal rewards gets exactly zero.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    return np.asarray(centred / (rewards.std(1, ddof=1, keepdims=True) + STD_FLOOR))


def pair_products(
    policy: Policy,
    rollout: Rollout,
    advantages: NDArray[np.float64],
    blocks: Sequence[int],
    temperature: float,
) -> dict[int, tuple[float, float]]:
    """One pass: per block, the mean product of two prompts' gradients and the mean gradient's square.

    A prompt's gradient is that of −mean over its completions of advantage × mean log-prob per token.

    Args:
        rollout: N ≥ 2 groups with the states that enter the lowest of `blocks`.
        advantages: [N, G].
    """
    count = len(advantages)
    unequal = np.flatnonzero(advantages.any(1))
    if unequal.size == 0:
        return dict.fromkeys(blocks, (0.0, 0.0))
    # A group without advantages has a gradient of exactly zero: it counts, but need not be computed.
    kept = rollout.groups_at(torch.as_tensor(unequal, device=policy.device))
    assert kept.boundary is not None
    with torch.enable_grad(), _watched(policy, blocks, len(unequal)) as gradients:
        # Autograd starts at these states, so the blocks below the lowest one are left alone.
        inputs = [kept.boundary.prompt.requires_grad_(), kept.boundary.completion.requires_grad_()]
        # One pack: the rows of a prompt stay adjacent.
        log_probs, _ = completion_log_probs(policy, kept, temperature=temperature, most_padding=1)
        weights = torch.as_tensor(
            advantages[unequal].reshape(-1), dtype=torch.float32, device=log_probs.device
        )
        means = log_probs.sum(1) / kept.completion_mask.sum(1)
        loss = -(weights * means).sum() / kept.group_size
        torch.autograd.grad(loss, inputs, allow_unused=True)
        gradients.finish()
    result = {}
    for block in blocks:
        of_sum, sum_of = float(gradients.square_of_sum[block]), float(gradients.sum_of_squares[block])
        result[block] = ((of_sum - sum_of) / (count * (count - 1)), of_sum / count**2)
    return result


@dataclass
class _Call:
    """One use of a linear layer: what went in, and the gradient of what came out."""

    inputs: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass
class _WeightGradients:
    """Weight gradients of linear layers, reduced layer by layer to two numbers per block.

    The frozen weights get no gradient from autograd. A layer's is aᵀx over its tokens, with x its input and a
    the gradient of its output, so the part of any prompt can be had, and dropped once it has been squared.
    """

    prompts: int
    square_of_sum: dict[int, torch.Tensor]
    sum_of_squares: dict[int, torch.Tensor]
    calls: dict[nn.Module, tuple[int, list[_Call]]] = field(default_factory=dict)

    def on_forward(
        self, block: int, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if not output.requires_grad:
            return
        call = _Call(args[0].detach())
        self.calls.setdefault(layer, (block, []))[1].append(call)
        output.register_hook(partial(self.on_backward, layer, call))

    def on_backward(self, layer: nn.Module, call: _Call, gradient: torch.Tensor) -> None:
        call.gradient = gradient.detach()
        block, calls = self.calls[layer]
        # Prompts and completions pass one after the other, and a prompt's gradient comes from both.
        if all(other.gradient is not None for other in calls):
            del self.calls[layer]
            self.reduce(block, calls)

    def reduce(self, block: int, calls: list[_Call]) -> None:
        total: torch.Tensor | None = None
        for prompt in range(self.prompts):
            own = sum(self.weight_gradient(call, prompt) for call in calls)
            assert isinstance(own, torch.Tensor)
            self.sum_of_squares[block] += _square(own)
            total = own if total is None else total.add_(own)
        assert total is not None
        self.square_of_sum[block] += _square(total)

    def weight_gradient(self, call: _Call, prompt: int) -> torch.Tensor:
        assert call.gradient is not None
        # The rows of a prompt are adjacent, whether a layer sees [B, T, F] or [B·T, F].
        x = call.inputs.reshape(self.prompts, -1, call.inputs.size(-1))[prompt]
        a = call.gradient.reshape(self.prompts, -1, call.gradient.size(-1))[prompt]
        gradient: torch.Tensor = a.float().T @ x.float()
        return gradient

    def finish(self) -> None:
        """Reduce layers of which some output was not used: what autograd does not reach adds nothing."""
        for block, calls in self.calls.values():
            reached = [call for call in calls if call.gradient is not None]
            if reached:
                self.reduce(block, reached)
        self.calls.clear()


@contextlib.contextmanager
def _watched(policy: Policy, blocks: Sequence[int], prompts: int) -> Iterator[_WeightGradients]:
    """Follows the linear layers of `blocks`, 4-bit ones included, through one forward and backward pass."""
    zeros = partial(torch.zeros, (), dtype=torch.float64, device=policy.device)
    gradients = _WeightGradients(prompts, {k: zeros() for k in blocks}, {k: zeros() for k in blocks})
    hooks = [
        layer.register_forward_hook(partial(gradients.on_forward, block))
        for block in set(blocks)
        for layer in policy.blocks[block].modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield gradients
    finally:
        for hook in hooks:
            hook.remove()


def _square(gradient: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return norm.square()


def _signal(block: int, estimates: NDArray[np.float64]) -> BlockSignal:
    """Args: estimates: [passes, 2], pair product and squared norm."""
    from scipy.stats import t

    products, squares = estimates.T
    score, square = float(products.mean()), float(squares.mean())
    margin = float(t.ppf(0.975, len(products) - 1) * products.std(ddof=1) / math.sqrt(len(products)))
    share = score / square if square > 0 else 0.0
    return BlockSignal(block, score, score - margin, score + margin, share, math.sqrt(square))


def _nothing_to_compare(rewards: NDArray[np.float64]) -> str:
    if np.ptp(rewards) == 0:
        found = f"all {rewards.size} completions got the reward {rewards.flat[0]:g}"
    else:
        found = f"all completions of each prompt got equal rewards (mean {rewards.mean():.3g})"
    return (
        f"the blocks cannot be ranked by gradient because {found}; try easier or harder problems, a larger "
        "--group-size, more --max-new-tokens or another --reward, or name the blocks with --layers."
    )
