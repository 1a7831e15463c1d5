"""A race of single-block trials for the best block, by successive halving (arXiv 1502.07943).

All blocks train for a few steps and are scored on the same problems; the better ones train on, until two are left or
the budget is spent. Prompts and random numbers are common, so that differences are paired. A trial ends when its
block is clearly worse than the leader, or when too many others are ahead of it. Only the first says that a block is
worse: one that ended for want of budget may still be among the best, and is counted so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from midtune.probe.contribution import Scores, standings
from midtune.probe.selection import best_first
from midtune.report.statistics import CONFIDENCE

# One block in KEPT goes on to the next round.
KEPT = 3
# Most of a round's time that scoring may take.
SCORING = 0.25


@dataclass(frozen=True)
class Entrant:
    """How far a block came.

    Attributes:
        steps: that it was trained for.
        best_probability: that it is the best of all, as far as its steps show.
        among_best: no comparison told it apart from the block that led.
    """

    block: int
    steps: int
    best_probability: float
    among_best: bool


@dataclass
class Budget:
    """What a race may cost, in seconds or in steps.

    Args:
        total: what may be spent.
        spent: → what has been.
        step, score: → what one more step, and scoring one block on all problems, cost.
    """

    total: float
    spent: Callable[[], float]
    step: Callable[[], float]
    score: Callable[[], float] = field(default=lambda: 0.0)

    def plan(self, blocks: int, rounds: int) -> tuple[int, float]:
        """What each block can do with an equal share of what is left.

        Args:
            blocks, rounds: how many blocks run in this round, and how many rounds are left.

        Returns:
            Steps, and the share of the problems to score on: all, unless that took too much of the time.
        """
        share = (self.total - self.spent()) / rounds / blocks
        whole = self.score()
        problems = min(1.0, max(share, 0.0) * SCORING / whole) if whole > 0 else 1.0
        return math.floor((share - problems * whole) / self.step()), problems


def race(
    order: Sequence[int],
    run: Callable[[int, int, float], Scores],
    budget: Budget,
    *,
    most_steps: int,
) -> list[Entrant]:
    """Race blocks against each other.

    Args:
        order: the blocks; where the budget does not reach for all of them, the first ones run.
        run: (block, steps, share) → its scores [N] after so many steps in all, on this share of the problems,
            the same ones for every block; called with more steps each time.
        budget: every block does one step at least, whatever it costs.
        most_steps: where a trial ends.

    Returns:
        The blocks, those that came farthest first, and by score among equals.
    """
    sizes = round_sizes(len(order))
    # 95% for all rounds together.
    confidence = 1 - (1 - CONFIDENCE) / len(sizes)
    running, steps, chance = list(order), 0, 1.0
    found: list[Entrant] = []
    for number, following in enumerate([*sizes[1:], 1]):
        more, problems = budget.plan(len(running), len(sizes) - number)
        if number > 0 and (len(running) == 1 or steps == most_steps or more < 1):
            break
        steps = min(most_steps, steps + max(1, more))
        scores = {block: run(block, steps, problems) for block in running}
        standing = standings(scores, confidence)
        entrants = []
        for block in best_first({block: float(np.mean(own)) for block, own in scores.items()}):
            probability, among_best = chance * standing[block].best_probability, standing[block].among_best
            entrants.append(Entrant(block, steps, probability, among_best))
        found = entrants + [old for old in found if old.block not in running]
        going = [entrant for entrant in entrants if entrant.among_best][:following]
        running = [entrant.block for entrant in going]
        chance = math.fsum(entrant.best_probability for entrant in going)
    return found


def round_sizes(blocks: int) -> list[int]:
    """How many blocks run in each round: a third of those of the round before, down to two."""
    sizes = [blocks]
    while sizes[-1] > 2:
        sizes.append(max(2, math.ceil(sizes[-1] / KEPT)))
    return sizes
