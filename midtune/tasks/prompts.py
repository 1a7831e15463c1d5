"""Put questions to a model: the usual templates, as a chat or as plain text."""

from __future__ import annotations

from dataclasses import dataclass

from midtune.config import TaskConfig
from midtune.tasks.split import Row

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
# DeepSeek-R1, arXiv 2501.12948, table 1.
THINK = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
_HERE = "{question}"


@dataclass(frozen=True)
class Template:
    """A system message for chats, the user's message, and both as plain text; `{question}` marks its place."""

    system: str | None
    user: str
    plain: str


TEMPLATES = {
    "none": Template(None, _HERE, _HERE),
    "boxed": Template(BOXED, _HERE, f"{_HERE}\n{BOXED}\n"),
    "r1": Template(THINK, _HERE, f"{THINK}\nUser: {_HERE}\nAssistant:"),
    "question": Template(None, f"Question: {_HERE}\nAnswer:", f"Question: {_HERE}\nAnswer:"),
}


def prompted(row: Row, settings: TaskConfig) -> Row:
    """Apply the template, system prompt and format of the settings to a row's chat messages."""
    messages = row["prompt"]
    is_chat = settings.prompt_format == "chat"
    template = TEMPLATES[settings.template]
    system = settings.system_prompt or (template.system if is_chat else None)
    if system is not None:
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system}, *others]
    text = template.user if is_chat else template.plain
    *before, last = messages
    messages = [*before, {**last, "content": text.replace(_HERE, last["content"])}]
    return {**row, "prompt": messages if is_chat else "\n".join(message["content"] for message in messages)}
