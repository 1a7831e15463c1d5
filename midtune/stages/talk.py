"""`midtune try`: the base model and the trained one answer the same prompts, side by side.

The model is loaded once; the base is that model with the trained blocks taken out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch

from midtune.config import RunConfig, with_settings
from midtune.model.patch import apply_patch, read_patch, require_patch
from midtune.model.policy import Policy
from midtune.report.results import Answers
from midtune.report.terminal import Terminal
from midtune.rl.training import sampling_of
from midtune.rollout.apart import decoder_of
from midtune.rollout.decoding import ready_to_sample
from midtune.rollout.evaluation import score_completions
from midtune.rollout.sampling import Sampling, padded
from midtune.rollout.speech import prompt_ids
from midtune.stages.opening import Opened
from midtune.tasks import Row, Task
from midtune.tasks.prompts import prompted
from midtune.tasks.split import problem


def run(
    target: str, config: RunConfig, *, base: bool, n: int | None, temperature: float, terminal: Terminal
) -> Iterator[dict[str, Any]]:
    """Answer prompts that are typed or piped in, a line each, or the first `n` held-out problems.

    `config` is the run's own with command-line changes. On a terminal completions are shown while they are sampled.
    `base` samples the base model alone.

    Yields the `prompt`, its `answer` and, for `base` and `trained`, the `completion` and its `score`; a prompt that is
    no problem of the task has neither answer nor scores.

    Raises InputError for an unfinished run, or a task that is played in turns.
    """
    folder = require_patch(target)
    patch = read_patch(folder)
    opened = Opened(
        with_settings(config, {"model.name": patch.base_model, "model.revision": patch.revision}), terminal
    )
    task = opened.task
    task.require_one_turn("`midtune try`")
    policy = opened.policy()
    if not base:
        apply_patch(policy, folder)
    sampling = sampling_of(config.training.model_copy(update={"temperature": temperature, "group_size": 1}))
    drawing = torch.Generator().manual_seed(config.seed)
    for row, is_problem in _prompts(task, opened.config, n, terminal):
        uniforms = None
        if temperature > 0:
            uniforms = torch.rand(sampling.max_new_tokens, 1, generator=drawing).to(policy.device)
        found: dict[str, Any] = {"prompt": row["question"], "answer": row["answer"] if is_problem else None}
        with terminal.live() as show:
            for arm in ("base",) if base else ("base", "trained"):
                found[arm] = {"completion": "", "score": None}

                def stream(text: str, own: dict[str, Any] = found[arm]) -> None:
                    own["completion"] = text
                    show(Answers(found))  # noqa: B023 (it is called within the loop)

                with policy.untrained() if arm == "base" else contextlib.nullcontext():
                    text, ids = complete(policy, row["prompt"], sampling, uniforms, stream)
                found[arm]["completion"] = text
                if is_problem:
                    (found[arm]["score"],) = score_completions(task.score, [row], [text], [ids])
        yield found


def complete(
    policy: Policy,
    prompt: Any,
    sampling: Sampling,
    uniforms: torch.Tensor | None,
    on_text: Callable[[str], None],
) -> tuple[str, list[int]]:
    """Complete a prompt by plain decoding, calling `on_text` with the text so far; returns the text and its tokens."""
    tokenizer, said = policy.tokenizer, list[int]()

    def text() -> str:
        return str(tokenizer.decode(said, skip_special_tokens=True))

    def stream(tokens: torch.Tensor) -> None:
        said.append(int(tokens))
        # A character may take several tokens.
        on_text(text().rstrip("\ufffd"))

    ids, mask = padded(policy, [prompt_ids(tokenizer, prompt)], "left")
    with ready_to_sample(policy, 1, unpack=False):
        decoder = decoder_of(policy)(policy, ids, mask, 1)
        decoder.draw(sampling, [sampling.max_new_tokens], uniforms, leave=False, on_tokens=stream)
    return text(), said


def _prompts(task: Task, config: RunConfig, n: int | None, terminal: Terminal) -> Iterator[tuple[Row, bool]]:
    """Rows to answer, and whether each is a problem of the task."""
    if n is not None:
        yield from ((row, True) for row in islice(task.held_out, n))
        return
    problems = cycle(task.held_out)
    if terminal.interactive:
        terminal.message("type a prompt, or Enter for a problem of the task; Ctrl-D ends")
    while True:
        try:
            text = terminal.ask(">") if terminal.interactive else input().strip()
        except EOFError:
            return
        if text:
            yield prompted(problem(text, text), config.task), False
        elif terminal.interactive:
            yield next(problems), True
