"""A trust region in place of a learning rate: `training.lr: auto`.

After the optimizer's step, a forward pass of the tail gives new log-probs of the completions that were learned from,
and with them how far the policy moved: its KL divergence as a share of its entropy. The rate follows, so that every
step moves it about as far. A step that went far beyond the target is taken back in part, and one that fell far short
is stretched: so neither the first guess nor a warm-up matters.

Sources: TRPO (arXiv 1502.05477) measures steps in KL and searches along them; PPO (1707.06347, section 4) lets a
coefficient follow the KL. Here the optimizer's rate does. Neither divides by the entropy: a policy that is sure of most
tokens can move little before it is another one. Where constant rates worked, steps had a KL of 0.001 a token in one
task and of 0.04 in another, whose entropies were 0.25 and 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from midtune.rl.trainer import LayerGRPOTrainer

# Where the search for a rate begins: rather too high, since the KL of short steps drowns in rounding in bf16.
FIRST_RATE = 1e-3
# KL of a step, as a share of the entropy.
TARGET = 0.01
# A rate that is off by this factor is wrong; within it, a step was also lucky or unlucky.
FAR = 10.0
# A step's KL may be this many times the target, or a target this many times it, before the step itself is changed.
MOST_OVER, MOST_UNDER = 4.0, FAR**2
# With about this many tokens, the KL of a step is known well enough: it enters as a square root, and the rate goes half
# of the way. More completions of a group are not measured, so the measurement costs little where texts are long.
ENOUGH_TOKENS = 256
# A changed step is measured again and changed again, at most this often, and each time by at most this factor.
TRIES, MOST_CHANGE = 6, 100.0


def divergence(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of `mask` of KL(before ‖ after), from the log-probs of tokens that `before` drew.

    A token counts r − 1 − log r with r = after/before, which is never negative and right on average ("k3", Schulman,
    joschu.net/blog/kl-approx.html).
    """
    log_ratio = (after - before).double() * mask
    return (log_ratio.expm1() - log_ratio).sum()


def measured_completions(group_size: int, tokens: float) -> int:
    """How many completions of each group are measured, if all have `tokens` tokens together; at least two."""
    return min(group_size, max(2, math.ceil(group_size * ENOUGH_TOKENS / max(tokens, 1))))


def factor_towards(target: float, kl: float) -> float:
    """By how much to lengthen a step for its KL, which grows with the square of its length, to reach the target."""
    ratio = target / kl if kl > 0 else math.inf
    return min(max(math.sqrt(ratio), 1 / MOST_CHANGE), MOST_CHANGE)


def fitted_step(
    parameters: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    target: float,
    kl: float,
    measure: Callable[[], float],
) -> tuple[float, float, float]:
    """Lengthen or shorten the step from `before` to `parameters`, in place, until its KL, now `kl`, is near the target.

    Returns the factor of the step's length, its KL, and the factor of the next steps' rate. The rate goes half of the
    way to where the step would have met the target, on a log scale, because the KL of one step is noisy; if it was far
    off, it goes the whole way. A KL of exactly 0, where nothing moved, says nothing.
    """
    if kl == 0:
        return 1.0, kl, 1.0
    length = 1.0
    for _ in range(TRIES):
        if target / MOST_UNDER <= kl <= target * MOST_OVER:
            break
        factor = factor_towards(target, kl)
        with torch.no_grad():
            for parameter, start in zip(parameters, before, strict=True):
                start = start.to(parameter.device)
                parameter.sub_(start).mul_(factor).add_(start)
        length *= factor
        kl = measure()
    wanted = length * factor_towards(target, kl)
    return length, kl, math.sqrt(wanted) if 1 / FAR < wanted < FAR else wanted


@dataclass(eq=False)
class TrustRegion(TrainerCallback):
    """Fits every step of a trainer to the target, and the rate to its KL.

    The rate is the scheduler's, in whose state a checkpoint keeps it. A schedule multiplies the length of steps: with
    half of the rate left, a quarter of the KL is the target. Steps in which no group teaches change nothing.
    """

    trainer: LayerGRPOTrainer
    # Of the last step: its `lr` and, if it was measured, `step_kl`.
    figures: dict[str, float] = field(default_factory=dict)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # In RAM, so that a card's peak stays what it was.
        self._before = tuple(parameter.detach().to("cpu", copy=True) for parameter in self._parameters())

    def on_optimizer_step(self, *args: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        before, self._before = self._before, ()
        trainer = self.trainer
        # Nothing reads them any more, and the copy takes their place.
        optimizer.zero_grad()
        scheduled = optimizer.param_groups[0]["lr"] / lr_scheduler.base_lrs[0]
        self.figures = {"lr": lr_scheduler.get_last_lr()[0]}
        target = TARGET * scheduled**2
        if trainer.accelerator.optimizer_step_was_skipped or target == 0:
            return
        if (tokens := trainer.taught_tokens()) == 0:
            return
        measure = partial(trainer.step_kl, measured_completions(trainer.num_generations, tokens))
        length, kl, change = fitted_step(self._parameters(), before, target, measure(), measure)
        lr_scheduler.base_lrs = [rate * change for rate in lr_scheduler.base_lrs]
        self.figures = {"lr": self.figures["lr"] * length, "step_kl": kl}

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.trainer.policy.trained_parameters().values())
