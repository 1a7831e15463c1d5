"""A run's report as one HTML file, and a page that compares several runs; self-contained, nothing is fetched."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midtune.report.card import form_rows
from midtune.report.depth import points, value_name
from midtune.report.figures import line_style, metric_curve, ranking_curves, reward_curves
from midtune.report.formats import (
    blocks_text,
    bytes_text,
    finite,
    interval_texts,
    known,
    numbers_text,
    percent_text,
    saving_text,
    seconds_text,
    speed_text,
)
from midtune.report.plots import smoothed, smoothing_width
from midtune.report.summary import COMPARED, PHASES, are_fractions, score_kinds
from midtune.report.tables import MEMORY_SOURCES, held_bytes, more_text

GENERATOR = '<meta name="generator" content="midtune">'
# Prefixes of report.json's keys for what midtune is compared with.
OTHERS = {"full": "full training", "qlora": "QLoRA"}
RATES = {"Learning rate": "training.lr", "KL weight": "training.beta", "Temperature": "training.temperature"}
CURVES = {
    "reward": "Reward",
    "completion_length": "Completion length, tokens",
    "step_kl": "KL of a step, as a share of the entropy",
    "lr": "Learning rate",
}
# Names that are more than capital letters.
ALGORITHM_NAMES = {"dr_grpo": "Dr. GRPO", "gigpo": "GiGPO"}
QUANTIZED = {"nf4": "linear layers in 4-bit NF4", "none": "unquantized"}


@dataclass(frozen=True)
class Run:
    """The content of a run's files; `probe` is the one that chose the blocks."""

    path: str  # the run's folder as a person types it
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[Mapping[str, Any]] = ()  # of before_after.json
    probe: Mapping[str, Any] | None = None
    exports: Mapping[str, Any] = field(default_factory=dict)  # the forms of export.json


