from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.config import TrainingConfig
from midtune.errors import MidtuneError
from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.rl.algorithms import ALGORITHMS, own_advantages
from midtune.rl.tail import completion_log_probs
from midtune.rl.trainer import TRAINED_TENSORS
from midtune.rollout.sampling import Rollout, SamplingLimits
from midtune.rollout.text import TextSampler
from tests.rl.toy_training import (
    Load,
    changed,
    contents,
    even_share,
    replay,
    settings_of,
    short_questions_only,
    thawed,
    train,
    trained,
    trainer_of,
)

# TRL has no other way to the advantages of the rest.
TRLS = [name for name in ALGORITHMS if own_advantages(settings_of(algorithm=name)) is None]
CHECKPOINT_FILES = {
    "manifest.json",
    TRAINED_TENSORS,
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}


def wavering() -> Any:
    """A reward that tells completions apart in every second step only."""
    calls = itertools.count()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return even_share(completion_ids) if next(calls) % 2 == 0 else [0.5] * len(completion_ids)

    return reward


# What is trained.


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_only_the_trained_block_changes(load: Load, tmp_path: Path, quantize: str) -> None:
    policy = thawed(load, 2, quantize=quantize)
    before = contents(policy)
    assert any("absmax" in name for name in before) == (quantize == "nf4")
    train(policy, tmp_path)
    assert changed(policy, before) == {name for name in before if name.startswith("model.layers.2.")}


def test_two_blocks_are_trained_together(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 1, 3)
    before = contents(policy)
    train(policy, tmp_path)
    assert changed(policy, before) == {
        name for name in before if name.startswith(("model.layers.1.", "model.layers.3."))
    }


def test_only_the_adapter_changes_under_lora(load: Load, tmp_path: Path) -> None:
    policy = thawed(load)
    policy.add_lora([2], rank=4)
    before = contents(policy)
    train(policy, tmp_path)
    found = changed(policy, before)
    assert found == {name for name in before if "lora_" in name}
    assert all(name.startswith("model.layers.2.") for name in found)


def test_trained_parameters_are_fp32_and_no_others_are_trained(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    trainer_of(policy, tmp_path, settings_of())
    found = policy.trained_parameters()
    assert found.keys() == {f"model.layers.2.{name}" for name, _ in policy.blocks[2].named_parameters()}
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}


