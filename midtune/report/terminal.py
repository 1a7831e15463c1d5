"""Where a stage reports to the person who watches: stderr, or nowhere; and consoles that obey no text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from midtune.errors import plain
from midtune.report.display import Advance, TrainingDisplay, progress_bar


class PlainConsole(Console):
    """A console on which text of any origin only appears: colours and movements are Rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is shown, their text without controls."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


class PlainStream(io.TextIOBase):
    """A stream that takes the controls out of what is written to another one."""

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
    """Messages and progress on stderr; results are not its business.

    Args:
        console: where to show.
        quiet: show nothing at all.
    """

    console: Console = field(default_factory=lambda: PlainConsole(stderr=True))
    quiet: bool = False

    def message(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=not self.console.is_terminal)

    @contextmanager
    def progress(self, description: str, total: float | None) -> Iterator[Advance]:
        """Show how work proceeds; see `progress_bar`."""
        with progress_bar(description, total, self.console, self.quiet) as advance:
            yield advance

    def training(self, total_steps: int, title: str) -> TrainingDisplay:
        """A display of training, to be used as a context."""
        return TrainingDisplay(total_steps, console=self.console, quiet=self.quiet, title=title)
