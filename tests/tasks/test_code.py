from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward
from midtune.tasks.code import call_tests, code_reward, code_row, extract_code, fraction_passed
from midtune.tasks.sandbox.sandbox import Result, Sandbox
from midtune.tasks.sources.files import BadRow
from tests.tasks import toy_data
from tests.tasks.conftest import LIMITS

MBPP = {
    "task_id": 1,
    "text": "Write a function to double a number.",
    "code": "def double(n):\n    return 2 * n",
    "test_list": ["assert double(2) == 4", "assert double(-3) == -6", "assert double(1.5) == 3"],
    "test_setup_code": "",
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef halve(x):\n    return x / 2\n\ndef double(x: float) -> float:\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert True\n"
    "    for i in range(4):\n        assert math.isclose(halve(candidate(i)), i)\n",
    "entry_point": "double",
}
APPS = {
    "question": "Add two numbers.",
    "solutions": json.dumps(["print(int(input()) + int(input()))"]),
    "input_output": json.dumps({"inputs": ["1\n2\n", "3\n4\n"], "outputs": ["3\n", "7"]}),
}
APPS_CALL = {
    "question": "Add two numbers.",
    "starter_code": "class Solution:\n    def add(self, a, b):",
    "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [1, 2]]}),
}

# Rows of agentica-org/DeepCoder-Preview-Dataset, in the forms of its configurations.
TACO = {
    "problem": "Add two numbers.",
    "solutions": ["```python\nprint(int(input()) + int(input()))\n```"],
    "tests": APPS["input_output"],
}
TACO_CALL = {
    "problem": "Add two numbers.",
    "solutions": ["def add(a, b): return a + b"],
    "tests": json.dumps({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [[1, 2]]]}),
}
PRIME = {
    "problem": "Add two numbers.",
    "solutions": ["print(int(input()) + int(input()))"],
    "tests": json.dumps(
        [
            {"type": "stdin_stdout", "input": "1\n2\n", "output": "3\n", "fn_name": None},
            {"type": "stdin_stdout", "input": "3\n4\n", "output": "7\n", "fn_name": None},
        ]
    ),
}
PRIME_CALL = {
    "problem": "Add two numbers.",
    "tests": json.dumps(
        [
            {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3},
            {"type": "function_call", "fn_name": "add", "input": [[1], [2]], "output": [[1, 2]]},
        ]
    ),
}
LIVE = {
    "problem": "Add two numbers.",
    "starter_code": "",
    "metadata": {"func_name": None},
    "tests": json.dumps(
        [
            {"input": "1\n2\n", "output": "3\n", "testtype": "stdin"},
            {"input": "3\n4\n", "output": "7\n", "testtype": "stdin"},
        ]
    ),
}
LIVE_CALL = {
    "problem": "Join two lists.",
    "starter_code": "class Solution:\n    def join(self, a: List[int], b: List[int]) -> List[int]:",
    "metadata": {"func_name": "join"},
    "tests": json.dumps(
        [
            {"input": "[4]\n[10, 2]", "output": "[4, 10, 2]", "testtype": "functional"},
            {"input": "[]\n[]", "output": "[]", "testtype": "functional"},
            {"input": "[0]\n[]", "output": "[0]", "testtype": "functional"},
        ]
    ),
}


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\na\n```\nbetter:\n```py\nb\n```", "b\n"),
        ("```python\ncut = o", "cut = o"),
        ("    return 1\n", "    return 1\n"),
        ("hm\n```\na\n```\n</think>\nb", "\nb"),
        ("    return 1\n```", "    return 1\n"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_fenced_block_or_all(completion: str, program: str) -> None:
    assert extract_code(completion) == program


def test_within_a_block_the_program_ends_with_it() -> None:
    assert extract_code("    return 1\n```\nand\n```python\nx\n```", in_block=True) == "    return 1\n"


def test_of_mbpp_the_prompt_shows_the_first_test_alone() -> None:
    row = code_row(MBPP, "prompt")
    assert set(row) == {"prompt", "answer", "tests"}
    assert row["prompt"] == f"{MBPP['text']}\n\nThe program must pass tests such as:\n\nassert double(2) == 4"
    tests = json.loads(row["tests"])
    assert tests["names"] == ["double"]
    assert tests["steps"] == [[source, True] for source in MBPP["test_list"]]
    assert code_row({**MBPP, "test_list": repr(MBPP["test_list"])}, "prompt") == row


def test_of_humaneval_each_statement_is_a_test_and_helpers_are_the_prompts_own() -> None:
    row = code_row(HUMAN_EVAL, "prompt")
    tests = json.loads(row["tests"])
    assert tests["names"] == ["double"]
    assert tests["prefix"] == HUMAN_EVAL["prompt"]
    assert [counts for _, counts in tests["steps"]] == [False] * 4 + [True, False, True]
    assert row["answer"] == HUMAN_EVAL["prompt"] + "    return 2 * x\n"


def test_a_check_that_returns_is_one_test() -> None:
    source = "def check(f):\n    if f(1) == 2: return\n    assert f(1) == 3"
    steps = call_tests([], [source], entry_point="g")["steps"]
    assert [counts for _, counts in steps] == [False] * 4 + [True]
    assert steps[-1] == ["check(f)", True]


def test_functions_of_a_built_ins_name_are_the_programs_where_the_reference_has_them() -> None:
    tests = ["assert sum(1, 2) == max(3, 3)"]
    assert call_tests([], tests)["names"] == []
    assert call_tests([], tests, "def sum(a, b): return a + b")["names"] == ["sum"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "has no prompt in column `prompt`"),
        ({"test_list": []}, "has no tests; the reward `code` needs `test_list`"),
        ({"test_list": ["assert ("]}, "has tests that cannot be read"),
        ({"test_list": ["double(2)", "assert True"]}, "has tests that test nothing"),
        ({"test_list": None, "input_output": "{"}, "has tests that cannot be read"),
        (
            {"test_list": None, "input_output": '{"inputs": [], "outputs": []}'},
            "has tests that test nothing",
        ),
        ({"test_list": None, "test": "assert 1", "entry_point": "f"}, "has tests that cannot be read"),
    ],
)
def test_a_row_without_tests_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=f"^{message}"):
        code_row({**MBPP, **change}, "prompt")


