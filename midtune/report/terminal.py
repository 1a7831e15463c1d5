"""Where a stage reports to a person: stderr, or nowhere; and consoles that no text can control."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from midtune.errors import plain
from midtune.report.display import TrainingDisplay, WorkDisplay, is_live, say


class PlainConsole(Console):
    """A console that shows text from anywhere without its control characters; colours and movements are Rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render segments, their text without control characters."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


class PlainStream(io.TextIOBase):
    """A stream that strips control characters from what it writes to another one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(plain(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@dataclass
class Terminal:
    """Messages and progress on stderr, or nothing if `quiet`; results go elsewhere."""

    console: Console = field(default_factory=lambda: PlainConsole(stderr=True))
    quiet: bool = False

    def __post_init__(self) -> None:
        self.console.quiet = self.quiet

    def message(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)

    @property
    def interactive(self) -> bool:
        """Whether someone can be asked."""
        return sys.stdin.isatty() and self.console.is_terminal and not self.quiet

    def ask(self, question: str, default: str = "") -> str:
        """Ask for a line; nothing typed, or nobody there, is the default. Raises EOFError at the end of the input."""
        if not self.interactive:
            return default
        self.console.print(Text(f"{question} [{default}]: " if default else f"{question}: "), end="")
        return input().strip() or default

    def progress(self, description: str, total: float | None) -> WorkDisplay:
        """A display of other work, a context to call as units of work get done."""
        return WorkDisplay(description, total, self.console)

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[RenderableType], None]]:
        """Give a function that shows each thing in place of the last, and removes it at the end; only on a terminal."""
        if not is_live(self.console):
            yield lambda _: None
            return
        with Live(console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
            yield live.update

    def training(self, total_steps: int, title: str) -> TrainingDisplay:
        """A display of training, a context."""
        return TrainingDisplay(total_steps, self.console, title)
