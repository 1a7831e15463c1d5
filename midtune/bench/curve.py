"""An arm's held-out score as it trains, on a clock that stands still while it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from numpy.typing import ArrayLike

from midtune.measure.meter import Meter
from midtune.model.memory import give_back
from midtune.model.policy import Policy
from midtune.report.statistics import score_interval


@dataclass
class Curve:
    """Scores before the first step, every `every` steps and after the last.

    Args:
        score: a policy, and whether it is an untouched base → its scores by problem.
        samples: completions of a step.
        target: the score at which the arm may end; None: after the last step.
        on_point: receives each point when it is there.

    Attributes:
        points: the `step`, the `seconds` of training and the `samples` drawn until then, and the score's interval.
        peak: most bytes held between the scorings; `seconds` are those of training until now.
    """

    score: Callable[[Policy, bool], ArrayLike]
    meter: Meter
    steps: int
    every: int
    samples: int
    target: float | None = None
    on_point: Callable[[dict[str, Any]], None] = lambda point: None
    points: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    seconds: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether the target was, if there is one."""
        return self.target is not None and self.points[-1]["score"] >= self.target

    def begin(self, policy: Policy) -> None:
        """Score the model as it was loaded."""
        self._policy = policy
        self._add(0)

    def after(self, step: int, seconds: float) -> None:
        """A step ended that took `seconds`; score the model if it is time."""
        if self.reached:
            return
        self.seconds += seconds
        if step % self.every == 0 or step == self.steps:
            self.peak = max(self.peak, self.meter.peak_bytes())
            self._add(step)

    def _add(self, step: int) -> None:
        model = self._policy.model
        training = model.training
        model.eval()
        found = score_interval(self.score(self._policy, step == 0))
        model.train(training)
        drawn = step * self.samples
        self.points.append({"step": step, "seconds": self.seconds, "samples": drawn, **asdict(found)})
        self.on_point(self.points[-1])
        # Memory that scoring left behind does not count.
        give_back()
        self.meter.reset_peak()
