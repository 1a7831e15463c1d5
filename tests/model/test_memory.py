from __future__ import annotations

import weakref

import pytest
import torch

from midtune.errors import RunStopped
from midtune.model.memory import RowLimit, is_out_of_memory, slices


def limit(rows: int | None = None) -> RowLimit:
    return RowLimit("sampling", "lower --group-size", rows)


def fitting(most: int) -> tuple[RowLimit, list[int], list[str]]:
    """A limit after work on 8 groups of 3 rows of which `most` groups fit, what was tried, and what was said."""
    tried: list[int] = []
    said: list[str] = []
    found = limit()
    found.on_message = said.append

    def run(groups: int) -> str:
        tried.append(groups)
        if groups > most:
            raise torch.OutOfMemoryError
        return "done"

    assert found.fitting(8, 3, run) == "done"
    return found, tried, said


def test_what_fits_is_done_at_once() -> None:
    found, tried, said = fitting(8)
    assert (tried, found.rows, said) == ([8], None, [])


def test_groups_are_halved_until_they_fit() -> None:
    found, tried, said = fitting(3)
    assert (tried, found.rows) == ([8, 4, 2], 6)
    assert said == [
        "memory ran out in sampling with 24 completions together; from now on at most 12 go together.",
        "memory ran out in sampling with 12 completions together; from now on at most 6 go together.",
    ]


@pytest.mark.parametrize(("group_size", "together"), [(1, 6), (2, 3), (4, 1), (8, 1)])
def test_a_limit_that_was_met_holds_for_groups_of_any_size(group_size: int, together: int) -> None:
    assert limit(6).fitting(100, group_size, lambda groups: groups) == together


@pytest.mark.parametrize(("rows", "together"), [(None, 4), (3, 3), (9, 4)])
def test_a_limit_is_lowered_for_a_while(rows: int | None, together: int) -> None:
    found = limit(rows)
    with found.at_most(4):
        assert found.fitting(100, 1, lambda groups: groups) == together
    assert found.rows == rows
    with found.at_most(4):
        found.rows = 2  # memory ran out
    assert found.rows == 2


@pytest.mark.parametrize(
    ("group_size", "alone"), [(1, "a single completion"), (8, "a single group of 8 completions")]
)
def test_a_group_that_is_too_much_alone_ends_the_run_in_one_sentence(group_size: int, alone: str) -> None:
    def run(groups: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(RunStopped) as stopped:
        limit().fitting(1, group_size, run)
    assert str(stopped.value) == f"memory ran out in sampling with {alone}; lower --group-size."
    assert stopped.value.__context__ is None


def test_what_else_takes_memory_is_said_when_it_runs_out() -> None:
    said: list[str] = []
    crowded = limit()
    crowded.on_message = said.append
    users = iter(["The card is also in use by ollama (7).", "", "The card is also in use by python (8)."])
    crowded.on_oom_hint = lambda: next(users)

    def run(groups: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(RunStopped, match=r"lower --group-size\. The card is also in use by python \(8\)\.$"):
        crowded.fitting(4, 1, run)
    assert [text.partition("go together.")[2] for text in said] == [
        " The card is also in use by ollama (7).",
        "",
    ]


def test_what_the_failed_work_held_is_gone_before_it_is_tried_again() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def run(groups: int) -> None:
        assert all(tensor() is None for tensor in held)
        activations = torch.zeros(groups)
        held.append(weakref.ref(activations))
        if groups > 1:
            raise torch.OutOfMemoryError

    limit().fitting(4, 1, run)
    assert len(held) == 3


def test_other_errors_are_left_alone() -> None:
    def run(groups: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        limit().fitting(4, 1, run)


def test_without_halving_memory_that_runs_out_is_an_error_like_others() -> None:
    strict = limit()
    strict.halves = False

    def run(groups: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        strict.fitting(4, 1, run)


def test_the_hosts_allocator_runs_out_of_memory_too() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_card_runs_out_of_memory_too() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, device="cuda")
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("expected scalar type Float but found BFloat16"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_slices_are_as_large_as_they_may_be() -> None:
    assert slices(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert slices(2, 4) == [slice(0, 2)]
