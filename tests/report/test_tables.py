from collections.abc import Callable
from typing import Any

import pytest
from rich.console import RenderableType

from midtune.report.plans import dry_run_text, plan_table
from midtune.report.ranking import probe_table
from midtune.report.results import (
    bench_table,
    compare_table,
    doctor_table,
    export_text,
    page_text,
    score_table,
    tasks_text,
    vote_table,
)
from midtune.report.tables import plain_table, report_table
from tests.report import toy_results
from tests.report.printed import rendered

THREE = {
    "before": {"score": 0.327, "low": 0.276, "high": 0.382, "n": 300},
    "after": {"score": 0.577, "low": 0.52, "high": 0.631, "n": 300},
    "gain": {"value": 0.25, "low": 0.203, "high": 0.3},
}
REPORT: dict[str, Any] = {
    "schema": 1,
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "task": "reasoning-gym:chain_sum",
    "blocks": [15],
    "quality": THREE,
    "sampled": THREE,
    "deployed": THREE,
    "time": {
        "step": 8.3,
        "rollout": 5.2,
        "reward": 0.002,
        "update": 3.06,
        "full_step": 26.4,
        "full_source": "estimated",
        "speedup": 26.4 / 8.3,
    },
    "memory": {
        "peak": 1200 * 2**20,
        "source": "cuda_allocated",
        "full_peak": 3 * 2**30,
        "full_source": "measured",
        "saving": 0.61,
    },
    "trainable_parameters": 3540096,
    "total_parameters": 134515008,
    "patch_bytes": 14160384,
    "probe": "the geometric middle",
    "seed": 0,
    "one_more_block": {"block": 14, "step": 0.25, "peak": 60 * 2**20},
}


def test_memory_is_shown_above_the_libraries() -> None:
    memory = {**REPORT["memory"], "source": "resident", "libraries": 600 * 2**20, "full_libraries": 2**30}
    lines = rendered(report_table({**REPORT, "memory": memory}))
    (row,) = [line.split() for line in lines if line.startswith("peak memory")]
    assert row == "peak memory 600.0 MiB 2.00 GiB, measured 61% less".split()
    assert "Peak memory is that of the process, above the 600.0 MiB before the model was loaded." in " ".join(
        lines
    )


def test_report_on_80_columns() -> None:
    assert rendered(report_table(REPORT)) == [
        "HuggingFaceTB/SmolLM2-135M-Instruct on reasoning-gym:chain_sum: block 15 trained",
        "",
        "score                  before             after        gain, points",
        "───────────────────────────────────────────────────────────────────",
        "greedy       32.7% (28 to 38)  57.7% (52 to 63)  +25.0 (+20 to +30)",
        "sampled      32.7% (28 to 38)  57.7% (52 to 63)  +25.0 (+20 to +30)",
        "unquantized  32.7% (28 to 38)  57.7% (52 to 63)  +25.0 (+20 to +30)",
        "In brackets: 95% intervals over 300 held-out problems.",
        "Greedy and sampled: on the model as it was trained.",
        "Unquantized: greedy on the original weights, with the trained blocks put in.",
        "",
        "training       midtune, measured       full training",
        "─────────────────────────────────────────────────────────────────",
        "time per step             8.30 s   26.4 s, estimated  3.2x faster",
        "  rollout                 5.20 s",
        "  reward                    2 ms",
        "  update                  3.06 s",
        "peak memory             1.17 GiB  3.00 GiB, measured     61% less",
        "Peak memory is that of the CUDA tensors.",
        "With block 14 too, a step would take 0.25 s (3%) and 60.0 MiB (5%) more,",
        "estimated.",
        "",
        "3,540,096 of 134,515,008 parameters trained (2.6%), a patch of 13.5 MiB.",
        "Choice of blocks: the geometric middle.",
        "Seed 0.",
    ]


def test_measured_full_training_is_compared_on_the_same_prompts() -> None:
    compared = {"compared_step": 9.9, "compared_tokens": 12.0, "full_tokens": 13.24}
    time = {**REPORT["time"], **compared, "full_source": "measured", "speedup": 26.4 / 9.9}
    memory = {**REPORT["memory"], "source": "resident"}
    lines = rendered(report_table({**REPORT, "time": time, "memory": memory}))
    (first,) = [line.split() for line in lines if line.startswith("  on the first prompts")]
    assert first[-6:] == ["s", "26.4", "s,", "measured", "2.7x", "faster"]
    (mean,) = [line.split() for line in lines if line.startswith("time per step")]
    assert mean[-2:] == ["8.30", "s"]
    assert "Peak memory is that of the process." in lines
    assert "First prompts: completions of 12.0 tokens here, of 13.2 in full training." in lines


def test_unknown_and_unbounded_figures() -> None:
    scores = {
        "before": {"score": 1.25, "low": -1.5, "high": 3.0, "n": 8},
        "after": {"score": 0.5, "low": None, "high": None, "n": 8},
        "gain": {"value": -0.75, "low": -2.0, "high": 0.5},
    }
    text = "\n".join(
        rendered(
            report_table(
                {
                    **REPORT,
                    "quality": scores,
                    "sampled": None,
                    "deployed": None,
                    "blocks": [3, 4],
                    "time": {**REPORT["time"], "full_step": None, "full_source": None, "speedup": None},
                    "memory": {**REPORT["memory"], "saving": -0.05},
                    "one_more_block": None,
                }
            ),
            encoding="ascii",
        )
    )
    assert "1.25 (-1.5 to 3)" in text
    assert "-0.75 (-2 to +0.5)" in text
    assert "sampled" not in text
    assert "5.0% more" in text
    assert "estimated" not in text
    assert "blocks 3, 4\ntrained" in text


WIDE: list[tuple[Callable[[dict[str, Any]], RenderableType], dict[str, Any]]] = [
    (report_table, toy_results.report()),
    (score_table, toy_results.evaluation(compared=False)),
    (score_table, toy_results.evaluation(compared=True)),
    (vote_table, toy_results.vote()),
    (bench_table, toy_results.bench()),
    (compare_table, toy_results.comparison()),
    (probe_table, toy_results.ranking()),
    (plan_table, toy_results.plan()),
    (dry_run_text, toy_results.dry_run()),
    (doctor_table, toy_results.checks()),
    (tasks_text, toy_results.problem()),
    (export_text, toy_results.exported()),
    (page_text, {"page": f"{toy_results.RUN}/report.html"}),
]


@pytest.mark.parametrize(("table", "result"), WIDE, ids=[table.__name__ for table, _ in WIDE])
def test_every_table_fits_80_columns(
    table: Callable[[dict[str, Any]], RenderableType], result: dict[str, Any]
) -> None:
    """`rendered` finds no line that is longer, and no cell that is cut."""
    for encoding in ("utf-8", "ascii"):
        assert rendered(table(result), encoding)


def test_a_table_that_is_too_wide_folds_its_widest_cells() -> None:
    table = plain_table("run", numbers=("score",), rows=[("runs/" + "[x]" * 30, "0.450"), ("a", "1")])
    assert rendered(table) == [
        "run                                                                        score",
        "─" * 80,
        "runs/" + "[x]" * 22 + "[x  0.450",
        "][x][x][x][x][x][x][x]",
        "a                                                                              1",
    ]
