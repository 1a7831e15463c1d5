"""Training on completions that a server samples, which is sent the trained block alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.errors import InputError, MidtuneError
from midtune.model.policy import Policy
from midtune.rollout.sampling import Sampling, SamplingLimits
from midtune.rollout.vllm import VLLMSampler
from tests.plain import stop_early
from tests.rl.toy_training import (
    Load,
    replay,
    settings_of,
    short_questions_only,
    thawed,
    train,
    trained,
    trainer_of,
)
from tests.rollout.toy_vllm import Toy, serve


@pytest.fixture
def toy(random_checkpoint: Callable[..., Path]) -> Iterator[Toy]:
    with serve(Toy(random_checkpoint("qwen3"))) as toy:
        yield toy


def server_of(policy: Policy, toy: Toy, folder: Path) -> VLLMSampler:
    return VLLMSampler(toy.url, policy, SamplingLimits(), folder)


def test_only_the_trained_block_is_sent_and_its_log_probs_come_back(
    load: Load, toy: Toy, tmp_path: Path
) -> None:
    policy = thawed(load, 2, quantize="none")
    start = trained(policy)
    _, metrics = train(policy, tmp_path, steps=3, temperature=0.8, vllm=toy.url)
    assert not torch.equal(trained(policy), start)
    everything, *sent = toy.loaded
    names = {f"model.layers.2.{name}" for name, _ in policy.blocks[2].named_parameters()}
    assert names < everything  # at first, what an earlier run may have left is replaced
    assert sent == [names] * 3
    # The server computes each step's log-probs with the weights of that step.
    assert [row["vllm_difference"] < 1e-5 for row in metrics] == [True] * 3
    assert all(row["reward"] > 0 and row["entropy"] > 0 for row in metrics)


def test_updates_are_those_of_the_same_completions_sampled_here(load: Load, toy: Toy, tmp_path: Path) -> None:
    """Groups without advantages are left out, and the correction for vLLM's log-probs is 1."""
    policy, plain = (thawed(load, 2, quantize="none") for _ in range(2))
    settings = settings_of(steps=2, prompts_per_step=6)
    drawn: list[list[list[int]]] = []

    def listening(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        drawn.append(completion_ids)
        return short_questions_only(completion_ids, **columns)

    trl = {"optim": "sgd", "learning_rate": 1.0}
    trainer_of(server_of(policy, toy, tmp_path / "vllm"), tmp_path, settings, listening, trl).train()
    replay(plain, tmp_path, settings, drawn, short_questions_only, trl)
    torch.testing.assert_close(trained(policy), trained(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_4_bit_policy_sends_full_precision(load: Load, toy: Toy, tmp_path: Path, adapter: str) -> None:
    policy = load("qwen3")
    stop_early(policy)
    if adapter == "lora":
        policy.add_lora([2], rank=4)
    else:
        policy.thaw(2)
    server = server_of(policy, toy, tmp_path)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.05
    server.sync_weights()
    ours = dict(policy.blocks[2].named_parameters())
    theirs = dict(toy.model.model.layers[2].named_parameters())
    stored = policy.original_tensors(2)
    for name, weight in theirs.items():
        if adapter == "full":
            assert torch.equal(weight, ours[name])
        elif "proj" in name:
            layer = policy.blocks[2].get_submodule(name.rpartition(".")[0])
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            torch.testing.assert_close(weight, stored[name] + delta)
        else:
            assert torch.equal(weight, stored[name])


def test_settings_of_sampling_are_passed_on(load: Load, toy: Toy, tmp_path: Path) -> None:
    policy = thawed(load, 2, quantize="none")
    how = Sampling(4, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop_strings=("\n",), group_size=2)
    rollout = server_of(policy, toy, tmp_path).sample(["ab", "ab", "c", "c"], how)
    (asked,) = toy.asked
    assert (
        asked["prompt"] == rollout.prompts() == [policy.tokenizer(text)["input_ids"] for text in ("ab", "c")]
    )
    ended = [ids[-1] in policy.stop_token_ids for ids in rollout.completions()]
    assert rollout.cut.tolist() == [not end for end in ended]
    assert (asked["n"], asked["max_tokens"], asked["temperature"]) == (2, 4, 0.7)
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["stop"]) == (0.9, 5, 0.1, ["\n"])
    assert asked["stop_token_ids"] == policy.stop_token_ids


def test_no_server_is_one_sentence_that_says_how_to_start_one(load: Load, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vLLM server at http://127.0.0.1:9.*vllm serve"):
        VLLMSampler("http://127.0.0.1:9", load("qwen3"), SamplingLimits(), tmp_path)


def test_a_server_that_takes_no_weights_is_refused(
    load: Load, random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with serve(Toy(random_checkpoint("qwen3"), takes_weights=False)) as toy:
        with pytest.raises(InputError, match="takes no weights; start it with `VLLM_SERVER_DEV_MODE=1"):
            server_of(load("qwen3"), toy, tmp_path)


def test_a_server_that_cannot_load_the_block_is_named(load: Load, toy: Toy, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    server = server_of(policy, toy, tmp_path)
    policy.deployed_blocks = lambda: {"other": torch.zeros(1)}  # type: ignore[method-assign]
    with pytest.raises(MidtuneError, match="failed at /collective_rpc .*unknown"):
        server.sync_weights()


@pytest.mark.skipif("MIDTUNE_VLLM" not in os.environ, reason="needs a vLLM server at $MIDTUNE_VLLM")
def test_a_real_server(tmp_path: Path) -> None:
    """`$MIDTUNE_VLLM` serves SmolLM2-135M in fp32."""
    from midtune.model.loading import load_policy
    from midtune.model.sources import resolve

    policy = load_policy(resolve("smollm2-135m"), quantize="none", device="cpu")
    policy.thaw(15)
    _, metrics = train(policy, tmp_path, steps=3, max_new_tokens=16, vllm=os.environ["MIDTUNE_VLLM"])
    differences = [row["vllm_difference"] for row in metrics]
    assert len(differences) == 3
    assert max(differences) < 1e-4
