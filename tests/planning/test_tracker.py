import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from midtune.planning.tracker import Tracker


def test_what_is_freed_counts_no_longer() -> None:
    with Tracker() as tracker:
        first = torch.zeros(256)
        second = first + 1
        del first
        tracker.keep()
        third = second * 2
        fourth = third + 1
        del second, third, fourth
    held = tracker.held()
    assert (held.kept, held.peak, held.small) == (1024, 3 * 1024, 3 * 1024)


def test_views_and_what_was_there_are_no_new_memory() -> None:
    there = torch.zeros(16, 16)
    with Tracker([there]) as tracker:
        there.t()[3:].add_(1)
        made = torch.ones(4, 4)
        made.view(16)[::2].mul_(3)
    assert tracker.held().peak == 4 * 4 * 4


def test_tensors_without_data_count_what_they_would_hold() -> None:
    with FakeTensorMode(), Tracker() as tracker:
        left = torch.empty(1024, 1024, dtype=torch.bfloat16)
        product = left @ left
        tracker.keep()
        del left, product
    assert tracker.held().kept == 2 * 2 * 2**20


class _Block(nn.Module):
    """Makes 64 KiB to work with and 16 KiB that it gives on; what it gave on before, it has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        work = given.repeat(4)
        self.kept.append(work[: len(given)] * 2)
        return work[: len(given)] * 3


def test_one_block_stands_for_many() -> None:
    def held(depth: int, more: int) -> tuple[int, int]:
        blocks = [_Block() for _ in range(depth)]
        hidden = torch.zeros(4096)
        with Tracker([hidden]) as tracker, tracker.repeated(blocks, 1):
            for block in blocks:
                hidden = block(hidden)
            tracker.keep()
        found = tracker.held(more)
        return found.kept, found.peak

    # Seven blocks keep 16 KiB each, and what the last gives on; as it works, there are six kept and what it is
    # given, 64 KiB, and the two that it makes.
    by_hand = 2**14 * (7 + 1), 2**14 * (6 + 1 + 4 + 2)
    assert held(7, 0) == held(3, 4) == by_hand
