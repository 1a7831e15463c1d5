"""The task that a configuration names, read without a model: nothing here imports torch until it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from midtune.config import RunConfig, require_task
from midtune.tasks import Reward, Task, load_task, open_sandbox


def read_task(config: RunConfig, *, more: int = 0, thinking: Callable[[], bool] | None = None) -> Task:
    """The task, its rewards not tried yet.

    Args:
        more: training problems beyond those that a run uses.
        thinking: whether the model's chat template ends prompts within `<think>`; None: it does not.
    """
    settings = config.task

    def shaping(name: str) -> Reward:
        from midtune.rl.shaping import shaping_reward  # with TRL, which few tasks need

        # Only `format` needs it, and it takes the model's tokenizer.
        asked = thinking if name == "format" and settings.prompt_format == "chat" else None
        return shaping_reward(name, config.training.max_new_tokens, thinking=asked is not None and asked())

    def tools(name: str, make: Callable[[], Any]) -> Callable[[Any], Any]:
        from midtune.rl.tools import tools_for

        return tools_for(name, make)

    # More than a run can use would only cost time: some generators take seconds a problem.
    most = max(config.training.steps * config.training.prompts_per_step, 64) + more
    return load_task(
        require_task(config),
        settings.model_copy(update={"train_size": min(settings.train_size, most)}),
        config.seed,
        sandbox=partial(open_sandbox, config.sandbox),
        shaping=shaping,
        tools=tools if settings.actions == "tools" else None,
    )
