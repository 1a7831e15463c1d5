"""What each command has found, with names and figures as long as they really get."""

from __future__ import annotations

from typing import Any

from tests.report.toy_probe import toy_probe

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
TASK = "nvidia/OpenMathReasoning:cot"
RUN = "runs/DeepSeek-R1-Distill-Qwen-1.5B-OpenMathReasoning-23"
DAY = 86_000.0
SCORE = {"score": 0.45, "low": 0.391, "high": 0.508, "n": 12_032}
GAIN = {"value": -0.125, "low": -0.203, "high": 0.3}
QUALITY = {
    "before": {"score": 1.0, "low": 0.997, "high": 1.0, "n": 12_032},
    "after": {"score": 1.0, "low": 0.997, "high": 1.0, "n": 12_032},
    "gain": {"value": -1.0, "low": -1.0, "high": 1.0},
}
PHASES = ("rollout", "reward", "update")


def report() -> dict[str, Any]:
    """A report.json of a long run with a large model."""
    return {
        **{"schema": 1, "model": MODEL, "task": TASK, "blocks": [10, 11, 12]},
        **{"quality": QUALITY, "sampled": QUALITY, "deployed": QUALITY},
        "time": {
            **{"step": DAY, **dict.fromkeys(PHASES, DAY)},
            **{"full_step": DAY, "full_source": "estimated", "speedup": 12.5},
            **{"compared_step": DAY, "compared_tokens": 12_345.6, "full_tokens": 12_345.6},
        },
        "memory": {
            **{"peak": 999 * 2**30, "source": "cuda_allocated", "saving": 0.99},
            **{"full_peak": 1234 * 2**30, "full_source": "estimated"},
        },
        **{"trainable_parameters": 1_234_567_890, "total_parameters": 123_456_789_012},
        **{"patch_bytes": 12 * 2**30, "probe": f"the ranking of {RUN} (race)", "seed": 2**31},
        "one_more_block": {"block": 9, "step": DAY, "peak": 12 * 2**30},
        "notes": ["In steps 11 to 20 all completions of each prompt got equal rewards."],
    }


def evaluation(compared: bool) -> dict[str, Any]:
    """What `midtune eval` finds, with the base beside it or without."""
    kinds = ("greedy", "avg@16", "pass@16")
    row = {
        "task": TASK,
        "scores": dict.fromkeys(kinds, SCORE),
        "before": dict.fromkeys(kinds, SCORE) if compared else None,
        "gain": dict.fromkeys(kinds, GAIN) if compared else None,
    }
    harness = {**row, "task": "leaderboard_mmlu_pro_professional_accounting"}
    about = {"model": MODEL, "patch": [10, 11, 12] if compared else None, "quantize": "nf4"}
    return {**about, "tasks": [row], "lm_eval": [harness], "worse": [TASK] if compared else None}


def vote() -> dict[str, Any]:
    """What `midtune vote` finds of seven runs."""
    run = {"run": RUN, "blocks": [10, 11, 12], "score": SCORE, "sampled": SCORE}
    return {
        **{"model": MODEL, "task": TASK, "quantize": "nf4", "base": SCORE, "runs": [run] * 7, "vote": SCORE},
        **{"gain_over_best": GAIN, "solved_by_any": 1.0, "solved_by_all": 1.0, "overlap": [[1.0] * 7] * 7},
    }


def bench() -> dict[str, Any]:
    """What `midtune bench` measures of minutes-long steps, with one arm that failed."""
    names = ("midtune", "trl-full", "trl-block", "trl-qlora")
    phases = {phase: {"median": 754.0} for phase in ("rollout", "update", "step")}
    ratios = dict.fromkeys(("rollout", "update", "step", "memory"), 12.5)
    arms = [
        {"arm": name, **phases, "peak": 1234 * 2**30, "libraries": 2**30, "ratios": ratios} for name in names
    ]
    return {
        **{"model": MODEL, "block": 10, "arms": arms, "steps": 5, "prompts": 128, "group_size": 16},
        **{"new_tokens": 16_384, "peak_flops_per_s": 9.9e14, "flops": {"rollout": 1e15, "update": 1e15}},
        "profile": {"rollout": {"matrix products": 700.0, "attention": 50.0, "other kernels": 4.0}},
        "failed": {"trl-qlora-fp32": "the arm trl-qlora-fp32 failed (no memory); leave it out with --arms."},
    }


def comparison() -> dict[str, Any]:
    """What `midtune compare` finds of twelve rankings."""
    correlation = {"value": -0.99, "low": -1.0, "high": -0.98}
    ranking = {
        **{"file": f"{RUN}/probe.json", "model": MODEL, "task": TASK, "method": "gradient", "seed": 0},
        **{"ranked": 28, "num_blocks": 28, "depth": correlation, "middle": correlation},
    }
    pair = {
        **{"first": 10, "second": 11, "matched": "depth", "compared": "contribution", "blocks": 126},
        **{"spearman": correlation, "kendall": correlation, "top_k": 10, "overlap": 10, "expected": 10.0},
        **{"p": 0.0001, "signals": {"gradient norm over weight norm": correlation, "middle": correlation}},
    }
    return {"rankings": [ranking] * 12, "pairs": [pair, pair]}


