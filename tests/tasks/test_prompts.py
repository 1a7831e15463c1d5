from __future__ import annotations

from typing import Any

import pytest

from midtune.config import TaskConfig
from midtune.tasks.prompts import BOXED, THINK, prompted

CHAT = [{"role": "system", "content": "old"}, {"role": "user", "content": r"What is {x} in \boxed{}?"}]
QUESTION = CHAT[1]["content"]


@pytest.mark.parametrize(
    ("template", "system_prompt", "expected"),
    [
        ("none", None, CHAT),
        ("none", "new", [{"role": "system", "content": "new"}, CHAT[1]]),
        ("boxed", None, [{"role": "system", "content": BOXED}, CHAT[1]]),
        ("boxed", "new", [{"role": "system", "content": "new"}, CHAT[1]]),
        ("r1", None, [{"role": "system", "content": THINK}, CHAT[1]]),
        ("question", None, [CHAT[0], {"role": "user", "content": f"Question: {QUESTION}\nAnswer:"}]),
    ],
)
def test_chats(template: Any, system_prompt: str | None, expected: Any) -> None:
    row = {"prompt": CHAT, "question": QUESTION}
    found = prompted(row, TaskConfig(template=template, system_prompt=system_prompt))
    assert found == {"prompt": expected, "question": QUESTION}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("none", QUESTION),
        ("boxed", f"{QUESTION}\n{BOXED}\n"),
        ("r1", f"{THINK}\nUser: {QUESTION}\nAssistant:"),
        ("question", f"Question: {QUESTION}\nAnswer:"),
    ],
)
def test_plain_text(template: Any, expected: str) -> None:
    row = {"prompt": CHAT[1:], "question": QUESTION}
    plain = prompted(row, TaskConfig(template=template, prompt_format="plain"))
    assert plain["prompt"] == expected
    settings = TaskConfig(template=template, prompt_format="plain", system_prompt="1 + 1 is 2.")
    shots = prompted(row, settings)
    assert shots["prompt"] == f"1 + 1 is 2.\n{expected}"


def test_the_boxed_template_is_that_of_qwen_math() -> None:
    assert BOXED == r"Please reason step by step, and put your final answer within \boxed{}."
