"""Rows of data files, of folders of them and of what `datasets` saved."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midtune.errors import WHY, InputError, explained
from midtune.tasks.split import Row

FORMATS = "jsonl, json, csv, tsv, parquet or arrow"
# As in GSM8K (question, answer), MATH and NuminaMath (problem, solution), TRL and ShareGPT (conversations) and
# verl (prompt, reward_model); the first that is there counts.
PROMPT_COLUMNS = ("prompt", "question", "problem", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
_DELIMITED = {".csv": None, ".tsv": "\t", ".tab": "\t"}
_SUFFIXES = (".jsonl", ".jsonlines", ".json-lines", ".ndjson", ".json", *_DELIMITED, ".parquet", ".arrow")
_UNPACK = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
# The first of these that a source has is its evaluation split.
EVALUATION = ("test", "validation", "valid", "val", "eval", "dev")
_ALSO = {"training": "train", "testing": "test", "evaluation": "eval"}
_PART = re.compile(rf"(?:^|[/._\- ])({'|'.join(['train', *EVALUATION, *_ALSO])})(?=[/._\- 0-9]|$)")
# What `datasets` and pandas take for a missing value in csv.
_MISSING = {"nan", "NaN", "-nan", "-NaN", "<NA>", "null", "NULL", "None"}
# Longer splits are thinned evenly: no run uses more, and all rows in memory would take gigabytes.
MOST_ROWS = 100_000
_SHOWN_FILES = 5


class BadRow(Exception):
    """A row cannot be used; the message ends a sentence that begins with the row's place."""


@dataclass(frozen=True)
class Line:
    """One row of a source, or why there is none."""

    place: str  # what messages call it, such as `line 3 of data.jsonl`
    row: Row | None
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """The rows of a file, a folder or a dataset."""

    name: str  # what messages call it
    lines: list[Line]  # all rows, or those to train on
    evaluation: list[Line] | None  # rows to evaluate on, where the source keeps them apart
    digest: str  # the same for the same content
    note: str = ""  # a remark for the person


def data_suffix(name: str) -> str:
    """The format in a file's name, such as `.jsonl` for `train.jsonl.gz`; empty if unknown."""
    path = Path(name.lower())
    if path.suffix in _UNPACK:
        path = path.with_suffix("")
    return path.suffix if path.suffix in _SUFFIXES else ""


def read_path(name: str) -> Source:
    """Read a data file, a folder of them or one that `datasets` saved; rows keep their order.

    Files in a folder called `train` and `test` (or `validation` or `eval`) stay apart, as do the splits of `datasets`.
    InputError if it is missing, empty, or of another format.
    """
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        unread = f"the folder {path}, which `save_to_disk` wrote, cannot be read"
        with explained(f"{unread} ({WHY}); save it again."):
            loaded = datasets.load_from_disk(str(path))
        return of_splits(str(path), loaded if isinstance(loaded, dict) else {"": loaded})
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"task file {path} does not exist; give the path of a {FORMATS} file.")
    content = path.read_bytes()
    return by_part(str(path), _parts(path, content), hashlib.sha256(content).hexdigest())


