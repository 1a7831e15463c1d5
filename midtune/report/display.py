"""What a person sees while a run works: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from midtune.report.tables import bytes_text, seconds_text, whole_seconds_text

SPARKS, ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
SPARKLINE_WIDTH = 32
# The time left follows the last steps: completions grow shorter or longer as training goes on.
STEPS_FOR_TIME_LEFT = 10
LINE_EVERY_S = 10.0
SHORT_WORK_S = 2.0


class TrainingDisplay:
    """Shows how training goes, step by step.

    On a terminal it redraws itself in place; elsewhere it prints one line per step.

    Args:
        total_steps: steps the run will have done at its end.
        console: where to show; default: stderr.
        quiet: show nothing at all.
        title: what is trained, one line.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        console: Console | None = None,
        quiet: bool = False,
        title: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._title = title
        self._clock = clock
        self._metrics: Mapping[str, Any] = {}
        self._rewards: deque[float] = deque(maxlen=SPARKLINE_WIDTH)
        self._step_s: deque[float] = deque(maxlen=STEPS_FOR_TIME_LEFT)
        self._updated = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to show; a second call does nothing."""
        self._updated = self._clock()
        if self._quiet or self._live is not None:
            return
        if _is_live(self._console):
            self._live = Live(self, console=self._console, refresh_per_second=2)
            self._live.start()
        elif self._title:
            self._line(self._title)

    def stop(self) -> None:
        """Leave the last state on the screen; a second call does nothing."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a finished step.

        Args:
            metrics: a line of metrics.jsonl; only `step` is required.
        """
        self._metrics = metrics
        self._updated = self._clock()
        if (reward := _figure(metrics, "reward")) is not None:
            self._rewards.append(reward)
        if (step_s := _figure(metrics, "step_s")) is not None:
            self._step_s.append(step_s)
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet:
            self._line(self.line())

    def message(self, text: str) -> None:
        """Print a note above the display."""
        if not self._quiet:
            self._line(text)

    def line(self) -> str:
        """The last step as one line of plain text."""
        step, equal = self._metrics.get("step", 0), _figure(self._metrics, "equal_groups")
        parts = [f"step {step}/{self._total}"]
        if (reward := _figure(self._metrics, "reward")) is not None:
            parts.append(f"reward {reward:.3f}")
        if equal is not None:
            parts.append(f"equal groups {equal:.0%}")
        parts += [text for text in (self._length(), self._speed(), self._phases(), self._memory()) if text]
        if (left := self._left_s()) is not None:
            parts.append(f"{whole_seconds_text(left)} left")
        return " | ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        step = int(self._metrics.get("step", 0))
        head = Table.grid(padding=(0, 2, 0, 0))
        left = self._left_s()
        head.add_row(
            f"step {step}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=step, width=30),
            "" if left is None else f"{whole_seconds_text(left)} left",
            self._waiting(step),
        )
        body = Table.grid(padding=(0, 2, 0, 0))
        body.add_column(style="bold", no_wrap=True)
        if (reward := _figure(self._metrics, "reward")) is not None:
            body.add_row("reward", f"{reward:.3f}  {sparkline(self._rewards, ascii_only=options.ascii_only)}")
        if (equal := _figure(self._metrics, "equal_groups")) is not None:
            body.add_row("groups", f"{equal:.0%} with equal rewards, so no advantage")
        text = [part for part in (self._length(), self._speed()) if part]
        if text:
            body.add_row("text", ", ".join(text))
        if phases := self._phases():
            body.add_row("time", phases)
        if memory := "; ".join(filter(None, (self._memory(), self._peaks()))):
            body.add_row("memory", memory)
        yield Group(*([Text(self._title, style="bold")] if self._title else []), head, body)

    def _waiting(self, step: int) -> str:
        """How long the step now running has taken: the sign of life during a long rollout."""
        if self._live is None or step >= self._total:
            return ""
        return f"step {step + 1} for {whole_seconds_text(self._clock() - self._updated)}"

    def _left_s(self) -> float | None:
        remaining = self._total - int(self._metrics.get("step", 0))
        if not self._step_s or remaining <= 0:
            return None
        return remaining * sum(self._step_s) / len(self._step_s)

    def _length(self) -> str | None:
        length, clipped = (_figure(self._metrics, key) for key in ("completion_length", "clipped"))
        if length is None:
            return None
        return f"{length:.0f} tokens a completion" + (
            "" if clipped is None else f" ({clipped:.0%} cut at the limit)"
        )

    def _speed(self) -> str | None:
        rate = _figure(self._metrics, "tokens_per_s")
        return None if rate is None else f"{rate:,.0f} tokens/s"

    def _phases(self) -> str | None:
        whole = _figure(self._metrics, "step_s")
        phases = self._by_phase("s")
        if not whole:
            return ", ".join(f"{name} {seconds_text(took)}" for name, took in phases.items()) or None
        parts = "; ".join(f"{name} {seconds_text(took)}, {took / whole:.0%}" for name, took in phases.items())
        return f"{seconds_text(whole)} a step" + (f" ({parts})" if parts else "")

    def _memory(self) -> str | None:
        memory = _figure(self._metrics, "memory_bytes")
        return None if memory is None else bytes_text(memory)

    def _peaks(self) -> str | None:
        peaks = self._by_phase("peak_bytes")
        parts = ", ".join(f"{name} {bytes_text(peak)}" for name, peak in peaks.items())
        return f"peaks: {parts}" if parts else None

    def _by_phase(self, kind: str) -> dict[str, float]:
        found = {name: _figure(self._metrics, f"{name}_{kind}") for name in ("rollout", "reward", "update")}
        return {name: figure for name, figure in found.items() if figure is not None}

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)


class Advance(Protocol):
    """Tells a progress bar that `amount` more units are done, and `tokens` more tokens made."""

    def __call__(self, amount: float = 1, *, tokens: int = 0) -> None: ...


@contextmanager
def progress_bar(
    description: str,
    total: float | None,
    console: Console | None = None,
    quiet: bool = False,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Show how work proceeds that may take longer than two seconds.

    On a terminal it is a bar that disappears at the end; elsewhere a line after two seconds and then
    every ten.

    Args:
        description: what is being done, such as `scoring before training`.
        total: units of work, or None when nobody knows.
        console: where to show; default: stderr.
        quiet: show nothing at all.
        clock: seconds from any origin.

    Yields:
        A function to call as work gets done.
    """
    console = console or Console(stderr=True)
    work = _Work(description, total, clock)
    if quiet:
        yield work.advance
    elif _is_live(console):
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), _WorkColumn(work))
        with Progress(
            *columns, console=console, transient=True, expand=True, refresh_per_second=4
        ) as progress:
            bar = progress.add_task(description, total=total)

            def advance(amount: float = 1, *, tokens: int = 0) -> None:
                work.advance(amount, tokens=tokens)
                progress.update(bar, completed=work.done)

            yield advance
    else:
        due = clock() + SHORT_WORK_S

        def advance_line(amount: float = 1, *, tokens: int = 0) -> None:
            nonlocal due
            work.advance(amount, tokens=tokens)
            if clock() >= due:
                due = clock() + LINE_EVERY_S
                console.print(Text(f"{description}: {work.text()}"), soft_wrap=True)

        yield advance_line


