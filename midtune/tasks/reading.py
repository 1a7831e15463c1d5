"""Rows as they stand in jsonl, csv and parquet files and in folders of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from midtune.errors import InputError
from midtune.tasks.split import Row

_JSONL = (".jsonl", ".jsonlines", ".json-lines", ".ndjson", ".json")
SUFFIXES = (*_JSONL, ".csv", ".parquet")
# Of evaluation splits the first that is there counts.
EVALUATION = ("test", "validation", "valid", "val", "eval", "dev")
_PART = re.compile(rf"(?:^|[/._-])(train|{'|'.join(EVALUATION)})(?=[/._-])")


@dataclass(frozen=True)
class Line:
    """One row of a source, or why there is none."""

    place: str  # what messages call it, such as `line 3 of data.jsonl`
    row: Row | None
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """The rows of a file, a folder or a dataset.

    Args:
        name: what messages call it.
        lines: all rows, or those to train on.
        evaluation: rows to evaluate on, where the source keeps them apart.
        digest: the same for the same content.
        note: a remark for the person.
    """

    name: str
    lines: list[Line]
    evaluation: list[Line] | None
    digest: str
    note: str = ""


def read_path(name: str) -> Source:
    """The rows of a jsonl, csv or parquet file, or of a folder of them, in their order.

    A folder whose files are called `train` and `test` (or `validation` or `eval`) keeps these apart.

    Raises:
        InputError: it is missing, empty, or of another format.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"task file {path} does not exist; give the path of a jsonl, csv or parquet file.")
    content = path.read_bytes()
    return Source(str(path), _lines(path, content), None, hashlib.sha256(content).hexdigest())


def _folder(folder: Path) -> Source:
    # A folder from the hub also holds descriptions in JSON.
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".json" and path.is_file()
    }
    if not found:
        raise InputError(f"the folder {folder} has no jsonl, csv or parquet files; give one that has.")
    parts: dict[str, list[Line]] = {}
    digest = hashlib.sha256()
    for relative, path in found.items():
        content = path.read_bytes()
        digest.update(f"{relative} {hashlib.sha256(content).hexdigest()}\n".encode())
        names = _PART.findall(relative.lower())
        parts.setdefault(names[-1] if names else "", []).extend(_lines(path, content))
    return by_part(str(folder), parts, digest.hexdigest())


def by_part(name: str, parts: dict[str, list[Line]], digest: str, note: str = "") -> Source:
    """A source whose rows have the names of splits; without a `train` and an evaluation split all are one."""
    evaluation = next((part for part in EVALUATION if part in parts), None)
    if "train" not in parts or evaluation is None:
        return Source(name, [line for lines in parts.values() for line in lines], None, digest, note)
    unused = [part for part in parts if part not in ("train", evaluation)]
    if unused:
        note = (
            f"{note} of {name}, {' and '.join(part or 'what has no split' for part in unused)} is not used."
        )
    return Source(name, parts["train"], parts[evaluation], digest, note.strip())


def _lines(path: Path, content: bytes) -> list[Line]:
    if path.suffix.lower() == ".parquet":
        return _parquet(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"task file {path} is not UTF-8 text; give a jsonl, csv or parquet file.") from None
    if not text.strip():
        raise InputError(f"task file {path} is empty; it needs a problem on each line.")
    lines = _csv(path, text) if path.suffix.lower() == ".csv" else _jsonl(path, text)
    if not lines:
        raise InputError(f"task file {path} has a header but no rows; it needs a problem on each line.")
    return lines


def _jsonl(path: Path, text: str) -> list[Line]:
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError:
            if not lines and line.lstrip().startswith("["):
                raise InputError(
                    f"{place} is not valid JSON; the file is one JSON array: write one JSON object a line."
                ) from None
            lines.append(Line(place, None, "is not valid JSON"))
            continue
        if isinstance(row, dict):
            lines.append(Line(place, row))
        else:
            lines.append(Line(place, None, f"is not a JSON object but {kind(row)}"))
    return lines


def _csv(path: Path, text: str) -> list[Line]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    lines = []
    try:
        for row in reader:
            place = f"line {reader.line_num} of {path}"
            if None in row:
                fault = "has more fields than the header (fields with commas need double quotes)"
                lines.append(Line(place, None, fault))
            else:
                lines.append(Line(place, dict(row)))
    except csv.Error as error:
        raise InputError(
            f"line {reader.line_num} of {path} is not valid csv ({error}); mend that line."
        ) from None
    return lines


def _parquet(path: Path, content: bytes) -> list[Line]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(arrow.BufferReader(content)).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise InputError(f"task file {path} is not a parquet file that can be read ({found}).") from None
    if not rows:
        raise InputError(f"task file {path} has columns but no rows; it needs a problem in each row.")
    return [Line(f"row {number} of {path}", row) for number, row in enumerate(rows, start=1)]


def kind(value: object) -> str:
    """What a value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
