"""What full training and QLoRA would take on the steps of a run: worked out, from what the run measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from midtune.config import RunConfig
from midtune.planning.budget import peak
from midtune.planning.estimate import StepShape, estimate_phases
from midtune.planning.step_size import Work
from midtune.rollout.sampling import Sampler
from midtune.stages.plan import Planner, planner_for
from midtune.tasks import Task

ARMS = {"full": "trl-full", "qlora": "trl-qlora"}


class Alternatives:
    """Full training and QLoRA of the model that a run trained.

    Args:
        sampler: of the policy as it was trained; not kept.
        steps: the run's lines of metrics.jsonl.
        process_bytes: resident memory of the process before the model was loaded; on a CPU peaks count it.
    """

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        task: Task,
        steps: Sequence[Mapping[str, Any]],
        process_bytes: int,
    ) -> None:
        policy = sampler.policy
        self._blocks = policy.trained
        self._planner: Planner = planner_for(policy, self._blocks, process_bytes)
        self._reference = config.training.beta > 0
        # Without a KL term, groups of equal rewards are left out of the update.
        self._updated = (
            1.0 if self._reference else 1 - statistics.fmean(step["equal_groups"] for step in steps)
        )
        self._shape = StepShape(
            prompts=config.training.prompts_per_step,
            group_size=config.training.group_size,
            prompt_tokens=statistics.fmean(sampler.prompt_lengths(task.train[:64])),
            # Of episodes, with what their environments showed.
            completion_tokens=statistics.fmean(
                step["completion_length"] + step.get("shown_length", 0) for step in steps
            ),
        )
        self._micro_batch_tokens = config.training.micro_batch_tokens

    def estimated(self, name: str, measured: dict[str, float]) -> dict[str, Any]:
        """Seconds of a `step` and of its `phases`, and `peak` bytes, None if they cannot be worked out.

        Memory is that of completions of the mean length, though the longest of a step is what it pads to.

        Args:
            name: of `ARMS`.
            measured: the run's mean seconds of each phase.
        """
        shape = self._shape
        phases = estimate_phases(
            self._planner.sizes,
            shape,
            adapters=name == "qlora",
            lowest_block=self._blocks[0],
            trained_blocks=len(self._blocks),
            measured=measured,
            updated_share=self._updated,
            reference=self._reference,
        )
        work = Work(
            prompts=shape.prompts,
            group_size=shape.group_size,
            prompt_tokens=math.ceil(shape.prompt_tokens),
            new_tokens=max(math.ceil(shape.completion_tokens), 2),
            micro_batch_tokens=self._micro_batch_tokens,
            reference=self._reference,
        )
        try:
            most = peak(self._planner.phases(ARMS[name], work))[1]
        except Exception:  # an architecture may use what tensors without data cannot; the report has the rest
            most = None
        return {"step": sum(phases.values()), "phases": phases, "peak": most}
