import math
from typing import Any

import pytest

from midtune.report.results import bench_table, doctor_table, vote_table
from tests.report.printed import rendered


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
        "   run            blocks  score    95% interval",
        "───────────────────────────────────────────────",
        "   base model             0.200  0.150 to 0.250",
        "1  runs/block-3        3  0.400  0.350 to 0.450",
        "2  runs/block-14      14  0.400  0.350 to 0.450",
        "   vote                   0.450  0.400 to 0.500",
        "",
        "The vote's gain over run 1, the best here, is +0.050 (95% interval unknown). The",
        "best is chosen on these same problems, so on others the gain tends to be larger.",
        "At least one run solves 0.0% of the problems, all of them solve 0.0%.",
        "",
        "Of the problems that either of two runs solves, both solve:",
        "run  1  2",
        "─────────",
        "  1     -",
        "  2  -",
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
