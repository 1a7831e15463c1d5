from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from midtune.config import load_config
from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.report.statistics import paired_gain, score_interval
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import Evaluation
from midtune.stages import evaluate, train, vote
from midtune.stages.opening import Opened
from tests.stages.conftest import small_run


@pytest.fixture(scope="module")
def runs(
    finished: tuple[Path, dict[str, Any]],
    random_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """Three runs of one base: block 2, block 1, and LoRA on blocks 1 and 2."""
    found = [str(finished[0])]
    for settings in (
        {"blocks__layers": "1", "seed": 1},
        {"blocks__layers": "1-2", "model__adapter": "lora", "model__lora_rank": 4},
    ):
        folder = tmp_path_factory.mktemp("other")
        more = {"evaluation__samples": 0, "evaluation__deployed": False}
        config = small_run(random_checkpoint("qwen3"), folder, **more, **settings)
        train.run(config, out=folder / "run", resume=None, terminal=Terminal(quiet=True))
        found.append(str(folder / "run"))
    return found


def go(targets: list[str], terminal: Terminal, **settings: Any) -> dict[str, Any]:
    """The vote with the first run's settings, as the command line makes it."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return vote.run(targets, load_config(Path(targets[0]) / "config.yaml", changes), terminal=terminal)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_base_and_runs_score_as_eval_says(runs: list[str], terminal: Terminal, quantize: str) -> None:
    found = go(runs, terminal, model__quantize=quantize)
    config = load_config(Path(runs[0]) / "config.yaml", {"model.quantize": quantize})
    assert found["base"] == evaluate.run(config.model.name, [config], terminal=terminal)["greedy"]
    assert [scored["blocks"] for scored in found["runs"]] == [[2], [1], [1, 2]]
    for target, scored in zip(runs, found["runs"], strict=True):
        alone = evaluate.run(target, [config], terminal=terminal)
        assert scored == {
            "run": target,
            "blocks": alone["patch"],
            "score": alone["greedy"],
            "sampled": alone["sampled"],
        }
    assert (found["task"], found["quantize"]) == (config.task.name, quantize)
    assert json.loads(json.dumps(found)) == found


def test_the_base_is_bit_for_bit_itself_after_every_run(
    runs: list[str], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(Path(runs[0]) / "config.yaml", {})
    before = Opened(config, terminal).policy().model.state_dict()
    changed: list[list[str]] = []

    restore = Policy.restore

    def restored(policy: Policy) -> None:
        restore(policy)
        after = policy.model.state_dict()
        assert after.keys() == before.keys()
        changed.append([name for name, tensor in before.items() if not torch.equal(tensor, after[name])])

    monkeypatch.setattr(Policy, "restore", restored)
    go(runs, terminal, evaluation__samples=0)
    # Each patch is tried, and then scored.
    assert changed == [[]] * 6


def test_a_vote_worked_out_by_hand(
    runs: list[str], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The right answers are whole numbers, so the last number of a completion votes.
    completions = [
        # 1 wins; 2 wins; a tie, so 1; only 3 answers; equal; 1 wins; equal, and equal.
        ["it is 7", "8", "8", "unsure", "1", "5", "1", ""],
        ["7.0", "so 7", "9", "unsure", "1", "5", "1", ""],
        ["8", "7", "7", "7", "1", "6", "1", ""],
    ]
    scores = np.array(
        [
            [1, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0],
        ],
        dtype=float,
    )
    by_vote = [1, 1, 0, 1, 1, 1, 0, 0]
    made = [Evaluation(np.zeros(8), None, [""] * 8)]
    made += [Evaluation(own, None, texts) for own, texts in zip(scores, completions, strict=True)]
    monkeypatch.setattr(Opened, "score", lambda *_, **__: made.pop(0))
    found = go(runs, terminal)
    assert [scored["score"]["score"] for scored in found["runs"]] == [3 / 8, 4 / 8, 4 / 8]
    assert [scored["sampled"] for scored in found["runs"]] == [None] * 3
    assert found["vote"] == asdict(score_interval(by_vote))
    # Of the two best, the first.
    assert found["gain_over_best"] == asdict(paired_gain(scores[1], by_vote))
    assert found["gain_over_best"]["value"] == 1 / 8
    assert (found["solved_by_any"], found["solved_by_all"]) == (6 / 8, 1 / 8)
    assert found["overlap"] == [[1, 3 / 4, 1 / 6], [3 / 4, 1, 2 / 6], [1 / 6, 2 / 6, 1]]


def test_answers_are_read_in_the_form_of_the_right_one() -> None:
    rows = [{"answer": "so #### 12"}, {"answer": "Rome"}]
    made = [
        Evaluation(np.array([0.1, 0.2]), None, ["3 or 4", "I think\nRome"]),
        Evaluation(np.array([0.3, 0.4]), None, ["12, or 5", "I think\nParis"]),
        Evaluation(np.array([0.5, 0.6]), None, ["13, or 5.0", "Well,\nparis"]),
    ]
    assert vote.vote_scores(rows, made).tolist() == [0.3, 0.4]


def test_a_run_that_may_know_the_problems_is_named(runs: list[str], terminal: Terminal) -> None:
    go(runs[:2], terminal, evaluation__samples=0)
    assert "may have learned" not in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    go(runs[:2], terminal, evaluation__samples=0, seed=5)
    lines = terminal.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (line,) = [line for line in lines if "may have learned" in line]
    assert line.startswith(f"{runs[0]} was trained with seed 0 and 8 held-out problems")


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "needs at least two runs and got 1"),
        (["{run}/patch"], "patch was given twice"),
        (["{tmp}"], "neither a run folder nor a patch folder"),
        (["{tmp}/begun"], "has no trained patch yet"),
        (["{tmp}/other"], r"was trained on .* and .*/other on elsewhere; give runs of one base model"),
        (["{tmp}/newer"], r"on .* at revision abc; give runs of one base model"),
        (["{tmp}/swapped"], "was trained on other weights"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_scored(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    terminal: Terminal,
    others: list[str],
    words: str,
) -> None:
    run, _ = finished
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    for name, changes in {
        "other": {"base_model": "elsewhere"},
        "newer": {"revision": "abc"},
        "swapped": {"base_digest": "0"},
    }.items():
        shutil.copytree(run / "patch", tmp_path / name)
        said = json.loads((run / "patch/patch.json").read_text())
        (tmp_path / name / "patch.json").write_text(json.dumps({**said, **changes}))
        # As patches of earlier versions, which no manifest holds against.
        (tmp_path / name / "manifest.json").unlink()
    targets = [str(run), *(other.format(run=run, tmp=tmp_path) for other in others)]
    with pytest.raises(InputError, match=words) as caught:
        go(targets, terminal)
    assert "\n" not in str(caught.value)
    assert "scoring" not in terminal.console.file.getvalue()  # type: ignore[attr-defined]
