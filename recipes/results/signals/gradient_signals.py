"""Cheap signals of every block from one set of rollouts of the untrained model, over frozen weights.

    python recipes/results/signals/gradient_signals.py --recipe recipes/sweep-tiny-chain-sum.yaml --out signals.json
    midtune compare signals.json recipes/results/sweep-tiny-chain-sum.json

The first signal estimates ‖E g‖², the squared norm of a block's true reward gradient g: the mean of ⟨g_i, g_j⟩
over pairs of different prompts of a backward pass. Two prompts are independent, so their noise averages to zero,
where the plain norm of a gradient is mostly noise. Passes are independent too: the 95% interval is over passes.

No signal ranked blocks better than closeness to the middle does, so ranks are by that; see ../README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t
from torch import nn

from midtune.config import RunConfig, load_config, parse_assignment
from midtune.errors import InputError, MidtuneError, RunStopped
from midtune.model.policy import Policy
from midtune.probe.methods import subject
from midtune.probe.selection import best, from_the_middle, middle
from midtune.report.terminal import Terminal
from midtune.rl.tail import completion_log_probs, tail_kind
from midtune.rl.training import sampling_of
from midtune.rollout.boundary import positions
from midtune.rollout.evaluation import score_completions
from midtune.rollout.sampling import Rollout, Sampling
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import sample
from midtune.stages.opening import Opened

# A pass over all blocks keeps the inputs and output gradients of every linear layer: 2.3 times the memory of
# updating the middle block on the same tokens, where it was measured.
MEMORY_FACTOR = 3
# Enough for an interval over passes; fewer, larger passes compare more prompts with each other.
PASSES = 8
# Damping: this share of a layer's mean squared gradient is added to each weight's.
DAMPING = 1e-3
# TRL's, so that the gradient is the one that training would follow.
STD_FLOOR = 1e-4


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


def measure(config: RunConfig, prompts: int, terminal: Terminal) -> dict[str, Any]:
    """The signals of every block, in the shape of a probe.json.

    Args:
        prompts: how many training problems to sample completions for.

    Raises:
        InputError: the task is played in turns, or has too few problems.
        RunStopped: the rewards tell no completions apart, or one is not finite.
    """
    opened = Opened(config, terminal)
    task = opened.task
    task.require_one_turn("the gradient probe")
    training = config.training
    count = min(prompts, len(task.train))
    if count < 4:
        raise InputError(f"the gradient probe compares at least 4 problems, but {count} were to be sampled.")
    policy = opened.policy()
    started = time.perf_counter()
    rows = random.Random(config.seed).sample(task.train, count)
    ids = [prompt_ids(policy.tokenizer, row["prompt"]) for row in rows]
    group_tokens = max(map(len, ids)) + training.group_size * training.max_new_tokens
    fitting = training.micro_batch_tokens // MEMORY_FACTOR // group_tokens
    micro_prompts = max(2, min(fitting, count // PASSES))
    passes = count // micro_prompts

    def reward_of(rollout: Rollout, start: int) -> list[float]:
        completions = rollout.completions()
        texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
        repeated = [rows[start + i // rollout.group_size] for i in range(len(completions))]
        return score_completions(task.reward, repeated, texts, completions)

    torch.manual_seed(config.seed)
    signals = gradient_signals(
        policy,
        ids[: passes * micro_prompts],
        reward_of,
        blocks=range(policy.num_blocks),
        sampling=sampling_of(training),
        micro_prompts=micro_prompts,
        sample_prompts=micro_prompts * max(1, training.prompts_per_step // micro_prompts),
    )
    order = from_the_middle(signals, policy.num_blocks)
    (baseline,) = middle(policy.num_blocks, 1)
    keys = {"group_size", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_strings"}
    return {
        **subject(policy.source, policy.num_blocks, task),
        "method": "gradient",
        "seed": config.seed,
        "seeds": 1,
        "settings": {
            "quantize": config.model.quantize,
            **training.model_dump(include=keys),
            "prompts": passes * micro_prompts,
            "passes": passes,
        },
        "cost_seconds": time.perf_counter() - started,
        "note": "Ranked by closeness to the middle: no signal ranked blocks better than that.",
        "blocks": [
            {"block": block, **found, "contribution": None, "rank": 1 + order.index(block)}
            for block, found in signals.items()
        ],
        "selected": best(order, policy.num_blocks, config.blocks.top_k),
        "depth_baseline": {"block": baseline, "score": signals[baseline]["score"]},
    }


def gradient_signals(
    policy: Policy,
    prompts: list[list[int]],
    reward_of: Callable[[Rollout, int], Any],
    *,
    blocks: Sequence[int],
    sampling: Sampling,
    micro_prompts: int,
    sample_prompts: int,
) -> dict[int, dict[str, Any]]:
    """The reward gradient of every block in `blocks`, and other signals; nothing in the policy changes.

    Args:
        policy: sampled from with torch's global random state.
        prompts: token ids; their number is a multiple of `micro_prompts`, and at least twice that.
        reward_of: (rollout, number of its first prompt) → rewards, N·G values, a prompt's adjacent.
        micro_prompts: prompts of one backward pass, at least 2; more of them give more pairs and less noise,
            and hold more: inputs and output gradients of every linear layer from the lowest block on.
        sample_prompts: prompts sampled together, a multiple of `micro_prompts`.

    Returns:
        Block → `score`, `low`, `high` and `signals`; see `summary`.

    Raises:
        RunStopped: all completions of every prompt got equal rewards, or a reward is not finite.
    """
    passes: list[dict[int, Sums]] = []
    states: list[dict[int, tuple[float, float]]] = []
    for start in range(0, len(prompts), sample_prompts):
        rollout = sample(
            policy,
            prompts[start : start + sample_prompts],
            sampling,
            boundary_block=min(blocks),
        )
        rewards = np.asarray(reward_of(rollout, start), dtype=np.float64).reshape(-1, sampling.group_size)
        if not np.isfinite(rewards).all():
            raise RunStopped("a reward was not a finite number, so there is no advantage; mend the reward.")
        advantages = group_advantages(rewards)
        for first in range(0, len(rewards), micro_prompts):
            part = slice(first, first + micro_prompts)
            groups = rollout.groups(part)
            passes.append(pair_products(policy, groups, advantages[part], blocks, sampling.temperature))
            states.append(state_signals(policy, groups, advantages[part], blocks))
    if not any(sums.square for found in passes for sums in found.values()):
        raise RunStopped("all completions of each prompt got equal rewards; try easier or harder problems.")
    return {
        block: summary(
            np.array([found[block] for found in passes]), np.array([found[block] for found in states])
        )
        for block in blocks
    }


def group_advantages(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """(reward − mean) / standard deviation of each group, as in GRPO (arXiv 2402.03300); [N, G] → [N, G].

    A group of equal rewards gets exactly zero.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    return np.asarray(centred / (rewards.std(1, ddof=1, keepdims=True) + STD_FLOOR))


