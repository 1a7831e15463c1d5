from __future__ import annotations

import time
from typing import Any

import pytest

from midtune.network import HUB_OFFLINE, OFFLINE, Unreachable, ask_hub, hub_is_offline, is_offline, within


def test_a_call_that_takes_too_long_is_left() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        within(0.1, lambda: time.sleep(1))
    assert time.monotonic() - started < 0.5
    assert within(1, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(1, lambda: {}["a"])


def test_a_call_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HUB_OFFLINE, "0")

    def late(_: Any) -> None:
        raise TimeoutError("no answer within 8 s")

    with pytest.raises(Unreachable, match=r"the hub cannot be reached \(no answer within 8 s\)"):
        ask_hub("org/toy", "model", late)
    monkeypatch.setenv(HUB_OFFLINE, "1")
    with pytest.raises(Unreachable, match="work is offline"):
        ask_hub("org/toy", "model", late)


@pytest.mark.parametrize(
    ("name", "value", "all_is", "hub_is"),
    [(OFFLINE, "1", True, True), (HUB_OFFLINE, "true", False, True), (OFFLINE, "0", False, False)],
)
def test_what_offline_means(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, all_is: bool, hub_is: bool
) -> None:
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.delenv(HUB_OFFLINE, raising=False)
    monkeypatch.setenv(name, value)
    assert (is_offline(), hub_is_offline()) == (all_is, hub_is)