def of_splits(name: str, parts: Mapping[str, Any], most_rows: int = MOST_ROWS) -> Source:
    """A source from the splits of a dataset in memory, at most `most_rows` rows of each."""
    lines: dict[str, list[Line]] = {}
    thinned = []
    digest = hashlib.sha256()
    for part, rows in parts.items():
        step = max(1, -(-len(rows) // most_rows))
        if step > 1:
            thinned.append(f"one row in {step} of {part}")
        of = f"{name}'s {part}" if part else name
        places = range(0, len(rows), step)
        chosen = zip(places, rows.select(places).to_list(), strict=True)
        lines[str(part)] = [Line(f"row {place + 1} of {of}", row) for place, row in chosen]
        for line in lines[str(part)]:
            digest.update(f"{part} {json.dumps(line.row, sort_keys=True, default=str)}\n".encode())
    note = f"{name} is long: {' and '.join(thinned)} is read." if thinned else ""
    return by_part(name, lines, digest.hexdigest(), note)


def _folder(folder: Path) -> Source:
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    found = {relative: path for relative, path in files.items() if data_suffix(relative)}
    left_out = [relative for relative in files if relative not in found]
    parts: dict[str, list[Line]] = {}
    names: dict[str, list[str]] = {}
    digest = hashlib.sha256()
    for relative, path in found.items():
        content = path.read_bytes()
        if _describes(relative, content):
            left_out.append(relative)
            continue
        digest.update(f"{relative} {hashlib.sha256(content).hexdigest()}\n".encode())
        matches = _PART.findall(relative.lower())
        split = _ALSO.get(matches[-1], matches[-1]) if matches else ""
        for inner, lines in _parts(path, content).items():
            parts.setdefault(inner or split, []).extend(lines)
            names.setdefault(inner or split, []).append(relative)
    if not parts:
        other = f" (it has {_listed(left_out)})" if left_out else ""
        raise InputError(f"the folder {folder} has no {FORMATS} files with rows{other}; give one that has.")
    note = f"{folder}: left out {_listed(left_out)}, with no problems in {FORMATS}." if left_out else ""
    return by_part(str(folder), parts, digest.hexdigest(), note, names)


def _describes(name: str, content: bytes) -> bool:
    """Whether a file is one JSON object that is no problem: folders from the hub hold descriptions, too."""
    document = _loaded(content) if data_suffix(name) == ".json" else None
    return (
        isinstance(document, dict)
        and _document(document) == {"": [document]}
        and not any(key.casefold() in PROMPT_COLUMNS for key in document)
    )


def _listed(files: Sequence[str]) -> str:
    more = len(files) - _SHOWN_FILES
    return ", ".join(files[:_SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")


def by_part(
    name: str,
    parts: Mapping[str, list[Line]],
    digest: str,
    note: str = "",
    files: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """A source from rows by split; all are one without `train` and an evaluation split. Messages list `files`."""

    def listed(parts: Sequence[str]) -> str:
        return " and ".join(
            (part or "what has no split") + (f" ({_listed(files[part])})" if files else "") for part in parts
        )

    evaluation = next((part for part in EVALUATION if part in parts), None)
    if "train" not in parts or evaluation is None:
        if {*parts} - {"train"} and {*parts} != {""}:
            missing = "evaluation" if "train" in parts else "train"
            note = f"{note} {name} has no {missing} split, so {listed([*parts])} is split anew."
        return Source(name, [line for lines in parts.values() for line in lines], None, digest, note.strip())
    unused = [part for part in parts if part not in ("train", evaluation)]
    if unused:
        note = f"{note} of {name}, {listed(unused)} is not used."
    return Source(name, parts["train"], parts[evaluation], digest, note.strip())


def _parts(path: Path, content: bytes) -> dict[str, list[Line]]:
    """Read a file's rows by split; nearly all files have none."""
    suffix = data_suffix(path.name)
    if not suffix:
        raise InputError(f"task file {path} is not a {FORMATS} file; give one.")
    packed = path.suffix.lower()
    if packed in _UNPACK:
        with explained(f"task file {path} is not a {packed} file that can be read ({WHY}); get it again."):
            content = _UNPACK[packed].decompress(content)
    if suffix in (".parquet", ".arrow"):
        return {"": _table(path, content, suffix)}
    with explained(
        f"task file {path} is not UTF-8 text; save it as UTF-8 (in Excel `CSV UTF-8`), or give a parquet file."
    ):
        # Excel's "Unicode text" is UTF-16.
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    if not text.strip():
        raise InputError(f"task file {path} is empty; it needs a problem on each line.")
    parts = {"": _csv(path, text, _DELIMITED[suffix])} if suffix in _DELIMITED else _json(path, text)
    if not any(parts.values()):
        what = "a header" if suffix in _DELIMITED else "brackets"
        raise InputError(f"task file {path} has {what} but no rows; it needs some problems.")
    return parts


def _json(path: Path, text: str) -> dict[str, list[Line]]:
    """Read JSON lines, an array of rows, or, in a `.json` file, an object that has them."""
    is_array = text.lstrip().startswith("[")
    document = _loaded(text) if is_array or data_suffix(path.name) == ".json" else ValueError()
    if isinstance(document, Exception):
        if is_array and isinstance(_loaded(text.strip().partition("\n")[0]), Exception):
            raise InputError(
                f"{path} is one JSON array, and it is not valid JSON ({document}); fix it, or write one JSON object a "
                "line."
            )
        lines = [(f"line {number} of {path}", line) for number, line in enumerate(text.split("\n"), start=1)]
        return {"": [line_of(place, _loaded(line)) for place, line in lines if line.strip()]}
    return {
        part: [
            line_of(f"item {number} of {f'`{part}` in ' if part else ''}{path}", row)
            for number, row in enumerate(rows, start=1)
        ]
        for part, rows in _document(document).items()
    }


def _loaded(text: str | bytes) -> Any:
    """Parsed JSON, or the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _document(document: Any) -> dict[str, list[Any]]:
    """The rows of a JSON document by split: from an array, pandas' columns, or a key with rows."""
    if not isinstance(document, dict):
        return {"": document if isinstance(document, list) else [document]}
    columns = [
        [*value.values()] if isinstance(value, dict) else value
        for value in document.values()
        if isinstance(value, dict | list)
    ]
    if any(key.casefold() in PROMPT_COLUMNS for key in document):
        if len(columns) != len(document) or len({len(column) for column in columns}) != 1:
            return {"": [document]}
        return {"": [dict(zip(document, row, strict=True)) for row in zip(*columns, strict=True)]}
    rows = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if len(rows) == 1 and not {*rows} & {"train", *EVALUATION}:
        return {"": next(iter(rows.values()))}
    return rows if rows and {*rows} <= {"train", *EVALUATION} else {"": [document]}


def line_of(place: str, row: Any, wanted: str = "a JSON object") -> Line:
    """A line from what was read at a place, with its fault if it is no row."""
    if isinstance(row, dict):
        return Line(place, dict(row))
    is_broken = isinstance(row, Exception)
    return Line(place, None, "is not valid JSON" if is_broken else f"is not {wanted} but {kind(row)}")


def _csv(path: Path, text: str, delimiter: str | None) -> list[Line]:
    before = 0
    # Excel's own way to name the delimiter.
    if (named := re.match(r"sep=(.)\r?\n", text)) is not None:
        delimiter, text, before = named[1], text[named.end() :], 1
    csv.field_size_limit(2**31 - 1)  # by default a long solution is an error
    lines = []
    reader: Any = None
    try:
        # Where Excel writes a decimal comma, it puts `;` between columns.
        chosen = delimiter or max(
            ",;\t", key=lambda mark: len(next(csv.reader(io.StringIO(text), delimiter=mark), []))
        )
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=chosen)
        for row in reader:
            place = f"line {reader.line_num + before} of {path}"
            if row.pop(None, None):
                fault = "has more fields than the header (fields with commas need double quotes)"
                lines.append(Line(place, None, fault))
                continue
            lines.append(Line(place, {key: None if cell in _MISSING else cell for key, cell in row.items()}))
    except csv.Error as error:
        number = reader.line_num + before if reader is not None else 1
        raise InputError(f"line {number} of {path} is not valid csv ({error}); fix that line.") from None
    return lines


def _table(path: Path, content: bytes, suffix: str) -> list[Line]:
    import pyarrow as arrow
    from pyarrow import ipc, parquet

    named = "a parquet" if suffix == ".parquet" else "an arrow"
    with explained(f"task file {path} is not {named} file that can be read ({WHY})."):
        buffer = arrow.BufferReader(content)
        opened = ipc.open_file if content.startswith(b"ARROW1") else ipc.open_stream
        table = parquet.read_table(buffer) if suffix == ".parquet" else opened(buffer).read_all()
        rows = table.to_pylist()
    if not rows:
        raise InputError(f"task file {path} has columns but no rows; it needs a problem in each row.")
    return [Line(f"row {number} of {path}", row) for number, row in enumerate(rows, start=1)]


def kind(value: object) -> str:
    """A value's type in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
