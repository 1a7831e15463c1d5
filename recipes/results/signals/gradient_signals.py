"""Cheap signals of every block from one set of rollouts, over frozen 4-bit weights.

The first is an estimate of ‖E g‖², the squared norm of a block's true reward gradient g: the mean of
⟨g_i, g_j⟩ over pairs of different prompts of a backward pass. Two prompts are independent, so their noise
averages to zero, where the plain norm of a gradient is mostly noise. That mean over all pairs is the mean,
over all ways of halving the pass, of the product of the two halves. Passes are independent of each other, and
the interval is over passes. Per parameter it ranks alike, since blocks are of one size.

The others weigh each weight by its noise (`fisher`), by what a first Adam step makes of it (`adam`), or look
at the states between blocks in place of gradients (`change`, `separation`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from midtune.errors import RunStopped
from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.rl.tail import completion_log_probs
from midtune.rollout.boundary import positions
from midtune.rollout.sampler import Rollout, Sampling, sample

# Of the mean square of a layer's gradients, added to each weight's.
SMALLEST_SHARE = 1e-3
# TRL's, so that the gradient is the one that training would follow.
STD_FLOOR = 1e-4


@dataclass(frozen=True)
class BlockSignal:
    """The reward gradient g of the weights of one block's linear layers, and other signals of the block.

    Attributes:
        score: unbiased estimate of ‖E g‖²; below zero when it is lost in noise.
        low, high: 95% interval of `score` over passes (Student's t).
        signals: `product`, which is `score`; `share`, that as a share of the mean squared norm of a pass's
            gradient, noise included; `norm`, the root mean square norm of a pass's gradient, noise included;
            `fisher`, ‖E g‖² with each weight's part divided by its mean square over prompts; `adam`, what a
            step by the sign of one half's gradient gains to first order on the other half; `change`, 1 − the
            mean cosine of the states that enter and leave the block; `separation`, as `product` for the
            advantage-weighted mean of the states that leave the block, over their mean square.
    """

    block: int
    score: float
    low: float
    high: float
    signals: dict[str, float]


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
    passes: list[dict[int, Sums]] = []
    states: list[dict[int, tuple[float, float]]] = []
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
            groups = rollout.groups(part.start, part.stop)
            passes.append(pair_products(policy, groups, advantages[part], blocks, sampling.temperature))
            states.append(state_signals(policy, groups, advantages[part], blocks))
            if on_progress is not None:
                on_progress(micro_prompts)
    rewards = np.concatenate(seen)
    if not group_advantages(rewards).any():
        raise RunStopped(_nothing_to_compare(rewards))
    return [
        _signal(
            block, np.array([sums[block] for sums in passes]), np.array([found[block] for found in states])
        )
        for block in blocks
    ]


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
) -> dict[int, Sums]:
    """One pass: per block, what `Sums` says.

    A prompt's gradient is that of −mean over its completions of advantage × mean log-prob per token.

    Args:
        rollout: N ≥ 2 groups with the states that enter the lowest of `blocks`.
        advantages: [N, G].
    """
    count = len(advantages)
    unequal = np.flatnonzero(advantages.any(1))
    if unequal.size == 0:
        return dict.fromkeys(blocks, Sums(0.0, 0.0, 0.0, 0.0))
    # A group without advantages has a gradient of exactly zero: it counts, but need not be computed.
    kept = rollout.groups_at(torch.as_tensor(unequal, device=policy.device))
    assert kept.boundary is not None
    with torch.enable_grad(), _watched(policy, blocks, len(unequal), count) as gradients:
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
    return {block: Sums(*gradients.sums[block].tolist()) for block in blocks}


@torch.no_grad()
def state_signals(
    policy: Policy, rollout: Rollout, advantages: NDArray[np.float64], blocks: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """One pass: per block, `change` and `separation` of its states; see `BlockSignal`.

    Args:
        rollout: N ≥ 2 groups.
        advantages: [N, G].
    """
    mask = torch.cat(
        [rollout.prompt_mask.repeat_interleave(rollout.group_size, 0), rollout.completion_mask], 1
    )
    ids = torch.cat([rollout.prompt_ids.repeat_interleave(rollout.group_size, 0), rollout.completion_ids], 1)
    width = rollout.completion_ids.size(1)
    written = rollout.completion_mask.bool()
    weights = torch.as_tensor(advantages.reshape(-1), dtype=torch.float32, device=ids.device)
    found: dict[int, tuple[float, float]] = {}

    def look(block: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered = (args[0] if args else kwargs["hidden_states"])[:, -width:].float()
        left = (output[0] if isinstance(output, tuple) else output)[:, -width:].float()
        change = 1 - torch.cosine_similarity(entered, left, dim=-1)[written].mean()
        # [N·G, H], the mean state of a completion; [N, H], how the better ones of a group differ.
        means = (left * written[..., None]).sum(1) / written.sum(1, keepdim=True)
        of_prompts = (means * weights[:, None]).view(*advantages.shape, -1).mean(1)
        pairs = of_prompts.sum(0).square().sum() - of_prompts.square().sum()
        count = len(of_prompts)
        separation = pairs / (count * (count - 1)) / means.square().sum(1).mean()
        found[block] = float(change), float(separation)

    hooks = [
        policy.blocks[block].register_forward_hook(partial(look, block), with_kwargs=True)
        for block in set(blocks)
    ]
    try:
        with policy.autocast():
            policy.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=False,
                logits_to_keep=1,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Sums(NamedTuple):
    """Sums over the weights of a block, of the gradients of the prompts of a pass.

    Attributes:
        product: mean product of the gradients of two prompts.
        square: squared norm of the mean gradient.
        fisher: `product` with each weight's part divided by its mean square over prompts.
        adam: mean gradient of one half times the sign of the other's.
    """

    product: float
    square: float
    fisher: float
    adam: float


@dataclass
class _Call:
    """One use of a linear layer: what went in, and the gradient of what came out."""

    inputs: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass
class _WeightGradients:
    """Weight gradients of linear layers, reduced layer by layer to the `Sums` of each block.

    The frozen weights get no gradient from autograd. A layer's is aᵀx over its tokens, with x its input and a
    the gradient of its output, so the part of any prompt can be had, and dropped once it has been squared.
    """

    prompts: int  # whose gradient is not zero
    count: int  # of all prompts
    sums: dict[int, torch.Tensor]
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
        halves: list[torch.Tensor] = []
        squares: torch.Tensor | None = None
        for prompt in range(self.prompts):
            own = sum(self.weight_gradient(call, prompt) for call in calls)
            assert isinstance(own, torch.Tensor)
            squares = own.square() if squares is None else squares.addcmul_(own, own)
            if prompt < 2:
                halves.append(own)
            else:
                halves[prompt % 2].add_(own)
        assert squares is not None
        total = sum(halves)
        assert isinstance(total, torch.Tensor)
        products = (total.square() - squares).div_(self.count * (self.count - 1))
        mean_square = squares.div_(self.count)
        # A weight that has hardly any gradient is not worth much more than the others.
        fisher = products / (mean_square + SMALLEST_SHARE * mean_square.mean())
        first, second = halves if len(halves) == 2 else (total, torch.zeros_like(total))
        adam = first.sign() * second + second.sign() * first
        found = (products, (total / self.count).square_(), fisher, adam / self.count)
        self.sums[block] += torch.stack([part.sum(dtype=torch.float64) for part in found])

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
def _watched(policy: Policy, blocks: Sequence[int], prompts: int, count: int) -> Iterator[_WeightGradients]:
    """Follows the linear layers of `blocks`, 4-bit ones included, through one forward and backward pass."""
    zeros = partial(torch.zeros, len(Sums._fields), dtype=torch.float64, device=policy.device)
    gradients = _WeightGradients(prompts, count, {k: zeros() for k in blocks})
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


def _signal(block: int, sums: NDArray[np.float64], states: NDArray[np.float64]) -> BlockSignal:
    """Args: sums: [passes, 4], as `Sums`; states: [passes, 2], as `state_signals`."""
    from scipy.stats import t

    products = sums[:, 0]
    score, square, fisher, adam = (float(mean) for mean in sums.mean(0))
    margin = float(t.ppf(0.975, len(products) - 1) * products.std(ddof=1) / math.sqrt(len(products)))
    change, separation = (float(mean) for mean in states.mean(0))
    signals = {
        "product": score,
        "share": score / square if square > 0 else 0.0,
        "norm": math.sqrt(square),
        "fisher": fisher,
        "adam": adam,
        "change": change,
        "separation": separation,
    }
    return BlockSignal(block, score, score - margin, score + margin, signals)


def _nothing_to_compare(rewards: NDArray[np.float64]) -> str:
    if np.ptp(rewards) == 0:
        found = f"all {rewards.size} completions got the reward {rewards.flat[0]:g}"
    else:
        found = f"all completions of each prompt got equal rewards (mean {rewards.mean():.3g})"
    return (
        f"the blocks cannot be ranked by gradient because {found}; try easier or harder problems, a larger "
        "--group-size, more --max-new-tokens or another --reward, or name the blocks with --layers."
    )
