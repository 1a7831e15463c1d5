"""Memory and time of each arm on a card, the settings that make a run fit, and the largest sizes that do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from midtune.bench.flops import rollout_flops, update_flops
from midtune.bench.workload import ARMS
from midtune.config import RunConfig, with_settings
from midtune.device import reachable_bytes, total_bytes
from midtune.errors import InputError, MidtuneError
from midtune.measure.meter import Meter
from midtune.model.architectures import text_alone, trains_experts
from midtune.model.configs import config_of
from midtune.model.policy import Policy
from midtune.model.sizes import Sizes, sizes_of
from midtune.planning.budget import (
    CONTEXT_BYTES,
    Loaded,
    Phases,
    frozen_bytes,
    peak,
    step_phases,
    totals,
    unpacked_bytes,
)
from midtune.planning.skeleton import planned_tail
from midtune.planning.step_size import DEAREST_FIRST, Work, leaner, standing, work_of
from midtune.planning.trace import block_update, sampling, whole_update
from midtune.probe.selection import parse_layers
from midtune.published import PublishedCard, card_named
from midtune.report.formats import bytes_text
from midtune.rl.tail import WHOLE, slower, tail_settings
from midtune.rollout.sampling import Sampler
from midtune.tasks import Task

# Of what is free on a card: plans may be a little low, and memory falls into pieces.
SHARE_OF_FREE = 0.93
# Upper limits of the search for the largest size.
MOST = {"prompts": 64, "group_size": 256, "new_tokens": 131072}


@dataclass(frozen=True)
class Planner:
    """Plans for one model on one card.

    `process` is process memory other than tensors, in bytes. Sampling may unpack weights into half of what is free of
    `device_bytes`.
    """

    model: Loaded
    sizes: Sizes
    card: PublishedCard
    blocks: Sequence[int]
    process: int
    device_bytes: int

    @property
    def tail(self) -> int:
        """Number of blocks from the first trained one on."""
        return self.sizes.blocks - self.blocks[0]

    @property
    def tail_kind(self) -> str:
        """How the update runs them; see `rl.tail.TAILS`."""
        return planned_tail(self.model.config, self.blocks[0])

    @property
    def notes(self) -> list[str]:
        """What to tell people beside the figures."""
        found = slower(self.tail_kind, self.blocks[0])
        if self.sizes.experts and self.model.with_experts:
            each = f"{self.sizes.experts / 1e6:,.0f} of {self.sizes.block / 1e6:,.0f} million weights"
            found.append(f"--experts frozen trains a block without its experts, {each}, which takes less.")
        return found

    def phases(self, arm: str, work: Work) -> Phases:
        """Bytes by phase of a step and part; raises MidtuneError if the architecture cannot run without data."""
        try:
            return self._phases(arm, work)
        except Exception as error:  # noqa: BLE001 (whatever the architecture's own code raises)
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise MidtuneError(
                f"memory of `{arm}` is not known: {self.model.config.model_type} cannot run on tensors without data "
                f"({why}); measure it with `midtune bench`."
            ) from error

    def _phases(self, arm: str, work: Work) -> Phases:
        model = self._full if ARMS[arm].trains == "all" else self.model
        held = standing(model, self.sizes, arm, work, trained=len(self.blocks))
        together = work.batch(work.micro_prompts)
        if arm != "midtune":
            return step_phases(
                held,
                self.process,
                sampling=sampling(model, work.batch(), shared=False),
                update=whole_update(model, together, arm, self.blocks[0]),
                on_card=model.on_card,
            )
        batch = work.batch()
        tokens = batch.prompts * work.prompt_tokens + batch.rows * work.config.training.max_new_tokens
        free = self.device_bytes - self.process - sum(held.parts.values())
        unpacks = work.config.model.unpack == "auto"
        return step_phases(
            held,
            self.process,
            sampling=sampling(model, work.batch(work.sampled_prompts), shared=True),
            update=block_update(
                model,
                together,
                tail_blocks=self.tail,
                trained=len(self.blocks),
                kind=self.tail_kind,
                **tail_settings(work.config.training, on_card=model.on_card),
            ),
            on_card=model.on_card,
            states=tokens * self.sizes.hidden * model.dtype.itemsize,
            unpacked=max(0, min(unpacked_bytes(model, self.sizes), free // 2)) if unpacks else 0,
        )

    @cached_property
    def _full(self) -> Loaded:
        return replace(self.model, quantized=False, full=True)

    def arm(self, name: str, work: Work) -> dict[str, Any]:
        """The plan's entry of an arm."""
        phases = self.phases(name, work)
        phase, most = peak(phases)
        return {
            "arm": name,
            "label": ARMS[name].label,
            "phases": phases,
            "peak": most,
            "phase": phase,
            "fits": most <= self.card.memory,
            "seconds": self.seconds(name, work, phases["sampling"]),
        }

    def seconds(self, arm: str, work: Work, held: Mapping[str, int]) -> dict[str, float]:
        """The least seconds of each phase of a step on the card: its compute or its memory reads, whichever is more.

        The forward pass of a KL term's reference is left out. `held` is the bytes of each part while sampling.
        """
        card, sizes, batch, training = self.card, self.sizes, work.batch(), work.config.training
        # Few rows pass few of the experts.
        unread = 1 - min(1, sizes.passed * batch.rows)
        share = 1 - unread * sizes.experts / sizes.linear
        plain = share * 2 * sizes.blocks * sizes.linear
        packed = share * sizes.blocks * frozen_bytes(self.model, sizes)
        weights = packed if ARMS[arm].trains != "all" else plain
        read = plain if held.get("unpacked weights") else weights
        sampling_passes = -(-batch.prompts // work.sampled_prompts)
        # Each token reads every weight and, on average, half of the keys and values.
        each = sampling_passes * (read + 2 * sizes.projection) + held["keys and values"] / 2
        products = update_flops(
            sizes,
            batch,
            arm,
            tail=self.tail,
            trained=len(self.blocks),
            recompute=training.recompute,
            checked=(checked := training.lr == "auto"),
            kind=self.tail_kind,
        )
        if arm == "midtune":
            below = sizes.blocks - self.tail if self.tail_kind == WHOLE else 0
            passes = ((2 + training.recompute + checked) * self.tail + (1 + checked) * below) / sizes.blocks
        else:
            passes = 2.0 + ARMS[arm].checkpointing
        micro_batches = batch.prompts // work.micro_prompts
        return {
            "sampling": max(
                rollout_flops(sizes, batch, arm) / card.flops, batch.new_tokens * each / card.bandwidth
            ),
            "update": max(products / card.flops, micro_batches * passes * weights / card.bandwidth),
        }

    def fitting(self, work: Work) -> dict[str, Any] | None:
        """The cheapest setting changes, by key, that make the work fit; None if none do.

        Embeddings that are only looked up go to the host first; then the phase with the peak decides, see `leaner`.
        """
        changes: dict[str, Any] = {}
        while True:
            changed = work.changed(changes)
            phases = self.phases("midtune", changed)
            phase, most = peak(phases)
            if most <= self.card.memory:
                break
            if self.model.on_card and self.sizes.lookups and changed.config.model.embeddings == "device":
                change: dict[str, Any] | None = {"model.embeddings": "host"}
            else:
                change = leaner(changed, phase, phases, self.card.memory)
            if change is None:
                return None
            changes |= change
        for key in DEAREST_FIRST:
            fewer = {other: value for other, value in changes.items() if other != key}
            if peak(self.phases("midtune", work.changed(fewer)))[1] <= self.card.memory:
                changes = fewer
        return changes

    def largest(self, work: Work, what: str) -> int:
        """The largest size `what` (a key of `MOST`) that fits, with the rest as in `work`.

        Memory is close to linear in each size, so it is extrapolated from the current size and twice that.
        """
        now: int = getattr(work.batch(work.micro_prompts), what)
        once, twice = (totals(self._sized(work, what, size)) for size in (now, 2 * now))
        most = [
            now + now * (self.card.memory - total) / (twice[phase] - total)
            for phase, total in once.items()
            if twice[phase] > total
        ]
        return max(now, min([MOST[what], *map(int, most)]))

    def _sized(self, work: Work, what: str, size: int) -> Phases:
        settings = {
            "prompts": {
                "training.prompts_per_step": size,
                "training.micro_batch_tokens": size * work.group_tokens,
                "training.sampled_prompts": work.sampled_prompts,
            },
            "group_size": {"training.group_size": size},
            "new_tokens": {"training.max_new_tokens": size},
        }
        phases = self.phases("midtune", work.changed(settings[what]))
        # With more prompts only the update grows: as many as before are sampled together.
        return {"update": phases["update"]} if what == "prompts" else phases


def planner_of(config: RunConfig, gpu: str) -> Planner:
    """A planner for the configured model on `gpu`: a card (see `card_named`), or `cpu` for this machine."""
    on_card = gpu != "cpu"
    # CPU speeds are not published.
    host = PublishedCard("this machine's CPU", total_bytes("cpu"), math.nan, math.nan)
    card = card_named(gpu) if on_card else host
    model_config = config_of(config.model.name, trust_remote_code=config.model.trust_remote_code)
    sizes = sizes_of(model_config)
    layers = "middle" if config.blocks.layers is None else config.blocks.layers
    blocks = parse_layers(layers, sizes.blocks, config.blocks.top_k)
    dtype = torch.bfloat16 if on_card else torch.float32
    model = Loaded(
        text_alone(model_config),
        dtype,
        config.model.quantize == "nf4",
        on_card,
        with_experts=trains_experts(model_config, config.model.experts, config.model.name),
    )
    process = CONTEXT_BYTES
    if not on_card:
        # On a CPU, libraries that are resident before a model is loaded count too.
        import midtune.rl.training  # noqa: F401

        process = Meter("cpu").current_bytes()
    return Planner(model, sizes, card, blocks, process, card.memory)


def planner_for(policy: Policy, blocks: list[int], process_bytes: int) -> Planner:
    """A planner for a loaded model on its own device; `process_bytes` is resident memory before it was loaded."""
    on_card = policy.device.type == "cuda"
    total = total_bytes(policy.device)
    return Planner(
        Loaded(
            text_alone(policy.model.config),
            policy.compute_dtype,
            policy.quantized,
            on_card,
            with_experts=policy.with_experts,
        ),
        sizes_of(policy.model.config),
        PublishedCard("this device", total, math.nan, math.nan),
        blocks,
        CONTEXT_BYTES if on_card else process_bytes,
        total,
    )


def fitted(
    config: RunConfig,
    sampler: Sampler,
    task: Task,
    blocks: list[int],
    process_bytes: int,
    on_message: Callable[[str], None],
) -> RunConfig:
    """Apply the cheapest changes that keep a run within `training.fit`; `auto` is what is free on the policy's device.

    Raises InputError if no change makes it fit, or the card is unknown; with `auto` it says so and changes nothing.
    """
    fit, policy = config.training.fit or "", sampler.policy
    if is_auto := fit == "auto":
        room = round(SHARE_OF_FREE * reachable_bytes(policy.device)) + CONTEXT_BYTES
        card = PublishedCard("the card's free memory", room, math.nan, math.nan)
        fit = f"the {bytes_text(room)} that are free"
    else:
        card = card_named(fit)
    planner = replace(planner_for(policy, blocks, process_bytes), card=card)
    longest = max(sampler.prompt_lengths([*task.train, *task.held_out]))
    work = work_of(config, longest)
    try:
        changes, error = planner.fitting(work), None
    except MidtuneError as unknown:
        changes, error = None, unknown
    if changes is None:
        error = error or InputError(
            f"{policy.source.name} was to be trained within {fit}, but it does not fit, whatever is made leaner; "
            "lower --max-new-tokens or --group-size, choose a higher block with --layers, or a smaller model."
        )
        if not is_auto:
            raise error
        on_message(f"settings stay as configured: {error}")
        return with_settings(config, {"training.fit": "none"})
    found = work.changed(changes)
    phase, most = peak(planner.phases("midtune", found))
    said = ", ".join(f"{key}={value}" for key, value in changes.items()) or "nothing has to change"
    on_message(f"to stay within {fit}: {said}; planned peak {bytes_text(most)}, in {phase}")
    # Scoring samples as many rows at once as training does.
    together = {"training.sampled_prompts": found.sampled_prompts}
    return with_settings(config, {**changes, **together, "training.fit": "none"})
