import subprocess
import sys
from typing import Any, Literal

import pytest

from midtune.report.statistics import Comparison, Gain, Score
from midtune.report.summary import MemoryReport, Report, TimeReport, phase_peaks

QUALITY = Comparison(Score(0.25, 0.2, 0.3, 300), Score(0.5, 0.45, 0.55, 300), Gain(0.25, 0.2, 0.3))


def report(
    full_step: float | None = 10.0,
    full_peak: int | None = 4000,
    source: Literal["measured", "estimated"] | None = "measured",
) -> dict[str, Any]:
    return Report(
        model="tiny",
        task="reasoning-gym:chain_sum",
        blocks=(2, 3),
        quality=QUALITY,
        sampled=QUALITY,
        deployed=None,
        time=TimeReport(4.0, 2.5, 0.5, 1.0, full_step=full_step, full_source=source),
        memory=MemoryReport(
            1000,
            "resident",
            full_peak=full_peak,
            full_source=source,
            phases={"rollout": 1000, "update": 900},
        ),
        trainable_parameters=20,
        total_parameters=100,
        patch_bytes=80,
        probe="given with --layers",
        seed=7,
    ).to_dict()


def test_schema_1() -> None:
    three = {
        "before": {"score": 0.25, "low": 0.2, "high": 0.3, "n": 300},
        "after": {"score": 0.5, "low": 0.45, "high": 0.55, "n": 300},
        "gain": {"value": 0.25, "low": 0.2, "high": 0.3},
    }
    assert report() == {
        "schema": 1,
        "model": "tiny",
        "task": "reasoning-gym:chain_sum",
        "blocks": [2, 3],
        "quality": three,
        "sampled": three,
        "deployed": None,
        "time": {
            "step": 4.0,
            "rollout": 2.5,
            "reward": 0.5,
            "update": 1.0,
            "full_step": 10.0,
            "full_source": "measured",
            "compared_step": None,
            "compared_tokens": None,
            "full_tokens": None,
            "compared_phases": None,
            "full_phases": None,
            "qlora_step": None,
            "qlora_source": "estimated",
            "qlora_phases": None,
            "speedup": 2.5,
        },
        "memory": {
            "peak": 1000,
            "source": "resident",
            "full_peak": 4000,
            "full_source": "measured",
            "phases": {"rollout": 1000, "update": 900},
            "reserved": None,
            "qlora_peak": None,
            "qlora_source": "estimated",
            "saving": 0.75,
        },
        "trainable_parameters": 20,
        "total_parameters": 100,
        "patch_bytes": 80,
        "probe": "given with --layers",
        "seed": 7,
        "notes": [],
    }


def test_what_full_training_takes_may_be_unknown() -> None:
    found = report(full_step=None, full_peak=None, source=None)
    assert (found["time"]["speedup"], found["memory"]["saving"]) == (None, None)


def test_speed_is_compared_on_the_same_prompts() -> None:
    times = TimeReport(4.0, 2.5, 0.5, 1.0, full_step=10.0, full_source="measured", compared_step=5.0)
    assert times.speedup == 2.0


def test_a_saving_may_be_negative() -> None:
    assert report(full_peak=800)["memory"]["saving"] == pytest.approx(-0.25)


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
        "import midtune.measure.meter, midtune.planning.estimate\n"
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
