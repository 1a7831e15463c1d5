"""Each algorithm's name in TRL, its authors' clip ranges, and the advantages TRL does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from midtune.config import TrainingConfig
from midtune.rl.advantages import Turns, Values, gigpo, leave_one_out

# `grpo` (arXiv 2402.03300) and `dr_grpo` (2503.20783) clip at 0.2; `dapo` (2503.14476) clips higher above;
# `cispo` (2506.13585) bounds the weight itself; `gspo` (2507.18071) clips whole-sequence ratios; `rloo`
# (2402.14740) weighs the log-prob of a whole completion, which is luspo's gradient as long as completions are new;
# `gigpo` (2505.10978) takes the mean over the tokens of a step, as its authors' code does.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group", "epsilon": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2},
    "dapo": {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "group", "epsilon": 0.2},
    "cispo": {"loss_type": "cispo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": 5.0},
    "gspo": {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "rloo": {
        "loss_type": "luspo",
        "scale_rewards": "none",
        "importance_sampling_level": "sequence",
        "epsilon": 0.2,
    },
    "gigpo": {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2},
}

# Rewards [N, G], and turns if a task has them → advantages [N, G], or those of the turns of each of the N·G episodes.
Advantages = Callable[[Values, Sequence[Turns]], Values | list[Values]]


def algorithm_arguments(settings: TrainingConfig) -> dict[str, Any]:
    """Arguments for TRL's GRPOConfig; `settings.epsilon` replaces the clip range on both sides."""
    arguments = dict(ALGORITHMS[settings.algorithm])
    if settings.epsilon is not None:
        arguments["epsilon"] = settings.epsilon
        arguments.pop("epsilon_high", None)
    return arguments


def own_advantages(settings: TrainingConfig) -> Advantages | None:
    """The function for the algorithm's advantages; None if TRL computes them."""
    if settings.algorithm == "rloo":
        return lambda rewards, episodes: leave_one_out(rewards)
    if settings.algorithm == "gigpo":
        return partial(
            gigpo, omega=settings.gigpo_omega, gamma=settings.gigpo_gamma, scaled=settings.gigpo_scale
        )
    return None


def groups_per_micro_batch(prompts_per_step: int, group_tokens: int, budget: int) -> int:
    """How many whole groups go through one backward pass; divides `prompts_per_step`, so micro-batches are equal.

    `group_tokens` are the most in a group: group size × (longest prompt + longest completion). `budget` is the most
    tokens in a micro-batch; a single group may exceed it.
    """
    fitting = [
        n for n in range(1, prompts_per_step + 1) if prompts_per_step % n == 0 and n * group_tokens <= budget
    ]
    return max(fitting, default=1)
