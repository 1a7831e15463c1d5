"""Training on completions that a server samples, which is sent the trained block alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.errors import InputError, MidtuneError, RunStopped
from midtune.model.policy import Policy
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits
from midtune.rollout.text import TextSampler
from midtune.rollout.vllm import VLLMSampler, require_servers
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


@pytest.fixture
def other(random_checkpoint: Callable[..., Path]) -> Iterator[Toy]:
    with serve(Toy(random_checkpoint("qwen3"))) as toy:
        yield toy


def sampler_of(policy: Policy, folder: Path, *toys: Toy) -> VLLMSampler:
    return VLLMSampler([toy.url for toy in toys], policy, SamplingLimits(), folder)


def completed(policy: Policy, folder: Path, *toys: Toy) -> tuple[Rollout, list[str]]:
    """A rollout of 8 groups from equal random numbers, and what was said."""
    sampler, said = sampler_of(policy, folder, *toys), list[str]()
    sampler.limits.rows.on_message = said.append
    sampler.sync_weights()
    torch.manual_seed(5)
    prompts = [text for text in "abcdefgh" for _ in range(2)]
    return sampler.sample(prompts, Sampling(6, group_size=2)), said


def test_only_the_trained_block_is_sent_and_its_log_probs_come_back(
    load: Load, toy: Toy, tmp_path: Path
) -> None:
    policy = thawed(load, 2, quantize="none")
    start = trained(policy)
    _, metrics = train(policy, tmp_path, steps=3, temperature=0.8, vllm=[toy.url])
    assert not torch.equal(trained(policy), start)
    everything, *sent = toy.worker.loaded
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
    trainer_of(sampler_of(policy, tmp_path / "vllm", toy), tmp_path, settings, listening, trl).train()
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
    server = sampler_of(policy, tmp_path, toy)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.05
    server.sync_weights()
    ours = dict(policy.blocks[2].named_parameters())
    theirs = dict(toy.worker.model.model.layers[2].named_parameters())
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
    sampler = sampler_of(policy, tmp_path, toy)
    sampler.sync_weights()
    rollout = sampler.sample(["ab", "ab", "c", "c"], how)
    first, second = sorted(toy.asked, key=lambda asked: -len(asked["prompt"]))
    prompts = [policy.tokenizer(text)["input_ids"] for text in ("ab", "c")]
    assert [first["prompt"], second["prompt"]] == rollout.prompts() == prompts
    assert {**first, "prompt": 0, "seed": 0} == {**second, "prompt": 0, "seed": 0}
    assert first["seed"] != second["seed"]
    ended = [ids[-1] in policy.stop_token_ids for ids in rollout.completions()]
    assert rollout.cut.tolist() == [not end for end in ended]
    assert (first["n"], first["max_tokens"], first["temperature"]) == (2, 4, 0.7)
    assert (first["top_p"], first["top_k"], first["min_p"], first["stop"]) == (0.9, 5, 0.1, ["\n"])
    assert first["stop_token_ids"] == policy.stop_token_ids


def test_no_server_is_one_sentence_that_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vLLM server at http://127.0.0.1:9 or none; start.*vllm serve"):
        require_servers(["http://127.0.0.1:9", "none"], tmp_path)


def test_a_server_that_takes_no_blocks_is_refused(
    random_checkpoint: Callable[..., Path], toy: Toy, tmp_path: Path
) -> None:
    with serve(Toy(random_checkpoint("qwen3"), extended=False)) as plain:
        with pytest.raises(InputError, match=f"{plain.url} takes no blocks; start it with `VLLM_SERVER_DEV"):
            require_servers([toy.url, plain.url], tmp_path)
    require_servers([plain.url, toy.url], tmp_path)  # one that is lost is left out


def test_a_server_that_cannot_load_the_block_is_named(load: Load, toy: Toy, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    policy.deployed_blocks = lambda: {"other": torch.zeros(1)}  # type: ignore[method-assign]
    with pytest.raises(
        RunStopped, match=f"no vLLM server is left: {toy.url} failed at /collective_rpc .*unk"
    ):
        completed(policy, tmp_path, toy)


def test_a_request_that_is_invalid_is_not_asked_of_another(load: Load, toy: Toy, tmp_path: Path) -> None:
    toy.answer = lambda path, body: (400, "too long")  # type: ignore[method-assign]
    with pytest.raises(MidtuneError, match=f"{toy.url} refused /v1/models .*too long"):
        sampler_of(thawed(load, 2), tmp_path, toy).sync_weights()


def test_completions_do_not_depend_on_who_answers(load: Load, toy: Toy, other: Toy, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    alone, _ = completed(policy, tmp_path, toy)
    toy.asked.clear()
    toy.delay_s = 0.5
    shared, said = completed(policy, tmp_path, toy, other)
    assert shared.completions() == alone.completions()
    assert torch.equal(shared.log_probs, alone.log_probs)
    assert len({tuple(ids) for ids in alone.completions()}) > 8
    assert (len(toy.asked), len(other.asked)) == (3, 5)  # the faster one takes what waits
    assert said == []


def stop(toy: Toy) -> None:
    toy.alive = False


@pytest.mark.parametrize(
    ("disturb", "words"),
    [(stop, "failed at /v1/completions"), (Toy.restart, "holds other blocks than were sent")],
)
def test_what_a_lost_server_had_in_work_is_done_by_the_others(
    load: Load, toy: Toy, other: Toy, tmp_path: Path, disturb: Callable[[Toy], None], words: str
) -> None:
    policy = thawed(load, 2)
    alone, _ = completed(policy, tmp_path, toy)
    toy.asked.clear()
    toy.delay_s = 0.1
    other.disturb = disturb
    shared, said = completed(policy, tmp_path, toy, other)
    assert shared.completions() == alone.completions()
    assert len(toy.asked) == 8
    assert len(other.asked) > 0
    (message,) = said
    assert message.startswith(f"the vLLM server at {other.url} {words}")


def lose_prompts(toy: Toy) -> None:
    toy.forgets_prompts = False


def keep_blocks(toy: Toy) -> None:
    toy.loads_blocks = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stop, "failed at /collective_rpc"),
        (keep_blocks, "holds other blocks than were sent"),
        (lose_prompts, "keeps prompts that were computed with old blocks"),
    ],
)
def test_a_server_is_left_out_until_it_has_the_current_block(
    load: Load, toy: Toy, other: Toy, tmp_path: Path, change: Callable[[Toy], None], words: str
) -> None:
    """It is lost after step 2, and well again after step 4."""
    answered: list[int] = []
    differences: list[float] = []
    said: list[str] = []

    def between(row: dict[str, Any]) -> None:
        answered.append(len(other.asked))
        differences.append(row["vllm_difference"])
        if row["step"] == 2:
            change(other)
        if row["step"] == 4:
            other.restart()
            other.loads_blocks = other.forgets_prompts = True

    policy = thawed(load, 2, quantize="none")
    sampler = TextSampler(policy, SamplingLimits())
    sampler.limits.rows.on_message = said.append
    urls = [toy.url, other.url]
    train(sampler, tmp_path, steps=5, prompts_per_step=4, vllm=urls, on_step=between)
    first, second, third, fourth, fifth = answered
    assert 0 < first < second == third == fourth < fifth
    lost, found = (message for message in said if "vLLM" in message)
    assert lost.startswith(f"the vLLM server at {other.url} {words}")
    assert found == f"the vLLM server at {other.url} is in use again."
    assert [difference < 1e-5 for difference in differences] == [True] * 5


def test_a_run_that_is_left_without_servers_goes_on_with_equal_ones(
    load: Load, toy: Toy, other: Toy, tmp_path: Path
) -> None:
    settings = {"steps": 3, "checkpoint_every": 1, "vllm": [toy.url, other.url]}
    whole, left = thawed(load, 2), thawed(load, 2)
    train(whole, tmp_path / "whole", **settings)
    toy.disturb = other.disturb = lambda one: stop(one) if len(toy.asked) + len(other.asked) > 10 else None
    with pytest.raises(RunStopped, match=f"no vLLM server is left: {toy.url} .*; {other.url} .*--resume"):
        train(left, tmp_path / "left", **settings)
    toy.disturb = other.disturb = lambda one: None
    toy.restart()
    resumed = thawed(load, 2)
    train(resumed, tmp_path / "left", resume_from=tmp_path / "left/checkpoint-2", **settings)
    assert torch.equal(trained(resumed), trained(whole))
    assert not torch.equal(trained(resumed), trained(left))


@pytest.mark.skipif("MIDTUNE_VLLM" not in os.environ, reason="needs a vLLM server at $MIDTUNE_VLLM")
def test_a_real_server(tmp_path: Path) -> None:
    """`$MIDTUNE_VLLM` serves SmolLM2-135M in fp32."""
    from midtune.model.loading import load_policy
    from midtune.model.sources import resolve

    policy = load_policy(resolve("smollm2-135m"), quantize="none", device="cpu")
    policy.thaw(15)
    _, metrics = train(policy, tmp_path, steps=3, max_new_tokens=16, vllm=[os.environ["MIDTUNE_VLLM"]])
    differences = [row["vllm_difference"] for row in metrics]
    assert len(differences) == 3
    assert max(differences) < 1e-4
