"""How a question is put to a model: the usual templates, as a chat or as plain text."""

from __future__ import annotations

from dataclasses import dataclass

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
    """A system message for chats, what a user says, and the same as plain text; `{question}` marks its place."""

    system: str | None
    user: str
    plain: str


TEMPLATES = {
    "boxed": Template(BOXED, _HERE, f"{_HERE}\n{BOXED}\n"),
    "r1": Template(THINK, _HERE, f"{THINK}\nUser: {_HERE}\nAssistant:"),
    "question": Template(None, f"Question: {_HERE}\nAnswer:", f"Question: {_HERE}\nAnswer:"),
}


def prompted(row: Row, *, template: str | None, system_prompt: str | None, prompt_format: str) -> Row:
    """The row with its messages as a prompt: chat messages, or a text where the format is `plain`.

    Args:
        row: `prompt` has chat messages.
        template: a name in `TEMPLATES`, or None to leave messages as they are; their last one is the question.
        system_prompt: the system message in place of a prompt's or the template's own.
        prompt_format: `chat` or `plain`.
    """
    messages = row["prompt"]
    chosen = TEMPLATES[template] if template is not None else None
    system = system_prompt or (chosen.system if chosen is not None and prompt_format == "chat" else None)
    if system is not None:
        messages = [message for message in messages if message["role"] != "system"]
    if chosen is not None:
        text = chosen.user if prompt_format == "chat" else chosen.plain
        *before, last = messages
        messages = [*before, {**last, "content": text.replace(_HERE, last["content"])}]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    if prompt_format == "plain":
        return {**row, "prompt": "\n".join(message["content"] for message in messages)}
    return {**row, "prompt": messages}
