"""Which prompts a step trains on: `training.prompts: auto`.

A group whose completions all got the same reward teaches nothing. Which groups will differ can be guessed before
anything is drawn, from the state that enters the first trained block at a prompt's last token: prompts with near states
have groups alike. Frozen blocks make that state, so it never changes, and each prompt passes them once in a run. Kernel
ridge regression on the last groups predicts how far a prompt's rewards will differ. Each step takes those that will
most, among several times as many prompts as it needs.

What is trained on: a quarter of each step's prompts are the next in line, whatever is predicted, so that every kind of
prompt is seen and the estimate follows the policy. The others are drawn to where the policy is of two minds.

Sources: DAPO (arXiv 2503.14476) draws until groups differ and discards the rest; MoPPS (2507.04632) keeps a posterior
of each prompt's pass rate, GRESO (2506.02177) skips prompts whose groups were equal before. Those two need prompts that
come back, where states tell of prompts that were never drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from midtune import processes
from midtune.model.blocks import Reached, captured
from midtune.model.policy import Policy
from midtune.rollout.sampling import padded
from midtune.rollout.speech import prompt_ids
from midtune.tasks import Row

# Prompts that a step chooses among, for each one that it takes.
CANDIDATES = 8
# Of a step's prompts, the share that is not chosen.
UNCHOSEN = 0.25
# Groups that predictions rest on: the last ones, since the policy changes; and how many there must be to begin.
MOST_KNOWN, FEWEST_KNOWN = 256, 32


def predicted(known: torch.Tensor, values: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Predict the values [A] of states `asked` [A, H] from those [K] of `known` [K, H], by kernel ridge regression.

    The kernel is Gaussian, as wide as the median distance; the ridge is 1, so a single neighbour counts by half.
    """
    scale = known.std(0).clamp(min=1e-6)
    known, asked = (known / scale).double(), (asked / scale).double()
    apart = torch.cdist(known, known).square()
    width = apart[apart > 0].median() if apart.any() else apart.new_ones(())
    kernel = (-apart / width).exp()
    mean = values.double().mean()
    weights = torch.linalg.solve(kernel + torch.eye(len(known)).to(kernel), values.double() - mean)
    return mean + (-torch.cdist(asked, known).square() / width).exp() @ weights


class PromptChooser:
    """Chooses the prompts of each step, and learns from their groups which to choose.

    Args:
        order: the numbers of `rows` in the order in which they become candidates, of all steps.
        count, candidates: prompts that a step takes, and among how many, of all processes together.
    """

    def __init__(
        self, policy: Policy, rows: Sequence[Row], order: Sequence[int], count: int, candidates: int
    ) -> None:
        self.policy, self.rows, self.count = policy, rows, count
        self._order, self._candidates = order, candidates
        first = list(dict.fromkeys(order))
        # Prompts that pass the frozen blocks together, whenever that is, so that a resumed run gets the same states.
        self._passes = [first[start : start + count] for start in range(0, len(first), count)]
        self._pass_of = {row: place // count for place, row in enumerate(first)}
        self._states: dict[int, torch.Tensor] = {}
        # Of the last groups: the rows of their prompts, and by how much rewards differed.
        self._known, self._values = list[int](), list[float]()
        self._chosen: list[int] = []

    def choose(self, step: int) -> list[Row]:
        """The rows of step `step`, counted from 0, that this process computes."""
        in_line = self._order[step * self._candidates : (step + 1) * self._candidates]
        candidates = [*dict.fromkeys(in_line)]
        self._chosen = [*in_line[: self.count]]
        if len(self._known) >= FEWEST_KNOWN and len(candidates) >= self.count:
            known, asked = self._states_of(self._known), self._states_of(candidates)
            self._chosen = processes.from_main(lambda: self._most_promising(candidates, known, asked))
        return [self.rows[row] for row in self._chosen[processes.share(self.count)]]

    def learn(self, rewards: torch.Tensor) -> None:
        """Remember by how much the rewards [N, G] of this process's groups differed, in the order of `choose`."""
        spread: list[float] = rewards.double().std(1).nan_to_num().tolist()
        self._known = [*self._known, *self._chosen][-MOST_KNOWN:]
        self._values = [*self._values, *processes.gathered(spread)][-MOST_KNOWN:]

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: `rows` [K], numbers of the last groups' prompts, and their `values` [K]."""
        return {"rows": torch.tensor(self._known), "values": torch.tensor(self._values, dtype=torch.float64)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`."""
        self._known, self._values = state["rows"].tolist(), state["values"].tolist()

    def _most_promising(self, candidates: list[int], known: torch.Tensor, asked: torch.Tensor) -> list[int]:
        first = max(1, round(UNCHOSEN * self.count))
        found = predicted(known, torch.tensor(self._values), asked[first:])
        best = found.argsort(descending=True, stable=True)[: self.count - first]
        return [*candidates[:first], *(candidates[first + place] for place in best.tolist())]

    def _states_of(self, rows: Sequence[int]) -> torch.Tensor:
        """The states [N, H] that enter the first trained block at the last token of prompts, fp32 in RAM."""
        due = sorted({self._pass_of[row] for row in rows if row not in self._states})
        made = [self._passed(self._passes[place]) for place in due[processes.share(len(due))]]
        for states in processes.gathered(made):
            self._states |= states
        return torch.stack([self._states[row] for row in rows])

    @torch.no_grad()
    def _passed(self, rows: Sequence[int]) -> dict[int, torch.Tensor]:
        policy = self.policy
        asked = [prompt_ids(policy.tokenizer, self.rows[row]["prompt"]) for row in rows]
        # Padded on the right, so that no state sees padding, whatever mixes a block's tokens.
        ids, mask = padded(policy, asked, "right")
        with captured(policy.blocks[policy.trained[0]], stop=True) as states, policy.autocast():
            with contextlib.suppress(Reached):
                policy.model(input_ids=ids, use_cache=False)
        last = states[0][torch.arange(len(rows), device=ids.device), mask.sum(1) - 1]
        return dict(zip(rows, last.float().cpu(), strict=True))
