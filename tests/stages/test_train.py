from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from midtune.config import RunConfig, dump_config, load_config, with_settings
from midtune.errors import InputError, Interrupted, RunStopped
from midtune.measure.meter import Meter
from midtune.model.loading import load_policy
from midtune.model.patch import apply_patch
from midtune.model.sources import resolve
from midtune.report.terminal import Terminal
from midtune.stages import evaluate, export, probe, train
from midtune.stages.opening import Choice, Opened, choose_blocks
from midtune.whole import damage
from tests.stages.conftest import Configured


def go(config: RunConfig, out: Path | None, terminal: Terminal, **more: Any) -> dict[str, Any]:
    return train.run(config, out=out, resume=more.get("resume"), terminal=terminal)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trajectory(folder: Path) -> list[tuple[float, ...]]:
    """What a step computed, without what the clock said."""
    return [
        (m["step"], m["reward"], m["loss"], m["grad_norm"], m["completion_length"]) for m in metrics(folder)
    ]


def test_a_run_leaves_what_the_house_says(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "start.json", "metrics.jsonl", "samples.jsonl"),
        *("checkpoints", "patch", "before_after.json", "report.json", "curve.svg", "report.html"),
    }
    assert {path.name for path in (run / "patch").iterdir()} == {
        *("patch.safetensors", "patch.json", "manifest.json")
    }
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert {"reward", "equal_groups", "completion_length", "rollout_s", "update_s", "memory_bytes"} <= set(
        metrics(run)[0]
    )


def test_the_report_is_what_was_returned(finished: tuple[Path, dict[str, Any]]) -> None:
    run, report = finished
    written = json.loads((run / "report.json").read_text())
    assert len(written.pop("digest")) == 16
    assert written == {key: value for key, value in report.items() if key != "run"}
    assert (written["schema"], written["blocks"]) == (1, [2])
    assert written["patch_bytes"] == sum(f.stat().st_size for f in (run / "patch").iterdir())
    assert written["time"]["full_source"] == written["memory"]["full_source"] == "estimated"
    assert written["quality"]["after"]["n"] == 8
    gain = written["sampled"]["after"]["score"] - written["sampled"]["before"]["score"]
    assert written["sampled"]["gain"]["value"] == pytest.approx(gain)


