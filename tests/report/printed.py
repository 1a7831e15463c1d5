"""What people see of a table or a drawing."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def rendered(renderable: RenderableType, encoding: str = "utf-8") -> list[str]:
    """What a pipe of 80 columns gets."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=80).print(renderable)
    file.seek(0)
    lines = [line.rstrip() for line in file.read().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line or "\x1b" in line for line in lines)
    return lines
