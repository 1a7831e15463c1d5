"""The rollout's cache against Transformers' own."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from midtune.rollout.keys_values import closed_up, shared_prompts

ROOM = 20


def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)


def test_it_holds_what_a_dynamic_cache_holds() -> None:
    torch.manual_seed(0)
    ours, theirs = shared_prompts(ROOM), DynamicCache()
    prompt = states(2, 5)
    for cache in (ours, theirs):
        cache.update(*prompt, 0)
        cache.batch_repeat_interleave(3)
    rows = 6
    for step in range(ROOM + 10):  # past the room there was at first
        if step in (3, 7):
            kept = torch.tensor([0, rows - 1, 2])[: rows - 3 + step // 4]
            for cache in (ours, theirs):
                cache.batch_select_indices(kept)
            rows = len(kept)
        token = states(rows, 1)
        found, expected = (cache.update(*token, 0) for cache in (ours, theirs))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


def test_a_token_is_written_where_there_is_room() -> None:
    cache = shared_prompts(ROOM)
    cache.update(*states(2, 5), 0)
    cache.batch_repeat_interleave(2)
    first, _ = cache.update(*states(4, 1), 0)
    second, _ = cache.update(*states(4, 1), 0)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_free_places_are_filled_from_the_end() -> None:
    going = torch.tensor([True, False, True, True, False, True])
    assert closed_up(going).tolist() == [0, 5, 2, 3]
    assert closed_up(~going).tolist() == [4, 1]
    assert closed_up(torch.tensor([True, True])).tolist() == [0, 1]
