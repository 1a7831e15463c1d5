"""What runs inside a sandbox: set the limits, then run a program, serve its functions or run the tests.

`sandbox.py` hands the compiled module to a new interpreter. It imports only what that interpreter has
loaded: `json` or `typing` alone would double the start time.

Tests and the program they test run in two sandboxes; only values pass between them, as Python literals.
`decode` turns these into plain numbers, texts and containers, whose `==` is Python's own, or into an
`Opaque`, which equals only itself.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STARTED = b"started"
_MOST_REPLY_BYTES = 4 * 2**20
_ONLY_AST = 0x400  # ast.PyCF_ONLY_AST, without the time that importing ast takes


def main(job: dict[str, Any]) -> None:
    """Set the limits, report the start on standard error, and do the job."""
    # Imported before the limits: the new user may be unable to read it. `socket` itself imports more slowly.
    import _socket

    _limit(job["limits"], job["uid"])
    # With the folder's descriptor, so that the parent can count the program's files.
    folder = os.open(".", os.O_RDONLY)
    said = _socket.socket(fileno=2)
    said.sendmsg([STARTED], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, folder.to_bytes(4, sys.byteorder))])
    said.detach()
    os.close(folder)
    # Nobody reads it from here on, and a full pipe would block the program.
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    sys.argv = ["program.py"]
    {"run": run, "serve": serve, "grade": grade}[job["role"]](job)


def _limit(limits: dict[str, int], uid: int | None) -> None:
    import resource  # not on Windows, where this module is imported too

    if uid is not None:
        # The kernel does not count the processes of root.
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def run(job: dict[str, Any]) -> None:
    """Run a program as Python runs a file."""
    _execute(job["sources"], "__main__")


def serve(job: dict[str, Any]) -> None:
    """Run a program, then answer calls of its functions until there are no more."""
    calls, replies = os.fdopen(job["calls"], "rb"), os.fdopen(job["replies"], "wb")
    objects: list[Any] = []

    def keep(value: Any) -> str:
        objects.append(value)
        return f"opaque({len(objects) - 1})"

    try:
        space, failure = _execute(job["sources"], "solution"), None
    except BaseException as error:  # noqa: BLE001 (a program raises anything, SystemExit too)
        space, failure = {}, error
    for line in calls:
        try:
            if failure is not None:
                raise failure
            function, args, keywords = decode(line.decode(), objects.__getitem__)
            found = _named(space, function) if isinstance(function, str) else function
            reply = encode((True, found(*args, **keywords)), keep)
        except BaseException as error:  # noqa: BLE001
            reply = encode((False, type(error).__name__), keep)
        replies.write(reply.encode() + b"\n")
        replies.flush()


def grade(job: dict[str, Any]) -> None:
    """Run tests against a program in another sandbox; write `1` or `0` to standard output for each."""
    calls, replies = os.fdopen(job["calls"], "wb"), os.fdopen(job["replies"], "rb")
    verdicts = os.dup(1)
    os.dup2(2, 1)  # what tests print is not a verdict

    def call(function: Any, args: Any, keywords: Any) -> Any:
        calls.write(encode((function, args, keywords), _reference).encode() + b"\n")
        calls.flush()
        line = replies.readline(_MOST_REPLY_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionError("the program has ended or answers without end")
        good, value = decode(line.decode(), lambda number: Opaque(number, call))
        if good is not True:
            kind = vars(builtins).get(value)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind.__new__(kind)
            raise RuntimeError(value)
        return value

    def function(name: str) -> Any:
        return lambda *args, **keywords: call(name, args, keywords)

    space: dict[str, Any] = {"__name__": "tests"}
    space |= {name: function(name) for name in job["tests"]["names"]}
    for source, counts in job["tests"]["steps"]:
        try:
            exec(source, space)
            passed = b"1"
        except BaseException:  # noqa: BLE001 (tests are skipped or ended in many ways)
            passed = b"0"
        if counts:
            os.write(verdicts, passed)


class Opaque:
    """A value that stays with the program: the tests can hand it back, call it and iterate over it."""

    def __init__(self, number: int, call: Callable[[Any, Any, Any], Any]) -> None:
        self.number = number
        self._call = call

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._call(self, args, keywords)

    def __iter__(self) -> Any:
        return iter(self._call("list", (self,), {}))


def encode(value: Any, opaque: Callable[[Any], str]) -> str:
    """A value as a Python literal, subclasses (named tuple, Counter) as the plain class; `opaque` writes the rest."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return hex(value)  # decimal digits are slow, and limited
    if isinstance(value, float):
        return f"float({float.__repr__(value)!r})"
    if isinstance(value, complex):
        return f"complex({complex.__repr__(value)!r})"
    if isinstance(value, str):
        return ascii(str.__str__(value))
    if isinstance(value, (bytes, bytearray)):
        return repr(bytes(value))
    if isinstance(value, dict):
        pairs = (f"{encode(key, opaque)}:{encode(item, opaque)}" for key, item in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = "".join(encode(item, opaque) + "," for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items})" if isinstance(value, tuple) else f"set([{items}])"
    return opaque(value)


def decode(text: str, opaque: Callable[[int], Any]) -> Any:
    """Read what `encode` wrote; raise on anything else, and run none of it."""
    made: dict[str, Callable[[Any], Any]] = {"float": float, "complex": complex, "set": set, "opaque": opaque}

    def value(node: Any) -> Any:
        match type(node).__name__:
            case "Constant":
                return node.value
            case "UnaryOp" if type(node.op).__name__ == "USub":
                return -value(node.operand)
            case "Tuple":
                return tuple(map(value, node.elts))
            case "List":
                return list(map(value, node.elts))
            case "Dict":
                return dict(zip(map(value, node.keys), map(value, node.values), strict=True))
            case "Call":
                (argument,) = node.args
                return made[node.func.id](value(argument))
        raise ValueError("not a literal")

    return value(compile(text, "value", "eval", _ONLY_AST).body)


def _reference(value: Any) -> str:
    if isinstance(value, Opaque):
        return f"opaque({value.number})"
    raise TypeError(f"a {type(value).__name__} cannot be passed to a program in a sandbox")


def _named(space: dict[str, Any], name: str) -> Any:
    if name in space:
        return space[name]
    # LeetCode's form, which APPS has too.
    return getattr(space["Solution"]() if "Solution" in space else builtins, name)


def _execute(sources: list[str], name: str) -> dict[str, Any]:
    """Run the first source that compiles; if none does, raise the last one's error."""
    module = type(sys)(name)
    sys.modules[name] = module  # dataclasses and pickle look it up
    for place, source in enumerate(sources, start=1):
        try:
            code = compile(source, "program.py", "exec")
            break
        except (SyntaxError, ValueError):
            if place == len(sources):
                raise
    exec(code, module.__dict__)
    return module.__dict__
