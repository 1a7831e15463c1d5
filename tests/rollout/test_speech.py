"""Prompts, actions and answers as tokens."""

from __future__ import annotations

from collections.abc import Callable

from midtune.model.policy import Policy
from midtune.rollout.speech import Text, prompt_ids

Load = Callable[..., Policy]


def test_a_text_prompt_gets_no_chat_template(load: Load) -> None:
    policy = load("qwen3", "none")
    chat = prompt_ids(policy.tokenizer, [{"role": "user", "content": "ab"}])
    assert policy.tokenizer.decode(chat) == "ab>"
    assert policy.tokenizer.decode(prompt_ids(policy.tokenizer, "ab")) == "ab"


def test_a_user_answers_in_a_chat(load: Load) -> None:
    policy = load("qwen3", "none")
    tokenizer = policy.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    speech = Text(policy, (), chat=True)
    action = tokenizer("left", add_special_tokens=False)["input_ids"]
    ended = [*action, tokenizer.eos_token_id]
    expected = "<s>user: a wall</s><s>assistant: "
    assert tokenizer.decode(speech.reply_ids("a wall", ended)) == expected
    assert tokenizer.decode(speech.reply_ids("a wall", action)) == "</s>" + expected


def test_text_goes_on_in_a_new_line(load: Load) -> None:
    policy = load("qwen3", "none")
    speech = Text(policy, (), chat=False)
    for action, expected in (("left", "\na wall"), ("left\n", "a wall")):
        ids = policy.tokenizer(action)["input_ids"]
        assert policy.tokenizer.decode(speech.reply_ids("a wall", ids)) == expected
