"""Where a stage reports to the person who watches: stderr, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from midtune.report.display import Advance, TrainingDisplay, progress_bar


@dataclass
class Terminal:
    """Messages and progress on stderr; results are not its business.

    Args:
        console: where to show.
        quiet: show nothing at all.
    """

    console: Console = field(default_factory=lambda: Console(stderr=True))
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
