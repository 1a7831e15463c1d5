from typing import Any

import pytest

from midtune.report.plans import dry_run_text, plan_table
from tests.report import toy_results
from tests.report.printed import rendered

GIB = 2**30


def plan(peak: int, **changes: Any) -> dict[str, Any]:
    """A plan of a model of two blocks on a card of 24 GiB."""
    phases = {
        "sampling": {"frozen blocks": GIB, "keys and values": peak - GIB},
        "update": {"frozen blocks": GIB},
    }
    arm = {
        **{"label": "midtune", "phases": phases, "peak": peak, "phase": "sampling", "fits": peak <= 24 * GIB},
        "seconds": {"sampling": 1.5, "update": 0.5},
    }
    return {
        **{"model": "toy", "parameters": 2_500_000_000, "num_blocks": 2, "blocks": [1], "arms": [arm]},
        "card": {"name": "24GB (RTX 3090)", "memory": 24 * GIB},
        "work": {"prompts": 8, "prompt_tokens": 1024, "group_size": 4, "new_tokens": 2048},
        **{"fit": {}, "fitted": arm, "largest": {"prompts": 9, "group_size": 16, "new_tokens": 4096}},
        "notes": [],
        "between": None,
        "by_block": [{"block": 0, "peak": 2 * peak}, {"block": 1, "peak": peak}],
        **changes,
    }


def test_a_plan_that_fits() -> None:
    assert rendered(plan_table(plan(16 * GIB))) == [
        "toy on 24GB (RTX 3090)",
        "2.50 billion parameters in 2 blocks; midtune trains block 1. A step: 8 prompts",
        "of 1,024 tokens x 4 completions of 2,048.",
        "",
        "way to train       peak        in  fits  step at best",
        "─────────────────────────────────────────────────────",
        "midtune       16.00 GiB  sampling   yes        2.00 s",
        "",
        "Where midtune's memory goes",
        "GiB              sampling  update",
        "─────────────────────────────────",
        "frozen blocks        1.00    1.00",
        "keys and values     15.00       -",
        "together            16.00    1.00",
        "",
        "Midtune's peak by the first block trained",
        "    0  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  32.00 GiB  does not fit",
        "    1  ━━━━━━━━━━━━━━━                 16.00 GiB",
        "",
        "It fits as asked, with 8.00 GiB to spare.",
        "With these settings about 9 prompts could go through an update together, or a",
        "group could have 16 completions, or a completion 4,096 tokens.",
        "Peaks of midtune come from running its code without data, those of TRL from",
        "running the model and the head that TRL runs; CUDA's own 0.6 GiB is assumed.",
        "Times are bounds from the card's published peaks, no promise.",
    ]


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (
            {"training.micro_batch_tokens": 512, "model.x": True},
            "training.micro_batch_tokens=512 --set model.x=true",
        ),
        (None, "It does not fit in 24.00 GiB, whatever is made leaner"),
    ],
)
def test_a_plan_that_does_not_fit(fit: dict[str, Any] | None, words: str) -> None:
    fitted = plan(20 * GIB)["fitted"]
    lines = rendered(plan_table(plan(32 * GIB, fit=fit, fitted=fit and fitted, largest=None)))
    assert words in " ".join(lines)
    # The settings that fit come first, and what was asked last.
    rows = [line for line in lines if line.startswith("midtune ") or line.startswith("midtune,")]
    wanted = ["20.00", "32.00"] if fit else ["32.00"]
    assert [row.partition(" GiB")[0].rpartition(" ")[2] for row in rows] == wanted
    assert not any(line.startswith("With these settings") for line in lines)


def test_a_dry_run_names_what_a_run_would_do() -> None:
    found = {**toy_results.dry_run(), "model": "m", "task": "t", "reward": None, "out": "runs/x"}
    assert rendered(
        dry_run_text({**found, "plan": None, "note": "no plan", "downloads": [], "weights_bytes": None})
    ) == [
        "Nothing was loaded, fetched or written.",
        "",
        "model       m (nf4)",
        "task        t, reward of the task",
        "algorithm   dr_grpo",
        "blocks      as a ranking says, else the middle",
        "step        128 prompts x 16 completions, at most 33,554,432 new tokens",
        "steps       1000",
        "evaluation  12032 problems, greedily and 16 samples each, twice: 31% of the run",
        "memory      no plan",
        "saved in    runs/x",
        "downloads   nothing from the hub",
    ]


def test_what_the_update_cannot_share_is_said() -> None:
    said = rendered(plan_table(plan(16 * GIB, notes=["The update repeats each prompt."])))
    assert "The update repeats each prompt." in said


def test_weights_that_are_too_large_by_themselves_are_said() -> None:
    found = plan(40 * GIB, fit=None, fitted=None, largest=None)
    found["arms"][0] |= {
        "fits": False,
        "phases": {"update": {"frozen blocks": 20 * GIB, "embeddings and head": 6 * GIB}},
    }
    assert "It does not fit in 24.00 GiB: its frozen weights alone take 26.00 GiB." in rendered(
        plan_table(found)
    )
