"""A local task of lm-evaluation-harness on a small model; needs `midtune[lm-eval]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.rollout.harness import harness_scores

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

TASK = """
task: midtune_toy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} is", "choices": ["ab", "cd"], "label": i % 2} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    return tmp_path


def test_a_harness_task_is_scored_by_document(load: Callable[..., Policy], folder: Path) -> None:
    import torch

    policy = load("qwen3", "nf4")
    policy.thaw(1)
    found = harness_scores(policy, ["midtune_toy"], folder=folder)["midtune_toy"]["acc"].tolist()
    expected = []
    for i in range(6):
        log_probs = []
        for choice in ("ab", "cd"):
            prompt = policy.tokenizer(f"{i} is")["input_ids"]
            ids = torch.tensor([prompt + policy.tokenizer(f" {choice}")["input_ids"]])
            with torch.no_grad():
                logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            log_probs.append(logits.gather(1, ids[0, len(prompt) :, None]).sum().item())
        expected.append(float((log_probs[1] > log_probs[0]) == (i % 2 == 1)))
    assert found == expected


def test_an_unknown_harness_task_is_refused(load: Callable[..., Policy], folder: Path) -> None:
    with pytest.raises(InputError, match="has no task no_such_task"):
        harness_scores(load("qwen3", "nf4"), ["no_such_task"], folder=folder)
