import subprocess
import sys
from typing import Any

import pytest

from midtune.report.summary import are_fractions, build, phase_peaks, score_kinds, step_times

# Two problems of eight are solved before training and four after; each is scored by Wilson's interval.
BEFORE, AFTER = [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]
STEPS: list[dict[str, Any]] = [
    {
        **{"step": step, "step_s": whole, "rollout_s": whole - 1.5, "reward_s": 0.5, "update_s": 1.0},
        **{"completion_length": length, "rollout_peak_bytes": 900 + step, "update_peak_bytes": 800},
        "update_reserved_bytes": 2000,
    }
    for step, whole, length in ((1, 6.0, 10.0), (2, 5.0, 20.0), (3, 2.5, 60.0))
]
FULL_PHASES = {"rollout": 3.0, "reward": 0.5, "update": 6.5}
FULL = {"step": 10.0, "phases": FULL_PHASES, "peak": 4000, "libraries": 100}


def built(**changes: Any) -> dict[str, Any]:
    about: dict[str, Any] = {
        **{"model": "tiny", "task": "reasoning-gym:chain_sum", "blocks": (2, 3)},
        **{"quality": (BEFORE, AFTER), "sampled": None, "deployed": None},
        **{"steps": STEPS, "time": step_times(STEPS), "peak_bytes": 1000, "memory_source": "resident"},
        **{"process_bytes": 200},
        **{"full": FULL, "full_source": "estimated", "qlora": {**FULL, "peak": None}},
        **{"trainable_parameters": 20, "total_parameters": 100, "patch_bytes": 80},
        **{"probe": "given with --layers", "seed": 7},
    }
    return build(**{**about, **changes})


def test_schema_1() -> None:
    found = built()
    quality = found.pop("quality")
    assert (quality["before"]["score"], quality["after"]["score"]) == (0.25, 0.5)
    # Wilson for 2 of 8, z = 1.95996: (0.25 + z²/16 ± z sqrt(0.25·0.75/8 + z²/256)) / (1 + z²/8).
    assert quality["before"] == {
        "score": 0.25,
        "low": pytest.approx(0.07148, abs=1e-5),
        "high": pytest.approx(0.59072, abs=1e-5),
        "n": 8,
    }
    assert quality["gain"].keys() == {"value", "low", "high"} and quality["gain"]["value"] == 0.25
    assert found == {
        "schema": 1,
        "model": "tiny",
        "task": "reasoning-gym:chain_sum",
        "blocks": [2, 3],
        "sampled": None,
        "deployed": None,
        "time": {
            "step": 4.5,
            "rollout": 3.0,
            "reward": 0.5,
            "update": 1.0,
            "full_step": 10.0,
            "full_source": "estimated",
            "compared_step": None,
            "compared_tokens": None,
            "full_tokens": None,
            "compared_phases": None,
            "full_phases": FULL_PHASES,
            "qlora_step": 10.0,
            "qlora_source": "estimated",
            "qlora_phases": FULL_PHASES,
            "speedup": 10 / 4.5,
        },
        "memory": {
            "peak": 1000,
            "source": "resident",
            "libraries": 200,
            "full_peak": 4000,
            "full_libraries": 100,
            "full_source": "estimated",
            "phases": {"rollout": 903, "update": 800},
            "reserved": 2000,
            "qlora_peak": None,
            "qlora_libraries": 100,
            "qlora_source": "estimated",
            # Above the libraries, 800 bytes of 3900.
            "saving": 1 - 800 / 3900,
        },
        "trainable_parameters": 20,
        "total_parameters": 100,
        "patch_bytes": 80,
        "probe": "given with --layers",
        "seed": 7,
        "notes": [],
        "scoring": None,
        "one_more_block": None,
    }


def test_measured_full_training_is_compared_with_the_fastest_step_on_its_prompts() -> None:
    times = step_times(STEPS, repeated=2)
    assert times == {
        **{"step": 4.5, "rollout": 3.0, "reward": 0.5, "update": 1.0},
        "compared_step": 5.0,
        "compared_phases": {"rollout": 3.5, "reward": 0.5, "update": 1.0},
        "compared_tokens": 15.0,
    }
    found = built(time=times, full={**FULL, "completion_length": 13.0}, full_source="measured")["time"]
    assert (found["speedup"], found["compared_tokens"], found["full_tokens"]) == (2.0, 15.0, 13.0)


def test_samples_and_the_unquantized_model_are_compared_where_they_were_scored() -> None:
    found = built(sampled=([0.25] * 8, [0.5] * 8), deployed=(AFTER, BEFORE))
    assert found["sampled"]["gain"]["value"] == 0.25
    assert found["deployed"]["gain"]["value"] == -0.25
    assert list(score_kinds(found)) == ["greedy", "sampled", "unquantized"]
    assert list(score_kinds(built())) == ["greedy"]
    assert are_fractions(score_kinds(found))
    assert not are_fractions(score_kinds(built(quality=(BEFORE, [1.5] * 8))))


def test_the_peak_is_the_highest_of_all_processes_of_a_run() -> None:
    found = built(peak_bytes=700)["memory"]
    assert (found["peak"], found["saving"]) == (903, pytest.approx(1 - 703 / 3900))
    bare = [{key: value for key, value in step.items() if "bytes" not in key} for step in STEPS]
    found = built(steps=bare, peak_bytes=700)["memory"]
    assert (found["peak"], found["phases"], found["reserved"]) == (700, None, None)


def test_a_saving_may_be_negative_or_unknown() -> None:
    assert built(full={**FULL, "peak": 800})["memory"]["saving"] == pytest.approx(1 - 800 / 700)
    found = built(full={**FULL, "peak": None})["memory"]
    assert (found["full_peak"], found["saving"]) == (None, None)


def test_notes_stand_beside_the_figures() -> None:
    assert built()["notes"] == []
    assert built(notes=["It collapsed."])["notes"] == ["It collapsed."]


def test_the_peak_of_a_phase_is_the_most_of_any_step() -> None:
    steps: list[dict[str, int]] = [
        {"step": 1},
        {"step": 2, "rollout_peak_bytes": 7, "update_peak_bytes": 5, "update_reserved_bytes": 9},
        {"step": 3, "update_peak_bytes": 6, "update_reserved_bytes": 8},
    ]
    assert phase_peaks(steps) == {"rollout": 7, "update": 6}
    assert phase_peaks(steps, "reserved_bytes") == {"update": 9}
    assert phase_peaks(steps[:1]) == {}


def test_the_report_does_not_import_torch() -> None:
    check = (
        "import sys, midtune.runs, midtune.report.summary, midtune.report.tables, midtune.report.display\n"
        "import midtune.measure.meter\n"
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
