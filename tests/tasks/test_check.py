"""What is found in rewards before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.tasks import Reward, Task, check_reward
from midtune.tasks.rewards import built_in
from midtune.tasks.sources.own import load_reward

ROWS = [{"prompt": "p", "question": f"q{n}", "answer": str(n), "level": n} for n in range(1, 7)]


def own(folder: Path, code: str, function: str = "f") -> Reward:
    (folder / "own.py").write_text(code)
    return load_reward(f"{folder / 'own.py'}:{function}")[0]


def task(reward: Reward) -> Task:
    return Task("mine", "0" * 16, ROWS, ROWS, reward, reward, own_reward=True)


@pytest.mark.parametrize(
    "code",
    [
        "def f(completions, level): return [1.0 * (n > 2) for n in level]",
        "def f(prompts, completions, **columns): return [True for _ in columns['trainer_state'].__class__ and prompts]",
        "async def f(completions, log_metric):\n    log_metric('x', 1)\n    return [None for _ in completions]",
        "import numpy\ndef f(completions): return numpy.ones(len(completions), dtype='float32')",
        "f = lambda completions, completion_ids: [len(i) for i in completion_ids]",
    ],
)
def test_ones_own_reward_gets_the_arguments_it_takes(tmp_path: Path, code: str) -> None:
    reward = own(tmp_path, code)
    assert reward.__name__ == "f"
    check_reward(task(reward))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def f(completions): return [c['x'] for c in completions]",
            r"`f` of `mine` raised TypeError: .*'q1'",
        ),
        ("def f(completions): return [1.0]", "returned 1 values for 4 completions"),
        ("def f(completions): return 1.0", "returned '1.0', but it must return a list"),
        (
            "def f(completions): return ['1' for _ in completions]",
            "returned '1' for the completion '1' on row",
        ),
        ("def f(completions): return [float('nan') for _ in completions]", "returned 'nan' .* finite"),
        (
            "def f(completions, other): return [1 for _ in completions]",
            "`f` asks for `other`, which is no column of",
        ),
    ],
)
def test_check_reward_shows_what_is_wrong(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_reward(task(own(tmp_path, code)))


def test_check_reward_rejects_a_built_in_reward_that_never_pays() -> None:
    rows = [{**row, "answer": "not a number"} for row in ROWS]
    numeric = built_in("numeric")
    with pytest.raises(InputError, match="`numeric` gives right answers of `mine` no more than wrong ones"):
        check_reward(Task("mine", "0" * 16, rows, rows, numeric, numeric))
