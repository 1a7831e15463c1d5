"""Whole commands on the bundled model as cards run them: in bf16 and fp16, on a CPU."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from midtune import cli
from midtune.model.loading import load_policy
from midtune.model.sources import resolve
from midtune.rl.checks import MOST_DIFFERENCE
from midtune.rl.tail import completion_log_probs
from midtune.rollout.sampling import Sampling
from midtune.rollout.text import sample

SMALL = "--eval-size 4 --samples 1 --prompts-per-step 2 --max-new-tokens 8 --quiet".split()
TRAIN = [
    "train",
    *SMALL,
    *"--layers 5 --steps 2 --lr 1e-3 --baseline estimated --set evaluation.deployed=false".split(),
]
LORA, OFTEN = "--adapter lora --beta 0.01", ["--set", "training.checkpoint_every=1"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def midtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: words of a command → the JSON it prints; it has to succeed."""
    monkeypatch.setenv("CI", "1")

    def call(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, words), "--json"])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return dict(json.loads(printed.out))

    return call


def half(dtype: str) -> list[str]:
    return ["--set", f"model.dtype={dtype}"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A reward that differs within every group, so that everything is computed."""
    file = tmp_path_factory.mktemp("uneven") / "reward.py"
    file.write_text("def uneven(completions, **columns): return [i % 3 / 2 for i in range(len(completions))]")
    return ["--reward", f"{file}:uneven"]


@pytest.fixture(scope="module")
def trained(
    uneven: list[str], tmp_path_factory: pytest.TempPathFactory, traced_once: None
) -> Iterator[Callable[..., Path]]:
    """A function: a dtype and options → the folder of a run, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*asked: str) -> Path:
        if asked not in made:
            dtype, *options = asked
            folder = tmp_path_factory.mktemp(dtype) / "run"
            with pytest.raises(SystemExit) as ended:
                cli.main([*TRAIN, *half(dtype), *uneven, *options, "--out", str(folder)])
            assert ended.value.code == 0
            made[asked] = folder
        return made[asked]

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CI", "1")
        yield run


def check_run(folder: Path) -> None:
    """Every figure is a number, and what was trained is fp32 and finite."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step[name]) for step in steps for name in ("loss", "grad_norm", "entropy"))
    assert all(step["grad_norm"] > 0 or step["equal_groups"] == 1 for step in steps)
    tensors = load_file(next(folder.glob("checkpoints/checkpoint-2/trained.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert json.loads((folder / "environment.json").read_text())["device"] in (
        "cpu in bfloat16",
        "cpu in float16",
    )


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--algorithm dr_grpo --beta 0.01",
        "--temperature 0.7 --set training.top_p=0.9 --set training.min_p=0.01",
        "--set training.recompute=true --quantize none",
        LORA,
        "--set training.gradients=bf16 --set training.micro_batch_tokens=100 --set model.unpack=never",
        "--set training.optimizer=adamw_8bit --layers 4-6",
    ],
)
def test_a_run_in_bf16(trained: Callable[..., Path], options: str) -> None:
    check_run(trained("bf16", *options.split()))


def test_a_run_in_fp16_scales_its_loss_and_goes_on_exactly(
    midtune: Any, trained: Callable[..., Path], tmp_path: Path
) -> None:
    whole, halved = trained("fp16", *OFTEN), tmp_path / "halved"
    check_run(whole)
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoints/checkpoint-2")
    midtune("train", "--resume", halved)
    for name in ("trained.safetensors", "scaler.pt"):
        file = f"checkpoints/checkpoint-2/{name}"
        assert (whole / file).read_bytes() == (halved / file).read_bytes()


@pytest.mark.parametrize(
    ("dtype", "options", "others"), [("bf16", [], LORA.split()), ("fp16", OFTEN, ["--layers", "6"])]
)
def test_what_is_made_of_a_run(
    midtune: Any,
    trained: Callable[..., Path],
    tmp_path: Path,
    dtype: str,
    options: list[str],
    others: list[str],
) -> None:
    run, other = trained(dtype, *options), trained(dtype, *others)
    report = json.loads((run / "report.json").read_text())
    found = midtune("eval", run, "--quiet")
    assert found["greedy"] == report["quality"]["after"]
    assert found["sampled"] == report["sampled"]["after"]
    midtune("merge", run, "--out", tmp_path / "merged", "--quiet")
    merged = midtune(
        "eval", tmp_path / "merged", "--task", "reasoning-gym:chain_sum", *SMALL[:4], *half(dtype)
    )
    assert merged["greedy"]["n"] == 4
    voted = midtune("vote", run, other, "--eval-size", 4, "--quiet", *half(dtype))
    assert [voter["blocks"] for voter in voted["runs"]] == [[5], [6] if "--layers" in others else [5]]


@pytest.mark.parametrize("method", ["race", "sweep"])
def test_a_ranking_in_bf16(midtune: Any, uneven: list[str], tmp_path: Path, method: str) -> None:
    how = {
        "race": ["--budget", "12 steps", "--steps", 2],
        "sweep": ["--quantize", "none", "--steps", 1],
    }[method]
    small = [*SMALL[:2], *SMALL[-1:], "--set", "training.max_new_tokens=8", *uneven]
    found = midtune(
        "probe",
        "--method",
        method,
        "--layers",
        "5-6",
        *how,
        *small,
        *half("bf16"),
        "--out",
        tmp_path / "probe",
    )
    assert {row["block"] for row in found["blocks"]} >= {5, 6}
    assert all(math.isfinite(row["score"]) for row in found["blocks"])


def test_a_game_in_bf16(midtune: Any, tmp_path: Path) -> None:
    pytest.importorskip("textarena")
    turns = ["--set", "task.turn_tokens=3", "--set", "task.max_turns=2", "--set", "task.train_size=8"]
    midtune(
        *TRAIN,
        *half("bf16"),
        *turns,
        "--task",
        "frozen-lake",
        "--algorithm",
        "gigpo",
        "--set",
        "training.max_new_tokens=120",
        "--out",
        tmp_path / "run",
    )
    check_run(tmp_path / "run")


def test_arms_are_compared_in_bf16(midtune: Any, tmp_path: Path) -> None:
    work = "--prompts 1 --group-size 2 --prompt-tokens 4 --new-tokens 3 --steps 1 --arms midtune".split()
    found = midtune("bench", *work, *half("bf16"), "--quiet", "--out", tmp_path / "bench")
    assert found["arms"][0]["step"]["median"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_and_update_agree_within_rounding(dtype: str) -> None:
    policy = load_policy(resolve("tiny"), device="cpu", dtype=DTYPES[dtype])
    policy.thaw(5)
    torch.manual_seed(0)
    prompts = [policy.tokenizer.encode(text) for text in ("What is 12 + 7?", "What is 31 - 5 now?")]
    rollout = sample(policy, prompts, Sampling(12, group_size=4), boundary_block=5)
    assert rollout.boundary is not None
    assert rollout.boundary.completion.dtype == DTYPES[dtype]
    log_probs, entropies = completion_log_probs(policy, rollout, temperature=1.0)
    written = rollout.completion_mask.bool()
    for ours, sampled in ((log_probs, rollout.log_probs), (entropies, rollout.entropies)):
        assert (ours.dtype, sampled.dtype) == (torch.float32, torch.float32)
        difference = (ours.detach() - sampled)[written].abs()
        assert difference.mean() < MOST_DIFFERENCE[policy.compute_dtype] / 4
    log_probs.sum().backward()
    assert {p.grad.dtype for p in policy.trained_parameters().values() if p.grad is not None} == {
        torch.float32
    }
