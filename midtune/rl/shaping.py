"""TRL's rewards that shape completions, whatever their answers, for text and chats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from midtune.tasks.rewards import Reward, completion_text, named

# The last 4,096 of DAPO's 20,480 tokens (arXiv 2503.14476, 3.4).
_PUNISHED_SHARE = 0.2
_ANSWER = re.compile(r"\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)


def shaping_reward(name: str, max_new_tokens: int, *, thinking: bool = False) -> Reward:
    """The reward `format`, `length` or `repetition`.

    - `format`: 1 for `<think>…</think>` and then one `<answer>…</answer>`, else 0; if the prompt already ends with
      `<think>` (`thinking`), the completion continues from there.
    - `length`: 0, falling to -1 over the last fifth of `max_new_tokens` (DAPO's soft overlong punishment).
    - `repetition`: minus the share of repeated 3-grams of tokens.
    """
    if name == "format":
        return named(_format("<think>" if thinking else ""), name)
    if name == "length":
        cache = max(1, round(max_new_tokens * _PUNISHED_SHARE))
        return named(get_soft_overlong_punishment(max_new_tokens, cache), name)
    return named(get_repetition_penalty_reward(ngram_size=3), name)


def _format(begun: str) -> Reward:
    def score(completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [begun + completion_text(completion).lstrip() for completion in completions]
        thought = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
        ends = [text.partition("</think>")[2] for text in texts]
        return [
            float(thinks and _ANSWER.fullmatch(end) is not None)
            for thinks, end in zip(thought, ends, strict=True)
        ]

    return score
