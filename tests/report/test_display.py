import io
from typing import Any

import pytest
from rich.console import Console

from midtune.report.display import TrainingDisplay, WorkDisplay, say, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 4,
        "reward_std": 0.2,
        "equal_groups": 0.25,
        "completion_length": 34.2,
        "clipped": 0.03,
        "loss": 1e-4,
        "grad_norm": 0.5,
        "lr": 5e-6,
        "rollout_s": 5.21,
        "reward_s": 0.0021,
        "update_s": 3.06,
        "step_s": 8.31,
        "tokens_per_s": 1234.0,
        "memory_bytes": 1_200_000_000,
        "elapsed_s": 8.31 * step,
        **changes,
    }


def piped() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=80, force_terminal=False), file


def test_a_rate_that_follows_the_kl_is_shown_with_it() -> None:
    console, file = piped()
    with TrainingDisplay(1, console) as display:
        display.update(metrics(1, lr=4.2e-4, step_kl=0.0113))
    assert " | rate 0.00042, which moved the policy by 1.1% of its entropy | text " in file.getvalue()


def test_a_pipe_gets_a_line_a_step() -> None:
    console, file = piped()
    with TrainingDisplay(4, console, "block 2 of tiny") as display:
        for step in (1, 2):
            display.update(metrics(step))
        say(console, "[checkpoint] saved")
        display.update({"step": 3, "reward": float("nan"), "loss": None})
        display.update(metrics(4))
    rest = (
        "groups 25% with equal rewards, so no advantage | "
        "text 34 tokens a completion (3% cut at the limit), 1,234 tokens/s | "
        "time 8.31 s a step (rollout 5.21 s, 63%; reward 2 ms, 0%; update 3.06 s, 37%) | memory 1.12 GiB"
    )
    assert file.getvalue().splitlines() == [
        "block 2 of tiny",
        f"step 1/4 | reward 0.250 | {rest} | 25 s left",
        f"step 2/4 | reward 0.500 | {rest} | 17 s left",
        "[checkpoint] saved",
        "step 3/4 | 9 s left",
        f"step 4/4 | reward 1.000 | {rest}",
    ]


def test_a_terminal_of_80_columns() -> None:
    display = TrainingDisplay(100, Console(quiet=True), "block 2 of tiny")
    peaks = {"rollout_peak_bytes": 2**31, "reward_peak_bytes": 2**30, "update_peak_bytes": 3 * 2**30}
    for step in range(1, 41):
        display.update(metrics(step, **peaks))
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(display)
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "block 2 of tiny",
        "step 40/100  ━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━  8 min 19 s left",
        "reward  10.000  ▁▁▁▂▂▂▂▃▃▃▃▃▄▄▄▄▅▅▅▅▆▆▆▆▆▇▇▇▇███",
        "groups  25% with equal rewards, so no advantage",
        "text    34 tokens a completion (3% cut at the limit), 1,234 tokens/s",
        "time    8.31 s a step (rollout 5.21 s, 63%; reward 2 ms, 0%; update 3.06 s, 37%)",
        "memory  1.12 GiB; peaks: rollout 2.00 GiB, reward 1.00 GiB, update 3.00 GiB",
    ]


def test_a_live_display_leaves_its_last_state() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    clock = Clock()
    with TrainingDisplay(2, console, clock=clock) as display:
        display.update(metrics(1))
        clock.now += 7.5
        say(console, "note")
        display.update(metrics(2))
    assert "step 2 for 0 s" in file.getvalue()
    assert "step 2 for 8 s" in file.getvalue()
    last = file.getvalue().rsplit("step 2/2", 1)[1]
    assert "left" not in last and "1.12 GiB" in last


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_console_shows_nothing(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, quiet=True, _environ={"TERM": "xterm"})
    with TrainingDisplay(4, console, "x") as display:
        display.update(metrics(1))
        say(console, "note")
    with WorkDisplay("scoring", 10, console) as advance:
        advance(5, tokens=100)
    assert file.getvalue() == ""


def test_a_pipe_gets_progress_after_2_seconds_and_then_every_10() -> None:
    console, file = piped()
    clock = Clock()
    with WorkDisplay("scoring", 300, console, clock=clock) as advance:
        for _ in range(30):
            clock.now += 1
            advance(10, tokens=500)
    assert file.getvalue().splitlines() == [
        "scoring: 20/300, 500 tokens/s, 28 s left",
        "scoring: 120/300, 500 tokens/s, 18 s left",
        "scoring: 220/300, 500 tokens/s, 8 s left",
    ]


def test_progress_without_a_total() -> None:
    console, file = piped()
    clock = Clock()
    with WorkDisplay("reading", None, console, clock=clock) as advance:
        clock.now += 3
        advance(1200)
    assert file.getvalue() == "reading: 1,200\n"


def test_a_progress_bar_disappears_from_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    clock = Clock()
    with WorkDisplay("scoring", 4, console, clock=clock) as advance:
        clock.now += 1
        advance(2, tokens=50)
        clock.now += 1
    assert "2/4, 25 tokens/s, 2 s left" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert sparkline([0, 7], ascii_only=True) == "_#"
    assert sparkline([]) == ""