def run_page(run: Run) -> str:
    """The page of one run; missing files leave out their sections."""
    report = run.report
    in_points = are_fractions(score_kinds(report))
    return _rendered(
        "run",
        title=f"{report['model']} on {report['task']}",
        run=run,
        report=report,
        asked=_asked(run),
        gains=_gains(report),
        forms=form_rows(report, run.exports) if run.exports else [],
        in_points=in_points,
        scale=[f"{end:.0%}" if in_points else f"{end:.3g}" for end in _scale(report)],
        curves=_curves(run.metrics),
        ranking=_ranking(run.probe),
        times=_times(report["time"]),
        memories=_memories(report["memory"]),
        phase_memories=[
            _bar(phase, "measured", peak, {phase: peak})
            for phase, peak in (report["memory"].get("phases") or {}).items()
        ],
        commands={
            "Reproduce": shlex.join(["midtune", "train", "--recipe", f"{run.path}/config.yaml"]),
            "Export as trained": shlex.join(
                ["midtune", "export", run.path, "--to", "nf4", "--out", "exported"]
            ),
            "Merge into a checkpoint": shlex.join(["midtune", "merge", run.path, "--out", "merged"]),
            "Serve": "vllm serve merged",
        },
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """The page that compares several runs."""
    gains = [{row["kind"]: row["gain"] for row in _gains(run.report)} for run in runs]
    return _rendered(
        "comparison",
        title=f"{len(runs)} runs compared",
        runs=list(zip(runs, gains, strict=True)),
        kinds=list(dict.fromkeys(kind for gain in gains for kind in gain)),
        curves=reward_curves([run.metrics for run in runs]) if any(run.metrics for run in runs) else None,
    )


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    functions = (
        bytes_text,
        line_style,
        more_text,
        numbers_text,
        saving_text,
        seconds_text,
        smoothing_width,
        speed_text,
    )
    values |= {function.__name__: function for function in (*functions, total_text)}
    values |= {"generator": GENERATOR, "phases": PHASES}
    return environment.get_template(f"{template}.html.jinja").render(**values)


def total_text(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """The time of all steps; None if no step has it."""
    seconds = known(metrics, "step_s")
    return seconds_text(sum(seconds)) if seconds else None


def _asked(run: Run) -> dict[str, str]:
    report = run.report

    def get(key: str) -> Any:
        part, _, name = key.partition(".")
        return (run.config.get(part) or {}).get(name)

    args = ", ".join(f"{key}={value}" for key, value in (get("task.args") or {}).items())
    # Older runs have one reward, as text.
    rewards = get("task.reward")
    lora = f"LoRA of rank {get('model.lora_rank')} on " if get("model.adapter") == "lora" else ""
    trained, parameters = report["trainable_parameters"], report["total_parameters"]
    algorithm = str(get("training.algorithm"))
    work = (
        f"{ALGORITHM_NAMES.get(algorithm, algorithm.upper())}, {get('training.steps')} steps of "
        f"{get('training.prompts_per_step')} prompts × {get('training.group_size')} completions of at most "
        f"{get('training.max_new_tokens')} tokens"
    )
    rounding = "calibrated on the task" if get("model.rounding") == "calibrated" else None
    model = (report["model"], get("model.revision"), QUANTIZED.get(get("model.quantize")), rounding)
    rows = {
        "Model": ", ".join(filter(None, model)),
        "Task": report["task"] + (f" ({args})" if args else ""),
        "Reward": " + ".join(rewards) if isinstance(rewards, list) else rewards,
        "Trained": f"{lora}{blocks_text(report['blocks'])}",
        "Chosen by": report["probe"],
        "Parameters": f"{trained:,} of {parameters:,} trained ({percent_text(trained / parameters)}), "
        f"a patch of {bytes_text(report['patch_bytes'])}",
        "Training": work if run.config.get("training") else None,
        **{
            name: f"{value:g}" if isinstance(value, float) else value
            for name, key in RATES.items()
            if (value := get(key)) is not None
        },
        "Seed": report["seed"],
        "Device": run.environment.get("device"),
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def _gains(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per way of scoring: scores as text, and as positions in percent of a common scale."""
    kinds = score_kinds(report)
    fractions = are_fractions(kinds)
    low, high = _scale(report)

    def place(score: Mapping[str, Any]) -> dict[str, float] | None:
        ends = {key: finite(score[key]) for key in ("low", "score", "high")}
        if high <= low or None in ends.values():
            return None
        return {key: 100 * (value - low) / (high - low) for key, value in ends.items() if value is not None}

    return [
        {
            "kind": kind,
            **{part: interval_texts(quality[part], fractions) for part in COMPARED},
            "places": {when: found for when in ("before", "after") if (found := place(quality[when]))},
        }
        for kind, quality in kinds.items()
    ]


def _scale(report: Mapping[str, Any]) -> tuple[float, float]:
    kinds = score_kinds(report)
    if are_fractions(kinds):
        return 0.0, 1.0
    scores = [quality[when] for quality in kinds.values() for when in ("before", "after")]
    ends = known(scores, "low") + known(scores, "high")
    return min(ends, default=0.0), max(ends, default=0.0)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for key, name in CURVES.items():
        _, values, means = smoothed(metrics, key)
        # A rate that never changes is in the table.
        if values and (key != "lr" or len(set(values)) > 1):
            width = smoothing_width(len(values))
            label = (
                f"{name} over {len(values)} steps: {means[width - 1]:.3g} in the mean of the first {width}, "
                f"{means[-1]:.3g} of the last {width}."
            )
            found.append({"name": name, "label": label, "svg": metric_curve(metrics, key)})
    return found


def _ranking(probe: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if probe is None or not (shown := points(probe)):
        return []
    best = max(shown, key=lambda point: point.value)
    labels = (
        f"{value_name(probe)} of {len(shown)} blocks by depth; the highest is block {best.block}'s.",
        "Gain of every block against the seconds of a training step.",
    )
    return [{"label": label, "svg": svg} for label, svg in zip(labels, ranking_curves(probe), strict=False)]


def _times(time: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars of a step's seconds: first those on equal prompts, then the mean of the run."""
    which = "" if finite(time.get("compared_step")) is None else ", first prompts"
    bars = []
    for key, name in {"compared": "midtune", **OTHERS}.items():
        if (step := finite(time.get(f"{key}_step"))) is not None:
            source, phases = time.get(f"{key}_source", "measured"), time.get(f"{key}_phases")
            bars.append(_bar(f"{name}{which}", source, step, phases or {"step": step}))
    phases = {phase: time[phase] for phase in PHASES}
    mean = _bar("midtune, mean of the run", "measured", time["step"], phases)
    return [*bars, mean] if which else [mean, *bars]


def _memories(memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    peaks = {f"midtune ({MEMORY_SOURCES[memory['source']]})": ("measured", held_bytes(memory) or 0)}
    for key, name in OTHERS.items():
        if (peak := held_bytes(memory, f"{key}_")) is not None:
            peaks[name] = (memory[f"{key}_source"], peak)
    return [_bar(name, source, peak, {"memory": peak}) for name, (source, peak) in peaks.items()]


def _bar(name: str, source: str, total: float, parts: Mapping[str, float]) -> dict[str, Any]:
    return {"name": name, "source": source, "total": total, "parts": parts}
