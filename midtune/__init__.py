"""midtune: reinforcement learning of one transformer block over a frozen 4-bit model.

The rooms, from the command line down; imports point downwards only:

    cli         runs commands; commands: their table  process     streams, quiet libraries
    api         train, probe and load, for notebooks  recipes     what recipes/ holds, by name
    stages/     one file per command                  config      every setting and its default, once
    probe/      which block to train: race, sweep     bench/      the same work through midtune and TRL
    planning/   memory and time, worked out           report/     statistics, tables, pictures, the page
    rl/         TRL's trainer, the tail, advantages
    rollout/    samplers: text, episodes, vLLM; the decode engine; boundary states; evaluation
    tasks/      prompts, rewards, answers, sources, games, the sandbox
    model/      the policy: loading, 4-bit, blocks, patches
    measure/    time and memory of this process and its card
    runs        the name of everything a run leaves   errors, network, device, published, whole

A step: `rl.trainer` asks a sampler (`rollout.text`) for completions and the states that enter the first trained
block (`rollout.boundary`); rewards (`tasks.rewards`) and advantages follow; `rl.tail` computes log-probs from those
states through the trained block and those above it, and the gradient reaches the trained block.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from midtune.api import load, probe, train

__all__ = ["load", "probe", "train"]
__version__ = "0.1.0"

# Nothing is sent anywhere unless asked for: TRL and the hub client report usage by default.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Import the functions for notebooks when one of them is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'midtune' has no attribute {name!r}")
    from midtune import api

    return getattr(api, name)
