import io

import pytest
from rich.console import Console
from rich.text import Text

from midtune.report.terminal import PlainConsole, PlainStream, Terminal

HOSTILE = "\x1b[2J\x1b]0;title\x07name\u202e [bold]x[/bold]"
# The escape that no sequence follows goes, and what stood after it is only text.
SHOWN = "]0;titlename [bold]x[/bold]"


def test_a_console_shows_what_a_terminal_would_obey() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=80, force_terminal=True, color_system="standard")
    console.print(Text(HOSTILE, style="red"))
    assert file.getvalue() == f"\x1b[31m{SHOWN}\x1b[0m\n"


def test_a_stream_takes_controls_out() -> None:
    file = io.StringIO()
    stream = PlainStream(file)
    assert stream.write(HOSTILE) == len(HOSTILE)
    stream.flush()
    assert (file.getvalue(), stream.isatty()) == (SHOWN, False)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_tells_or_is_quiet(quiet: bool) -> None:
    file = io.StringIO()
    terminal = Terminal(Console(file=file, width=20), quiet)
    terminal.message("a line longer than the width [of a pipe]")
    with terminal.progress("scoring", 2) as advance:
        advance()
    with terminal.training(1, "block 2 of tiny") as display:
        display.update({"step": 1})
    said = "a line longer than the width [of a pipe]\nblock 2 of tiny\nstep 1/1\n"
    assert file.getvalue() == ("" if quiet else said)
