"""One token drawn from logits."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest
import torch

from midtune.rollout.decoding import choose
from midtune.rollout.sampling import Sampling

LOGITS = torch.tensor([[0.25, 0.5, 0.1, 0.15]]).log()


def drawn(**settings: float) -> set[int]:
    torch.manual_seed(0)
    tokens, _, _ = choose(LOGITS.expand(400, -1), 1.0, Sampling(1, **settings).warpers(), torch.rand(400))  # type: ignore[arg-type]
    return set(tokens.tolist())


def test_unlikely_draws_fall_on_tokens_that_can_be_drawn() -> None:
    # The least and the greatest number that torch.rand gives.
    for number in (0.0, 1 - 2**-24):
        logits = torch.tensor([[-torch.inf, 0.3, -torch.inf, 0.1, -torch.inf, -torch.inf]])
        token, log_prob, entropy = choose(logits, 1.0, Sampling(1).warpers(), torch.tensor([number]))
        assert token.item() == (1 if number == 0 else 3)
        assert torch.isfinite(log_prob).all()
        assert torch.isfinite(entropy).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {1}), (0.6, {0, 1}), (0.8, {0, 1, 3}), (0.95, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert drawn(top_p=top_p) == kept


def test_top_k_keeps_the_k_most_likely() -> None:
    assert drawn(top_k=3) == {0, 1, 3}


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.6, {1}), (0.4, {0, 1}), (0.25, {0, 1, 3}), (0.1, {0, 1, 2, 3})]
)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(min_p: float, kept: set[int]) -> None:
    assert drawn(min_p=min_p) == kept


def test_top_p_counts_the_probability_that_top_k_left() -> None:
    # Of the two kept, token 1 has 0.5 / 0.75.
    assert drawn(top_k=2, top_p=0.6) == {1}


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    torch.manual_seed(0)
    tokens, _, _ = choose(LOGITS.expand(10_000, -1), 1.0, Sampling(1).warpers(), torch.rand(10_000))
    shares = [Counter(tokens.tolist())[token] / 10_000 for token in range(4)]
    assert shares == pytest.approx([0.25, 0.5, 0.1, 0.15], abs=0.02)


def test_tokens_are_those_of_running_sums_over_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    logits, uniforms = 4 * torch.randn(500, 1000), torch.rand(500)
    logits[torch.rand(500, 1000) < 0.3] = -torch.inf
    found, *_ = choose(logits, 1.0, Sampling(1).warpers(), uniforms)
    for row, number, token in zip(
        logits.double().softmax(-1).tolist(), uniforms.tolist(), found.tolist(), strict=True
    ):
        sums = list(accumulate(row))
        assert token == next(place for place, total in enumerate(sums) if total > number * sums[-1])


def test_log_probs_are_those_of_the_full_distribution() -> None:
    _, log_probs, _ = choose(LOGITS, 1.0, Sampling(1, top_p=0.4).warpers(), torch.rand(1))
    assert log_probs.exp().item() == pytest.approx(0.5)


def test_temperature_flattens_the_distribution() -> None:
    # Roots of 0.64, 0.16, 0.16 and 0.04 are 0.8, 0.4, 0.4 and 0.2; they sum to 1.8.
    logits = torch.tensor([[0.64, 0.16, 0.16, 0.04]]).log()
    _, log_probs, _ = choose(logits, 2.0, Sampling(1, top_k=1).warpers(), torch.rand(1))
    assert log_probs.exp().item() == pytest.approx(0.8 / 1.8)
