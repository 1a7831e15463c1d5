import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from midtune.rl.tracker import Tracker


def test_what_is_freed_counts_no_longer() -> None:
    with Tracker() as tracker:
        first = torch.zeros(256)
        second = first + 1
        assert tracker.live == 2 * 1024
        del first
        assert tracker.live == 1024
        third = second * 2
        del second, third
    assert (tracker.live, tracker.peak) == (0, 2 * 1024)


def test_views_and_what_was_there_are_no_new_memory() -> None:
    there = torch.zeros(16, 16)
    with Tracker([there]) as tracker:
        there.t()[3:].add_(1)
        made = torch.ones(4, 4)
        made.view(16)[::2].mul_(3)
    assert tracker.peak == 4 * 4 * 4


def test_tensors_without_data_count_what_they_would_hold() -> None:
    with FakeTensorMode(), Tracker() as tracker:
        left = torch.empty(1024, 1024, dtype=torch.bfloat16)
        product = left @ left
        assert tracker.live == 2 * 2 * 2**20
        del left, product
    assert tracker.live == 0
