from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from midtune.config import TrainingConfig
from midtune.errors import MidtuneError, RunStopped
from midtune.measure.meter import Meter
from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.rl import trainer as trainer_room
from midtune.rl.algorithms import ALGORITHMS, own_advantages
from midtune.rl.tail import completion_log_probs
from midtune.rl.trainer import TRAINED_TENSORS, LayerGRPOTrainer, check_trainable, compare_log_probs
from midtune.rl.training import in_order, train_blocks, trl_arguments
from midtune.rollout.sampling import Rollout, Sampling
from midtune.rollout.text import sample
from midtune.tasks import Row
from tests.plain import stop_early

Load = Callable[..., Policy]
# TRL has no other way to the advantages of the rest.
TRLS = [name for name in ALGORITHMS if own_advantages(name, omega=1, gamma=1) is None]
CHECKPOINT_FILES = {
    "manifest.json",
    TRAINED_TENSORS,
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}


def question_rows() -> list[Row]:
    questions = ["a", "two words", "the third question", "some", "five", "and the last of all"]
    return [{"prompt": [{"role": "user", "content": text}], "question": text} for text in questions]


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def short_questions_only(completion_ids: list[list[int]], question: list[str], **_: Any) -> list[float]:
    """All completions of a long question get the same reward, and those of a short one hardly ever."""
    scores = [sum(ids) / 1000 for ids in completion_ids]
    return [score if len(text) < 5 else 0.5 for score, text in zip(scores, question, strict=True)]


def wavering() -> Any:
    """A reward that tells completions apart in every second step only."""
    calls = itertools.count()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return even_share(completion_ids) if next(calls) % 2 == 0 else [0.5] * len(completion_ids)

    return reward


def nothing(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.0] * len(completion_ids)


def settings_of(**changes: Any) -> TrainingConfig:
    given = {"steps": 2, "lr": 1e-3, "beta": 0, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6}
    return TrainingConfig.model_validate({**given, **changes})


def thawed(load: Load, *blocks: int, quantize: str = "nf4") -> Policy:
    policy = load("qwen3", quantize)
    stop_early(policy)
    for block in blocks:
        policy.thaw(block)
    return policy


def train(
    policy: Policy, folder: Path, reward: Any = even_share, **changes: Any
) -> tuple[int, list[dict[str, Any]]]:
    """The last step and the metrics; what is no training setting goes to `train_blocks`."""
    names = TrainingConfig.model_fields
    settings = settings_of(**{key: value for key, value in changes.items() if key in names})
    others = {key: value for key, value in changes.items() if key not in names}
    metrics: list[dict[str, Any]] = []
    step = train_blocks(
        policy,
        question_rows(),
        reward,
        settings,
        folder=folder,
        seed=0,
        on_step=metrics.append,
        **{"meter": Meter(policy.device), **others},
    )
    return step, metrics


def contents(policy: Policy) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, packed 4-bit weights and their quantization constants among them."""
    return {
        name: value.clone()
        for name, value in [*policy.model.state_dict().items(), *policy.model.named_buffers()]
    }


def changed(policy: Policy, before: dict[str, torch.Tensor]) -> set[str]:
    after = contents(policy)
    assert after.keys() == before.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def trained(policy: Policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.trained_parameters().values()])


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
    trainer_of(LayerGRPOTrainer, policy, tmp_path, settings_of())
    found = policy.trained_parameters()
    assert found.keys() == {f"model.layers.2.{name}" for name, _ in policy.blocks[2].named_parameters()}
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}


def test_a_trained_parameter_in_half_precision_is_refused(load: Load) -> None:
    policy = thawed(load, 2)
    policy.blocks[2].mlp.up_proj.bfloat16()
    with pytest.raises(MidtuneError, match=r"layers\.2\.mlp\.up_proj\.weight is trained in torch\.bfloat16"):
        check_trainable(policy)


def test_a_gradient_outside_the_trained_block_is_refused(load: Load) -> None:
    policy = thawed(load, 2)
    policy.model.model.norm.requires_grad_(True)
    with pytest.raises(MidtuneError, match=r"model\.norm\.weight requires a gradient outside blocks \[2\]"):
        check_trainable(policy)


def test_a_frozen_tensor_that_moved_is_named(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    trainer = trainer_of(LayerGRPOTrainer, policy, tmp_path, settings_of())
    trainer.check_frozen()
    policy.blocks[1].mlp.up_proj.weight.data[0] ^= 1
    with pytest.raises(MidtuneError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is frozen"):
        trainer.check_frozen()


def test_an_update_that_computes_otherwise_than_the_sampler_is_refused(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hotter(*arguments: Any, temperature: float, **settings: Any) -> Any:
        return completion_log_probs(*arguments, temperature=2 * temperature, **settings)

    monkeypatch.setattr("midtune.rl.trainer.completion_log_probs", hotter)
    with pytest.raises(MidtuneError, match="cannot train this architecture"):
        train(thawed(load, 2), tmp_path)


def test_the_first_groups_that_are_computed_are_compared(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def listening(policy: Policy, rollout: Rollout, log_probs: torch.Tensor) -> None:
        compared.append(len(log_probs))
        compare_log_probs(policy, rollout, log_probs)

    monkeypatch.setattr("midtune.rl.trainer.compare_log_probs", listening)
    calls = itertools.count()

    def equal_at_first(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.5] * len(completion_ids) if next(calls) == 0 else even_share(completion_ids)

    train(thawed(load, 2), tmp_path, equal_at_first, steps=3)
    assert compared == [8]


def test_the_policy_is_left_as_it_was_found(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    train(policy, tmp_path)
    assert not policy.model.training
    assert "forward" not in vars(policy.model)
    assert {parameter.dtype for parameter in policy.trained_parameters().values()} == {torch.float32}


# The same as TRL itself.


class Replay(GRPOTrainer):
    """TRL's own trainer, except that completions are given instead of sampled."""

    completions: list[list[list[int]]]

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.completions.pop(0), None


def trainer_of(
    kind: type[GRPOTrainer],
    policy: Policy,
    folder: Path,
    settings: TrainingConfig,
    reward: Any = even_share,
    **arguments: Any,
) -> GRPOTrainer:
    rows = in_order(question_rows(), settings.steps * settings.prompts_per_step, seed=0)
    args = trl_arguments(
        settings,
        group_tokens=100,
        folder=folder,
        seed=0,
        device=policy.device,
        checkpoints=False,
    )
    names = ("vllm", "recompute_tokens", "update_rows", "advantages", "bf16_gradients", "on_message")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    for name, value in arguments.items():
        setattr(args, name, value)
    if issubclass(kind, LayerGRPOTrainer):
        return kind(policy, args, [reward], rows, meter=Meter(policy.device), **own)
    return kind(
        model=policy.model,
        args=args,
        reward_funcs=[reward],
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )


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
    arguments = {"optim": "sgd", "learning_rate": 1.0, **arguments}
    layer = trainer_of(
        LayerGRPOTrainer, ours, folder, settings, listening, recompute_tokens=recompute_tokens, **arguments
    )
    layer.train()
    stock = trainer_of(Replay, theirs, folder, settings, reward, **arguments)
    stock.completions = list(drawn)
    stock.train()

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
    train(policy, tmp_path, steps=1, lr=1e-3, faster={1: 3.0})
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
    trainer = trainer_of(LayerGRPOTrainer, policy, tmp_path, settings_of(optimizer="adamw_8bit", lr=1e-2))
    trainer.train()
    assert not torch.equal(trained(policy), start)
    states = trainer.optimizer.optimizer.state[policy.blocks[2].mlp.up_proj.weight]
    assert states["state1"].dtype == states["state2"].dtype == torch.uint8


