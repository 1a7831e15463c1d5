import math
from typing import Any

import pytest

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
from tests.report import toy_results
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


def test_scores_beside_those_of_the_base() -> None:
    kinds = {"greedy": {"score": 0.45, "low": 0.391, "high": 0.508, "n": 300}}
    gain = {"greedy": {"value": -0.125, "low": -0.203, "high": -0.04}}
    row = {"task": "sums[a]", "scores": kinds, "before": kinds, "gain": gain}
    found = {"model": "tiny", "patch": [2, 3], "quantize": "none", "tasks": [row], "lm_eval": []}
    assert rendered(score_table({**found, "worse": ["sums[a]"]})) == [
        "tiny with trained blocks 2, 3 (unquantized)",
        "",
        "task              base  trained    gain      95% interval  problems",
        "───────────────────────────────────────────────────────────────────",
        "sums[a]  greedy  0.450    0.450  -0.125  -0.203 to -0.040       300",
        "Worse than the base: sums[a]. Each interval holds 95% alone; of many, some miss",
        "by chance.",
    ]
    assert rendered(score_table({**found, "patch": None, "worse": None}))[2:] == [
        "task             score    95% interval  problems",
        "────────────────────────────────────────────────",
        "sums[a]  greedy  0.450  0.391 to 0.508       300",
    ]
    assert rendered(score_table({**found, "worse": []}))[-2].startswith("Nothing was measurably worse")


def test_a_bench_says_which_arm_failed_and_where_time_goes() -> None:
    lines = rendered(bench_table(toy_results.bench()))
    assert "trl-qlora-fp32               -               -               -            failed" in lines
    assert "The arm trl-qlora-fp32 failed (no memory); leave it out with --arms." in lines
    text = " ".join(lines)
    # 700, 50 and 4 of 754 seconds; 1e15 operations at 9.9e14 a second.
    assert "matrix products 93%, attention 7%, other kernels 1%; at this machine's 990,000 GFLOP/s" in text
    assert "the products with weights would take 1.01 s." in text


def test_rankings_are_compared_by_what_both_have() -> None:
    found = toy_results.comparison()
    lines = rendered(compare_table({**found, "pairs": found["pairs"][:1]}))
    assert "position: closeness to the middle  -0.99 (-1.00 to -0.98)" in lines
    assert "Compared: C(k)." in lines
    scores = {
        **found["pairs"][0],
        "first": 0,
        "second": 1,
        "compared": "score",
        "spearman": None,
        "matched": "block",
    }
    lines = rendered(compare_table({**found, "pairs": [scores, *found["pairs"][:1]]}))
    assert "Compared: C(k) for 11, 12, scores for the others." in lines
    assert next(line for line in lines if line.startswith("1, 2 ")).split()[:4] == ["1,", "2", "126", "-"]


def test_tasks_are_listed_shown_or_checked() -> None:
    assert rendered(tasks_text({"tasks": ["gym:a", "gym:b"]})) == ["gym:a", "gym:b"]
    checked = {"checked": "my[x].py", "doubts": ["the reward is constant"], "findings": ["it has 3 problems"]}
    assert rendered(tasks_text(checked)) == [
        "my[x].py can be read, but its reward is in doubt",
        "  the reward is constant",
        "  it has 3 problems",
    ]
    assert rendered(tasks_text({**checked, "doubts": []}))[0] == "my[x].py can be trained on"
    shown = rendered(tasks_text({**toy_results.problem(), "prompt": "2 + 3 [x]?"}))
    assert shown == [
        *(toy_results.TASK, "  split=train", "  max_terms=4"),
        *("", "prompt", "2 + 3 [x]?", "", "answer", "5"),
        *("", "a right answer, which `numeric` gives 1", "It is 5."),
        *("", "a wrong answer, which `numeric` gives 0", "It is 6."),
    ]


def test_files_that_were_written() -> None:
    merged = {"path": "merged[x]", "tensors": 14, "bytes": 3 * 2**19, "scores": None}
    assert rendered(export_text(merged)) == ["merged[x]: 14 tensors replaced, 1.5 MiB."]
    assert rendered(page_text({"page": "runs/a[x].html"})) == ["runs/a[x].html"]