def test_a_frozen_tensor_that_moved_is_named(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    trainer = trainer_of(policy, tmp_path, settings_of())
    trainer.check_frozen()
    policy.blocks[1].mlp.up_proj.weight.data[0] ^= 1
    with pytest.raises(MidtuneError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is frozen"):
        trainer.check_frozen()


class Lying(TextSampler):
    """Gives log-probs that are not the policy's in the rollout of this number."""

    def __init__(self, policy: Policy, number: int) -> None:
        super().__init__(policy, SamplingLimits())
        self.left = number

    def sample(self, *arguments: Any, **settings: Any) -> Rollout:
        rollout = super().sample(*arguments, **settings)
        self.left -= 1
        return replace(rollout, log_probs=2 * rollout.log_probs) if self.left == 0 else rollout


@pytest.mark.parametrize(("lying", "steps"), [(1, 3), (2, 1), (3, 3)])
def test_the_first_groups_that_are_computed_are_compared_with_the_sampler(
    load: Load, tmp_path: Path, lying: int, steps: int
) -> None:
    calls = itertools.count()

    def equal_at_first(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.5] * len(completion_ids) if next(calls) == 0 else even_share(completion_ids)

    metrics: list[dict[str, Any]] = []
    refused = pytest.raises(MidtuneError, match="cannot train this architecture")
    with refused if steps < 3 else nullcontext():
        train(Lying(thawed(load, 2), lying), tmp_path, equal_at_first, steps=3, on_step=metrics.append)
    assert len(metrics) == steps


def test_the_policy_is_left_as_it_was_found(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    train(policy, tmp_path)
    assert not policy.model.training
    assert "forward" not in vars(policy.model)
    assert {parameter.dtype for parameter in policy.trained_parameters().values()} == {torch.float32}


# The same as TRL itself.


def assert_as_trl(
    load: Load,
    folder: Path,
    quantize: str,
    settings: TrainingConfig,
    reward: Any = even_share,
    recompute_tokens: int = 0,
    whole: bool = False,
    **arguments: Any,
) -> None:
    """Train block 2 or all with midtune and, on the same completions, with TRL; compare what comes of it."""
    ours, theirs = (thawed(load, *([] if whole else [2]), quantize=quantize) for _ in range(2))
    if whole:
        ours.thaw_all()
        theirs.thaw_all()
    start = trained(ours)
    drawn: list[list[list[int]]] = []

    def listening(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        drawn.append(completion_ids)
        return reward(completion_ids, **columns)

    # Plain gradient descent: Adam would blow rounding up where a gradient is zero.
    trl = {"optim": "sgd", "learning_rate": 1.0, **arguments}
    layer = trainer_of(
        ours, folder, settings, listening, trl, tail_arguments={"recompute_tokens": recompute_tokens}
    )
    layer.train()
    stock = replay(theirs, folder, settings, drawn, reward, trl)

    names = ["loss", "grad_norm", "reward", "completions/mean_length", "num_tokens"]
    if layer.args.gradient_accumulation_steps == 1:
        # TRL shuffles rows into other micro-batches, and takes means of these over each.
        names += ["entropy", "kl", "clip_ratio/region_mean"]
    steps = zip(layer.state.log_history[:-1], stock.state.log_history[:-1], strict=True)
    for found, expected in steps:
        common = [name for name in names if name in expected]
        assert [found[name] for name in common] == pytest.approx(
            [expected[name] for name in common], rel=1e-4, abs=2e-6
        )
        assert found["grad_norm"] > 0.01
    moved = trained(theirs) - start
    assert float((trained(ours) - trained(theirs)).norm() / moved.norm()) < 1e-4


@pytest.mark.parametrize("beta", [0, 0.1])
@pytest.mark.parametrize("algorithm", TRLS)
def test_three_steps_equal_trls(load: Load, tmp_path: Path, algorithm: str, beta: float) -> None:
    settings = settings_of(steps=3, algorithm=algorithm, beta=beta, temperature=0.8)
    assert_as_trl(load, tmp_path, "none", settings)


@pytest.mark.parametrize("beta", [0, 0.1])
def test_full_training_equals_trls(load: Load, tmp_path: Path, beta: float) -> None:
    settings = settings_of(steps=3, beta=beta, temperature=0.8)
    assert_as_trl(load, tmp_path, "none", settings, whole=True)


def test_some_blocks_learn_faster(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 1, 2, quantize="none")
    before = {name: p.detach().clone() for name, p in policy.trained_parameters().items()}
    train(policy, tmp_path, steps=1, lr=1e-3, lr_multipliers={1: 3.0})
    # A first step of Adam moves every weight that has a gradient by its learning rate.
    for name, parameter in policy.trained_parameters().items():
        expected = 3e-3 if ".1." in name else 1e-3
        assert float((parameter - before[name]).abs().max().detach()) == pytest.approx(expected, rel=0.01)


def test_a_stop_after_a_step_leaves_the_schedule_as_it_was(load: Load, tmp_path: Path) -> None:
    settings = {"steps": 4, "lr_schedule": "linear"}
    _, whole = train(thawed(load, 2), tmp_path / "whole", **settings)
    step, part = train(thawed(load, 2), tmp_path / "part", **settings, stop_after=2)
    assert step == 2
    assert [line["lr"] for line in part] == [line["lr"] for line in whole[:2]]
    assert (tmp_path / "part" / "checkpoint-2" / TRAINED_TENSORS).is_file()


@pytest.mark.parametrize("algorithm", TRLS)
def test_groups_of_equal_rewards_are_left_out_exactly(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    groups: list[int] = []

    def counted(policy: Policy, rollout: Rollout, **settings: Any) -> Any:
        groups.append(len(rollout.prompt_ids))
        return completion_log_probs(policy, rollout, **settings)

    monkeypatch.setattr("midtune.rl.trainer.completion_log_probs", counted)
    # Half of the six questions are short.
    settings = settings_of(steps=3, algorithm=algorithm, prompts_per_step=6)
    assert_as_trl(load, tmp_path, "none", settings, short_questions_only)
    assert groups == [3, 3, 3]


def test_an_entropy_bonus_weighs_groups_of_equal_rewards_too(load: Load, tmp_path: Path) -> None:
    settings = settings_of(steps=3, prompts_per_step=6)
    assert_as_trl(load, tmp_path, "none", settings, short_questions_only, entropy_coef=0.1)


def test_recomputing_the_tail_equals_trls(load: Load, tmp_path: Path) -> None:
    assert_as_trl(load, tmp_path, "none", settings_of(steps=3), recompute_tokens=60)


def test_8_bit_adam_keeps_its_states_in_8_bit(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    start = trained(policy)
    trainer = trainer_of(policy, tmp_path, settings_of(optimizer="adamw_8bit", lr=1e-2))
    trainer.train()
    assert not torch.equal(trained(policy), start)
    states = trainer.optimizer.optimizer.state[policy.blocks[2].mlp.up_proj.weight]
    assert states["state1"].dtype == states["state2"].dtype == torch.uint8


def test_a_step_without_advantages_moves_on_momentum(load: Load, tmp_path: Path) -> None:
    found = []
    for scored in (False, True):
        policy = thawed(load, 2)
        trainer = trainer_of(policy, tmp_path, settings_of(steps=4), wavering())
        if scored:
            trainer._scored_for_update = lambda trainer=trainer: completion_log_probs(
                trainer.policy, trainer._piece["rollout"], temperature=trainer.temperature
            )
        trainer.train()
        found.append(trained(policy))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_three_steps_over_a_4_bit_model_equal_trls(load: Load, tmp_path: Path) -> None:
    assert_as_trl(load, tmp_path, "nf4", settings_of(steps=3))


def test_micro_batches_equal_trls(load: Load, tmp_path: Path) -> None:
    settings = settings_of(steps=3, beta=0.1, prompts_per_step=4, micro_batch_tokens=200)
    assert_as_trl(load, tmp_path, "none", settings)


@pytest.mark.parametrize("parts", [1, 2])
def test_using_completions_twice_equals_trls(load: Load, tmp_path: Path, parts: int) -> None:
    settings = settings_of(
        steps=4, algorithm="grpo", epsilon=1e-3, prompts_per_step=2, micro_batch_tokens=200 // parts
    )
    assert_as_trl(load, tmp_path, "none", settings, num_iterations=2)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_micro_batches_add_up_to_one_batch(load: Load, tmp_path: Path, algorithm: str) -> None:
    found = []
    for tokens in (1, 100_000):
        policy = thawed(load, 2)
        start = trained(policy)
        settings = settings_of(
            steps=2, algorithm=algorithm, beta=0.1, prompts_per_step=4, micro_batch_tokens=tokens
        )
        trainer = trainer_of(policy, tmp_path, settings, trl={"optim": "sgd", "learning_rate": 1.0})
        assert trainer.args.gradient_accumulation_steps == (4 if tokens == 1 else 1)
        trainer.train()
        found.append(trained(policy) - start)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4


# The KL term.


def test_kl_is_zero_at_first_and_grows(load: Load, tmp_path: Path) -> None:
    _, metrics = train(thawed(load, 2), tmp_path, steps=3, beta=0.1)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[1]["kl"] > 1e-6


def test_kl_under_lora_is_against_the_base(load: Load, tmp_path: Path) -> None:
    policy = thawed(load)
    policy.add_lora([2], rank=4)
    _, metrics = train(policy, tmp_path, steps=3, beta=0.1)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[-1]["kl"] > 1e-6


# Checkpoints.


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_resumed_run_equals_one_that_was_never_stopped(load: Load, tmp_path: Path, adapter: str) -> None:
    def start() -> Policy:
        torch.manual_seed(0)
        policy = thawed(load, *([2] if adapter == "full" else []))
        if adapter == "lora":
            policy.add_lora([2], rank=4)
        return policy

    settings = {"steps": 4, "beta": 0.1, "lr_schedule": "linear", "micro_batch_tokens": 1}
    straight, resumed = start(), start()
    _, expected = train(straight, tmp_path / "straight", **settings)

    stops = iter([False, True])
    step, before = train(start(), tmp_path / "run", **settings, stop_requested=lambda: next(stops))
    assert step == 2
    step, after = train(resumed, tmp_path / "run", **settings, resume_from=tmp_path / "run" / "checkpoint-2")
    assert step == 4

    exact = ("step", "reward", "loss", "kl", "grad_norm", "lr", "entropy", "completion_length")
    assert [[line[name] for name in exact] for line in before + after] == [
        [line[name] for name in exact] for line in expected
    ]
    assert torch.equal(trained(resumed), trained(straight))


def test_a_checkpoint_holds_the_trained_tensors_only(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    train(policy, tmp_path, steps=1)
    folder = tmp_path / "checkpoint-1"
    assert {file.name for file in folder.iterdir()} == CHECKPOINT_FILES
    # The block and Adam's two moments of it, and what is written around them.
    trained_bytes = 4 * trained(policy).numel()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3 * trained_bytes + 65536


def test_a_requested_stop_saves_a_checkpoint(load: Load, tmp_path: Path) -> None:
    step, _ = train(thawed(load, 2), tmp_path, steps=3, stop_requested=lambda: True)
    assert step == 1
    assert (tmp_path / "checkpoint-1" / TRAINED_TENSORS).is_file()


def test_the_two_latest_checkpoints_are_kept(load: Load, tmp_path: Path) -> None:
    train(thawed(load, 2), tmp_path, steps=4, checkpoint_every=1)
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_without_checkpoints_nothing_is_written(load: Load, tmp_path: Path) -> None:
    train(thawed(load, 2), tmp_path, checkpoints=False)
    assert list(tmp_path.glob("checkpoint-*")) == []


def in_fp16(random_checkpoint: Callable[..., Path]) -> Policy:
    policy = load_policy(resolve(str(random_checkpoint("qwen3"))), device="cpu", dtype=torch.float16)
    policy.thaw(2)
    return policy


def test_a_loss_that_is_scaled_gives_the_gradient_of_one_that_is_not(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    norms = []
    for scale in (1.0, 2.0**12):
        trainer = trainer_of(in_fp16(random_checkpoint), tmp_path, settings_of(steps=1))
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_a_step_whose_gradients_overflow_changes_nothing_and_is_said(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def large(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1e9 * share for share in even_share(completion_ids)]

    policy = in_fp16(random_checkpoint)
    before = trained(policy)
    said: list[str] = []
    train(policy, tmp_path, large, steps=1, algorithm="dr_grpo", on_message=said.append)
    assert torch.equal(trained(policy), before)
    assert [text for text in said if "overflowed" in text] == [
        "gradients of step 1 overflowed in fp16, so it changed nothing; the next ones are scaled less."
    ]


def test_runs_on_two_threads_are_alike_to_the_last_bit(load: Load, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for run in range(3):
            policy = thawed(load, 1, 2)
            train(policy, tmp_path / str(run), steps=3, prompts_per_step=4, group_size=8, lr=1e-2, beta=0.1)
            found.append(trained(policy))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fp32_masters_learn_among_bf16_activations(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    policy = load_policy(resolve(str(random_checkpoint("qwen3"))), device="cuda")
    policy.thaw(2)
    before = contents(policy)
    _, metrics = train(policy, tmp_path, beta=0.1)
    assert {parameter.dtype for parameter in policy.trained_parameters().values()} == {torch.float32}
    assert changed(policy, before) == {name for name in before if name.startswith("model.layers.2.")}
    assert metrics[-1]["grad_norm"] > 0
