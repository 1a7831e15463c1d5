"""`midtune bench`: the same prompts and completions through midtune and through TRL, each in its own process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from midtune.bench.workload import ARMS, BENCHED, Workload
from midtune.config import RunConfig
from midtune.device import compute_dtype, resolve_device
from midtune.errors import InputError, MidtuneError
from midtune.probe.selection import parse_layers
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder, describe_environment
from midtune.stages import learning
from midtune.stages.opening import Opened
from midtune.stages.subprocess_job import in_own_process


def run(
    config: RunConfig,
    *,
    arms: Sequence[str],
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    group_size: int,
    steps: int,
    profile: bool,
    out: Path | None,
    terminal: Terminal,
    until: str | None = None,
    rates: int = 3,
    every: int | None = None,
) -> dict[str, Any]:
    """Run the arms (from `BENCHED`) one after the other, compare them with the first, and write bench.json into `out`.

    `config` names model, device, dtype, the micro-batch size of all arms, and the block. Each arm runs one warm-up step
    before its `steps` measured ones; `profile` profiles one extra step of the first arm. With `until`, the arms are
    trained instead, on the task: see `learning.run`, which also takes `rates` and `every`.

    Returns:
        The content of bench.json: the workload, and `arms` with `step`, `rollout` and `update` (median, least and
        greatest seconds), `tokens_per_s` of sampling, `peak` and `libraries` bytes, and `ratios` to the first
        arm (null if it did different work). With `profile`: `profile`, the first arm's seconds by phase and kind of
        work, `flops` by phase, the machine's `peak_flops_per_s`, and if the first arm is midtune, the `operators` of a
        block and decoded token in its sampler and in transformers' `generate`. `failed`: arm → why it failed.

    Raises:
        InputError: an unknown arm, model or block; nothing has been written.
        MidtuneError: the first arm's process failed; other arms may fail without stopping the rest.
    """
    from transformers import AutoConfig

    from midtune.model.loading import load_tokenizer

    if until is not None:
        return learning.run(
            config, until=until, arms=arms, rates=rates, every=every, out=out, terminal=terminal
        )

    unknown = [arm for arm in arms if arm not in BENCHED]
    if unknown or not arms:
        asked = f"arm {unknown[0]} is not known" if unknown else "no arm was named"
        raise InputError(f"{asked}; choose among {', '.join(BENCHED)}.")
    source = Opened(config, terminal).source
    blocks = AutoConfig.from_pretrained(source.folder).get_text_config().num_hidden_layers
    layers = "middle" if config.blocks.layers is None else config.blocks.layers
    block, *more = parse_layers(layers, blocks)
    if more:
        raise InputError(
            f"--layers {layers} names {1 + len(more)} blocks, but the bench trains one; name one."
        )
    folder = RunFolder.create(out, f"bench-{Path(config.model.name).stem}")
    device = str(resolve_device(config.model.device))
    work = Workload(
        prompts=make_prompts(load_tokenizer(source), prompts, prompt_tokens),
        group_size=group_size,
        new_tokens=new_tokens,
        block=block,
        warmup=1,
        steps=steps,
        micro_batch_tokens=config.training.micro_batch_tokens,
        seed=config.seed,
    )
    result: dict[str, Any] = {
        "schema": 1,
        "model": source.name,
        "block": block,
        "prompts": prompts,
        "group_size": group_size,
        "new_tokens": new_tokens,
        "prompt_tokens": prompt_tokens,
        "micro_batch_tokens": work.micro_batch_tokens,
        "steps": steps,
        "arms": [],
        "failed": {},
        "environment": describe_environment(device, config.seed),
    }
    first: dict[str, Any] = {}
    rows = prompts * group_size * new_tokens
    with terminal.progress("arms", len(arms)) as advance:
        for arm in arms:
            terminal.message(f"{ARMS[arm].label}: {work.warmup} + {work.steps} steps")
            try:
                found = in_own_process(
                    f"{__name__}:{arm_alone.__name__}",
                    {
                        "arm": arm,
                        "model": source.name,
                        "revision": source.revision,
                        "device": device,
                        "dtype": config.model.dtype,
                        "work": asdict(replace(work, profile=profile and not first)),
                    },
                    what=f"the arm {arm}",
                    instead="leave it out with --arms, or lower --micro-batch-tokens",
                )
            except MidtuneError as error:
                if not first:
                    raise
                terminal.message(str(error))
                result["failed"][arm] = str(error)
            else:
                if not first:
                    first = found
                    result |= {
                        key: found[key]
                        for key in ("profile", "flops", "peak_flops_per_s", "operators")
                        if key in found
                    }
                result["arms"].append(summarise(found, first, rows=rows))
            # Arms take long: save what is measured in case a later one fails.
            folder.write_json(folder.path / "bench.json", result)
            advance(1)
    return result


def make_prompts(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """`count` different texts of about `tokens` tokens."""
    texts = []
    for number in range(count):
        sums = " ".join(f"{number + i} + {number + 2 * i} = {2 * number + 3 * i}." for i in range(tokens))
        texts.append(tokenizer.decode(tokenizer(sums)["input_ids"][:tokens], skip_special_tokens=True))
    return texts


def summarise(arm: dict[str, Any], first: dict[str, Any], *, rows: int) -> dict[str, Any]:
    """An arm's figures and their ratios to those of `first`; `rows` is the number of tokens sampled in a step."""
    phases = {
        phase: {
            "median": statistics.median(values := [step[phase] for step in arm["steps"]]),
            "least": min(values),
            "greatest": max(values),
        }
        for phase in ("step", "rollout", "update")
    }
    work = ("prompt_tokens", "completion_tokens")
    ratios = None
    if all(arm[key] == first[key] for key in work) and len(arm["steps"]) == len(first["steps"]):
        ratios = {
            phase: figures["median"] / statistics.median(step[phase] for step in first["steps"])
            for phase, figures in phases.items()
        }
        ratios["memory"] = (arm["peak"] - arm["libraries"]) / (first["peak"] - first["libraries"])
    return {
        **{key: arm[key] for key in ("arm", "peak", "libraries", "memory_source", "trainable", *work)},
        **phases,
        "tokens_per_s": rows / phases["rollout"]["median"],
        "ratios": ratios,
    }


def arm_alone(
    arm: str, model: str, revision: str | None, device: str, dtype: str, work: dict[str, Any]
) -> dict[str, Any]:
    """Run one arm in this process (see `bench.arms.run_arm`); `work` is a `Workload` passed through `asdict`."""
    from midtune.bench.arms import run_arm
    from midtune.model.sources import resolve

    target = resolve_device(device)
    return run_arm(arm, resolve(model, revision), Workload(**work), target, compute_dtype(dtype, target))