class _Work:
    """How much is done, how fast, and how long the rest will take."""

    def __init__(self, description: str, total: float | None, clock: Callable[[], float]) -> None:
        self.description, self.total, self.done, self._tokens = description, total, 0.0, 0
        self._clock, self._began = clock, clock()

    def advance(self, amount: float = 1, *, tokens: int = 0) -> None:
        self.done += amount
        self._tokens += tokens

    def text(self) -> str:
        took = max(self._clock() - self._began, 1e-9)
        parts = [f"{self.done:,.0f}" + ("" if self.total is None else f"/{self.total:,.0f}")]
        if self._tokens:
            parts.append(f"{self._tokens / took:,.0f} tokens/s")
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{whole_seconds_text(took * (self.total - self.done) / self.done)} left")
        return ", ".join(parts)


class _WorkColumn(ProgressColumn):
    def __init__(self, work: _Work) -> None:
        super().__init__(Column(no_wrap=True))
        self._work = work

    def render(self, task: Task) -> Text:
        return Text(self._work.text())


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """Recent values as a row of bars between their least and greatest."""
    levels = ASCII_SPARKS if ascii_only else SPARKS
    least, greatest = min(values, default=0.0), max(values, default=0.0)
    scale = (len(levels) - 1) / (greatest - least) if greatest > least else 0.0
    return "".join(levels[round((value - least) * scale)] for value in values)


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _figure(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return None if value is None or not math.isfinite(value) else float(value)
