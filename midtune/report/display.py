"""Progress while a run works: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from midtune.report.formats import bytes_text, finite, seconds_text, whole_seconds_text
from midtune.report.summary import PHASES
from midtune.report.tables import labelled

SPARKS, ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
SPARKLINE_WIDTH = 32
# The time left follows recent steps, because completion lengths change during training.
STEPS_FOR_TIME_LEFT = 10
LINE_EVERY_S = 10.0
SHORT_WORK_S = 2.0
# Seconds from any origin.
Clock = Callable[[], float]


def say(console: Console, text: str) -> None:
    """Print a text as it is; without a terminal it is not wrapped."""
    console.print(Text(text), soft_wrap=not console.is_terminal)


class TrainingDisplay:
    """Shows training while entered as a context: redrawn in place on a terminal, elsewhere one line per step."""

    def __init__(
        self, total_steps: int, console: Console, title: str = "", *, clock: Clock = time.monotonic
    ) -> None:
        self._total, self._console, self._title, self._clock = total_steps, console, title, clock
        self._known: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=SPARKLINE_WIDTH)
        self._step_s: deque[float] = deque(maxlen=STEPS_FOR_TIME_LEFT)
        self._updated, self._step = clock(), 0
        self._live = Live(self, console=console, refresh_per_second=2)

    def __enter__(self) -> Self:
        if is_live(self._console):
            self._live.start()
        elif self._title:
            say(self._console, self._title)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a finished step, a line of metrics.jsonl; only its `step` is required."""
        self._step = metrics["step"]
        self._known = {
            key: figure
            for key, value in metrics.items()
            if not isinstance(value, Mapping) and (figure := finite(value)) is not None
        }
        self._updated = self._clock()
        for key, recent in (("reward", self._rewards), ("step_s", self._step_s)):
            if key in self._known:
                recent.append(self._known[key])
        if self._live.is_started:
            self._live.refresh()
        else:
            figures = (f"{name} {text}" for name, text in self._figures())
            parts = [f"step {self._step}/{self._total}", *figures, self._left_text()]
            say(self._console, " | ".join(filter(None, parts)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._title:
            yield Text(self._title, style="bold")
        step = self._step
        bar = ProgressBar(total=max(self._total, 1), completed=step, width=30)
        head = Table.grid(padding=(0, 2, 0, 0))
        # The running step's time is the sign of life during a long rollout.
        running = self._live.is_started and step < self._total
        took = f"step {step + 1} for {whole_seconds_text(self._clock() - self._updated)}" if running else ""
        head.add_row(f"step {step}/{self._total}", bar, self._left_text(), took)
        yield head
        rewards = sparkline(self._rewards, ascii_only=options.ascii_only)
        yield labelled(
            (Text(name, style="bold"), f"{text}  {rewards}" if name == "reward" else text)
            for name, text in self._figures()
        )

    def _left_text(self) -> str:
        remaining = self._total - self._step
        if not self._step_s or remaining <= 0:
            return ""
        return f"{whole_seconds_text(remaining * sum(self._step_s) / len(self._step_s))} left"

    def _figures(self) -> Iterator[tuple[str, str]]:
        known = self._known
        if "reward" in known:
            yield "reward", f"{known['reward']:.3f}"
        if "equal_groups" in known:
            yield "groups", f"{known['equal_groups']:.0%} with equal rewards, so no advantage"
        if "step_kl" in known:
            moved = f"which moved the policy by {known['step_kl']:.1%} of its entropy"
            yield "rate", f"{known['lr']:.2g}, {moved}"
        text = []
        if "completion_length" in known:
            cut = f" ({known['clipped']:.0%} cut at the limit)" if "clipped" in known else ""
            text.append(f"{known['completion_length']:.0f} tokens a completion{cut}")
        if "tokens_per_s" in known:
            text.append(f"{known['tokens_per_s']:,.0f} tokens/s")
        if text:
            yield "text", ", ".join(text)
        if whole := known.get("step_s"):
            phases = "; ".join(
                f"{name} {seconds_text(took)}, {took / whole:.0%}" for name, took in self._by_phase("s")
            )
            yield "time", f"{seconds_text(whole)} a step" + (f" ({phases})" if phases else "")
        if "memory_bytes" in known:
            peaks = ", ".join(f"{name} {bytes_text(peak)}" for name, peak in self._by_phase("peak_bytes"))
            yield "memory", bytes_text(known["memory_bytes"]) + (f"; peaks: {peaks}" if peaks else "")

    def _by_phase(self, kind: str) -> Iterator[tuple[str, float]]:
        return ((name, self._known[key]) for name in PHASES if (key := f"{name}_{kind}") in self._known)


class WorkDisplay:
    """Shows progress while entered: a bar on a terminal, elsewhere a line after two seconds, then every ten."""

    def __init__(
        self, description: str, total: float | None, console: Console, *, clock: Clock = time.monotonic
    ) -> None:
        self._description, self._total, self.done, self._tokens = description, total, 0.0, 0
        self._console, self._clock, self._began = console, clock, clock()
        self._next_line = self._began + SHORT_WORK_S
        self._live = Live(self, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if is_live(self._console):
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, amount: float = 1, *, tokens: int = 0) -> None:
        """Show that `amount` more units and `tokens` more tokens are done."""
        self.done += amount
        self._tokens += tokens
        if not self._live.is_started and self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_EVERY_S
            say(self._console, f"{self._description}: {self._text()}")

    def __rich__(self) -> RenderableType:
        columns = Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True)
        line = Table.grid(*columns, expand=True, padding=(0, 1, 0, 0))
        bar = ProgressBar(total=self._total, completed=self.done)
        line.add_row(Text(self._description), bar, Text(self._text()))
        return line

    def _text(self) -> str:
        took = max(self._clock() - self._began, 1e-9)
        parts = [f"{self.done:,.0f}" + ("" if self._total is None else f"/{self._total:,.0f}")]
        if self._tokens:
            parts.append(f"{self._tokens / took:,.0f} tokens/s")
        if self._total is not None and 0 < self.done < self._total:
            parts.append(f"{whole_seconds_text(took * (self._total - self.done) / self.done)} left")
        return ", ".join(parts)


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """Values as a row of bars between their minimum and maximum."""
    levels = ASCII_SPARKS if ascii_only else SPARKS
    least, greatest = min(values, default=0.0), max(values, default=0.0)
    scale = (len(levels) - 1) / (greatest - least) if greatest > least else 0.0
    return "".join(levels[round((value - least) * scale)] for value in values)


def is_live(console: Console) -> bool:
    """Whether what a console shows can be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet
