"""What commands start with: the configured model and task, and the choice of blocks to train.

Nothing here imports torch until a model is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midtune.config import BlocksConfig, RunConfig, require_task
from midtune.device import cuda_devices, dtype_named, resolve_device
from midtune.errors import InputError
from midtune.measure.cards import Card
from midtune.measure.meter import card_of
from midtune.model.sources import Source, resolve
from midtune.probe.selection import best, matching_probe, middle, parse_layers, ranking_of, read_probe
from midtune.report.display import WorkDisplay
from midtune.report.formats import blocks_text, card_text, processes_text
from midtune.report.terminal import Terminal
from midtune.runs import RUNS
from midtune.tasks import Reward, Task, check_reward, load_task, open_sandbox

if TYPE_CHECKING:
    from midtune.model.policy import Policy
    from midtune.rollout.evaluation import Evaluation
    from midtune.rollout.sampling import Sampler


class Opened:
    """The source, tokenizer and task of a configuration, opened on first use; `more_problems` than a run uses."""

    def __init__(self, config: RunConfig, terminal: Terminal, *, more_problems: int = 0) -> None:
        self.config = config
        self.terminal = terminal
        self._more_problems = more_problems

    @cached_property
    def task(self) -> Task:
        """The task, with its rewards tried on real rows and its prompts within `task.max_prompt_tokens`."""
        config = self.config
        task = read_task(config, more=self._more_problems, thinking=self._thinks_from_the_start)
        check_reward(task)
        if config.training.algorithm == "gigpo" and task.game is None:
            raise InputError(f"gigpo compares turns, and {task.name} is answered in one; use grpo.")
        if config.training.vllm and task.game is not None:
            raise InputError(
                f"{task.name} is played in turns, which midtune samples itself; leave training.vllm out."
            )
        if config.task.max_prompt_tokens is not None:
            task = self._without_long_prompts(task, config.task.max_prompt_tokens)
        if task.note:
            self.terminal.message(task.note)
        return task

    @cached_property
    def source(self) -> Source:
        """The model's files on this machine, downloaded or converted if needed."""
        resolve_device(self.config.model.device)
        bars: dict[str, WorkDisplay] = {}
        with contextlib.ExitStack() as shown:

            def progress(message: str, done: int | None, total: int | None) -> None:
                if message not in bars:
                    self.terminal.message(message)
                    shown.close()
                    bars[message] = shown.enter_context(self.terminal.progress(message, total))
                bars[message]((done or 0) - bars[message].done)

            return resolve(self.config.model.name, self.config.model.revision, progress=progress)

    @cached_property
    def tokenizer(self) -> Any:
        from midtune.model.loading import load_tokenizer

        return load_tokenizer(self.source, self.config.model.trust_remote_code)

    def policy(self, *, quantize: str | None = None, embeddings: str | None = None) -> Policy:
        """Load the frozen model; arguments override the configuration. Says what else uses a card short of memory."""
        from midtune.model.host import embed_on_host
        from midtune.model.loading import load_policy

        model = self.config.model
        quantize = quantize or model.quantize
        if (card := self._card) is not None and card.tight:
            self.terminal.message(f"memory is tight: {card_text(card)}.")
        with self.terminal.progress(f"loading {self.source.name}", None):
            policy = load_policy(
                self.source,
                quantize=quantize,
                experts=model.experts,
                device=model.device,
                dtype=dtype_named(model.dtype),
                trust_remote_code=model.trust_remote_code,
                on_message=self.terminal.message,
                tokenizer=self.tokenizer,
            )
        if quantize == "nf4" and model.rounding == "calibrated":
            self._calibrate(policy)
        if (embeddings or model.embeddings) == "host":
            embed_on_host(policy.model, policy.source.name)
        return policy

    def sampler(self, policy: Policy) -> Sampler:
        """The task's sampler; it reports when memory runs out and what else uses the card."""
        from midtune.rollout.episodes import EpisodeSampler
        from midtune.rollout.sampling import SamplingLimits
        from midtune.rollout.text import TextSampler

        config = self.config
        limits = SamplingLimits(unpack=config.model.unpack == "auto", graphs=config.training.graphs == "auto")
        limits.rows.on_message = self.terminal.message
        if self._card is not None:
            limits.rows.on_oom_hint = partial(_others_text, policy.device)
        game = self.task.game
        return TextSampler(policy, limits) if game is None else EpisodeSampler(policy, limits, game)

    def score_first(self, problems: int) -> None:
        """Score the first held-out problems alone; the others stay out of training too."""
        self.task = replace(self.task, held_out=self.task.held_out[:problems])

    def score(self, sampler: Sampler, what: str, **how: Any) -> Evaluation:
        """Score the held-out problems; for `how` see `score_rows`."""
        from midtune.rl.scoring import score_rows

        found = score_rows(
            sampler, self.task.held_out, self.task, self.config, what, self.terminal.progress, **how
        )
        if found.kept:
            self.terminal.message(f"{what}: known from an earlier run with the same settings")
        return found

    def _calibrate(self, policy: Policy) -> None:
        """Round 4-bit weights anew, by the task's first prompts and the policy's own completions."""
        import torch

        from midtune.model.rounding import TEXT_TOKENS, TOKENS, calibrate
        from midtune.rl.training import sampling_of

        if policy.stored_quantized:
            raise InputError(
                f"{self.source.name} is stored in 4-bit already; leave out model.rounding=calibrated."
            )
        sampler, sampling = self.sampler(policy), sampling_of(self.config.training)
        sampling = replace(sampling, group_size=1, max_new_tokens=min(sampling.max_new_tokens, TEXT_TOKENS))
        rows = self.task.train[:256]
        longest = min(max(sampler.prompt_lengths(rows)) + sampling.max_new_tokens, TEXT_TOKENS)
        begun = sampler.begin(rows[: TOKENS // longest])
        with self.terminal.progress("rounding to 4-bit by the task's prompts", None):
            with torch.random.fork_rng(devices=cuda_devices(policy.device)):
                torch.manual_seed(self.config.seed)
                found = sampler.sample([row["prompt"] for row in begun], sampling)
            texts = [[*a, *b] for a, b in zip(found.prompts(), found.completions(), strict=True)]
            calibrate(policy, [text[:TEXT_TOKENS] for text in texts])

    @cached_property
    def _card(self) -> Card | None:
        device = resolve_device(self.config.model.device)
        return card_of(device) if device.type == "cuda" else None

    def _thinks_from_the_start(self) -> bool:
        """Whether the chat template ends prompts with `<think>`, so that completions begin inside the thinking."""
        from midtune.rollout.speech import prompt_ids

        ids = prompt_ids(self.tokenizer, [{"role": "user", "content": "?"}])
        return str(self.tokenizer.decode(ids)).rstrip().endswith("<think>")

    def _without_long_prompts(self, task: Task, limit: int) -> Task:
        """Drop prompts over the limit, or refuse them with a count, as `task.bad_rows` says."""
        from midtune.rollout.speech import prompt_ids

        rows = [*task.train, *task.held_out]
        lengths = [len(prompt_ids(self.tokenizer, row["prompt"])) for row in rows]
        fits = [length <= limit for length in lengths]
        if all(fits):
            return task
        long, longest = fits.count(False), max(lengths)
        found = f"{long} of {len(rows)} prompts are longer than {limit} tokens, the longest {longest}"
        train = [*compress(task.train, fits)]
        held_out = [*compress(task.held_out, fits[len(task.train) :])]
        if self.config.task.bad_rows == "stop" or not train or not held_out:
            raise InputError(
                f"{found}; raise task.max_prompt_tokens, or leave them out with --set task.bad_rows=drop, where "
                "shorter ones remain."
            )
        note = f"{found}; left them out."
        return replace(task, train=train, held_out=held_out, note=" ".join(filter(None, [task.note, note])))


def _others_text(device: Any) -> str:
    others = card_of(device).others
    return f"The card is also in use by {processes_text(others)}." if others else ""


def read_task(config: RunConfig, *, more: int = 0, thinking: Callable[[], bool] | None = None) -> Task:
    """Load the task, with `more` problems than a run uses, without trying its rewards.

    `thinking` says whether the chat template opens `<think>` in the prompt; None means no.
    """
    settings = config.task

    def shaping(name: str) -> Reward:
        from midtune.rl.shaping import shaping_reward  # with TRL, which few tasks need

        # Only `format` depends on thinking, and finding out loads the tokenizer.
        asked = thinking if name == "format" and settings.prompt_format == "chat" else None
        return shaping_reward(name, config.training.max_new_tokens, thinking=asked is not None and asked())

    def tools(name: str, make: Callable[[], Any]) -> Callable[[Any], Any]:
        from midtune.rl.tools import tools_for

        return tools_for(name, make)

    # Load no more than the run can use: some generators take seconds per problem.
    most = max(config.training.steps * config.training.prompts_per_step, 64) + more
    return load_task(
        require_task(config),
        settings.model_copy(update={"train_size": min(settings.train_size, most)}),
        config.seed,
        sandbox=partial(open_sandbox, config.sandbox),
        shaping=shaping,
        tools=tools if settings.actions == "tools" else None,
    )


@dataclass(frozen=True)
class Choice:
    """The blocks to train, sorted; how they were chosen, for people; and the probe.json that chose them, if any."""

    blocks: list[int]
    how: str
    ranking: Path | None = None


def choose_blocks(wanted: BlocksConfig, policy: Policy, task: Task, terminal: Terminal) -> Choice:
    """Choose the named blocks, those that a ranking selects, or else the geometric middle.

    Raises InputError if there is no such block, or a needed ranking is missing or about something else.
    """
    ranking = None
    if wanted.layers is not None:
        blocks = parse_layers(wanted.layers, policy.num_blocks, wanted.top_k)
        how = f"--layers {wanted.layers}"
    elif wanted.select == "middle":
        blocks = middle(policy.num_blocks, wanted.top_k)
        how = "the geometric middle, as asked"
    elif (found := _ranking(wanted, policy, task)) is not None:
        file, probe = found
        ranking = file.absolute()
        # The worst blocks are a control that good blocks have to beat.
        ordered = ranking_of(probe)[:: -1 if wanted.select == "worst" else 1]
        blocks = best(ordered, policy.num_blocks, wanted.top_k)
        how = f"the ranking of {file} ({probe['method']})"
    elif wanted.select == "best":
        blocks = middle(policy.num_blocks, wanted.top_k)
        how = "the geometric middle: `midtune probe` has not ranked the blocks for this model and task"
    else:
        raise InputError(
            f"--select {wanted.select} needs a ranking of all blocks, and none under {RUNS} is about this model and "
            "task; make one with `midtune probe`, or name the blocks with --layers."
        )
    names = blocks_text(blocks)
    if wanted.select == "boost":
        terminal.message(
            f"training all {policy.num_blocks} blocks, unquantized, {names} at {wanted.boost:g} times the learning "
            f"rate ({how}); it takes about the time and memory of full training"
        )
        how = f"boost of {names} by {wanted.boost:g}: {how}"
    else:
        how = f"the worst of {how}" if wanted.select == "worst" and wanted.layers is None else how
        terminal.message(f"training {names} of {policy.num_blocks}{policy.kinds(blocks)}, chosen by {how}")
    return Choice(blocks, how, ranking)


def _ranking(wanted: BlocksConfig, policy: Policy, task: Task) -> tuple[Path, dict[str, Any]] | None:
    """The named probe.json and its data, or else the newest match under `runs`."""
    about = policy.source.name, task.fingerprint, policy.source.revision
    if (file := wanted.probe) is not None:
        probe = read_probe(file)
        if not matching_probe(probe, *about):
            raise InputError(
                f"{file} ranks the blocks of {probe.get('model')} on {probe.get('task')}, not those of "
                f"{policy.source.name} on {task.name} as asked; probe again, or choose with --layers."
            )
        return file, probe
    for file in sorted(RUNS.glob("*/probe.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(InputError):
            probe = read_probe(file)
            if matching_probe(probe, *about) and len(ranking_of(probe)) >= wanted.top_k:
                return file, probe
    return None