def test_of_deepcoder_each_configuration_is_read() -> None:
    pairs = [["1\n2\n", "3\n"], ["3\n4\n", "7\n"]]
    for row in (PRIME, LIVE):
        assert json.loads(code_row(row, "problem")["tests"]) == {"pairs": pairs}
    assert code_row(TACO, "prompt")["answer"] == TACO["solutions"][0]
    live = code_row({**LIVE_CALL, "metadata": json.dumps(LIVE_CALL["metadata"])}, "problem")
    assert live["prompt"] == f"Join two lists.\n\n```python\n{LIVE_CALL['starter_code']}\n```"
    assert json.loads(live["tests"])["names"] == ["join"]
    assert json.loads(live["tests"])["steps"][1] == [
        "assert listed(join([4], [10, 2])) in [[[4, 10, 2]], [4, 10, 2]]",
        True,
    ]
    as_columns = {**PRIME, "tests": json.loads(PRIME["tests"])}
    assert code_row(as_columns, "problem")["tests"] == code_row(PRIME, "problem")["tests"]
    with pytest.raises(BadRow, match="has tests that cannot be read"):
        code_row({**LIVE_CALL, "metadata": None}, "problem")


DOUBLE = "def double(n): return 2 * n"
ADD = "class Solution:\n    def add(self, a, b): return a + b"

# As models write it: the annotations' names are at hand where the problem came from.
JOIN = "class Solution:\n    def join(self, a: List[int], b: List[int]) -> List[int]: return a + b"


