"""What a run has left, to make a page of."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from midtune.report.page import Run
from midtune.report.summary import PHASES
from tests.report.toy_probe import toy_probe

QUALITY = {
    "before": {"score": 0.25, "low": 0.2, "high": 0.3, "n": 300},
    "after": {"score": 0.5, "low": 0.45, "high": 0.55, "n": 300},
    "gain": {"value": 0.25, "low": 0.2, "high": 0.3},
}


def toy_report(**changes: Any) -> dict[str, Any]:
    """A report.json with full training measured; `changes` are other values for its keys."""
    return {
        "schema": 1,
        "model": "toy",
        "task": "sums",
        "blocks": [2, 3],
        "quality": deepcopy(QUALITY),
        "sampled": deepcopy(QUALITY),
        "deployed": deepcopy(QUALITY),
        "time": {
            **{"step": 4.0, "rollout": 2.5, "reward": 0.5, "update": 1.0},
            **{"full_step": 10.0, "full_source": "measured", "speedup": 2.0},
            **{"compared_step": 5.0, "compared_tokens": None, "full_tokens": None},
            "compared_phases": dict(zip(PHASES, (2.5, 0.5, 2.0), strict=True)),
            "full_phases": dict(zip(PHASES, (3.0, 0.5, 6.5), strict=True)),
            **{"qlora_step": None, "qlora_source": "estimated", "qlora_phases": None},
        },
        "memory": {
            **{"peak": 2**30, "source": "resident", "full_peak": 2**32, "full_source": "measured"},
            "phases": {"rollout": 2**30, "reward": 2**28, "update": 2**29},
            **{"reserved": None, "qlora_peak": None, "qlora_source": "estimated", "saving": 0.75},
        },
        "trainable_parameters": 20,
        "total_parameters": 100,
        "patch_bytes": 80,
        "probe": "the ranking of runs/probe (sweep)",
        "seed": 7,
        "notes": [],
        "one_more_block": {"block": 1, "step": 0.5, "peak": 2**25},
        **changes,
    }


def toy_run(**changes: Any) -> Run:
    """A run that has left everything; `changes` are other values for its fields."""
    config = {
        "model": {"revision": "v1", "quantize": "nf4", "adapter": "full"},
        "task": {"args": {"min_terms": 2}, "reward": "numeric"},
        "training": {
            **{"algorithm": "grpo", "steps": 20, "prompts_per_step": 8, "group_size": 4},
            **{"max_new_tokens": 16, "lr": 2e-4, "beta": 0.0, "temperature": 1.0},
        },
    }
    metrics = [
        {"step": step, "reward": step / 40, "completion_length": 30 - step, "step_s": 4.0}
        for step in range(1, 21)
    ]
    problem = {
        "prompt": "What is 2 + 3?",
        "answer": "5",
        "before": {"completion": "It is 6.", "score": 0.0},
        "after": {"completion": "It is 5.", "score": 1.0},
    }
    everything: dict[str, Any] = {
        "path": "runs/my toy",
        "config": config,
        "report": toy_report(),
        "metrics": metrics,
        "environment": {"device": "cpu", "versions": {"midtune": "0.1.0", "trl": None}},
        "problems": [problem],
        "probe": toy_probe([0.1, 0.2, 0.3, 0.25], half_width=0.1, full=0.4),
    }
    return Run(**{**everything, **changes})