def test_a_step_without_advantages_moves_on_momentum(load: Load, tmp_path: Path) -> None:
    found = []
    for scored in (False, True):
        policy = thawed(load, 2)
        trainer = trainer_of(LayerGRPOTrainer, policy, tmp_path, settings_of(steps=4), wavering())
        if scored:
            trainer._scored_for_update = lambda trainer=trainer: completion_log_probs(
                trainer.policy, trainer._rollout, temperature=trainer.temperature
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
        trainer = trainer_of(LayerGRPOTrainer, policy, tmp_path, settings, optim="sgd", learning_rate=1.0)
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


# What a run says.


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


def test_only_the_limit_cuts_a_completion() -> None:
    eos = 2
    ids = torch.tensor([[5, 6, eos], [5, 6, 7], [5, eos, 0], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]])  # a stop text has ended the last one
    trainer: Any = SimpleNamespace(
        _rollout=SimpleNamespace(completion_ids=ids, completion_mask=mask),
        policy=SimpleNamespace(stop_token_ids=[eos]),
        args=SimpleNamespace(max_completion_length=3),
        game=None,
    )
    assert LayerGRPOTrainer._cut_share(trainer) == 0.25


def test_a_metrics_line_has_the_peak_of_each_phase_once_the_meter_measures_it(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter(range(1000, 2000))
    monkeypatch.setattr(
        Meter, "_counted", lambda meter: {"peak_bytes": next(counted), "reserved_bytes": 5000}
    )
    monkeypatch.setattr(Meter, "_reset_counter", lambda meter: True)
    policy = thawed(load, 2)
    meter = Meter(policy.device)
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


# The order of the rows.


def test_all_rows_are_used_before_any_comes_again() -> None:
    rows = question_rows()
    questions = [row["question"] for row in in_order(rows, 15, seed=0)]
    everything = {row["question"] for row in rows}
    assert set(questions[:6]) == set(questions[6:12]) == everything
    assert len(questions) == 15


def test_a_seed_fixes_the_order_of_the_rows() -> None:
    order = partial(in_order, question_rows(), 12)
    assert order(1) == order(1)
    assert order(1) != order(2)


def in_fp16(random_checkpoint: Callable[..., Path]) -> Policy:
    policy = load_policy(resolve(str(random_checkpoint("qwen3"))), device="cpu", dtype=torch.float16)
    policy.thaw(2)
    return policy


def test_a_loss_that_is_scaled_gives_the_gradient_of_one_that_is_not(
    random_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for scale in (1.0, 2.0**12):
        monkeypatch.setattr(trainer_room, "FIRST_LOSS_SCALE", scale)
        _, metrics = train(in_fp16(random_checkpoint), tmp_path / str(scale), steps=1)
        norms.append(metrics[0]["grad_norm"])
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_a_step_whose_gradients_overflow_changes_nothing_and_is_said(
    random_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_room, "FIRST_LOSS_SCALE", 2.0**40)
    policy = in_fp16(random_checkpoint)
    before = trained(policy)
    said: list[str] = []
    train(policy, tmp_path, steps=1, on_message=said.append)
    assert torch.equal(trained(policy), before)
    assert [text for text in said if "overflowed" in text] == [
        "gradients of step 1 overflowed in fp16, so it changed nothing; the next ones are scaled less."
    ]


def test_activations_that_overflow_in_fp16_end_the_run(load: Load) -> None:
    policy = thawed(load, 2)
    rollout = sample(policy, [[5, 6, 7]], Sampling(4), group_size=2, boundary_block=2)
    policy.compute_dtype = torch.float16
    with pytest.raises(RunStopped, match="overflow in fp16; add --set model.dtype=fp32"):
        compare_log_probs(policy, rollout, rollout.log_probs * torch.nan)


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


def test_one_card_is_used_where_several_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoCards(GRPOConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            assert self.n_gpu == 0
            self._n_gpu = 2

    monkeypatch.setattr("midtune.rl.training.GRPOConfig", TwoCards)
    args = trl_arguments(
        settings_of(), group_tokens=10, folder=tmp_path, seed=0, device=torch.device("cpu"), checkpoints=False
    )
    assert args.n_gpu == 1


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
