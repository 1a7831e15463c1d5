"""The study's architectures, small: loaded, one block trained, saved as a patch and merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from midtune.config import load_config
from midtune.model.loading import load_policy
from midtune.model.patch import deployed_tensors, merge_patch, save_patch
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.report.terminal import Terminal
from midtune.rollout.speech import prompt_ids
from midtune.stages.opening import Opened
from midtune.tasks.rewards import parts_of
from tests.conftest import STUDY
from tests.model.toy_training import logits_of, perturb

# deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, chat_template of tokenizer_config.json (MIT), as three public copies of it
# have it; litellm's tests have one.
R1_TEMPLATE = Path(__file__).with_name("deepseek-r1-distill-qwen.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STUDY)
def test_a_trained_block_is_merged_into_each_architecture(
    random_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    architecture, overrides = STUDY[name]
    folder = random_checkpoint(architecture, **overrides)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain.config.tie_word_embeddings is overrides["tie_word_embeddings"]
    names = set(plain.state_dict())
    assert ("model.layers.1.self_attn.q_norm.weight" in names) is (architecture == "qwen3")
    assert ("model.layers.1.self_attn.q_proj.bias" in names) is (architecture == "qwen2")
    unquantized = load_policy(resolve(str(folder)), quantize="none", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = plain(ids).logits.log_softmax(-1)
        torch.testing.assert_close(
            unquantized.model(ids).logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-5
        )

    policy = load_policy(resolve(str(folder)), quantize="nf4", device="cpu")
    policy.thaw(1)
    before = logits_of(policy)
    perturb(policy)
    assert not torch.equal(logits_of(policy), before)
    trained = {key: value.detach().clone() for key, value in policy.trained_parameters().items()}
    save_patch(policy, tmp_path / "patch")
    merge_patch(policy.source, deployed_tensors(policy.source, tmp_path / "patch"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(merged[key], trained.get(key, value)), key


def test_prompts_of_a_reasoning_model_end_where_thinking_begins(
    random_checkpoint: Callable[..., Path], load: Callable[..., Policy], tmp_path: Path
) -> None:
    architecture, overrides = STUDY["r1-distill-qwen-7b"]
    folder = shutil.copytree(random_checkpoint(architecture, **overrides), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(R1_TEMPLATE, encoding="utf-8")
    tokenizer = load(folder, "none").tokenizer
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>2"},
        {"role": "user", "content": "2+2?"},
    ]
    ids = prompt_ids(tokenizer, chat)
    assert tokenizer.decode(ids) == (
        "<s><｜User｜>1+1?<｜Assistant｜>2<｜end▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    config = load_config(
        None,
        {
            "model.name": str(folder),
            "task.name": "reasoning-gym:chain_sum",
            "task.reward": ["verifier", "format"],
        },
    )
    for template, expected in ((None, 1.0), ("{{ messages[0]['content'] }}", 0.0)):
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        rewards, _ = parts_of(Opened(config, Terminal(quiet=True)).task.reward)
        assert rewards[1](completions=["hm\n</think>\n<answer>4</answer>"]) == [expected]