@pytest.mark.parametrize(
    ("row", "program", "expected"),
    [
        (MBPP, DOUBLE, 1.0),
        (MBPP, "def double(n): return 2 * abs(n)", 2 / 3),
        (MBPP, "def double(n): return n + n if n != 2 else exit()", 2 / 3),
        (MBPP, "import os\ndef double(n): return n + n if n != -3 else os._exit(0)", 1 / 3),
        (MBPP, "double = 2 *", 0.0),
        (MBPP, "", 0.0),
        (HUMAN_EVAL, "    return 2 * x\n", 1.0),
        (HUMAN_EVAL, "def double(y):\n    return y + y", 1.0),
        (HUMAN_EVAL, "    return 4\n", 0.5),
        # The test's own helper is not the program's.
        (HUMAN_EVAL, "def halve(x): return 4\ndef double(x): return 4", 0.5),
        (APPS, "print(int(input()) + int(input()))", 1.0),
        (APPS, "print(3)", 0.5),
        (APPS, "print(int(input()) + int(input())); 1 / 0", 0.0),
        (APPS_CALL, ADD, 1.0),
        (APPS_CALL, "def add(a, b): return [a + b]", 0.5),
        (TACO, "print(int(input()) + int(input()))", 1.0),
        (TACO_CALL, ADD, 1.0),
        (PRIME, "print(int(input()) + int(input()))", 1.0),
        (PRIME, "print(7)", 0.5),
        (PRIME_CALL, "def add(a, b): return a + b", 1.0),
        (LIVE, "print(int(input()) + int(input()))", 1.0),
        (LIVE_CALL, JOIN, 1.0),
        (LIVE_CALL, "class Solution:\n    def join(self, a, b): return 0", 0.0),
    ],
)
def test_the_fraction_of_tests_passed(
    sandbox: Sandbox, row: dict[str, Any], program: str, expected: float
) -> None:
    assert fraction_passed(sandbox, program, code_row(row, "prompt")["tests"]) == expected


@pytest.mark.parametrize(
    ("program", "test", "expected"),
    [
        ("def f(x): return (x, [x], {x: {x}})", "assert f(1) == (1, [1], {1: {1}})", 1.0),
        ("def f(x): return [x]", "assert f(1) == (1,)", 0.0),
        ("def f(x): return float('inf')", "assert f(1) == float('inf')", 1.0),
        ("def f(x): raise KeyError", "try: f(1)\nexcept KeyError: pass\nelse: assert False", 1.0),
        ("def f(x): raise SystemExit", "try: f(1)\nexcept SystemExit: assert 1 == 1", 0.0),
        ("def f(x): return range(x)", "assert set(f(3)) == {0, 1, 2}", 1.0),
        ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3", 1.0),
        ("class P(complex): pass\nclass Q: x = 1\ndef f(q): return q.x", "assert f(Q()) == 1 == P(1)", 1.0),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\nf = P", "assert f(1) != 1", 1.0),
        ("def f(x):\n  print('noise' * 1000)\n  return x", "assert f(1) == 1", 1.0),
        ("def f(x, *, key): return x + key", "assert f(1, key=2) == 3", 1.0),
    ],
)  # fmt: skip
def test_values_pass_between_program_and_tests(
    sandbox: Sandbox, program: str, test: str, expected: float
) -> None:
    assert fraction_passed(sandbox, program, json.dumps(call_tests([], [test]))) == expected


FORGERIES = {
    "prints the result and ends well": "print(4, -6, 3.0)\nraise SystemExit(0)",
    "prints the result and ends at once": "import os\ndef double(n):\n    print('111')\n    os._exit(0)",
    "equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = int.__hash__\ndef double(n): return Any(7)"
    ),
    "is an object that equals everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
        "double = lambda n: Any()"
    ),
    "patches the built-ins": (
        "import builtins, sys\nbuiltins.AssertionError = builtins.exec = builtins.compile = lambda *a, **k: True\n"
        "def double(n): raise AssertionError"
    ),
    "patches what serves it": (
        "import sys\nspace = sys._getframe(2).f_globals\n"
        "space['encode'] = lambda value, keep: '(True, True)'\nspace['grade'] = lambda job: None\n"
        "def double(n): return n"
    ),
    "writes verdicts to every channel": (
        "import os\nfor fd in range(32):\n    try: os.write(fd, b'1' * 64)\n    except OSError: pass\n"
        "def double(n): return n"
    ),
    "answers before it is asked": (
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'(True, True)\\n' * 9)\n    except OSError: pass\n"
        "def double(n): return n"
    ),
    "answers without end": "import os\ndef double(n):\n    while True: os.write(5, b'1' * 4096)",
    "looks for the tests": (
        "import gc, sys\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'steps' in o]\n"
        "def double(n): return found[0]"
    ),
    "traces what is above it": (
        "import sys\ndef double(n):\n    sys._getframe(1).f_locals['reply'] = '(True, 4)'\n    return n"
    ),
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_pass_cannot_be_forged(isolated: Sandbox, program: str) -> None:
    assert fraction_passed(isolated, program, code_row(MBPP, "prompt")["tests"]) == 0.0


