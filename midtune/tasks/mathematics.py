"""Compare answers mathematically with math-verify, in a process that can be killed.

math-verify's own timeouts are signals: they need the main thread, and do not interrupt arithmetic on huge
integers (`9**9**9`). So this file also runs as a program that answers one question per line. One that takes
too long or too much memory is killed; the next question starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any

LIMIT_S = 3.0
# Importing SymPy takes a second or two, on a busy machine more.
START_S = 60.0
MEMORY_BYTES = 2 * 2**30
# A text longer than this, in characters, is more than an answer.
_LONGEST = 200
# Numbers, signs and bare letters, but not those in LaTeX commands and words.
_PARTS = re.compile(
    r"(?<!\\)(?<![a-zA-Z])[0-9]+|[-+<>|]|\\(?:[lg]eq?|n)(?![a-zA-Z])|(?<![a-zA-Z\\{])[a-zA-Z](?![a-zA-Z])"
)
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)[a-z]*\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?(?=\s*\$?$)")


class Comparer:
    """Compares answers, each within `limit_s` seconds, in a process of `program` that the first question starts."""

    def __init__(self, limit_s: float = LIMIT_S, program: str = __file__) -> None:
        self.limit_s = limit_s
        self._program = program
        self._process: Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, references: Sequence[str], candidates: Sequence[str]) -> bool:
        """Whether a completion's answer equals the reference; False on a timeout.

        Each comes in several notations; the first that can be read counts. Raises MidtuneError if the process does
        not work at all.
        """
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            said = _asked(process, json.dumps([list(references), list(candidates)]), self.limit_s)
            if not said:
                self.close()
            return said.strip() == "true"

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> Popen[str]:
        # -P: modules of this folder would shadow others.
        process = self._process = Popen(
            [sys.executable, "-P", self._program], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, encoding="utf-8"
        )
        # The first LaTeX builds its parser.
        if not _asked(process, json.dumps([["$\\frac{1}{2}$"], ["$x^2$"]]), START_S):
            self.close()
            from midtune.errors import MidtuneError  # not importable where this file is the program

            raise MidtuneError(
                f"math-verify does not answer within {START_S:.0f} s; see whether `python -c 'import math_verify'` "
                "works, and choose another reward than `math` meanwhile."
            )
        return process


def _asked(process: Popen[str], line: str, limit_s: float) -> str:
    """The process's answer, or nothing if it ended or was killed."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""
    finally:
        timer.cancel()


def _serve(questions: IO[str], answers: IO[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for midtune, which ends this process
    # Where the system has no such limit, the time limit alone holds.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    for line in questions:
        references, candidates = json.loads(line)
        try:
            equal = _equal(tuple(references), candidates)
        except Exception:  # noqa: BLE001 (an answer that cannot be read is not equal)
            equal = False
        print(json.dumps(equal), file=answers, flush=True)


def _equal(references: tuple[str, ...], candidates: Sequence[str]) -> bool:
    text, gold = _read(references)
    said, found = _read(tuple(candidates))
    places = max([6, *map(len, re.findall(r"\.([0-9]+)", f"{text} {said}"))])
    if not _verified(gold, found, places) or not (_is_read_whole(text) and _is_read_whole(said)):
        return False
    # It calls two equations equal if it cannot solve them. Each comparison takes up to 0.1 s.
    others = islice(_others(said), 2) if "=" in text and "=" in said else ()
    return not any(_verified(gold, _parsed(other), places) for other in others)


def _verified(gold: Sequence[Any], found: Sequence[Any], places: int) -> bool:
    from math_verify import verify

    equal: bool = verify(
        list(gold), list(found), float_rounding=places, allow_set_relation_comp=True, timeout_seconds=None
    )
    return equal


@lru_cache(maxsize=4096)
def _read(texts: tuple[str, ...]) -> tuple[str, tuple[Any, ...]]:
    """The first text that can be read, and how math-verify reads it."""
    return next(((text, found) for text in texts if (found := _parsed(text))), ("", ()))


def _parsed(text: str) -> tuple[Any, ...]:
    from math_verify import parse

    # What is not read comes back as text.
    return tuple(found for found in parse(text, parsing_timeout=None) if not isinstance(found, str))


@lru_cache(maxsize=4096)
def _is_read_whole(text: str) -> bool:
    """Whether each number, sign and name in an answer matters to how math-verify reads it.

    It drops what it does not know: it reads `0.\\overline{3}` as 0, `120_5` as 120 and `3c` as 3.
    """
    if len(text) > _LONGEST:
        return True
    read = _parsed(text)
    return not any(_parsed(other) == read for other in _others(_UNIT.sub("", text)))


def _others(text: str) -> Iterator[str]:
    """The text with one number or sign changed, or one name left out."""
    swapped = {"+": "-", "-": "+"}
    for found in sorted(_PARTS.finditer(text), key=lambda found: not found[0].isdigit()):
        part = found[0]
        part = part[:-1] + str((int(part[-1]) + 1) % 10) if part.isdigit() else swapped.get(part, "")
        yield text[: found.start()] + part + text[found.end() :]


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    _serve(sys.stdin, sys.stdout)
