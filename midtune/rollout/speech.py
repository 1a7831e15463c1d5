"""Convert between the policy and an environment: tokens to an action, an answer to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from midtune.model.policy import Policy
from midtune.model.template import rendering
from midtune.tasks.answers import after_thinking
from midtune.tasks.environment import Match

_MARK = "midtune-acts-here"


class Speech(Protocol):
    """How actions and answers are written."""

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Token ids of an episode's start, up to the policy's first action."""

    def answer(self, match: Match, before: list[int], action: list[int]) -> tuple[list[int] | None, float]:
        """Pass the policy's action to the environment; `before` are all tokens before the action.

        Returns the tokens between this action and the next, None if the episode is over; and the reward.
        """


class Text:
    """An action is the policy's text; the environment answers as the user of a chat, or in the same text.

    Reasoning that ends with `</think>` is not part of an action, which ends before the first of `stop_strings`. Without
    a `chat`, an answer continues the action's text.
    """

    def __init__(self, policy: Policy, stop_strings: Sequence[str], *, chat: bool) -> None:
        self.tokenizer = policy.tokenizer
        self.stop_ids = policy.stop_token_ids
        self.stop_strings = stop_strings
        self.chat = chat

    def prompt_ids(self, prompt: Any) -> list[int]:
        return prompt_ids(self.tokenizer, prompt)

    def answer(self, match: Match, before: list[int], action: list[int]) -> tuple[list[int] | None, float]:
        text: str = self.tokenizer.decode(action, skip_special_tokens=True)
        for stop in self.stop_strings:
            text = text.partition(stop)[0]
        shown, reward = match.step(after_thinking(text).strip())
        return (None if match.over else self.reply_ids(shown, action)), reward

    def reply_ids(self, text: str, action: list[int]) -> list[int]:
        """The tokens that append `text` to an action, without repeating what ended the action."""
        if not self.chat:
            said = self.tokenizer.decode(action, skip_special_tokens=True)
            return self._tokens(text if said.endswith("\n") else f"\n{text}")
        turns = [("user", "?"), ("assistant", _MARK), ("user", text)]
        chat = [{"role": role, "content": content} for role, content in turns]
        with rendering():
            whole = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = self._tokens(whole.partition(_MARK)[2])
        return ids[1:] if action[-1] in self.stop_ids and ids[:1] == action[-1:] else ids

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Tokenize a prompt as TRL does: a text as it is, a chat up to where the answer begins; tokens stay as they are."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if prompt and isinstance(prompt[0], int):
        return list(prompt)
    return chat_ids(tokenizer, prompt, add_generation_prompt=True)


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]], **arguments: Any) -> list[int]:
    """Chat messages as token ids; `arguments` go to `apply_chat_template`."""
    with rendering():
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **arguments
        )["input_ids"]
    return ids