def test_output_is_compared_outside(isolated: Sandbox) -> None:
    tests = code_row(APPS, "prompt")["tests"]
    search = "import os\nfor folder, _, names in os.walk('/tmp'): print(folder, names)\nos._exit(0)"
    assert fraction_passed(isolated, search, tests) == 0.0
    assert fraction_passed(isolated, "print(3); print(7)", tests) == 0.0


def test_an_endless_loop_is_waited_for_once(sandbox: Sandbox) -> None:
    pairs = [["go", "gone"], ["stop", "gone"], *([["go", "gone"]] * 50)]
    program = "import time\nif input() == 'stop': time.sleep(60)\nprint('gone')"
    hasty = replace(sandbox, limits=sandbox.limits.model_copy(update={"wall_s": 2.0}))
    start = time.monotonic()
    assert fraction_passed(hasty, program, json.dumps({"pairs": pairs})) == 1 / 52
    assert time.monotonic() - start < 4


def test_the_reward_runs_different_programs_once_and_keeps_their_order() -> None:
    class Counting(Sandbox):
        def run(self, source: str, stdin: bytes = b"") -> Result:
            ran.append(source)
            return Result(source.strip().encode(), 0, "")

    ran: list[str] = []
    sandbox = Counting(LIMITS, (), workers=1)
    texts = ["7", "3", "7", "```\n5\n```"]
    tests = [json.dumps({"pairs": [["", "7"], ["", text[:1]]]}) for text in "7375"]
    columns = {"prompts": ["p"] * 4, "tests": tests, "answer": [""] * 4}
    assert code_reward("code", sandbox)(completions=texts, **columns) == [1.0, 0.5, 1.0, 0.5]
    assert sorted(ran) == ["3", "3", "5\n", "5\n", "7", "7"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert code_reward("code-all", sandbox)(completions=messages, **columns) == [1.0, 0.0, 1.0, 0.0]


def load(path: Path, sandbox: Sandbox) -> Task:
    return toy_data.load(path, reward=["code"], train_size=9, eval_size=2, sandbox=sandbox)


def test_a_file_of_problems_becomes_a_task(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "mbpp.jsonl"
    rows = [{**MBPP, "text": f"Problem {n}"} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load(path, sandbox)
    assert set(task.train[0]) == {"prompt", "question", "answer", "tests", "row"}
    assert task.reward.__name__ == "code"
    check_reward(task)
    right = f"```python\n{MBPP['code']}\n```"
    columns = {"prompts": ["p", "p"], "completions": [right, right.replace("2 * n", "n * n")]}
    tests = [task.train[0]["tests"]] * 2
    assert task.reward(**columns, tests=tests) == [1.0, 1 / 3]
    assert task.score(**columns, tests=tests) == [1.0, 0.0]
    rows[3]["test_list"] = []
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="line 4 of .* has no tests"):
        load(path, sandbox)


def test_tests_that_reject_right_programs_are_found(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    rows = [{**MBPP, "text": f"Problem {n}", "test_list": ["assert double(2) == 5"]} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="gives right answers of .* no more than wrong ones"):
        check_reward(load(path, sandbox))


def test_a_task_without_tests_has_no_reward_code(sandbox: Sandbox) -> None:
    with pytest.raises(
        InputError, match="the reward `code` needs tests, which reasoning-gym:chain_sum does not"
    ):
        load(Path("reasoning-gym:chain_sum"), sandbox)


def test_weak_isolation_is_said_with_the_task(sandbox: Sandbox, tmp_path: Path) -> None:
    weak = Sandbox(sandbox.limits, ())
    note = load(Path("tiny-programs"), weak).note
    assert note is not None
    assert "weak isolation" in note
