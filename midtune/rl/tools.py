"""Actions as tool calls: TRL's `environment_factory`, for models whose chat template knows tools.

TRL makes templates and schemas and parses calls; turns work as in any task played in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
    supports_tool_calling,
)

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.rollout.speech import chat_ids
from midtune.tasks.environment import Match, tools_of


def tools_for(name: str, make: Callable[[], Any]) -> Callable[[Policy], ToolSpeech]:
    """Make from a policy how it calls the methods of the environments that `make` constructs."""
    return lambda policy: ToolSpeech(policy, name, make())


class ToolSpeech:
    """An action is a message that calls tools, the public methods of `environment`; one without calls ends the episode.

    `name` is the environment's in messages. Raises InputError if the chat template knows no tools, or a method cannot
    be described to the model.
    """

    def __init__(self, policy: Policy, name: str, environment: Any) -> None:
        self.tokenizer = copy.deepcopy(policy.tokenizer)
        if not supports_tool_calling(self.tokenizer):
            raise InputError(
                f"the chat template of {policy.source.name} knows no tools; let the model act by text with "
                "--set task.actions=text, or take a model that was trained to call tools, such as Qwen3."
            )
        try:
            if getattr(self.tokenizer, "response_template", None) is None:
                self.tokenizer = add_response_schema(self.tokenizer)
            if not is_chat_template_prefix_preserving(self.tokenizer):
                self.tokenizer.chat_template = get_training_chat_template(self.tokenizer)
        except ValueError as error:
            raise InputError(
                f"TRL cannot read calls of tools in the chat template of {policy.source.name}: {error}; let the model "
                "act by text with --set task.actions=text."
            ) from error
        try:
            self.schemas = [get_json_schema(tool) for tool in tools_of(environment).values()]
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise InputError(
                f"a method of {name} cannot be described to the model: {error}; give its arguments types, and "
                "describe each in the docstring."
            ) from error

    def prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            raise InputError("tools are called in a chat; leave out --prompt-format plain.")
        return chat_ids(self.tokenizer, prompt, tools=self.schemas, add_generation_prompt=True)

    def answer(self, match: Match, before: list[int], action: list[int]) -> tuple[list[int] | None, float]:
        calls = parse_response(self.tokenizer, action, prefix=before, tools=self.schemas).get("tool_calls")
        said, total = [], 0.0
        for call in calls or []:
            name = call["function"]["name"]
            text, reward = match.call(name, call["function"]["arguments"])
            said.append({"role": "tool", "name": name, "content": text})
            total += reward
        return (None if match.over or not said else self._reply_ids(said, action)), total

    def _reply_ids(self, said: list[dict[str, str]], action: list[int]) -> list[int]:
        """The template's text after a message with calls, without the end token that the policy drew."""
        call = {"type": "function", "function": {"name": said[0]["name"], "arguments": {}}}
        begun: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        before = chat_ids(self.tokenizer, begun)
        end = self.tokenizer.eos_token_id
        # Some templates put a line break after the end token; it belongs to the reply.
        if end in before:
            before = before[: len(before) - before[::-1].index(end)]
        reply = chat_ids(self.tokenizer, [*begun, *said], add_generation_prompt=True)[len(before) :]
        return reply if action[-1] == end or end not in before else [end, *reply]
