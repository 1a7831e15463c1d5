"""The report of a run: report.json, schema 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SCHEMA = 1
PHASES = ("rollout", "reward", "update")
COMPARED = ("before", "after", "gain")
# [n] scores of the same problems in the same order, before and after training.
BeforeAfter: TypeAlias = "tuple[ArrayLike, ArrayLike]"


def build(
    *,
    model: str,
    task: str,
    blocks: Sequence[int],
    quality: BeforeAfter,
    sampled: BeforeAfter | None,
    deployed: BeforeAfter | None,
    steps: Sequence[Mapping[str, Any]],
    time: Mapping[str, Any],
    peak_bytes: int,
    process_bytes: int,
    memory_source: Literal["cuda_allocated", "resident"],
    full: Mapping[str, Any],
    full_source: Literal["measured", "estimated"],
    qlora: Mapping[str, Any],
    trainable_parameters: int,
    total_parameters: int,
    patch_bytes: int,
    probe: str,
    seed: int,
    notes: Sequence[str] = (),
    scoring: Mapping[str, Any] | None = None,
    one_more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build report.json: what a run gained and saved, in bytes, seconds and fractions.

    Args:
        quality: scores of greedy completions, on the model as it trains.
        sampled: means over samples at the training temperature.
        deployed: scores of greedy completions on the unquantized model.
        steps: lines of metrics.jsonl, which also hold peaks from before a resume.
        time: see `step_times`.
        process_bytes: what was held before the model was loaded; savings compare what was held above that.
        memory_source: what peaks count, tensors on the CUDA device or the process's physical memory.
        full, qlora: `step` and `phases` in seconds, `peak` (None: unknown) and `libraries` in bytes; `full` also has
            the mean `completion_length` in tokens, if measured.
        probe: how the blocks were chosen, for people.
        scoring: the `problems` scored, the `planned_share` of the run, and whether scores of the base were `kept` from
            an earlier run: of the model as `trained`, and `unquantized`.
        one_more: the `block` that could be trained too, and its further seconds of a `step` and bytes of the `peak`.
    """
    compared_step = time["step"] if time["compared_step"] is None else time["compared_step"]
    phases = phase_peaks(steps)
    peak = max([peak_bytes, *phases.values()])
    return {
        "schema": SCHEMA,
        "model": model,
        "task": task,
        "blocks": list(blocks),
        "quality": compared(quality),
        "sampled": compared(sampled),
        "deployed": compared(deployed),
        "time": {
            **time,
            "full_step": full["step"],
            "full_source": full_source,
            "full_tokens": full.get("completion_length"),
            "full_phases": full["phases"],
            "qlora_step": qlora["step"],
            "qlora_source": "estimated",
            "qlora_phases": qlora["phases"],
            "speedup": full["step"] / compared_step if compared_step > 0 else None,
        },
        "memory": {
            "peak": peak,
            "source": memory_source,
            "libraries": process_bytes,
            "full_peak": full["peak"],
            "full_libraries": full["libraries"],
            "full_source": full_source,
            "phases": phases or None,
            "reserved": max(phase_peaks(steps, "reserved_bytes").values(), default=None),
            "qlora_peak": qlora["peak"],
            "qlora_libraries": qlora["libraries"],
            "qlora_source": "estimated",
            "saving": 1 - (peak - process_bytes) / (full["peak"] - full["libraries"])
            if full["peak"]
            else None,
        },
        "trainable_parameters": trainable_parameters,
        "total_parameters": total_parameters,
        "patch_bytes": patch_bytes,
        "probe": probe,
        "seed": seed,
        "notes": list(notes),
        "scoring": scoring,
        "one_more_block": one_more,
    }


def step_times(steps: Sequence[Mapping[str, Any]], repeated: int = 0) -> dict[str, Any]:
    """Mean seconds of a `step` and of each of `PHASES`, and those to compare with full training.

    Completion lengths change as a model learns, so full training is measured on the prompts of the first `repeated`
    steps (0: not at all) and compared with those: `compared_step` and `compared_phases` are seconds of the fastest,
    since the first also warms up; `compared_tokens` are mean tokens of a completion. All are None if not measured.
    """
    means: dict[str, Any] = {name: fmean(step[f"{name}_s"] for step in steps) for name in ("step", *PHASES)}
    means |= dict.fromkeys(("compared_step", "compared_phases", "compared_tokens"))
    if repeated:
        fastest = min(steps[:repeated], key=lambda step: step["step_s"])
        means["compared_step"] = fastest["step_s"]
        means["compared_phases"] = {name: fastest[f"{name}_s"] for name in PHASES}
        means["compared_tokens"] = fmean(step["completion_length"] for step in steps[:repeated])
    return means


def phase_peaks(steps: Sequence[Mapping[str, Any]], kind: str = "peak_bytes") -> dict[str, int]:
    """The most bytes per phase in any step; `kind`: `peak_bytes` (all held) or `reserved_bytes` (CUDA's allocator)."""
    known = {name: [step[key] for step in steps if (key := f"{name}_{kind}") in step] for name in PHASES}
    return {name: max(counts) for name, counts in known.items() if counts}


def score_kinds(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Scores before and after by name: `greedy` and, if taken, `sampled` and `unquantized`."""
    kinds = {"greedy": report["quality"], "sampled": report["sampled"], "unquantized": report.get("deployed")}
    return {name: quality for name, quality in kinds.items() if quality}


def are_fractions(kinds: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all scores lie between 0 and 1, so that percents make sense."""
    scores = [quality[when]["score"] for quality in kinds.values() for when in ("before", "after")]
    return all(0 <= score <= 1 for score in scores)


def compared(scores: BeforeAfter | None) -> dict[str, Any] | None:
    """Scores before and after with their intervals, and the paired gain."""
    from midtune.report.statistics import paired_gain, score_interval

    if scores is None:
        return None
    before, after = scores
    found = asdict(score_interval(before)), asdict(score_interval(after)), asdict(paired_gain(before, after))
    return dict(zip(COMPARED, found, strict=True))