def test_the_report_has_the_peak_of_each_phase_where_the_system_tells(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    run, report = finished
    phases = report["memory"]["phases"]
    if not Meter("cpu").reset_peak():
        assert phases is None
        return
    assert phases == {
        phase: max(line[f"{phase}_peak_bytes"] for line in metrics(run))
        for phase in ("rollout", "reward", "update")
    }
    assert 50 * 2**20 < max(phases.values()) <= report["memory"]["peak"]
    assert report["memory"]["reserved"] is None


def test_its_config_gives_the_same_run(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, report = finished
    again = go(load_config(run / "config.yaml", {}), tmp_path / "again", Terminal(quiet=True))
    assert trajectory(tmp_path / "again") == trajectory(run)
    assert again["quality"] == report["quality"]


def test_eval_of_a_run_gives_the_scores_of_its_report(
    finished: tuple[Path, dict[str, Any]], terminal: Terminal
) -> None:
    run, report = finished
    config = load_config(run / "config.yaml", {})
    found = evaluate.run(str(run), [config], terminal=terminal)
    assert found["greedy"] == report["quality"]["after"]
    assert found["sampled"] == report["sampled"]["after"]
    unquantized = load_config(run / "config.yaml", {"model.quantize": "none"})
    assert evaluate.run(str(run), [unquantized], terminal=terminal)["greedy"] == report["deployed"]["after"]


def test_a_merged_run_scores_as_the_patch_on_the_unquantized_base(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, terminal: Terminal
) -> None:
    run, report = finished
    merged = export.run(run, out=tmp_path / "merged", terminal=terminal)
    assert merged["tensors"] == 11
    config = load_config(run / "config.yaml", {"model.quantize": "none"})
    found = evaluate.run(str(tmp_path / "merged"), [config], terminal=terminal)
    assert found["greedy"] == report["deployed"]["after"]
    assert found["patch"] is None


def chosen(config: RunConfig, terminal: Terminal) -> Choice:
    """The blocks that a run would train."""
    opened = Opened(config, terminal)
    return choose_blocks(config.blocks, opened.policy(), opened.task, terminal)


def test_without_a_ranking_the_middle_is_trained(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    choice = chosen(configured(blocks__layers=None), terminal)
    assert (choice.blocks, choice.ranking) == ([1], None)
    assert choice.how.startswith("the geometric middle: `midtune probe` has not ranked")


def test_the_latest_fitting_ranking_under_runs_chooses(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured(blocks__layers=None, training__steps=1, probe__budget="4 steps")
    ranking = probe.run(config, out=None, resume=None, terminal=terminal)
    assert [row["block"] for row in ranking["blocks"]] == [0, 1, 2, 3]
    report = go(config, None, terminal)
    assert report["probe"].startswith("the ranking of runs/probe-")
    assert report["blocks"] == ranking["selected"]
    other = configured(blocks__layers=None, task__eval_size=9)
    assert chosen(other, terminal).blocks == ranking["selected"]
    exact = configured(blocks__layers="middle", task__reward="exact")
    assert chosen(exact, terminal).how == "--layers middle"


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """A ranking of the four blocks, best first 3, 0, 2, 1, to be completed with what it is about."""
    blocks = [{"block": block, "rank": rank, "score": -rank} for rank, block in enumerate((3, 0, 2, 1), 1)]
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"method": "sweep", "blocks": blocks}))
    return file


def about(ranking: Path, config: RunConfig, terminal: Terminal) -> RunConfig:
    """The configuration with a ranking that is about its model and task."""
    data = json.loads(ranking.read_text())
    task = Opened(config, terminal).task
    data |= {"model": config.model.name, "revision": None, "task_fingerprint": task.fingerprint}
    ranking.write_text(json.dumps(data))
    return config


def test_a_given_ranking_chooses_if_it_is_about_this_model_and_task(
    configured: Configured, tmp_path: Path, terminal: Terminal, ranked: Path
) -> None:
    config = configured(blocks__layers=None, blocks__probe=ranked)
    choice = chosen(about(ranked, config, terminal), terminal)
    assert (choice.blocks, choice.how) == ([3], f"the ranking of {ranked} (sweep)")
    other = configured(blocks__layers=None, blocks__probe=ranked, task__reward="exact")
    with pytest.raises(InputError, match="probe again, or choose with --layers"):
        go(other, tmp_path / "c", terminal)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("select", "blocks"), [("best", [0, 3]), ("worst", [1, 2]), ("middle", [1, 2])])
def test_strategies_take_the_best_the_worst_or_the_middle(
    configured: Configured, terminal: Terminal, ranked: Path, select: str, blocks: list[int]
) -> None:
    config = configured(blocks__layers=None, blocks__probe=ranked, blocks__select=select, blocks__top_k=2)
    choice = chosen(about(ranked, config, terminal), terminal)
    assert choice.blocks == blocks
    assert ("the worst of" in choice.how) == (select == "worst")


def test_boost_trains_all_blocks_and_the_best_faster(
    configured: Configured, tmp_path: Path, terminal: Terminal, ranked: Path
) -> None:
    config = configured(
        blocks__layers=None,
        blocks__probe=ranked,
        blocks__select="boost",
        blocks__boost=3.0,
        training__steps=1,
        training__lr=1e-3,
    )
    report = go(about(ranked, config, terminal), tmp_path / "run", terminal)
    assert report["blocks"] == [0, 1, 2, 3]
    assert report["probe"].startswith("boost of block 3 by 3: the ranking of")
    assert load_config(tmp_path / "run/config.yaml", {}).model.quantize == "none"
    policy = load_policy(resolve(config.model.name), quantize="none", device="cpu")
    apply_patch(policy, tmp_path / "run/patch")
    for block in range(4):
        original = policy.original_tensors(block)["mlp.up_proj.weight"].float()
        moved = policy.blocks[block].mlp.up_proj.weight - original
        assert float(moved.detach().abs().max()) == pytest.approx(3e-3 if block == 3 else 1e-3, rel=0.01)


