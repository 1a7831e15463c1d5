from __future__ import annotations

import signal
import time

import pytest

from midtune.errors import InputError
from midtune.model.loading import load_tokenizer
from midtune.model.sources import resolve
from midtune.model.template import rendering
from midtune.rollout.speech import prompt_ids

CHAT = [{"role": "user", "content": "?"}]
LOOP = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (LOOP, "it does not end within 0.5 s"),
        ("{{ 9 ** (9 ** 9) }}", "it does not end within 0.5 s"),
        ("{{ 'x' * 10 ** 12 }}", "more memory than any conversation takes"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{% for", "'end of template'"),
        ("{{ messages.nope.nope }}", "has no attribute"),
        ("{{ raise_exception('no user') }}", "no user"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ ().__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_hostile_template_is_one_sentence_and_ends(source: str, words: str) -> None:
    tokenizer = load_tokenizer(resolve("tiny"))
    tokenizer.chat_template = source
    started = time.monotonic()
    with pytest.raises(InputError, match="chat template cannot be used") as caught, rendering(0.5):
        tokenizer.apply_chat_template(CHAT)
    assert words in str(caught.value)
    assert time.monotonic() - started < 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_prompts_are_rendered_within_limits() -> None:
    tokenizer = load_tokenizer(resolve("tiny"))
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(InputError, match=r"chat template cannot be used \(division by zero\)"):
        prompt_ids(tokenizer, CHAT)
