"""What each algorithm is called in TRL, with the clip ranges its authors use."""

from __future__ import annotations

from typing import Any

# `grpo` (arXiv 2402.03300) and `dr_grpo` (2503.20783) clip at 0.2; `dapo` (2503.14476) clips higher above;
# `cispo` (2506.13585) bounds the weight itself; `gspo` (2507.18071) clips whole-sequence ratios; `rloo`
# (2402.14740) compares a completion with the mean of the others and sums over its tokens; `gigpo` (2505.10978)
# has advantages of its own for each step of an episode, and GRPO's where there are no steps.
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
    "gigpo": {"loss_type": "grpo", "scale_rewards": "group", "epsilon": 0.2},
    "rloo": {
        "loss_type": "luspo",
        "scale_rewards": "none",
        "importance_sampling_level": "sequence",
        "epsilon": 0.2,
    },
}


def algorithm_arguments(algorithm: str, epsilon: float | None) -> dict[str, Any]:
    """Arguments of TRL's GRPOConfig for `algorithm`; `epsilon` replaces the clip range on both sides."""
    arguments = dict(ALGORITHMS[algorithm])
    if epsilon is not None:
        arguments["epsilon"] = epsilon
        arguments.pop("epsilon_high", None)
    return arguments


def advantage_factor(algorithm: str, group_size: int) -> float:
    """What TRL's advantages are multiplied by to give the algorithm's.

    RLOO's advantage of a completion, r − (Σr − r) / (G − 1), is G / (G − 1) times its difference from the mean.
    """
    return group_size / (group_size - 1) if algorithm == "rloo" else 1.0


def groups_per_micro_batch(prompts_per_step: int, group_tokens: int, budget: int) -> int:
    """How many whole groups go through one backward pass.

    Args:
        prompts_per_step: groups of one step; the result divides it, so that micro-batches are equal.
        group_tokens: most tokens a group can have: group size × (longest prompt + longest completion).
        budget: most tokens in a micro-batch; a single group may exceed it.
    """
    fitting = [
        n for n in range(1, prompts_per_step + 1) if prompts_per_step % n == 0 and n * group_tokens <= budget
    ]
    return max(fitting, default=1)
