import threading
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward
from midtune.tasks.own import load_reward
from midtune.tasks.rewards import Reward, built_in, default_reward, named, parts_of
from midtune.tasks.task import load_task

ROWS = [{"prompt": "p", "question": f"q{n}", "answer": str(n), "level": n} for n in range(1, 7)]


def score(name: str, text: str, answer: str) -> float:
    return built_in(name)(prompts=["p"], completions=[text], answer=[answer], trainer_state=None)[0]


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        ("exact", "I say\n  PARIS ", "Paris", 1.0),
        ("exact", "Paris, I say", "Paris", 0.0),
        ("exact", "it is 1,234", "1234", 1.0),
        ("exact", "", "Paris", 0.0),
        ("numeric", "= -5", "-5", 1.0),
        ("numeric", "3-5", "-5", 0.0),
        ("numeric", r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("numeric", "12 #### 7", "She has 3 + 4. #### 7", 1.0),
        ("numeric", "", "0", 0.0),
        ("math", r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        ("math", r"so $x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("math", "<answer>0.5</answer>", "1/2", 1.0),
        ("math", r"\boxed{3}", "1/2", 0.0),
        ("math", r"\boxed{9^{9^{9^9}}}", "1/2", 0.0),
        ("math", r"\boxed{\frac{", "1/2", 0.0),
        ("math", "", "1/2", 0.0),
        # Generation began within <think>, which names another answer first.
        ("math", "is it \\boxed{3}? no\n</think>\nIt is $\\frac{1}{2}$.", "1/2", 1.0),
        ("math", "it is \\boxed{\\frac{1}{2}}\n</think>\nIt is 3.", "1/2", 0.0),
        ("exact", "Rome\n</think>\nParis", "Paris", 1.0),
    ],
)
def test_built_in_rewards(name: str, text: str, answer: str, expected: float) -> None:
    assert score(name, text, answer) == expected


def test_math_works_outside_the_main_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(score("math", r"\boxed{0.75}", r"\frac{3}{4}")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_the_default_reward_is_numeric_only_if_all_answers_are_numbers() -> None:
    assert default_reward(["1", "-2.5", "so #### 3"]) == "numeric"
    assert default_reward(["1", "two"]) == "exact"
    assert default_reward(["1", r"x = \boxed{\sqrt{2}}"]) == "math"


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


def test_files_and_functions_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.py does not exist"):
        load_reward(f"{tmp_path / 'none.py'}:f")
    with pytest.raises(InputError, match="no function `g`; its functions are `f`, `h`: "):
        own(tmp_path, "from os import getcwd\ndef f(): ...\ndef h(): ...\ndef _i(): ...", "g")
    with pytest.raises(
        InputError, match=r"does not import \(ModuleNotFoundError: No module named 'nowhere'\)"
    ):
        own(tmp_path, "import nowhere")
    with pytest.raises(InputError, match=r"does not import \(SyntaxError"):
        own(tmp_path, "def f(:")


def test_ones_own_reward_is_also_the_score_and_needs_no_answers(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(completions, topic): return [len(t) for t in topic]")
    (tmp_path / "data.csv").write_text("prompt,topic\n" + "".join(f"p{n},t\n" for n in range(6)))
    settings: dict[str, Any] = {"args": {}, "prompt_column": "prompt", "answer_column": "answer", "seed": 0}
    settings |= {"system_prompt": None, "train_size": 9, "eval_size": 2}
    mine = load_task(str(tmp_path / "data.csv"), reward=f"{tmp_path / 'own.py'}:f", **settings)
    assert mine.reward is mine.score
    assert mine.own_reward
    check_reward(mine)
    with pytest.raises(InputError, match="`verifier` exists for reasoning-gym tasks and task files"):
        load_task(str(tmp_path / "data.csv"), reward="verifier", **settings | {"answer_column": "topic"})
    with pytest.raises(
        InputError,
        match="no reward `f1`; the rewards are exact, numeric, math, verifier, code, code-all, format,",
    ):
        load_task(str(tmp_path / "data.csv"), reward="f1", **settings)


def test_rewards_add_up_by_weights_and_the_score_is_that_of_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\n" + "".join(f"p{n},{n}\n" for n in range(6)))
    settings: dict[str, Any] = {"args": {}, "seed": 0, "train_size": 9, "eval_size": 2}

    def shaping(name: str) -> Reward:
        return named(lambda completions, **_: [None if not c else -1.0 * len(c) for c in completions], name)

    both = load_task(str(path), reward=["length=0.5", "numeric=3"], shaping=shaping, **settings)
    columns = {"prompts": ["?"] * 3, "completions": ["12", "7", ""], "answer": ["12", "12", "12"]}
    assert both.reward(**columns) == [0.5 * -2 + 3, -0.5, 0.0]
    assert both.score(**columns) == [1.0, 0.0, 0.0]
    assert both.reward.__name__ == "length+numeric"
    rewards, weights = parts_of(both.reward)
    assert ([reward.__name__ for reward in rewards], weights) == (["length", "numeric"], [0.5, 3.0])
    check_reward(both)
    alone = load_task(str(path), reward="numeric", **settings)
    assert parts_of(alone.reward) == ([alone.reward], [1.0])
    lighter = load_task(str(path), reward=["length=0.4", "numeric=3"], shaping=shaping, **settings)
    assert len({alone.fingerprint, both.fingerprint, lighter.fingerprint}) == 3
    with pytest.raises(InputError, match="length shapes completions but judges no answers"):
        load_task(str(path), reward=["length"], shaping=shaping, **settings)
    with pytest.raises(InputError, match="asked for twice"):
        load_task(str(path), reward=["math", "math=2"], **settings)
