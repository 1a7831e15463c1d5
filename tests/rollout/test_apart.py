"""Decoders for other states than keys and values, against the plain decoder and the plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from midtune.model.policy import Policy
from midtune.rollout.apart import ApartDecoder, WholeDecoder, decoder_of
from midtune.rollout.decoding import Decoder
from midtune.rollout.sampling import Sampling, padded
from tests.architectures import RECURRENT
from tests.plain import PROMPTS, plain_log_probs, sampled, stop_early

Load = Callable[..., Policy]
SLOWER = [ApartDecoder, WholeDecoder]


@pytest.mark.parametrize("make", SLOWER)
def test_completions_are_those_of_the_plain_decoder(load: Load, make: type[Decoder]) -> None:
    found = []
    for decoder in (Decoder, make):
        policy = load("gemma3_text")
        stop_early(policy)
        policy.in_slots, policy.decoder = False, decoder
        found.append(sampled(policy, boundary_block=2))
    ours, theirs = found[1], found[0]
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=1e-5, rtol=1e-5)
    assert ours.boundary is not None
    assert theirs.boundary is not None
    real = theirs.prompt_mask.bool()
    torch.testing.assert_close(ours.boundary.prompt[real], theirs.boundary.prompt[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", SLOWER)
def test_rows_go_on_after_they_were_answered(load: Load, make: type[Decoder]) -> None:
    policy = load("qwen3")
    ids, mask = padded(policy, PROMPTS, "left")
    found = []
    with torch.no_grad():
        for decoder in (Decoder(policy, ids, mask, 2), make(policy, ids, mask, 2)):
            decoder.draw(Sampling(4, temperature=0), [4, 1, 2, 3, 4, 1, 2, 3], None, leave=False)
            decoder.follow([1, 2, 6], [[5], [6, 8, 9], [7, 7]])
            found.append(decoder.draw(Sampling(3, temperature=0), [3, 2, 3], None, leave=True))
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(found[0].log_probs, found[1].log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "make", "says"),
    [
        ("lfm2", ApartDecoder, "prompts of different lengths prefilled apart"),
        ("rwkv", WholeDecoder, "without a cache"),
        ("nemotron_h", WholeDecoder, "without a cache"),
    ],
)
def test_a_model_that_cannot_be_decoded_plainly_is_decoded_exactly(
    load: Load, architecture: str, make: type[Decoder], says: str
) -> None:
    policy = load(architecture, "none", **RECURRENT[architecture])
    messages: list[str] = []
    with torch.no_grad():
        assert decoder_of(policy, messages.append) is make
        assert decoder_of(policy, messages.append) is make
    assert len(messages) == 1
    assert says in messages[0]
    stop_early(policy)
    rollout = sampled(policy, max_new_tokens=6)
    with torch.no_grad():
        right, _ = plain_log_probs(policy, rollout, 1.0)
    torch.testing.assert_close(rollout.log_probs, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "falcon_h1"])
def test_rows_that_end_leave_with_their_states(load: Load, architecture: str) -> None:
    policy = load(architecture, "none", **RECURRENT[architecture])
    stop_early(policy)
    policy.in_slots, policy.decoder = False, ApartDecoder
    rows: list[int] = []
    with policy.model.get_input_embeddings().register_forward_hook(lambda *given: rows.append(len(given[2]))):
        rollout = sampled(policy)
    lengths = rollout.completion_mask.sum(1)
    # After prefill, a step feeds the rows that go on, and no others.
    steps = rows[-int(lengths.max()) + 1 :]
    assert steps == [int((lengths > fed).sum()) for fed in range(1, int(lengths.max()))]
    assert steps[-1] < len(lengths)
    with torch.no_grad():
        right, _ = plain_log_probs(policy, rollout, 1.0)
    torch.testing.assert_close(rollout.log_probs, right, atol=1e-4, rtol=1e-4)
