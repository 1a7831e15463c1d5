"""What several commands begin with: the model and the task that a configuration names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from midtune.config import RunConfig, TrainingConfig
from midtune.device import dtype_named, resolve_device
from midtune.errors import InputError
from midtune.measure.cards import other_processes
from midtune.measure.meter import card_of
from midtune.model.host import embed_on_host
from midtune.model.loading import load_policy, load_tokenizer
from midtune.model.policy import Policy
from midtune.model.sources import Source, resolve
from midtune.report.display import WorkDisplay
from midtune.report.formats import card_text, processes_text
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import Evaluation, evaluate
from midtune.rollout.sampler import Sampling
from midtune.rollout.speech import prompt_ids
from midtune.stages.reading import read_task
from midtune.tasks import Row, Task, check_reward


def with_model(config: RunConfig, name: str, revision: str | None) -> RunConfig:
    """The configuration with another model in place of its own."""
    model = config.model.model_copy(update={"name": name, "revision": revision})
    return config.model_copy(update={"model": model})


def open_source(config: RunConfig, terminal: Terminal) -> Source:
    """The model's files on this machine, fetched or converted if need be."""
    resolve_device(config.model.device)
    bars: dict[str, WorkDisplay] = {}
    done_before: dict[str, int] = {}
    with contextlib.ExitStack() as shown:

        def progress(message: str, done: int | None, total: int | None) -> None:
            if message not in bars:
                terminal.message(message)
                shown.close()
                bars[message] = shown.enter_context(terminal.progress(message, total))
            bars[message]((done or 0) - done_before.get(message, 0))
            done_before[message] = done or 0

        return resolve(config.model.name, config.model.revision, progress=progress)


def open_policy(
    config: RunConfig, source: Source, terminal: Terminal, *, quantize: str | None = None
) -> Policy:
    """The model in memory, frozen; says what else uses its card where memory is tight, and when it runs out."""
    device = resolve_device(config.model.device)
    card = card_of(device) if device.type == "cuda" else None
    if card is not None and card.tight:
        terminal.message(f"memory is tight: {card_text(card)}.")
    with terminal.progress(f"loading {source.name}", None):
        policy = load_policy(
            source,
            quantize=quantize or config.model.quantize,
            device=config.model.device,
            dtype=dtype_named(config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
            unpack=config.model.unpack == "auto",
        )
    place_embedding(config, policy)
    policy.sampling_rows.on_message = terminal.message
    if card is not None:
        policy.sampling_rows.others = partial(_others_text, card.uuid)
    return policy


def place_embedding(config: RunConfig, policy: Policy) -> None:
    """Put the input embedding where `model.embeddings` says."""
    if config.model.embeddings == "host":
        embed_on_host(policy.model, policy.source.name)


def _others_text(uuid: str) -> str:
    others = other_processes(uuid)
    return f"The card is also in use by {processes_text(others)}." if others else ""


def open_task(config: RunConfig, terminal: Terminal, *, more: int = 0) -> Task:
    """The task, its rewards already tried on real rows, its prompts within `task.max_prompt_tokens`.

    Args:
        more: training problems beyond those that a run uses.
    """
    task = read_task(config, more=more, thinking=partial(_thinks_from_the_start, config, terminal))
    check_reward(task)
    if config.training.algorithm == "gigpo" and task.game is None:
        raise InputError(f"gigpo compares turns, and {task.name} is answered in one; use grpo.")
    if config.training.vllm is not None and task.game is not None:
        raise InputError(
            f"{task.name} is played in turns, which midtune samples itself; leave training.vllm out."
        )
    if config.task.max_prompt_tokens is not None:
        task = _without_long_prompts(task, config, terminal)
    if task.note:
        terminal.message(task.note)
    return task


def _thinks_from_the_start(config: RunConfig, terminal: Terminal) -> bool:
    """Whether prompts of the model end with `<think>`, so that its completions begin within."""
    tokenizer = load_tokenizer(open_source(config, terminal), config.model.trust_remote_code)
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "?"}])
    return str(tokenizer.decode(ids)).rstrip().endswith("<think>")


def _without_long_prompts(task: Task, config: RunConfig, terminal: Terminal) -> Task:
    """The task without prompts over the limit, or a refusal that counts them, as `task.bad_rows` has it."""
    limit = config.task.max_prompt_tokens or 0
    source = open_source(config, terminal)
    tokenizer = load_tokenizer(source, config.model.trust_remote_code)
    sides = task.train, task.held_out
    lengths = [[len(prompt_ids(tokenizer, row["prompt"])) for row in side] for side in sides]
    every = [length for side in lengths for length in side]
    long = sum(length > limit for length in every)
    if not long:
        return task
    found = f"{long} of {len(every)} prompts are longer than {limit} tokens, the longest {max(every)}"
    train, held_out = (
        [row for row, length in zip(side, counts, strict=True) if length <= limit]
        for side, counts in zip(sides, lengths, strict=True)
    )
    if config.task.bad_rows == "stop" or not train or not held_out:
        raise InputError(
            f"{found}; raise task.max_prompt_tokens, or leave them out with --set task.bad_rows=drop, where "
            "shorter ones remain."
        )
    note = f"{found}; left them out."
    return replace(task, train=train, held_out=held_out, note=" ".join(filter(None, [task.note, note])))


def score_policy(
    policy: Policy,
    task: Task,
    rows: Sequence[Row],
    config: RunConfig,
    terminal: Terminal,
    what: str,
    samples: int,
) -> Evaluation:
    """Score the policy on `rows`, with a progress bar that says `what` is going on."""
    with terminal.progress(what, len(rows) * (1 + samples)) as advance:
        return evaluate(
            policy,
            rows,
            task.score,
            sampling_of(config.training),
            samples=samples,
            seed=config.seed,
            on_problems=lambda problems, tokens: advance(problems, tokens=tokens),
            game=task.game,
        )


def require_one_turn(task: Task, what: str) -> None:
    """Check that a task is answered in one turn.

    Args:
        what: the command or option that can do nothing else.

    Raises:
        InputError: it is played in turns.
    """
    if task.game is not None:
        raise InputError(f"{task.name} is played in turns, and {what} knows tasks of one turn only.")


def sampling_of(settings: TrainingConfig) -> Sampling:
    """How completions are drawn, in training and where a score is taken."""
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        stop_strings=tuple(settings.stop_strings),
    )