def ranking() -> dict[str, Any]:
    """A probe.json with everything that can be known."""
    probe = toy_probe([0.001 * block - 0.05 for block in range(96)], half_width=0.3, full=0.2)
    for row in probe["blocks"]:
        row |= {"best_probability": 0.5, "steps": 1000 + row["block"]}
    about = {"model": MODEL, "task": TASK, "among_best": [*range(0, 96, 2)], "note": "A note."}
    plateau = {"first": 10, "last": 90, "inside": 0.75, "outside": -0.375}
    return {**probe, **about, "plateau": plateau, "position": {"depth": 0.2, "middle": -0.4}}


def plan() -> dict[str, Any]:
    """What `midtune plan` works out of a model that does not fit as asked."""
    phases = {
        phase: {"unpacked weights": 1234 * 2**30, "trained blocks, fp32": 2**30, "keys and values": 0}
        for phase in ("sampling", "update", "optimizer")
    }
    arm = {
        **{"arm": "trl", "label": "TRL, the same without checkpointing", "phases": phases, "fits": False},
        **{"peak": 1235 * 2**30, "phase": "optimizer", "seconds": {"sampling": DAY, "update": 1.0}},
    }
    return {
        **{"model": MODEL, "parameters": 123_456_789_012, "num_blocks": 126, "blocks": [60, 61]},
        "card": {"name": "141GB (H200)", "memory": 141 * 2**30},
        "work": {"prompts": 128, "prompt_tokens": 2048, "group_size": 16, "new_tokens": 32_768},
        **{
            "arms": [arm] * 5,
            "fitted": arm,
            "fit": {"training.micro_batch_tokens": 4096, "model.flash": True},
        },
        "largest": {"prompts": 64, "group_size": 256, "new_tokens": 131_072},
        "notes": [
            "The update runs all blocks, which is slower: later ones also read what earlier ones keep."
        ],
        "between": None,
        "by_block": [{"block": block, "peak": (1234 - block) * 2**30} for block in range(126)],
    }


def dry_run() -> dict[str, Any]:
    """What `midtune train --dry-run` finds of a model and problems from the hub."""
    return {
        **{"model": MODEL, "quantize": "nf4", "task": TASK, "reward": ["numeric", "format", "code"]},
        **{"algorithm": "dr_grpo", "layers": "as a ranking says, else the middle", "steps": 1000},
        "step": {"prompts": 128, "group_size": 16, "completions": 2048, "tokens": 33_554_432},
        **{"evaluation": {"problems": 12_032, "samples": 16, "share": 0.31}, "out": RUN, "note": None},
        "downloads": [f"the weights of {MODEL}", f"the problems of {TASK}"],
        "weights_bytes": 123 * 2**30,
        "plan": {
            **{"blocks": [10, 11, 12], "trainable_parameters": 1_234_567_890, "card": "141GB (H200)"},
            **{"prompt_tokens": 2048, "peak": 1234 * 2**30, "phase": "optimizer", "fits": False},
            "notes": [],
            "changes": {"training.recompute": True, "training.optimizer": "adamw_8bit"},
            "seconds": {"sampling": DAY, "update": DAY},
        },
    }


def checks() -> dict[str, Any]:
    """What `midtune doctor` finds on a machine that is not ready."""
    check = {
        **{"name": "transformers", "status": "problem", "found": "4.0.0; midtune is tested with >=5.20,<6"},
        "fix": 'python -m pip install "transformers>=5.20,<6" --index-url https://download.pytorch.org/whl/cpu',
    }
    return {"checks": [check, {**check, "status": "warning"}], "problems": 1, "warnings": 1}


def exported() -> dict[str, Any]:
    """One form scored of two."""
    scores = {
        "before": {"score": 0.327, "low": 0.276, "high": 0.382, "n": 300},
        "after": {"score": 0.577, "low": 0.52, "high": 0.631, "n": 300},
        "gain": {"value": 0.25, "low": 0.203, "high": 0.3},
    }
    forms = {"nf4": {"scores": scores}, "hf": {"scores": None}}
    return {"path": f"{RUN}/exported", "tensors": 1234, "bytes": 2**40, "scores": scores, "forms": forms}


def problem() -> dict[str, Any]:
    """What `midtune tasks` shows of a task."""
    return {
        **{"task": TASK, "arguments": {"split": "train", "max_terms": 4}, "prompt": "What is 2 + 3? " * 9},
        **{"answer": "5", "reward": "numeric", "right": {"score": 1.0, "completion": "It is 5."}},
        "wrong": {"score": 0.0, "completion": "It is 6."},
    }
