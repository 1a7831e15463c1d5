"""`midtune plan`: what training would hold in memory and take at least, before anything is loaded.

Weights, gradients and optimizer states follow from the configuration alone. Activations, keys and values come from
running the code that trains on tensors without data (see `midtune.planning.trace`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from midtune.bench.arms import ARMS as TRAINED_ARMS
from midtune.config import RunConfig, with_settings
from midtune.device import total_bytes
from midtune.errors import InputError
from midtune.measure.meter import Meter
from midtune.model.configs import config_of
from midtune.model.policy import Policy
from midtune.model.sizes import Sizes
from midtune.planning.budget import CONTEXT_BYTES, Phases, peak
from midtune.model.sizes import sizes_of
from midtune.planning.speed import step_seconds
from midtune.planning.step_size import Work, midtune_phases, trl_phases
from midtune.planning.trace import Loaded
from midtune.probe.selection import middle, parse_layers
from midtune.published import PublishedCard, card_named
from midtune.report.tables import bytes_text
from midtune.report.terminal import Terminal
from midtune.rollout.speech import prompt_lengths
from midtune.stages.beside import beside
from midtune.tasks import Task
from midtune.tasks.hub import is_dataset
from midtune.tasks.reading import SUFFIXES

ARMS = {
    **{arm: TRAINED_ARMS[arm] for arm in ("midtune", "trl-block", "trl-qlora", "trl-full")},
    "trl-full-kept": "TRL, the same without checkpointing",
}
# Tokens that are computed again together at the least.
LEAST_PACK = 512
# Of a step: the study's has 2 million.
MOST_STEP_TOKENS = 100_000_000
# How far the search for the largest size goes.
MOST = {"prompts": 64, "group_size": 256, "new_tokens": 131072}


def run(config: RunConfig, *, gpu: str, prompt_tokens: int) -> dict[str, Any]:
    """Work out the memory of each phase, for midtune and for TRL, and what fits.

    Args:
        config: names the model and says how it is to be trained.
        gpu: the card, by name or memory, see `card_named`; or `cpu`, this machine.
        prompt_tokens: of the longest prompt.

    Returns:
        `model`, `parameters`, `num_blocks`, `blocks`, `card` and `work`: what was planned for. `arms`: of each its
        name, `phases` (bytes of each part), the `peak` and its `phase`, whether it `fits`, and `seconds`, the least
        that each phase can take. `by_block`: midtune's peak for each first trained block. `fit`: settings with which
        midtune fits, None if none do; `fitted`: the arm with them. `largest`: with these, how many prompts could go
        through an update together, how large a group and how long a completion could be, the rest as asked.

    Raises:
        InputError: the model, the card or a block is not known.
    """
    planner, blocks = planner_of(config, gpu)
    card, sizes = planner.card, planner.sizes
    work = work_of(config, prompt_tokens)
    own = planner.arm("midtune", work)

    def others() -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
        firsts = range(sizes.blocks - len(blocks) + 1)
        by_block = [
            {"block": k, "peak": peak(replace(planner, block=k).phases("midtune", work))[1]} for k in firsts
        ]
        return [planner.arm(name, work) for name in ARMS if name != "midtune"], by_block

    waiting = beside(others)
    fit = planner.fitting(work)
    fitting = {
        "fit": None if fit is None else settings_of(fit, work),
        "fitted": None if fit is None else planner.arm("midtune", fit),
        "largest": None if fit is None else {what: planner.largest(fit, what) for what in MOST},
    }
    trl, by_block = waiting()
    return {
        "schema": 1,
        "model": config.model.name,
        "parameters": sizes.total,
        "num_blocks": sizes.blocks,
        "blocks": blocks,
        "card": asdict(card),
        "work": asdict(work),
        "arms": [own, *trl],
        "by_block": by_block,
        **fitting,
    }


def run_stem(config: RunConfig) -> str:
    """What a run's folder is called under `runs/`, where nothing else is asked for."""
    task = config.task.name or ""
    task = task.partition(":")[0] if is_dataset(task) else task.rpartition(":")[2]
    return f"{_bare(config.model.name)}-{_bare(task)}"


