"""How many held-out problems a run scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from midtune.config import RunConfig

# Of a run's time, by default; and the fewest problems whose scores say anything.
SHARE, FEWEST = 0.15, 50
# What a trained completion costs beside a scored one: it is sampled too, and groups that teach go through the update.
TRAINED_COST = 1.3
# Standard deviation of a problem's greedy gain if a quarter of the problems change sides.
GAIN_SPREAD = 0.5


@dataclass(frozen=True)
class ScoringPlan:
    """How many held-out problems are scored, before training and after, and what that is of the run's completions."""

    problems: int
    share: float

    def __str__(self) -> str:
        few = ", the fewest that say anything" if self.problems == FEWEST and self.share > SHARE else ""
        # 1.96 standard errors of a mean over the problems.
        points = 100 * 1.96 * GAIN_SPREAD / math.sqrt(self.problems)
        return (
            f"scoring {self.problems} problems before and after{few}: about {self.share:.0%} of the run; the 95% "
            f"interval of a greedy gain is about ±{points:.0f} points"
        )


def plan_scoring(config: RunConfig, available: int) -> ScoringPlan:
    """The problems to score of those `available`: as many as `task.eval_size` says, or as `SHARE` of the run pays for.

    It counts completions, whose length cancels out; so equal settings give the same problems on any machine.
    """
    training, evaluation = config.training, config.evaluation
    trained = TRAINED_COST * training.steps * training.prompts_per_step * training.group_size
    # Of each problem, before and after: a greedy completion, the samples, and one of the unquantized model.
    each = 2 * (1 + evaluation.samples + evaluation.deployed)
    problems = config.task.most_held_out
    if config.task.eval_size == "auto":
        paid = SHARE / (1 - SHARE) * trained / each
        problems = min(problems, max(FEWEST, int(paid) // 10 * 10))
    problems = min(problems, available)
    return ScoringPlan(problems, problems * each / (problems * each + trained))
