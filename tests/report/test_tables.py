import math
from typing import Any

import pytest

from midtune.report.results import bench_table, doctor_table, vote_table
from midtune.report.tables import bytes_text, report_table, seconds_text, whole_seconds_text
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
}


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
        "Unquantized: greedy on the original weights, with the trained blocks put in.",
        "",
        "training                    midtune, measured       full training",
        "──────────────────────────────────────────────────────────────────────────────",
        "time per step                          8.30 s   26.4 s, estimated  3.2x faster",
        "  rollout                              5.20 s",
        "  reward                                 2 ms",
        "  update                               3.06 s",
        "peak memory (CUDA tensors)           1.17 GiB  3.00 GiB, measured  61% less",
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
    (first,) = [line.split() for line in lines if line.startswith("time per step, first prompts")]
    assert first[-6:] == ["s", "26.4", "s,", "measured", "2.7x", "faster"]
    (mean,) = [line.split() for line in lines if line.startswith("time per step, mean")]
    assert mean[-2:] == ["8.30", "s"]
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


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1536, "1.5 KiB"),
        (14160384, "13.5 MiB"),
        (2**30 * 5 // 4, "1.25 GiB"),
        (-(2**30), "-1.00 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0002, "0.20 ms"),
        (0.012, "12 ms"),
        (2.312, "2.31 s"),
        (45.21, "45.2 s"),
        (99.96, "1 min 40 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_whole_seconds() -> None:
    assert [whole_seconds_text(s) for s in (0, 7.2, 59.5, 60, 200)] == [
        "0 s",
        "8 s",
        "1 min 00 s",
        "1 min 00 s",
        "3 min 20 s",
    ]


def test_the_bench_table_shows_ratios_where_work_was_equal() -> None:
    def arm(name: str, seconds: float, ratios: dict[str, float] | None) -> dict[str, Any]:
        phases = {phase: {"median": seconds} for phase in ("step", "rollout", "update")}
        return {"arm": name, "peak": 3 * 2**30, "libraries": 2**30, "ratios": ratios, **phases}

    ones = dict.fromkeys(("step", "rollout", "update", "memory"), 1.0)
    fours = {**ones, "update": 4.0}
    arms = [arm("midtune", 1.5, ones), arm("trl-full", 6.0, fours), arm("trl-qlora", 7.0, None)]
    sizes = {"steps": 5, "prompts": 4, "group_size": 8, "new_tokens": 24}
    lines = rendered(bench_table({"model": "m", "block": 3, "arms": arms, "failed": {}, **sizes}))
    by_arm = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert by_arm["midtune"] == ["1.50", "s", "1.50", "s", "1.50", "s", "2.00", "GiB"]
    assert "(4.0x)" in by_arm["trl-full"]
    assert not any("x)" in word for word in by_arm["trl-qlora"])
    assert "An arm without a ratio did not do the same work." in lines


def test_the_vote_on_80_columns() -> None:
    def score(value: float, low: float, high: float) -> dict[str, Any]:
        return {"score": value, "low": low, "high": high, "n": 300}

    runs = [
        {"run": f"runs/block-{block}", "blocks": [block], "score": score(0.4, 0.35, 0.45), "sampled": None}
        for block in (3, 14)
    ]
    result = {
        "model": "tiny",
        "task": "reasoning-gym:chain_sum",
        "quantize": "nf4",
        "base": score(0.2, 0.15, 0.25),
        "runs": runs,
        "vote": score(0.45, 0.4, 0.5),
        "gain_over_best": {"value": 0.05, "low": math.nan, "high": math.nan},
        "solved_by_any": 0.0,
        "solved_by_all": 0.0,
        "overlap": [[None, None], [None, None]],
    }
    assert rendered(vote_table(result)) == [
        "tiny (nf4) on reasoning-gym:chain_sum, 300 problems",
        "",
        "     run             blocks   score     95% interval",
        " ───────────────────────────────────────────────────",
        "     base model               0.200   0.150 to 0.250",
        " 1   runs/block-3         3   0.400   0.350 to 0.450",
        " 2   runs/block-14       14   0.400   0.350 to 0.450",
        "",
        "     vote                     0.450   0.400 to 0.500",
        "",
        "The vote's gain over run 1, the best here, is +0.050 (95% interval unknown). The",
        "best is chosen on these same problems, so on others the gain tends to be larger.",
        "At least one run solves 0.0% of the problems, all of them solve 0.0%.",
        "",
        "Of the problems that either of two runs solves, both solve:",
        "",
        " run   1   2",
        " ───────────",
        "   1       -",
        "   2   -",
        "",
    ]


def test_the_doctor_on_80_columns() -> None:
    def check(name: str, status: str, found: str, fix: str = "") -> dict[str, str]:
        return {"name": name, "status": status, "found": found, "fix": fix}

    checks = [
        check("trl", "problem", "1.17.0; midtune is tested with >=1.16,<1.17", 'pip install "trl"'),
        check("device", "ok", "CPU, 2 cores"),
        check(
            "hub",
            "warning",
            "https://huggingface.co does not answer",
            "folders work [and] `tiny` " + "does " * 9,
        ),
    ]
    assert rendered(doctor_table({"checks": checks, "problems": 1, "warnings": 2})) == [
        "problem  trl     1.17.0; midtune is tested with >=1.16,<1.17",
        '                 -> pip install "trl"',
        "ok       device  CPU, 2 cores",
        "warning  hub     https://huggingface.co does not answer",
        "                 -> folders work [and] `tiny` does does does does does does does",
        "                 does does",
        "",
        "Not ready: 1 problem and 2 warnings.",
    ]


@pytest.mark.parametrize(
    ("warnings", "verdict"), [(0, "Ready."), (1, "Ready: 1 warning."), (2, "Ready: 2 warnings.")]
)
def test_the_doctor_ends_with_a_verdict(warnings: int, verdict: str) -> None:
    lines = rendered(doctor_table({"checks": [], "problems": 0, "warnings": warnings}), encoding="ascii")
    assert lines[-1] == verdict