def _bare(name: str) -> str:
    path = Path(name)
    # Other names have dots too, such as Qwen3-1.7B.
    return path.stem if path.suffix.lower() in (*SUFFIXES, ".py", ".gguf") else path.name


def planner_of(config: RunConfig, gpu: str) -> tuple[Planner, list[int]]:
    """What plans for the configuration's model on a card, and the blocks that would be trained."""
    card = card_named(gpu) if gpu != "cpu" else _host()
    model_config = config_of(config.model.name, trust_remote_code=config.model.trust_remote_code)
    sizes = sizes_of(model_config)
    wanted = config.blocks
    blocks = (
        parse_layers(wanted.layers, sizes.blocks, wanted.top_k)
        if wanted.layers is not None
        else middle(sizes.blocks, wanted.top_k)
    )
    quantized, on_card = config.model.quantize == "nf4", gpu != "cpu"
    model = Loaded(model_config, torch.bfloat16 if on_card else torch.float32, quantized, on_card)
    process = CONTEXT_BYTES if on_card else _libraries_bytes()
    planner = Planner(model, sizes, card, blocks[0], len(blocks), process, card.memory)
    return planner, blocks


@dataclass(frozen=True)
class Planner:
    """What one model can do on one card.

    Attributes:
        block: the first trained block.
        trained: how many blocks are trained.
        process: bytes that a process holds besides tensors.
        device_bytes: of the device's memory; sampling may unpack weights into half of what is free of it.
    """

    model: Loaded
    sizes: Sizes
    card: PublishedCard
    block: int
    trained: int
    process: int
    device_bytes: int

    def phases(self, arm: str, work: Work) -> Phases:
        """Bytes of each part in each phase of a step."""
        if arm == "midtune":
            return midtune_phases(
                self.model,
                self.sizes,
                work,
                block=self.block,
                trained=self.trained,
                process=self.process,
                capacity=self.device_bytes,
            )
        return trl_phases(
            self.model,
            self.sizes,
            work,
            arm.removesuffix("-kept"),
            block=self.block,
            process=self.process,
            checkpointing=not arm.endswith("-kept"),
        )

    def arm(self, name: str, work: Work) -> dict[str, Any]:
        """What a plan says of an arm."""
        phases = self.phases(name, work)
        phase, most = peak(phases)
        return {
            "arm": name,
            "label": ARMS[name],
            "phases": phases,
            "peak": most,
            "phase": phase,
            "fits": most <= self.card.memory,
            "seconds": step_seconds(
                self.card,
                self.sizes,
                name,
                prompts=work.prompts,
                group_size=work.group_size,
                prompt_tokens=work.prompt_tokens,
                new_tokens=work.new_tokens,
                tail=self.sizes.blocks - self.block,
                trained=self.trained,
                quantized=self.model.quantized,
                unpacked=bool(phases["sampling"].get("unpacked weights")),
                sampling_passes=-(-work.prompts // (work.sampled_prompts or work.prompts)),
                update_passes=work.prompts // work.micro_prompts,
                again=work.recompute,
                cache=phases["sampling"]["keys and values"],
            ),
        }

    def fitting(self, work: Work) -> Work | None:
        """The work with the cheapest changes that make it fit; None if none do.

        First the input embedding goes to the host. Then where memory peaks decides what is changed. In sampling,
        weights are no longer unpacked, then fewer completions are sampled together. In the update, fewer groups go
        together, optimizer states are kept in 8 bits and gradients in bf16, then activations are computed again, fewer
        and fewer at a time.
        """
        changed: Work | None = work
        while changed is not None:
            phases = self.phases("midtune", changed)
            phase, most = peak(phases)
            if most <= self.card.memory:
                return self._without_needless(changed, work)
            if self.model.on_card and self.sizes.head and not changed.host_embedding:
                changed = replace(changed, host_embedding=True)
            else:
                changed = _leaner(changed, phase, phases, self.card.memory)
        return None

    def _without_needless(self, changed: Work, work: Work) -> Work:
        """The changes without those that later ones have made needless, the dearest left out first."""
        for name in ("gradients", "optimizer", "unpack", "host_embedding"):
            undone = replace(changed, **{name: getattr(work, name)})
            if peak(self.phases("midtune", undone))[1] <= self.card.memory:
                changed = undone
        return changed

    def largest(self, work: Work, what: str) -> int:
        """How many prompts, completions of a group or new tokens fit, the rest as in `work`.

        Memory grows by about the same with each of them, so it is worked out for what `work` has and for twice as many.
        """
        now = getattr(work, what) if what != "prompts" else work.micro_prompts
        totals = [
            {name: sum(parts.values()) for name, parts in phases.items()}
            for phases in (self._sized(work, what, now), self._sized(work, what, 2 * now))
        ]
        most = [
            now + now * (self.card.memory - once) / (twice - once)
            for once, twice in zip(totals[0].values(), totals[1].values(), strict=True)
            if twice > once
        ]
        return max(now, min([MOST[what], *map(int, most)]))

    def _sized(self, work: Work, what: str, size: int) -> Phases:
        if what == "group_size":
            return self.phases("midtune", replace(work, group_size=size))
        if what == "new_tokens":
            return self.phases("midtune", replace(work, new_tokens=size))
        # Each prompt of an update adds what its group takes there; as many as before are sampled together.
        wider = replace(
            work,
            prompts=size,
            micro_batch_tokens=size * work.group_tokens,
            sampled_prompts=work.sampled_prompts or work.prompts,
        )
        return {"update": self.phases("midtune", wider)["update"]}


def planner_for(policy: Policy, blocks: list[int], process_bytes: int) -> Planner:
    """What plans for a loaded model on its own device.

    Args:
        blocks: the trained ones.
        process_bytes: resident memory of this process before the model was loaded.
    """
    on_card = policy.device.type == "cuda"
    total = total_bytes(policy.device)
    return Planner(
        Loaded(policy.model.config, policy.compute_dtype, policy.quantized, on_card),
        sizes_of(policy.model.config),
        PublishedCard("this device", total, math.nan, math.nan),
        blocks[0],
        len(blocks),
        CONTEXT_BYTES if on_card else process_bytes,
        total,
    )


def fitted(
    config: RunConfig, policy: Policy, task: Task, process_bytes: int, terminal: Terminal
) -> RunConfig:
    """The configuration of a run with the cheapest changes that keep it within `training.fit`.

    Args:
        config: says in `training.fit` what to stay within.
        policy: the loaded model.
        process_bytes: resident memory of this process before the model was loaded.

    Raises:
        InputError: it does not fit, whatever is changed, or what it should fit is not known.
    """
    fit = config.training.fit
    if fit is None:
        return config
    blocks = parse_layers(config.blocks.layers or "", policy.num_blocks, config.blocks.top_k)
    planner = replace(planner_for(policy, blocks, process_bytes), card=card_named(fit))
    longest = max(prompt_lengths(policy.tokenizer, [*task.train, *task.held_out], task.game))
    work = work_of(config, longest)
    found = planner.fitting(work)
    if found is None:
        raise InputError(
            f"{policy.source.name} was to be trained within {fit}, but it does not fit, whatever is made leaner; "
            "lower --max-new-tokens or --group-size, choose a higher block with --layers, or a smaller model."
        )
    phase, most = peak(planner.phases("midtune", found))
    changes = settings_of(found, work)
    said = ", ".join(f"{key}={value}" for key, value in changes.items()) or "nothing has to change"
    terminal.message(f"to stay within {fit}: {said}; planned peak {bytes_text(most)}, in {phase}")
    # Scoring samples as many together as training does.
    together = {"training.sampled_prompts": found.sampled_prompts or found.prompts}
    return with_settings(config, {**changes, **together, "training.fit": None})


def _libraries_bytes() -> int:
    """What a process that trains on a CPU has resident before a model is loaded: it counts there."""
    import midtune.rl.training  # noqa: F401

    return Meter("cpu").current_bytes()


def _host() -> PublishedCard:
    """The memory of this machine; how fast its CPU is stands nowhere."""
    return PublishedCard("this machine's CPU", total_bytes("cpu"), math.nan, math.nan)


def _leaner(work: Work, phase: str, phases: Phases, memory: int) -> Work | None:
    """The work with one thing changed that makes a phase smaller; None if nothing is left to change."""
    if phase == "sampling":
        together = work.sampled_prompts or work.prompts
        if phases["sampling"]["unpacked weights"]:
            return replace(work, unpack=False)
        return replace(work, sampled_prompts=together // 2) if together > 1 else None
    if phase == "update" and work.micro_prompts > 1:
        # As many groups as would fit if they took all of it, of numbers that divide a step.
        parts = phases["update"]
        each = (parts["activations"] + parts["workspace"] + parts["heap"]) / work.micro_prompts
        over = (sum(parts.values()) - memory) / each
        fewer = [n for n in range(1, work.micro_prompts) if work.prompts % n == 0]
        fitting = [n for n in fewer if n <= work.micro_prompts - over]
        return replace(work, micro_batch_tokens=max(fitting, default=1) * work.group_tokens)
    if phase in ("update", "optimizer") and work.optimizer == "adamw":
        return replace(work, optimizer="adamw_8bit")
    if phase == "update" and work.gradients == "fp32":
        return replace(work, gradients="bf16")
    if phase == "update" and not work.recompute:
        return replace(work, recompute=True)
    if phase == "update" and work.micro_batch_tokens > LEAST_PACK:
        return replace(work, micro_batch_tokens=min(work.micro_batch_tokens, work.group_tokens) // 2)
    return None


def work_of(config: RunConfig, prompt_tokens: int) -> Work:
    """A configuration's step.

    Raises:
        InputError: it has more tokens than any step.
    """
    training = config.training
    completions = training.prompts_per_step * training.group_size
    if (tokens := completions * (prompt_tokens + training.max_new_tokens)) > MOST_STEP_TOKENS:
        raise InputError(
            f"a step of {completions:,} completions with {prompt_tokens:,} tokens of a prompt and "
            f"{training.max_new_tokens:,} new ones has {tokens:,} tokens, and at most {MOST_STEP_TOKENS:,} are "
            "planned; ask for fewer prompts, smaller groups or shorter texts."
        )
    return Work(
        prompts=training.prompts_per_step,
        group_size=training.group_size,
        prompt_tokens=prompt_tokens,
        new_tokens=training.max_new_tokens,
        micro_batch_tokens=training.micro_batch_tokens,
        recompute=training.recompute,
        sampled_prompts=training.sampled_prompts or None,
        optimizer=training.optimizer,
        reference=training.beta > 0,
        unpack=config.model.unpack == "auto",
        host_embedding=config.model.embeddings == "host",
        gradients=training.gradients,
    )


def settings_of(work: Work, asked: Work) -> dict[str, Any]:
    """What `work` changes of what was asked, as keys of a configuration."""
    keys = {
        "training.micro_batch_tokens": "micro_batch_tokens",
        "training.recompute": "recompute",
        "training.sampled_prompts": "sampled_prompts",
        "training.optimizer": "optimizer",
        "training.gradients": "gradients",
    }
    changed = {
        key: getattr(work, name) for key, name in keys.items() if getattr(work, name) != getattr(asked, name)
    }
    if work.unpack != asked.unpack:
        changed["model.unpack"] = "never"
    if work.host_embedding != asked.host_embedding:
        changed["model.embeddings"] = "host"
    return changed