def summary(sums: NDArray[np.float64], states: NDArray[np.float64]) -> dict[str, Any]:
    """The figures of one block.

    `score` is the unbiased estimate of ‖E g‖², below zero when it is lost in noise, with a Student's t interval
    over passes. `signals` are `product`, which is `score`; `share`, that as a share of the mean squared norm of a
    pass's gradient, noise included; `norm`, the root mean square norm of a pass's gradient, noise included;
    `fisher`, ‖E g‖² with each weight's part divided by its mean square over prompts; `adam`, what a step by the
    sign of one half's gradient gains to first order on the other half; `change`, 1 − the mean cosine of the states
    that enter and leave the block; `separation`, as `product` for the advantage-weighted mean of the states that
    leave the block, over their mean square.

    Args:
        sums: [passes, 4], as `Sums`.
        states: [passes, 2], as `state_signals`.
    """
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
    return {"score": score, "low": score - margin, "high": score + margin, "signals": signals}


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
    unequal = np.flatnonzero(advantages.any(1))
    if unequal.size == 0:
        return dict.fromkeys(blocks, Sums(0.0, 0.0, 0.0, 0.0))
    # A group without advantages has a gradient of exactly zero: it counts, but need not be computed.
    kept = rollout.groups(torch.as_tensor(unequal, device=policy.device))
    assert kept.boundary is not None
    # Tried once, in passes that are not to be watched.
    tail_kind(policy, kept.boundary.block)
    with torch.enable_grad(), watched(policy, blocks, len(unequal), len(advantages)) as gradients:
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
    """One pass: per block, `change` and `separation` of its states; see `summary`.

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

    with contextlib.ExitStack() as hooks, policy.autocast():
        for block in blocks:
            hook = policy.blocks[block].register_forward_hook(partial(look, block), with_kwargs=True)
            hooks.callback(hook.remove)
        policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            logits_to_keep=1,
        )
    return found


@dataclass
class Call:
    """One use of a linear layer: what went in, and the gradient of what came out."""

    inputs: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass
class WeightGradients:
    """Weight gradients of linear layers, reduced layer by layer to the `Sums` of each block.

    The frozen weights get no gradient from autograd. A layer's is aᵀx over its tokens, with x its input and a
    the gradient of its output, so the part of any prompt can be had, and dropped once it has been squared.
    """

    prompts: int  # whose gradient is not zero
    count: int  # of all prompts
    sums: dict[int, torch.Tensor]
    calls: dict[nn.Module, tuple[int, list[Call]]] = field(default_factory=dict)

    def on_forward(
        self, block: int, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if not output.requires_grad:
            return
        call = Call(args[0].detach())
        self.calls.setdefault(layer, (block, []))[1].append(call)
        output.register_hook(partial(self.on_backward, layer, call))

    def on_backward(self, layer: nn.Module, call: Call, gradient: torch.Tensor) -> None:
        call.gradient = gradient.detach()
        block, calls = self.calls[layer]
        # Prompts and completions pass one after the other, and a prompt's gradient comes from both.
        if all(other.gradient is not None for other in calls):
            del self.calls[layer]
            self.reduce(block, calls)

    def reduce(self, block: int, calls: list[Call]) -> None:
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
        fisher = products / (mean_square + DAMPING * mean_square.mean())
        first, second = halves if len(halves) == 2 else (total, torch.zeros_like(total))
        adam = first.sign() * second + second.sign() * first
        found = (products, (total / self.count).square_(), fisher, adam / self.count)
        self.sums[block] += torch.stack([part.sum(dtype=torch.float64) for part in found])

    def weight_gradient(self, call: Call, prompt: int) -> torch.Tensor:
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
def watched(policy: Policy, blocks: Sequence[int], prompts: int, count: int) -> Iterator[WeightGradients]:
    """Follows the linear layers of `blocks`, 4-bit ones included, through one forward and backward pass."""
    zeros = partial(torch.zeros, len(Sums._fields), dtype=torch.float64, device=policy.device)
    gradients = WeightGradients(prompts, count, {block: zeros() for block in blocks})
    with contextlib.ExitStack() as hooks:
        for block in blocks:
            for layer in policy.blocks[block].modules():
                if isinstance(layer, nn.Linear):
                    hook = layer.register_forward_hook(partial(gradients.on_forward, block))
                    hooks.callback(hook.remove)
        yield gradients


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="a YAML file; default: the bundled model's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any config key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=64, help="problems to sample completions for")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: the standard output")
    asked = parser.parse_args(arguments)
    # Of the libraries underneath, about themselves.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        config = load_config(asked.recipe, {"seed": asked.seed, **dict(map(parse_assignment, asked.set))})
        found = json.dumps(measure(config, asked.prompts, Terminal()), indent=2)
    except MidtuneError as error:
        sys.exit(str(error))
    if asked.out is None:
        print(found)
    else:
        asked.out.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
