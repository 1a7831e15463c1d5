"""Training random models on a handful of questions, and looking at what it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from midtune.config import TrainingConfig
from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rl.training import in_order, sampling_of, train_blocks, trl_arguments
from midtune.rollout.boundary import with_boundary
from midtune.rollout.sampling import Rollout, Sampler, Sampling, SamplingLimits, padded
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import TextSampler
from midtune.tasks import Row
from tests.plain import plain_log_probs, stop_early

Load = Callable[..., Policy]
Metrics = list[dict[str, Any]]


def question_rows() -> list[Row]:
    questions = ["a", "two words", "the third question", "some", "five", "and the last of all"]
    return [{"prompt": [{"role": "user", "content": text}], "question": text} for text in questions]


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def short_questions_only(completion_ids: list[list[int]], question: list[str], **_: Any) -> list[float]:
    """All completions of a long question get the same reward, and those of a short one hardly ever."""
    scores = [sum(ids) / 1000 for ids in completion_ids]
    return [score if len(text) < 5 else 0.5 for score, text in zip(scores, question, strict=True)]


def settings_of(**changes: Any) -> TrainingConfig:
    given = {"steps": 2, "lr": 1e-3, "beta": 0, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6}
    return TrainingConfig.model_validate({**given, **changes})


def thawed(load: Load, *blocks: int, quantize: str = "nf4") -> Policy:
    policy = load("qwen3", quantize)
    stop_early(policy)
    for block in blocks:
        policy.thaw(block)
    return policy


def sampler_of(policy: Policy) -> TextSampler:
    return TextSampler(policy, SamplingLimits())


def train(
    trained: Policy | Sampler,
    folder: Path,
    reward: Any = even_share,
    rows: Sequence[Row] | None = None,
    **changes: Any,
) -> tuple[int, Metrics]:
    """The last step and the metrics; what is no training setting goes to `train_blocks`."""
    names = TrainingConfig.model_fields
    settings = settings_of(**{key: value for key, value in changes.items() if key in names})
    others = {key: value for key, value in changes.items() if key not in names}
    metrics: Metrics = []
    sampler = sampler_of(trained) if isinstance(trained, Policy) else trained
    step = train_blocks(
        sampler,
        rows or question_rows(),
        reward,
        settings,
        folder=folder,
        seed=0,
        **{"meter": Meter(sampler.policy.device), "on_step": metrics.append, **others},
    )
    return step, metrics


def arguments_of(settings: TrainingConfig, folder: Path, **changes: Any) -> tuple[GRPOConfig, list[Row]]:
    """TRL's settings with changes, and the rows in their order."""
    args = trl_arguments(
        settings, group_tokens=100, folder=folder, seed=0, device=torch.device("cpu"), checkpoints=False
    )
    for name, value in changes.items():
        setattr(args, name, value)
    return args, in_order(question_rows(), settings.steps * settings.prompts_per_step, seed=0)


def trainer_of(
    trained: Policy | Sampler,
    folder: Path,
    settings: TrainingConfig,
    reward: Any = even_share,
    trl: dict[str, Any] | None = None,
    **own: Any,
) -> LayerGRPOTrainer:
    """A trainer.

    Args:
        trl: changes to TRL's settings.
        own: arguments of `LayerGRPOTrainer`.
    """
    sampler = sampler_of(trained) if isinstance(trained, Policy) else trained
    args, rows = arguments_of(settings, folder, **(trl or {}))
    meter = Meter(sampler.policy.device)
    return LayerGRPOTrainer(sampler, sampling_of(settings), args, [reward], rows, meter=meter, **own)


class Replay(GRPOTrainer):
    """TRL's own trainer, except that completions are given instead of sampled."""

    completions: list[list[list[int]]]

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.completions.pop(0), None


def replay(
    policy: Policy,
    folder: Path,
    settings: TrainingConfig,
    completions: list[list[list[int]]],
    reward: Any = even_share,
    trl: dict[str, Any] | None = None,
) -> Replay:
    """Train with TRL alone on the completions of each step."""
    args, rows = arguments_of(settings, folder, **(trl or {}))
    trainer = Replay(
        model=policy.model,
        args=args,
        reward_funcs=[reward],
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    trainer.completions = list(completions)
    trainer.train()
    return trainer


class DecidedSampler(TextSampler):
    """Gives completions that are decided, with the log-probs that the policy gives them.

    Args:
        decide: prompts' token ids, one for each completion → the completions.
    """

    def __init__(self, policy: Policy, decide: Callable[[list[list[int]]], list[list[int]]]) -> None:
        super().__init__(policy, SamplingLimits())
        self.decide = decide

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        asked = [prompt_ids(self.policy.tokenizer, prompt) for prompt in prompts]
        prompt, completion = (
            padded(self.policy, asked[:: sampling.group_size], "left"),
            padded(self.policy, self.decide(asked), "right"),
        )
        unknown = torch.zeros(completion[0].shape)
        rollout = Rollout(*prompt, *completion, unknown, unknown, torch.zeros(len(asked), dtype=torch.bool))
        log_probs, entropies = plain_log_probs(self.policy, rollout, sampling.temperature)
        return with_boundary(self, replace(rollout, log_probs=log_probs, entropies=entropies), boundary_block)


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


@contextmanager
def short_backward(policy: Policy, failing: int) -> Iterator[None]:
    """The backward pass of this number fails when a part of the gradient of block 2 has been added."""
    added: list[str] = []
    done = 0

    def check(gradient: torch.Tensor) -> None:
        nonlocal done
        done += 1
        if done == failing:
            assert added
            raise torch.OutOfMemoryError("CUDA out of memory.")

    block = policy.blocks[2]
    hooks = [
        block.mlp.down_proj.weight.register_hook(lambda gradient: added.append("down_proj")),
        block.self_attn.q_proj.weight.register_hook(check),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
