"""The reward `code`: run a model's programs against tests in a sandbox.

Rows have the form of MBPP (`test_list` or `tests`), HumanEval (`test` and `entry_point`), APPS
(`input_output`) or DeepCoder (`tests` as JSON).

Expected results never enter the program's sandbox:

- Pairs of input and output: the program runs once per input, and its output is compared here.
- Tests that call functions run in a second sandbox. Each function of the program is a proxy there, which
  passes arguments and results between the sandboxes as values. So the tests compare plain numbers, texts and
  containers, by Python's own `==` and out of the program's reach.

So a test passes only if the right values came back in time. Ending early, printing the result, patching modules,
overriding `==` and writing to any channel only loses values. A program can still return a result that the prompt
shows; of MBPP's tests the prompt shows only the first. The price: tests cannot pass that hand functions to the
program, look into its objects or expect arguments changed in place, and the program has only the standard library.
Under weak isolation (`sandbox/sandbox.py`) the program can reach other processes, so none of this is guaranteed.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import symtable
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from midtune.tasks.answers import after_thinking
from midtune.tasks.rewards import Reward, completion_text, named
from midtune.tasks.sandbox.sandbox import Sandbox, checked
from midtune.tasks.sources.files import BadRow
from midtune.tasks.split import Row

CODE = ("code", "code-all")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_REFERENCES = ("answer", "code", "canonical_solution", "solutions")
# APPS compares tuples as lists, and writes some expected results in a list of one.
_APPS_SETUP = "def listed(v): return [listed(i) for i in v] if isinstance(v, (list, tuple)) else v"


def extract_code(completion: str, *, in_block: bool = False) -> str:
    """The program in a completion: its last fenced block, closed or not, or what comes before any fence.

    If the prompt opened a block (`in_block`), it is what comes before that block's end.
    """
    completion = after_thinking(completion)
    blocks = [] if in_block else _FENCED.findall(completion)
    return blocks[-1] if blocks else completion.partition("```")[0]


def code_row(row: Row, prompt_column: str) -> Row:
    """Make `prompt`, `answer` (a right program, if known) and `tests` of a row of a known form.

    The prompt is in `prompt_column`, else in `text` (MBPP), `question` (APPS) or `problem` (DeepCoder). Raises BadRow
    if the row has no prompt, no tests, or tests that cannot be read.
    """
    column = next((name for name in (prompt_column, "text", "question", "problem") if row.get(name)), None)
    if column is None:
        raise BadRow(f"has no prompt in column `{prompt_column}`; name its column with --prompt-column")
    prompt, answer = row[column], _reference(row)
    try:
        if given := _input_output(row):
            tests = _apps(given)
            if isinstance(prompt, str) and row.get("starter_code"):
                prompt = f"{prompt.strip()}\n\n```python\n{row['starter_code'].strip()}\n```"
        elif listed := row.get("test_list") or row.get("tests"):
            shown = _texts(listed)
            setup = [*_texts(row.get("test_imports") or []), row.get("test_setup_code") or ""]
            tests = call_tests(setup, shown, answer)
            if isinstance(prompt, str):
                prompt = f"{prompt.strip()}\n\nThe program must pass tests such as:\n\n{shown[0].strip()}"
        elif row.get("test") and row.get("entry_point"):
            prefix = prompt if isinstance(prompt, str) else ""
            tests = call_tests([], [row["test"]], answer, entry_point=row["entry_point"], prefix=prefix)
            answer = answer and prefix + answer
        else:
            raise BadRow(
                "has no tests; the reward `code` needs `test_list`, `test` with `entry_point`, or `input_output`"
            )
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, IndexError, StopIteration) as error:
        raise BadRow(f"has tests that cannot be read ({error})") from None
    if not _count(tests):
        raise BadRow("has tests that test nothing: no `assert`, or no inputs")
    return {"prompt": prompt, "answer": answer, "tests": json.dumps(tests)}


def call_tests(
    setup: Sequence[str],
    sources: Sequence[str],
    reference: str = "",
    *,
    entry_point: str | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """Make tests that call functions of a program.

    Args:
        sources: tests, each with an `assert`; with an entry point, modules with `check(candidate)` (HumanEval).
        reference: a right program; names that it defines are the program's even if they are built-in names.
        entry_point: the function that `check` gets.
        prefix: what a completion continues, if it is not a program of its own.
    """
    steps: list[list[Any]] = [[source, False] for source in setup if source.strip()]
    for source in sources:
        if entry_point is None:
            steps.append([source, _asserts(ast.parse(source))])
        else:
            steps += _check_steps(source, entry_point, prefix)
    tables = [symtable.symtable(source, "tests", "exec") for source, _ in steps]
    for table in tables:
        tables += table.get_children()
    symbols = [symbol for table in tables for symbol in table.get_symbols() if symbol.is_global()]
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    asked = {symbol.get_name() for symbol in symbols} - bound
    defined = _defined(reference)
    names = {name for name in asked if name in defined or not hasattr(builtins, name)}
    names |= set() if entry_point is None else {entry_point}
    return {"prefix": prefix, "steps": steps, "names": sorted(names)}


def code_reward(name: str, sandbox: Sandbox) -> Reward:
    """The reward `code`, the fraction of tests passed, or `code-all`, 1 if all pass and else 0."""

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], tests: Sequence[str], **columns: Any
    ) -> list[float]:
        programs = [
            extract_code(completion_text(completion), in_block=completion_text(prompt).count("```") % 2 == 1)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        jobs = list(zip(programs, tests, strict=True))
        different = list(dict.fromkeys(jobs))
        scores = sandbox.each(lambda job: fraction_passed(sandbox, *job), different)
        found = dict(zip(different, scores, strict=True))
        return [float(found[job] == 1) if name == "code-all" else found[job] for job in jobs]

    return named(reward, name)


def fraction_passed(sandbox: Sandbox, program: str, tests: str) -> float:
    """The fraction of its tests (the `tests` column of a row) that a program passes.

    Functions share one process, so calls after an exit fail; each input/output pair is a new run. After an endless
    loop nothing more is tried.
    """
    read: dict[str, Any] = json.loads(tests)
    if not program.strip():
        return 0.0
    passed = _pairs_passed if "pairs" in read else _calls_passed
    return passed(sandbox, program, read) / _count(read)


def _pairs_passed(sandbox: Sandbox, program: str, tests: dict[str, Any]) -> int:
    passed = 0
    for given, expected in tests["pairs"]:
        result = sandbox.run(program, given.encode())
        if result.killed:
            break
        # Compare words and ignore whitespace, as contests' checkers do.
        passed += result.exit_code == 0 and result.output.split() == expected.encode().split()
    return passed


def _calls_passed(sandbox: Sandbox, program: str, tests: dict[str, Any]) -> int:
    with ExitStack() as opened:
        calls, replies = os.pipe(), os.pipe()
        with ExitStack() as ends:
            for end in (*calls, *replies):
                ends.callback(os.close, end)
            # A completion of HumanEval either continues the prompt or has all of the function.
            sources = [tests["prefix"] + program, program]
            answering = {"calls": calls[0], "replies": replies[1]}
            asking = {"calls": calls[1], "replies": replies[0]}
            served = opened.enter_context(sandbox.start("serve", fds=answering, sources=sources))
            graded = opened.enter_context(sandbox.start("grade", fds=asking, tests=tests))
        verdicts = checked(graded.wait(beside=[served])).output
        checked(served.wait(0))
    return verdicts[: _count(tests)].count(b"1")


def _count(tests: dict[str, Any]) -> int:
    return len(tests["pairs"]) if "pairs" in tests else sum(counts for _, counts in tests["steps"])


def _input_output(row: Row) -> dict[str, Any] | None:
    """Inputs, outputs and function name (APPS's keys) of a row of APPS or DeepCoder; None for other rows.

    DeepCoder's `tests` are JSON: APPS's object where they come from TACO, elsewhere a list with an object per test.
    """
    given = row.get("input_output") or row.get("tests")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            if row.get("input_output"):
                raise
    if isinstance(given, dict):
        return given
    if not (isinstance(given, list) and given and all(isinstance(test, dict) for test in given)):
        return None
    data = {"inputs": [test["input"] for test in given], "outputs": [test["output"] for test in given]}
    if given[0].get("testtype") == "functional":
        # LiveCodeBench: an argument on each line, and all of it JSON.
        metadata = row["metadata"]
        known = json.loads(metadata) if isinstance(metadata, str) else metadata
        data["inputs"] = [[json.loads(line) for line in text.splitlines()] for text in data["inputs"]]
        # In a list of one, as in APPS: otherwise a list's first element would be accepted too.
        data["outputs"] = [[json.loads(text)] for text in data["outputs"]]
        return {**data, "fn_name": known["func_name"]}
    return {**data, "fn_name": given[0].get("fn_name")}


def _apps(data: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(data["inputs"], data["outputs"], strict=True))
    function = data.get("fn_name")
    if not function:
        return {"pairs": [[_lines(given), _lines(expected)] for given, expected in pairs]}
    tests = []
    for arguments, expected in pairs:
        accepted = [expected, *expected[:1]] if isinstance(expected, list) else [expected]
        call = f"{function}({', '.join(map(repr, arguments))})"
        tests.append(f"assert listed({call}) in {accepted!r}")
    # Starter code has annotations such as List[int], without the import.
    return call_tests([_APPS_SETUP], tests, prefix="from typing import *\n")


def _lines(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text)) + "\n"


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        # A csv file holds a list as text.
        value = ast.literal_eval(value) if value.lstrip().startswith("[") else [value]
    return [str(text) for text in value]


def _reference(row: Row) -> str:
    known = next((row[name] for name in _REFERENCES if row.get(name)), "")
    if isinstance(known, str) and known.lstrip().startswith("["):
        with suppress(ValueError):
            known = json.loads(known)
    known = known[0] if isinstance(known, list) and known else known
    return known if isinstance(known, str) else ""


def _check_steps(source: str, entry_point: str, prefix: str) -> list[list[Any]]:
    """Split HumanEval's `check(candidate)` into its statements, or keep it whole if it returns.

    The tests can use what the prompt imports and defines; of the program they see `entry_point` alone.
    """
    tree = ast.parse(source)
    place, check = next(
        (place, node)
        for place, node in enumerate(tree.body)
        if isinstance(node, ast.FunctionDef) and node.name == "check"
    )
    candidate = check.args.args[0].arg
    known = prefix if _defined(prefix) else ""
    before = [
        [f"{candidate} = {entry_point}", False],
        [known, False],
        [f"{entry_point} = {candidate}", False],
    ]
    if any(isinstance(node, ast.Return) for node in ast.walk(check)):
        return [*before, [source, False], [f"check({candidate})", _asserts(check)]]
    before.append([ast.unparse(ast.Module(tree.body[:place], [])), False])
    return [*before, *([ast.unparse(node), _asserts(node)] for node in check.body)]


def _asserts(tree: ast.AST) -> bool:
    """Whether a statement tests something; many of HumanEval's tests have `assert True`."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Assert))
    return any(not (isinstance(node.test, ast.Constant) and node.test.value) for node in found)


def _defined(source: str) -> set[str]:
    """Functions and classes of a program; none if the text is not a program."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return set()
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
