"""Record each step: metrics, samples, warnings; stop when nothing can be learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from midtune import processes
from midtune.config import TrainingConfig
from midtune.errors import RunStopped
from midtune.measure.meter import OUTSIDE, Meter
from midtune.rl.collapse import find_collapse
from midtune.tasks.rewards import completion_text

if TYPE_CHECKING:
    from midtune.rl.trainer import LayerGRPOTrainer
    from midtune.rl.trust_region import TrustRegion

SAMPLES_PER_STEP = 2
# Seconds between checkpoints, as a multiple of the seconds that one takes: 2% of the time goes into them.
CHECKPOINT_SPACING = 50
# Most training time a killed process may lose, if steps are shorter.
MOST_LOST_S = 120.0
FIELDS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "equal_groups",
    "completions/mean_length": "completion_length",
    "turns": "turns",
    "shown_length": "shown_length",
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "sampling/sampling_logp_difference/mean": "vllm_difference",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}


@dataclass(eq=False)
class StepRecorder(TrainerCallback):
    """Turns TRL's logs into one line of metrics a step.

    The line that `on_step` receives holds:

    - step, reward, rewards (the mean of each part of a weighted sum), equal_groups (share of groups whose rewards are
      all equal), completion_length (tokens), clipped (share cut at the limit), loss, grad_norm, lr; with
      a trust region, step_kl (by what share of its entropy the step moved the policy) if any group taught;
    - in tasks played in turns, turns and shown_length (actions of an episode, tokens its environment showed); with
      vLLM, vllm_difference (mean difference of a token's log-prob between vLLM and the policy);
    - rollout_s, reward_s, update_s, step_s, tokens_per_s (of the rollout), memory_bytes, elapsed_s; if the meter has
      them, rollout_peak_bytes, reward_peak_bytes, update_peak_bytes and, on CUDA, rollout_reserved_bytes and so on;
    - after memory has run out, sampling_rows or update_rows (most completions that go together since).

    Of several processes, a phase takes what the slowest took, and memory is that of the one that holds most. All others
    are means over all completions.
    """

    meter: Meter  # the trainer charges its phases to it
    _: KW_ONLY
    on_step: Callable[[dict[str, Any]], None]
    on_sample: Callable[[dict[str, Any]], None]  # receives some completions with their rewards
    on_message: Callable[[str], None]  # receives a sentence for the user
    stop_requested: Callable[[], bool]  # called after every step; True saves a checkpoint and ends training
    stop_after: int | None  # a step after which training ends likewise
    settings: TrainingConfig
    trainer: LayerGRPOTrainer = field(init=False)
    trust_region: TrustRegion | None = None

    def __post_init__(self) -> None:
        self._started = self.meter.clock()
        self._checked = False
        self._said: set[str] = set()

    def on_train_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        # A resumed run reads its earlier steps from the checkpoint.
        known = [log for log in state.log_history if "reward" in log]
        self._rewards: list[float] = [log["reward"] for log in known]
        self._equal_groups: list[float] = [log["frac_reward_zero_std"] for log in known]
        self._saved = self.meter.clock()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        seconds = self.meter.end_step()
        self._phases = {f"{name}_s": seconds[name] for name in ("rollout", "reward", "update", "step")}
        self._peaks = {
            f"{'update' if phase == OUTSIDE else phase}_{kind}": count
            for phase, peaks in self.meter.peaks.items()
            for kind, count in peaks.items()
        }
        if not self._checked:
            self.trainer.check_frozen()
            self._checked = True
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.on_message(
                f"gradients of step {state.global_step} overflowed in fp16, so it changed nothing; the next ones are "
                "scaled less."
            )
        if self.stop_requested() or state.global_step == self.stop_after:
            control.should_training_stop = True
        ended = control.should_training_stop or state.global_step >= state.max_steps
        due = processes.from_main(lambda: self._checkpoint_is_due(seconds["step"]))
        if args.save_strategy != "no" and (ended or due):
            control.should_save = True

    def _checkpoint_is_due(self, step_s: float) -> bool:
        """Whether a checkpoint is due; the first step always saves one, to time it."""
        since, takes_s = self.meter.clock() - self._saved, self.trainer.checkpoint_s
        return since >= CHECKPOINT_SPACING * takes_s or since + step_s + takes_s > MOST_LOST_S

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._saved = self.meter.clock()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        if "reward" not in logs:
            return
        metrics: dict[str, Any] = {"step": state.global_step}
        metrics |= {ours: logs[theirs] for theirs, ours in FIELDS.items() if theirs in logs}
        if self.trust_region is not None:
            metrics |= self.trust_region.figures
        metrics["clipped"] = self.trainer.cut_share
        if len(names := self.trainer.reward_func_names) > 1:
            metrics["rewards"] = {name: logs[f"rewards/{name}/mean"] for name in names}
        metrics |= self._phases
        rows = self.settings.prompts_per_step * self.settings.group_size
        metrics["tokens_per_s"] = metrics["completion_length"] * rows / max(self._phases["rollout_s"], 1e-9)
        for held in processes.gathered([{"memory_bytes": self.meter.current_bytes(), **self._peaks}]):
            metrics |= {name: max(size, metrics.get(name, 0)) for name, size in held.items()}
        metrics["elapsed_s"] = self.meter.clock() - self._started
        limits = {
            "sampling_rows": self.trainer.sampler.limits.rows.rows,
            "update_rows": self.trainer.update_rows.rows,
        }
        for limit in processes.gathered([{name: rows for name, rows in limits.items() if rows is not None}]):
            metrics |= {name: min(rows, metrics.get(name, rows)) for name, rows in limit.items()}
        self.on_step(metrics)
        for sample in self._last_samples()[:SAMPLES_PER_STEP]:
            self.on_sample({"step": state.global_step, **sample})
        self._watch(metrics)

    def _watch(self, metrics: dict[str, Any]) -> None:
        self._rewards.append(metrics["reward"])
        self._equal_groups.append(metrics["equal_groups"])
        only_equal = all(share == 1 for share in self._equal_groups)
        if only_equal and 0 < self.settings.stop_after_equal_rewards <= metrics["step"]:
            raise RunStopped(self._nothing_to_learn(metrics))
        if "collapse" not in self._said and (found := find_collapse(self._rewards, self._equal_groups)):
            self._say("collapse", f"{found}.")
        if metrics["clipped"] == 1:
            self._say(
                "clipped",
                f"every completion was cut at {self.settings.max_new_tokens} tokens, so answers at the end are lost; "
                "raise --max-new-tokens if this goes on.",
            )
        if abs(metrics.get("loss", 1.0)) < 1e-3:
            self._say(
                "loss",
                "the loss is near zero because the advantages of a group sum to zero; it is no measure of "
                "progress, watch the reward.",
            )

    def _nothing_to_learn(self, metrics: dict[str, Any]) -> str:
        shown = "\n".join(
            f"  reward {sample['reward']:g}: {' '.join(sample['completion'].split())[:160]!r}"
            for sample in self._last_samples()[:3]
        )
        if metrics["reward"] == 0:
            cause = (
                "every reward was 0: the task is too hard for this model, or its answers are not recognised"
            )
        else:
            cause = f"all completions of each prompt got equal rewards (mean {metrics['reward']:.3g})"
        return (
            f"stopped after {metrics['step']} steps without a learning signal: {cause}. Look at these completions, "
            "then try easier problems, a larger --group-size, more --max-new-tokens or another --reward "
            f"(--set training.stop_after_equal_rewards=0 goes on regardless):\n{shown}"
        )

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self.on_message(text)

    def _last_samples(self) -> list[dict[str, Any]]:
        logs = self.trainer._logs
        rewards = list(logs["rewards"].values())
        weights = self.trainer.reward_weights.tolist()
        return [
            {
                "prompt": completion_text(prompt),
                "completion": completion_text(completion),
                "reward": sum(
                    weight * values[i]
                    for weight, values in zip(weights, rewards, strict=True)
                    if not math.isnan(values[i])
                ),
            }
            for i, (prompt, completion) in enumerate(zip(logs["prompt"], logs["completion"], strict=True))
        ]