def test_the_worst_blocks_are_known_only_by_a_ranking(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for select in ("worst", "boost"):
        config = configured(blocks__layers=None, blocks__select=select)
        with pytest.raises(InputError, match=f"--select {select} needs a ranking .* `midtune probe`"):
            go(config, tmp_path / "run", terminal)
    lora = configured(blocks__select="boost", model__adapter="lora")
    with pytest.raises(InputError, match="leave out --adapter lora"):
        go(lora, tmp_path / "run", terminal)
    assert not (tmp_path / "run").exists()


def test_lora_trains_scores_and_merges(configured: Configured, tmp_path: Path, terminal: Terminal) -> None:
    report = go(configured(model__adapter="lora", model__lora_rank=4), tmp_path / "run", terminal)
    assert (tmp_path / "run/patch/adapter_model.safetensors").is_file()
    export.run(tmp_path / "run", out=tmp_path / "merged", terminal=terminal)
    config = load_config(tmp_path / "run/config.yaml", {"model.quantize": "none"})
    found = evaluate.run(str(tmp_path / "merged"), [config], terminal=terminal)
    assert found["greedy"]["score"] == pytest.approx(report["deployed"]["after"]["score"], abs=1e-6)


def test_full_training_is_measured_in_a_process_of_its_own(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    report = go(configured(evaluation__baseline="measured"), tmp_path / "run", terminal)
    time, memory = report["time"], report["memory"]
    assert (time["full_source"], memory["full_source"]) == ("measured", "measured")
    assert time["speedup"] == pytest.approx(time["full_step"] / time["compared_step"])
    assert memory["full_peak"] > memory["full_libraries"] > 50 * 2**20
    assert memory["peak"] > memory["libraries"] > 50 * 2**20


def test_nothing_to_learn_stops_the_run(configured: Configured, tmp_path: Path, terminal: Terminal) -> None:
    config = configured(
        task__reward=f"{tmp_path / 'reward.py'}:nothing",
        training__stop_after_equal_rewards=2,
        training__steps=9,
    )
    with pytest.raises(RunStopped, match="every reward was 0") as caught:
        go(config, tmp_path / "run", terminal)
    assert str(caught.value).count("reward 0:") == 3
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__name": "no/such-folder/at-all"}, "no/such-folder/at-all"),
        ({"model__device": "cuda:7"}, "CUDA"),
        ({"model__device": "abacus"}, "abacus"),
        ({"task__name": "reasoning-gym:chain_sums"}, "chain_sum"),
        ({"task__name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"task__reward": "exakt"}, "exact"),
        ({"task__reward": "{}/reward.py:gone"}, "gone"),
        ({"task__reward": "{}/reward.py:broken"}, "raised ValueError: no such thing"),
        ({"task__reward": "{}/reward.py:short"}, "returned 1 values for 4 completions"),
        ({"task__reward": "{}/reward.py:words"}, "returned 'good'"),
        ({"task__prompt_column": "question"}, "prompt"),
        ({"task__name": "{}/empty.jsonl"}, "empty.jsonl"),
        ({"task__name": "{}/torn.jsonl"}, "line 2"),
        ({"blocks__layers": "4"}, "numbered 0 to 3|0 to 3"),
        ({"blocks__layers": "middle", "blocks__top_k": 5}, "has 4; ask for 1 to 4"),
        ({"blocks__layers": None, "blocks__top_k": 5}, "has 4; ask for 1 to 4"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    configured: Configured, tmp_path: Path, terminal: Terminal, settings: dict[str, Any], words: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", \n')
    filled = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(InputError, match=words) as caught:
        go(configured(**filled), tmp_path / "run", terminal)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        go(configured(training__report_to="wandb"), tmp_path / "run", terminal)
    assert not (tmp_path / "run").exists()


def test_a_vllm_server_that_does_not_answer(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    with pytest.raises(InputError, match="no vLLM server at http://127.0.0.1:9"):
        go(configured(training__vllm="http://127.0.0.1:9"), tmp_path / "run", terminal)
    assert not (tmp_path / "run").exists()


def test_vllm_servers_sample_for_one_process(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="sample for one process, and 2 share this run"):
        train._checked(configured(training__vllm="http://127.0.0.1:9"))


def test_a_folder_that_holds_a_run_is_left_alone(
    finished: tuple[Path, dict[str, Any]], configured: Configured, terminal: Terminal
) -> None:
    run, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(InputError, match="holds another run"):
        go(configured(), run, terminal)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_a_disk_without_room(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=1000))
    with pytest.raises(InputError, match="disk space"):
        go(configured(), tmp_path / "run", terminal)
    assert not (tmp_path / "run").exists()


def test_resume_with_nothing_to_resume(configured: Configured, tmp_path: Path, terminal: Terminal) -> None:
    config = configured()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_config(config))
    with pytest.raises(InputError, match="was made by `midtune probe`.*midtune probe --resume"):
        go(config, None, terminal, resume=tmp_path / "run")


def test_a_run_stopped_by_a_signal_goes_on_exactly(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(training__steps=40)
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(dump_config(config))
    command = [sys.executable, "-m", "midtune", "train", "--recipe", str(recipe), "--out", str(run)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    written = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (written.is_file() and written.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with `midtune train --resume" in err
    stopped_at = len(metrics(run))
    assert 2 <= stopped_at < 40
    assert not (run / "patch").exists()

    resumed = go(load_config(run / "config.yaml", {}), None, terminal, resume=run)
    whole = go(config, tmp_path / "whole", terminal)
    assert trajectory(run) == trajectory(tmp_path / "whole")
    assert resumed["quality"] == whole["quality"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_training_after_its_step(
    configured: Configured,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    terminal: Terminal,
    name: str,
) -> None:
    run = tmp_path / "run"
    reward = at_a_moment(tmp_path, "(run / 'metrics.jsonl').exists()", f"os.kill(os.getpid(), signal.{name})")
    config = configured(task__reward=reward)
    with pytest.raises(Interrupted, match="stopped after step 2 of 3; go on with `midtune train --resume"):
        go(config, run, terminal)
    (tmp_path / "armed").unlink()
    go(load_config(run / "config.yaml", {}), None, terminal, resume=run)
    assert trajectory(run) == trajectory(finished[0])


def at_a_moment(folder: Path, when: str, does: str) -> str:
    """A reward `digits` that does something where `run`, the folder, is as `when` says, and `armed` is there."""
    (folder / "armed").touch()
    (folder / "moment.py").write_text(
        f"""
import os, shutil, signal
from pathlib import Path

folder = Path({str(folder)!r})
run = folder / "run"

def digits(completions, **columns):
    if (folder / "armed").exists() and {when}:
        {does}
    texts = [c[-1]["content"] for c in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]
"""
    )
    return f"{folder / 'moment.py'}:digits"


def test_a_failure_keeps_the_folder_resumable(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    after_training = "(run / 'checkpoints/checkpoint-4').exists()"
    reward = at_a_moment(tmp_path, after_training, "raise MemoryError('out of memory')")
    config = configured(training__steps=4, training__checkpoint_every=2, task__reward=reward)
    go(config, tmp_path / "whole", terminal)
    with pytest.raises(
        RunStopped, match="memory ran out; make room, then go on with `midtune train --resume"
    ):
        go(config, tmp_path / "run", terminal)
    (tmp_path / "armed").unlink()
    go(load_config(tmp_path / "run/config.yaml", {}), None, terminal, resume=tmp_path / "run")
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    for file in ("patch/patch.safetensors", "before_after.json"):
        resumed, whole = ((tmp_path / name / file).read_bytes() for name in ("run", "whole"))
        assert resumed == whole


def test_a_run_that_ends_for_want_of_memory_goes_on_from_what_fitted(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(training__steps=4, training__prompts_per_step=4, training__checkpoint_every=1)
    go(config, tmp_path / "whole", terminal)
    run = tmp_path / "run"

    def check(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, Qwen3DecoderLayer):
            return
        ended = (run / "metrics.jsonl").is_file() and len(metrics(run)) == 2
        if args[0].size(1) == 1 and len(args[0]) > (0 if ended else 8):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = register_module_forward_pre_hook(check)
    try:
        with pytest.raises(RunStopped, match="memory ran out in sampling with a single group of 4"):
            go(config, run, terminal)
    finally:
        hook.remove()
    assert "16 completions together; from now on at most 8 go together" in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    go(load_config(run / "config.yaml", {}), None, terminal, resume=run)
    assert [line["sampling_rows"] for line in metrics(run)] == [8] * 4
    for found, expected in zip(trajectory(run), trajectory(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_run_that_lost_how_it_began_is_not_resumed(
    finished: tuple[Path, Any], tmp_path: Path, terminal: Terminal
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "start.json").unlink()
    with pytest.raises(InputError, match="lacks start.json"):
        go(load_config(run / "config.yaml", {}), None, terminal, resume=run)


def test_a_stop_while_scoring_says_how_to_go_on(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    run = tmp_path / "run"
    reward = at_a_moment(tmp_path, "(run / 'config.yaml').exists()", "os.kill(os.getpid(), signal.SIGHUP)")
    config = configured(training__steps=2, task__reward=reward)
    go(config, tmp_path / "whole", terminal)
    for resume in (None, run):
        with pytest.raises(Interrupted, match=f"stopped; go on with `midtune train --resume {run}`"):
            go(config, run, terminal, resume=resume)
    (tmp_path / "armed").unlink()
    go(load_config(run / "config.yaml", {}), None, terminal, resume=run)
    assert trajectory(run) == trajectory(tmp_path / "whole")
    assert (run / "start.json").read_bytes() == (tmp_path / "whole/start.json").read_bytes()


def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    config, run = configured(training__steps=4, training__checkpoint_every=1), tmp_path / "run"
    go(config, run, terminal)
    whole, patch = trajectory(run), (run / "patch/patch.safetensors").read_bytes()
    rng = run / "checkpoints/checkpoint-4/rng_state.pth"
    rng.write_bytes(rng.read_bytes()[:-1] + b"!")
    go(load_config(run / "config.yaml", {}), None, terminal, resume=run)
    shown = terminal.console.file.getvalue()  # type: ignore[attr-defined]
    assert "checkpoint-4 of" in shown and "rng_state.pth does not have its checksum" in shown
    assert "resuming" in shown and "after step 3" in shown
    assert trajectory(run) == whole
    assert (run / "patch/patch.safetensors").read_bytes() == patch
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("where", ["start", "checkpoint", "metrics", "patch"])
def test_a_full_disk_ends_a_run_in_a_sentence_and_it_goes_on_with_room(
    finished: tuple[Path, dict[str, Any]],
    configured: Configured,
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    config, run, whole = configured(), tmp_path / "run", finished[0]
    fsync, writing = os.fsync, {"start": "start.json", "metrics": "metrics.jsonl"}.get(where, f".{where}")

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(run))
        if f"/{writing}" in name.replace("/.start", "/start") and (run / "config.yaml").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            RunStopped, match="the disk is full; make room, then go on with `midtune train --re"
        ):
            go(config, run, terminal)
    assert not list(run.rglob(".*"))
    assert all(damage(path) is None for path in (run / "checkpoints").glob("*"))
    go(load_config(run / "config.yaml", {}), None, terminal, resume=run)
    assert trajectory(run) == trajectory(whole)
    for file in ("start.json", "before_after.json", "patch/patch.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_a_folder_that_vanishes_ends_the_run(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    run = tmp_path / "run"
    reward = at_a_moment(tmp_path, "(run / 'metrics.jsonl').exists()", "shutil.rmtree(run)")
    with pytest.raises(RunStopped, match=f"{run} was removed while it was worked in; start again"):
        go(configured(task__reward=reward), run, terminal)


def test_scores_of_the_base_are_those_of_an_earlier_run(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "cache"))
    settings = {"task__reward": "exact", "training__steps": 1, "task__eval_size": "auto", "training__lr": 1.0}
    config = configured(**settings, training__stop_after_equal_rewards=0)
    first = go(config, tmp_path / "first", terminal)
    # 13 problems are a third of 40, and fewer than the floor.
    assert first["scoring"] == {
        "problems": 13,
        # 13 · 2 · (1 + 2 + 1) completions, beside 1 · 2 · 4 at 1.3.
        "planned_share": 104 / (104 + 10.4),
        "kept": {"trained": False, "unquantized": False},
    }
    # Another block starts from the same base.
    second = go(with_settings(config, {"blocks.layers": "1"}), tmp_path / "second", terminal)
    assert second["scoring"]["kept"] == {"trained": True, "unquantized": True}
    assert train.KEPT in second["notes"] and train.KEPT not in first["notes"]
    for kind in ("quality", "sampled", "deployed"):
        assert second[kind]["before"] == first[kind]["before"]
    said = terminal.console.file.getvalue()  # type: ignore[attr-defined]
    assert "scoring 13 problems before and after: about 91% of the run" in said
    assert "scoring before training: known from an earlier run with the same settings" in said
