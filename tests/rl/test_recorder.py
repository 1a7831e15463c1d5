"""What a run says: a line of metrics a step, samples, warnings, and why it stops."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from midtune.config import TrainingConfig
from midtune.errors import RunStopped
from midtune.measure.meter import Meter
from midtune.rl.recorder import StepRecorder
from midtune.rl.training import ignore
from tests.rl.toy_training import Load, thawed, train


def nothing(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.0] * len(completion_ids)


def test_a_metrics_line_a_step(load: Load, tmp_path: Path) -> None:
    _, metrics = train(thawed(load, 2), tmp_path, beta=0.1)
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert line.keys() == {
            *("step", "reward", "reward_std", "equal_groups", "completion_length", "clipped"),
            *("loss", "kl", "entropy", "grad_norm", "lr", "rollout_s", "reward_s", "update_s", "step_s"),
            *("tokens_per_s", "memory_bytes", "elapsed_s"),
        }
        parts = line["rollout_s"] + line["reward_s"] + line["update_s"]
        assert parts == pytest.approx(line["step_s"])
        assert min(line["rollout_s"], line["reward_s"], line["update_s"]) > 0


class Counting(Meter):
    """A meter whose peak is one byte higher at every reading."""

    def __init__(self) -> None:
        super().__init__()
        self._readings = itertools.count(1000)

    def _counted(self) -> dict[str, int]:
        return {"peak_bytes": next(self._readings), "reserved_bytes": 5000}

    def _reset_counter(self) -> bool:
        return True


def test_a_metrics_line_has_the_peak_of_each_phase_once_the_meter_measures_it(
    load: Load, tmp_path: Path
) -> None:
    policy = thawed(load, 2)
    meter = Counting()
    meter.reset_peak()
    _, metrics = train(policy, tmp_path, meter=meter)
    # Read once by the reset, then six times a step: where it begins and ends, and both phases in it.
    for line, first in zip(metrics, (1001, 1007), strict=True):
        assert [line[f"{phase}_peak_bytes"] - first for phase in ("rollout", "reward", "update")] == [2, 4, 5]
        assert {line[f"{phase}_reserved_bytes"] for phase in ("rollout", "reward", "update")} == {5000}
    assert meter.peak_bytes() == 1013


def test_two_completions_a_step_are_shown_with_their_rewards(load: Load, tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = []
    train(thawed(load, 2), tmp_path, on_sample=samples.append)
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    assert all(sample.keys() == {"step", "prompt", "completion", "reward"} for sample in samples)


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        (nothing, "every reward was 0"),
        (lambda completion_ids, **_: [0.5] * len(completion_ids), r"equal rewards \(mean 0.5\)"),
    ],
)
def test_equal_rewards_from_the_start_stop_the_run(
    load: Load, tmp_path: Path, reward: Any, cause: str
) -> None:
    with pytest.raises(RunStopped, match=f"stopped after 2 steps .*{cause}") as stopped:
        train(thawed(load, 2), tmp_path, reward, steps=4, stop_after_equal_rewards=2)
    assert str(stopped.value).count("\n  reward ") == 3


def test_equal_rewards_do_not_stop_a_run_that_was_told_to_go_on(load: Load, tmp_path: Path) -> None:
    step, _ = train(thawed(load, 2), tmp_path, nothing, steps=3, stop_after_equal_rewards=0)
    assert step == 3


def test_equal_rewards_do_not_stop_a_run_that_had_others_before(load: Load, tmp_path: Path) -> None:
    settings = {"steps": 4, "stop_after_equal_rewards": 2}
    train(thawed(load, 2), tmp_path, **settings, stop_requested=lambda: True)
    step, _ = train(thawed(load, 2), tmp_path, nothing, **settings, resume_from=tmp_path / "checkpoint-1")
    assert step == 4


def test_a_message_says_once_that_every_completion_is_cut(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    policy.model.generation_config.eos_token_id = 2
    said: list[str] = []
    train(policy, tmp_path, steps=3, max_new_tokens=2, on_message=said.append)
    assert sum(text.startswith("every completion was cut at 2 tokens") for text in said) == 1


def test_a_message_says_once_that_training_collapsed(load: Load, tmp_path: Path) -> None:
    def lost_after_ten_steps(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        return [float(row % 2 and trainer_state.global_step < 10) for row in range(len(completion_ids))]

    said: list[str] = []
    settings = {"steps": 22, "max_new_tokens": 2, "on_message": said.append}
    step, _ = train(thawed(load, 2), tmp_path, lost_after_ten_steps, **settings, stop_after=15)
    assert step == 15 and not any("collapsed" in text for text in said)
    # What the steps before were like is known from the checkpoint.
    resume = {"resume_from": tmp_path / "checkpoint-15"}
    step, _ = train(thawed(load, 2), tmp_path, lost_after_ten_steps, **settings, **resume)
    assert step == 22
    (found,) = (text for text in said if "collapsed" in text)
    assert found.startswith("in steps 11 to 20") and "was 0, after 0.5 at best" in found


def test_a_message_says_once_that_the_loss_is_no_measure(load: Load, tmp_path: Path) -> None:
    said: list[str] = []
    train(thawed(load, 2), tmp_path, steps=3, on_message=said.append)
    assert sum(text.startswith("the loss is near zero") for text in said) == 1


@pytest.mark.parametrize(
    ("takes_s", "expected"),
    [
        # The first step has one, which tells what one takes; then 50 times that have to pass; the last has one.
        (1.0, [1, 3, 5]),
        # At most two minutes of steps may be lost, whatever a checkpoint takes.
        (30.0, [1, 4, 5]),
        (0.1, [1, 2, 3, 4, 5]),
    ],
)
def test_the_first_step_has_a_checkpoint_and_the_next_come_by_time(
    takes_s: float, expected: list[int]
) -> None:
    now = 0.0
    recorder = StepRecorder(
        Meter(clock=lambda: now),
        on_step=ignore,
        on_sample=ignore,
        on_message=ignore,
        stop_requested=lambda: False,
        stop_after=None,
        settings=TrainingConfig(),
    )
    accelerator = SimpleNamespace(optimizer_step_was_skipped=False)
    trainer: Any = SimpleNamespace(accelerator=accelerator, checkpoint_s=0.0, check_frozen=ignore)
    recorder.trainer = trainer
    args: Any = SimpleNamespace(save_strategy="steps")
    state, saved = TrainerState(max_steps=5), []
    recorder.on_train_begin(args, state, TrainerControl())
    for step in range(1, 6):
        control, state.global_step = TrainerControl(), step
        recorder.on_step_begin(args, state, control)
        now += 30.0
        recorder.on_step_end(args, state, control)
        if control.should_save:
            saved.append(step)
            trainer.checkpoint_s = takes_s
            recorder.on_save(args, state, control)
    assert saved == expected
