"""The gradient signals of recipes/results: the hooks against plain autograd, the arithmetic against hand work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from midtune.errors import RunStopped
from midtune.model.policy import Policy
from midtune.model.quantize import dequantized
from midtune.probe.selection import read_probe
from midtune.rollout.sampling import Rollout, Sampling
from midtune.rollout.text import sample
from tests.scripts import RESULTS, read_script

FOLDER = RESULTS / "signals"

script = read_script("signals/gradient_signals")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [40]]
SAMPLING = Sampling(max_new_tokens=6, temperature=0.8, group_size=3)
Load = Callable[..., Policy]


def rollout_of(policy: Policy, block: int) -> Rollout:
    torch.manual_seed(1)
    return sample(policy, PROMPTS, SAMPLING, boundary_block=block)


def advantages() -> NDArray[np.float64]:
    """Unequal in three groups of four."""
    found = np.random.default_rng(0).normal(size=(len(PROMPTS), SAMPLING.group_size))
    found[2] = 0
    return found


def by_autograd(
    policy: Policy, rollout: Rollout, given: NDArray[np.float64], blocks: list[int]
) -> dict[int, torch.Tensor]:
    """Each prompt's gradient of every linear weight of a block, [N, parameters].

    Completion by completion, without padding, through the whole unfrozen model.
    """
    weights = {
        k: [
            part.weight.requires_grad_() for part in policy.blocks[k].modules() if isinstance(part, nn.Linear)
        ]
        for k in blocks
    }
    rows: dict[int, list[torch.Tensor]] = {k: [] for k in blocks}
    completions = rollout.completions()
    size = rollout.group_size
    for prompt, ids in enumerate(PROMPTS):
        loss = torch.zeros(())
        for j, completion in enumerate(completions[prompt * size : (prompt + 1) * size]):
            sequence = torch.tensor([ids + completion])
            logits = policy.model(input_ids=sequence, use_cache=False).logits[0, len(ids) - 1 : -1]
            log_probs = (logits / SAMPLING.temperature).log_softmax(-1)
            chosen = log_probs.gather(-1, sequence[0, len(ids) :, None])
            loss = loss - given[prompt, j] * chosen.mean() / size
        for k in blocks:
            gradients = torch.autograd.grad(loss, weights[k], retain_graph=True)
            rows[k].append(torch.cat([gradient.flatten() for gradient in gradients]))
    policy.model.requires_grad_(False)
    return {k: torch.stack(found) for k, found in rows.items()}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "gemma3_text", "phi3", "llama"])
def test_pair_products_equal_plain_autograd(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    blocks = [1, 3]
    rollout, given = rollout_of(policy, 1), advantages()

    found = script.pair_products(policy, rollout, given, blocks, SAMPLING.temperature)

    for k, rows in by_autograd(policy, rollout, given, blocks).items():
        n = len(rows)
        products = [float(rows[i] @ rows[j]) for i, j in permutations(range(n), 2)]
        square = float(rows.mean(0).square().sum())
        assert found[k][0] == pytest.approx(np.mean(products), rel=1e-4, abs=1e-4 * square)
        assert found[k][1] == pytest.approx(square, rel=1e-4)
        assert float(rows[2].abs().max()) == 0
    assert not policy.trained_parameters()
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_completions_of_one_token_among_longer_ones(load: Load) -> None:
    policy = load("qwen3", "none")
    policy.model.generation_config.eos_token_id = list(range(100))
    rollout, given = rollout_of(policy, 1), advantages()
    assert {1, 6} <= set(rollout.completion_mask.sum(1).tolist())

    found = script.pair_products(policy, rollout, given, [1], SAMPLING.temperature)

    rows = by_autograd(policy, rollout, given, [1])[1]
    assert found[1][1] == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-4)


def test_two_prompts_give_the_product_of_two_halves(load: Load) -> None:
    policy = load("qwen3", "none")
    rollout, given = rollout_of(policy, 0), advantages()

    found = script.pair_products(policy, rollout.groups(slice(0, 2)), given[:2], [0], SAMPLING.temperature)[0]

    half_a, half_b = by_autograd(policy, rollout, given, [0])[0][:2]
    assert found.product == pytest.approx(float(half_a @ half_b), rel=1e-4)
    of_signs = (half_a.sign() @ half_b + half_b.sign() @ half_a) / 2
    assert found.adam == pytest.approx(float(of_signs), rel=1e-3)


def test_fisher_divides_each_weights_part_by_its_mean_square(load: Load) -> None:
    policy = load("qwen3", "none")
    rollout, given = rollout_of(policy, 1), advantages()

    found = script.pair_products(policy, rollout, given, [1], SAMPLING.temperature)[1]

    rows = by_autograd(policy, rollout, given, [1])[1]
    sizes = [part.weight.numel() for part in policy.blocks[1].modules() if isinstance(part, nn.Linear)]
    expected = 0.0
    for layer in rows.split(sizes, 1):
        products = (layer.sum(0).square() - layer.square().sum(0)) / 12
        mean_square = layer.square().mean(0)
        expected += float((products / (mean_square + 1e-3 * mean_square.mean())).sum())
    assert found.fisher == pytest.approx(expected, rel=1e-3)


def test_states_that_differ_with_the_advantage_are_separated(load: Load) -> None:
    policy = load("qwen3", "none")
    policy.model.generation_config.eos_token_id = list(range(100))
    rollout, given = rollout_of(policy, 0), advantages()

    found = script.state_signals(policy, rollout, given, [2])[2]

    assert not any(module._forward_hooks for module in policy.blocks.modules())
    entered, left = [], []
    for row, completion in enumerate(rollout.completions()):
        ids = torch.tensor([PROMPTS[row // SAMPLING.group_size] + completion])
        states = policy.model(input_ids=ids, output_hidden_states=True).hidden_states
        entered.append(states[2][0, -len(completion) :])
        left.append(states[3][0, -len(completion) :])
    cosines = torch.cosine_similarity(torch.cat(entered), torch.cat(left), dim=-1)
    assert found[0] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)
    means = torch.stack([part.mean(0) for part in left])
    weighted = (means * torch.tensor(given.reshape(-1, 1), dtype=torch.float32)).view(4, 3, -1).mean(1)
    products = [float(weighted[i] @ weighted[j]) for i, j in permutations(range(4), 2)]
    assert found[1] == pytest.approx(np.mean(products) / float(means.square().sum(1).mean()), rel=1e-3)


def test_nf4_gradients_equal_those_of_the_dequantized_weights(load: Load) -> None:
    quantized, plain = load("qwen3"), load("qwen3", "none")
    with torch.no_grad():
        for name, part in quantized.blocks.named_modules():
            if hasattr(getattr(part, "weight", None), "quant_state"):
                plain.blocks.get_submodule(name).weight.copy_(dequantized(part.weight))
    rollout, given = rollout_of(quantized, 0), advantages()

    found = script.pair_products(quantized, rollout, given, [0, 2], SAMPLING.temperature)

    for k, rows in by_autograd(plain, rollout, given, [0, 2]).items():
        assert found[k][1] == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-3)
        total, own = float(rows.sum(0).square().sum()), float(rows.square().sum())
        assert found[k][0] == pytest.approx((total - own) / 12, rel=1e-3, abs=1e-3 * total / 12)


def rewards_by_length(rollout: Rollout, start: int) -> NDArray[np.float64]:
    tokens = rollout.completion_ids.double() * rollout.completion_mask
    return np.asarray(tokens.sum(1) % 2)


def signals_of(policy: Policy, prompts: list[list[int]], reward: object, **settings: Any) -> dict[int, Any]:
    """Signals from completions of `new_tokens` tokens, in passes of two prompts."""
    asked = {"blocks": [2], "micro_prompts": 2, "sample_prompts": 2, **settings}
    sampling = Sampling(max_new_tokens=asked.pop("new_tokens", 2), group_size=4)
    torch.manual_seed(0)
    found: dict[int, Any] = script.gradient_signals(policy, prompts, reward, sampling=sampling, **asked)
    return found


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_every_requested_block_gets_signals_and_nothing_changes(load: Load, new_tokens: int) -> None:
    policy = load("qwen3")
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    starts = []

    def reward_of(rollout: Rollout, start: int) -> NDArray[np.float64]:
        starts.append(start)
        return rewards_by_length(rollout, start)

    found = signals_of(
        policy, PROMPTS * 3, reward_of, blocks=[3, 1, 2], sample_prompts=4, new_tokens=new_tokens
    )

    assert (list(found), starts) == ([3, 1, 2], [0, 4, 8])
    for row in found.values():
        assert row["low"] < row["score"] < row["high"]
        assert row["signals"]["product"] == row["score"]
        assert row["signals"]["norm"] > 0
        assert row["signals"]["share"] == pytest.approx(row["score"] / row["signals"]["norm"] ** 2)
        assert 0 < row["signals"]["change"] < 1
    after = policy.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in policy.blocks.modules())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda rollout, start: np.repeat([start, start + 1], 4), "equal rewards"),
        (lambda rollout, start: np.full(len(rollout.completion_ids), np.nan), "not a finite number"),
    ],
)
def test_rewards_that_say_nothing_stop_the_probe(load: Load, reward: object, message: str) -> None:
    with pytest.raises(RunStopped, match=message):
        signals_of(load("qwen3", "none"), PROMPTS, reward)


def test_the_script_on_the_bundled_model(tmp_path: Path) -> None:
    out = tmp_path / "signals.json"
    small = ["training.group_size=8", "training.max_new_tokens=40", "training.prompts_per_step=4"]
    settings = [word for text in small for word in ("--set", text)]
    script.main(["--prompts", "4", *settings, "--out", str(out)])
    found, published = read_probe(out), json.loads((FOLDER / "tiny-chain-sum-0.json").read_text())
    assert (found["method"], found["model"], found["selected"]) == ("gradient", "tiny", [5])
    assert found.keys() == published.keys() - {"objective", "among_best"} | {"note"}
    assert found["settings"].keys() == published["settings"].keys()
    assert [row["rank"] for row in found["blocks"]] == [11, 9, 7, 5, 3, 1, 2, 4, 6, 8, 10, 12]
    for row, old in zip(found["blocks"], published["blocks"], strict=True):
        # The price of a step was measured then.
        assert row.keys() == old.keys() - {"step_cost"}
        assert row["signals"].keys() == old["signals"].keys()


def test_group_advantages() -> None:
    # (1, 0, 0, 0): mean 0.25, sample standard deviation 0.5.
    found = script.group_advantages(np.array([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [1, 1, 0, 0]]))
    assert found[0] == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])
    assert (found[1] == 0).all()
    assert found[2] == pytest.approx(np.array([0.5, 0.5, -0.5, -0.5]) / (np.sqrt(1 / 3) + 1e-4))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
