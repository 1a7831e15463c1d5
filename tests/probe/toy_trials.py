"""A small probe: problems, a reward that varies with what is written, and the settings of runs of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midtune.config import RunConfig, load_config
from midtune.model.policy import Policy
from midtune.probe.trials import Runner, Trials
from midtune.report.terminal import Terminal
from midtune.rollout.sampling import Sampler, SamplingLimits
from midtune.rollout.text import TextSampler
from midtune.runs import RunFolder
from midtune.tasks import Reward, Row, Task

SETTINGS = {
    "task.eval_size": 8,
    "training.steps": 4,
    "training.beta": 0.0,
    "training.lr": 0.01,
    "training.group_size": 4,
    "training.max_new_tokens": 6,
    "training.prompts_per_step": 4,
    "evaluation.samples": 2,
}


def length(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[-1]["content"]) % 2) for completion in completions]


def toy_rows(count: int) -> list[Row]:
    return [
        {
            "prompt": [{"role": "user", "content": f"{i} and {i * i}"}],
            "question": f"{i} and {i * i}",
            "answer": str(i + i * i),
        }
        for i in range(count)
    ]


def toy_task(*, train: int = 24, held_out: int = 8, reward: Reward = length) -> Task:
    rows = toy_rows(train + held_out)
    return Task("sums", "f", rows[:train], rows[train:], reward, length)


def toy_config(**settings: Any) -> RunConfig:
    return load_config(None, {**SETTINGS, **{key.replace("__", "."): v for key, v in settings.items()}})


def toy_trials(
    policy: Policy,
    folder: Path,
    *,
    problems: int = 8,
    task: Task | None = None,
    sampler: Sampler | None = None,
) -> Trials:
    """Trials that may go on, run here on problems of their own."""
    task, terminal, run_folder = task or toy_task(), Terminal(quiet=True), RunFolder(folder)
    runner = Runner(sampler or TextSampler(policy, SamplingLimits()), task, toy_config(), terminal)
    runner.rows, runner.problems = toy_rows(16), toy_rows(problems)
    return Trials(
        runner.in_turn(run_folder), runner.config, policy.num_blocks, problems, run_folder, terminal
    )
