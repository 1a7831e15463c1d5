"""A race of single-block trials for the best block, by successive halving (arXiv 1502.07943).

All blocks train for a few steps and are scored on the same problems; the better ones continue, until two are left or
the budget is spent. Prompts and random numbers are shared, so differences are paired. A trial ends when its block is
clearly worse than the leader, or when too many others are ahead. Only the first means that the block is worse; one
dropped to save budget still counts as possibly among the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from midtune.probe.contribution import Scores, standings
from midtune.probe.selection import best_first
from midtune.report.statistics import CONFIDENCE

# One block in KEPT reaches the next round.
KEPT = 3
# Largest share of a round's time that scoring may take.
SCORING = 0.25


@dataclass(frozen=True)
class Entrant:
    """How far a block came; `among_best` if no comparison told it apart from the leader."""

    block: int
    steps: int
    best_probability: float
    among_best: bool


@dataclass
class Budget:
    """What a race may cost, in seconds or steps; `step` and `score` price one step and one scoring on all problems."""

    total: float
    spent: Callable[[], float]
    step: Callable[[], float]
    score: Callable[[], float] = field(default=lambda: 0.0)

    def plan(self, blocks: int, rounds: int) -> tuple[int, float]:
        """Steps of each block from an equal share of the rest, and the share of the problems to score on.

        That is all of them, unless scoring takes too much of the time. `rounds` are left, with `blocks` in this one.
        """
        share = (self.total - self.spent()) / rounds / blocks
        whole = self.score()
        problems = min(1.0, max(share, 0.0) * SCORING / whole) if whole > 0 else 1.0
        return math.floor((share - problems * whole) / self.step()), problems


def race(
    order: Sequence[int],
    run: Callable[[Sequence[int], int, float], dict[int, Scores]],
    budget: Budget,
    *,
    most_steps: int,
) -> list[Entrant]:
    """Race the blocks of `order` against each other; returns the furthest first, then by score.

    `run(blocks, steps, share)` returns each block's scores [N] after `steps` in total, on the first `share` of the
    problems: a round, whose blocks may run at the same time. Every block runs at least one step, whatever it costs.
    """
    sizes = round_sizes(len(order))
    # 95% over all rounds together.
    confidence = 1 - (1 - CONFIDENCE) / len(sizes)
    running, steps, chance = list(order), 0, 1.0
    found: list[Entrant] = []
    for number, following in enumerate([*sizes[1:], 1]):
        more, problems = budget.plan(len(running), len(sizes) - number)
        if number > 0 and (len(running) == 1 or steps == most_steps or more < 1):
            break
        steps = min(most_steps, steps + max(1, more))
        scores = run(running, steps, problems)
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
    """How many blocks run in each round: a third of the round before, down to two."""
    sizes = [blocks]
    while sizes[-1] > 2:
        sizes.append(max(2, math.ceil(sizes[-1] / KEPT)))
    return sizes
