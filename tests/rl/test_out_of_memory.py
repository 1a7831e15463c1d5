"""A step survives memory that runs out anywhere in it: the same gradient, in smaller slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.errors import RunStopped
from midtune.model.policy import Policy
from midtune.rl.algorithms import ALGORITHMS
from midtune.rl.tail import completion_log_probs
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rollout.sampling import Rollout
from tests.rl.toy_training import (
    Load,
    sampler_of,
    settings_of,
    short_backward,
    thawed,
    train,
    trained,
    trainer_of,
)
from tests.tight import memory_for

Trouble = Callable[[Policy], AbstractContextManager[Any]]
# Two micro-batches of two groups of four.
SETTINGS = {"steps": 2, "prompts_per_step": 4, "micro_batch_tokens": 200}
LOGGED = ("reward", "loss", "grad_norm", "num_tokens", "completions/mean_length")


def steps_of(
    load: Load,
    folder: Path,
    trouble: Trouble = lambda policy: nullcontext(),
    rows: int | None = None,
    **settings: Any,
) -> tuple[LayerGRPOTrainer, torch.Tensor, list[str]]:
    """Some steps of gradient descent: the trainer, how the block moved, and what was said."""
    policy = thawed(load, 2, quantize="none")
    start = trained(policy)
    said: list[str] = []
    sampler = sampler_of(policy)
    sampler.limits.rows.on_message = said.append
    # Plain gradient descent: Adam would blow rounding up where a gradient is zero.
    trainer = trainer_of(
        sampler,
        folder,
        settings_of(**{**SETTINGS, **settings}),
        trl={"optim": "sgd", "learning_rate": 1.0},
        update_rows=rows,
        on_message=said.append,
    )
    assert trainer.args.gradient_accumulation_steps == 2
    with trouble(policy):
        trainer.train()
    return trainer, trained(policy) - start, said


def assert_same_steps(
    found: tuple[LayerGRPOTrainer, torch.Tensor, list[str]],
    expected: tuple[LayerGRPOTrainer, torch.Tensor, list[str]],
    logged: tuple[str, ...] = LOGGED,
) -> None:
    assert expected[2] == []
    logs = [trainer.state.log_history[:-1] for trainer, _, _ in (found, expected)]
    assert len(logs[0]) == len(logs[1]) == 2
    for ours, theirs in zip(*logs, strict=True):
        assert [ours[name] for name in logged] == pytest.approx(
            [theirs[name] for name in logged], rel=1e-4, abs=2e-6
        )
        assert theirs["grad_norm"] > 0.01
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-4


@pytest.mark.parametrize("beta", [0, 0.1])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_slices_of_a_micro_batch_add_up_to_it(
    load: Load, tmp_path: Path, algorithm: str, beta: float
) -> None:
    settings = {"algorithm": algorithm, "beta": beta}
    in_slices = steps_of(load, tmp_path, rows=4, **settings)
    assert_same_steps(in_slices, steps_of(load, tmp_path, **settings))


@contextmanager
def short_forward(groups: int, *, gradient: bool) -> Iterator[None]:
    """Passes of more groups fail, with a gradient or without, after they have allocated what they need."""

    def check(policy: Policy, rollout: Rollout, **settings: Any) -> Any:
        found = completion_log_probs(policy, rollout, **settings)
        if torch.is_grad_enabled() == gradient and len(rollout.prompt_ids) > groups:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("midtune.rl.trainer.completion_log_probs", check)
        yield


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda policy: short_forward(1, gradient=True), id="forward"),
        pytest.param(lambda policy: short_backward(policy, 1), id="backward"),
        pytest.param(lambda policy: short_backward(policy, 2), id="backward-of-the-second-micro-batch"),
        pytest.param(lambda policy: short_backward(policy, 4), id="backward-of-the-second-step"),
    ],
)
def test_an_update_that_runs_out_of_memory_is_done_again(
    load: Load, tmp_path: Path, trouble: Trouble
) -> None:
    found = steps_of(load, tmp_path, trouble)
    assert_same_steps(found, steps_of(load, tmp_path))
    assert found[0].update_rows.rows == 4
    assert found[2] == [
        "memory ran out in the update with 8 completions together; from now on at most 4 go together."
    ]


def test_what_a_broken_pass_logged_is_forgotten(load: Load, tmp_path: Path) -> None:
    found = steps_of(load, tmp_path, lambda policy: short_backward(policy, 1), beta=0.1)
    logged = (*LOGGED, "entropy", "kl", "clip_ratio/region_mean")
    assert_same_steps(found, steps_of(load, tmp_path, rows=4, beta=0.1), logged)


def test_log_probs_of_the_reference_that_do_not_fit_are_computed_again(load: Load, tmp_path: Path) -> None:
    found = steps_of(load, tmp_path, lambda policy: short_forward(1, gradient=False), beta=0.1)
    assert_same_steps(found, steps_of(load, tmp_path, beta=0.1))
    assert found[0].update_rows.rows == 4


def test_a_step_survives_in_sampling(load: Load, tmp_path: Path) -> None:
    found = steps_of(load, tmp_path, lambda policy: memory_for(policy, 8, decoding))
    assert_same_steps(found, steps_of(load, tmp_path))
    assert found[0].sampler.limits.rows.rows == 8
    assert found[0].update_rows.rows is None
    assert found[2] == [
        "memory ran out in sampling with 16 completions together; from now on at most 8 go together."
    ]


def decoding(hidden: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and hidden.size(1) == 1


def test_a_group_that_does_not_fit_ends_the_run(load: Load, tmp_path: Path) -> None:
    with pytest.raises(RunStopped) as stopped:
        steps_of(load, tmp_path, lambda policy: short_forward(0, gradient=True))
    assert str(stopped.value) == (
        "memory ran out in the update with a single group of 4 completions; "
        "lower --max-new-tokens or --group-size, or add --set training.recompute=true."
    )


def test_metrics_say_what_fits_once_memory_has_run_out(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    sampler = sampler_of(policy)
    sampler.limits.rows.on_oom_hint = lambda: "The card is also in use by ollama (7)."
    said: list[str] = []
    with short_backward(policy, 2), memory_for(policy, 4, decoding):
        _, metrics = train(sampler, tmp_path, steps=3, on_message=said.append)
    limits = [(line.get("sampling_rows"), line.get("update_rows")) for line in metrics]
    assert limits == [(4, None), (4, 4), (4, 4)]
    (told,) = [text for text in said if "memory ran out in the update" in text]
    assert told.endswith("go together. The card is also in use by ollama (7).")
