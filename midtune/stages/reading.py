"""The task that a configuration names, read without a model: nothing here imports torch until it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from midtune.config import RunConfig, require_task
from midtune.tasks import Limits, Reward, Task, load_task, open_sandbox


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

    return load_task(
        require_task(config),
        args=settings.args,
        reward=settings.reward,
        prompt_column=settings.prompt_column,
        answer_column=settings.answer_column,
        system_prompt=settings.system_prompt,
        template=None if settings.template == "none" else settings.template,
        eval_file=settings.eval_file,
        bad_rows=settings.bad_rows,
        last_turn=settings.last_turn,
        prompt_format=settings.prompt_format,
        # More than a run can use would only cost time: some generators take seconds a problem.
        train_size=min(
            settings.train_size, max(config.training.steps * config.training.prompts_per_step, 64) + more
        ),
        eval_size=settings.eval_size,
        seed=config.seed,
        sandbox=partial(
            open_sandbox,
            Limits(
                cpu_s=config.sandbox.cpu_s,
                wall_s=config.sandbox.wall_s,
                memory_bytes=config.sandbox.memory_mib * 2**20,
                processes=config.sandbox.processes,
            ),
            workers=config.sandbox.workers,
            allow_weak=config.sandbox.allow_weak,
        ),
        shaping=shaping,
        max_turns=settings.max_turns,
        turn_tokens=settings.turn_tokens,
        tools=tools if settings.actions == "tools" else None,
    )
