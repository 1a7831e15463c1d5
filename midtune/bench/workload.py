"""What the bench compares: the arms, and the work that each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Arm:
    """A way to train: single blocks over frozen ones, all parameters, or LoRA adapters on every linear layer.

    With `checkpointing`, TRL keeps only the inputs of blocks, and recomputes the rest for the gradient.
    """

    label: str
    trains: Literal["blocks", "all", "adapters"]
    checkpointing: bool = True


ARMS = {
    "midtune": Arm("midtune", "blocks", checkpointing=False),
    "trl-full": Arm("TRL, all parameters", "all"),
    # With checkpointing, transformers propagates a single block's gradient down to the embeddings.
    "trl-block": Arm("TRL, the same block over NF4", "blocks", checkpointing=False),
    "trl-qlora": Arm("TRL, QLoRA on all linear layers", "adapters"),
    "trl-qlora-fp32": Arm("the same, adapters in fp32", "adapters"),
    "trl-full-kept": Arm("TRL, the same without checkpointing", "all", checkpointing=False),
}
# In the order of a plan's table: "the same" means the arm before.
PLANNED = ("midtune", "trl-block", "trl-qlora", "trl-full", "trl-full-kept")
BENCHED = tuple(arm for arm in ARMS if arm != "trl-full-kept")
LORA_RANK = 16
# TRL has no `auto`: with this rate, the study's, a few steps leave completions as long as they were.
STOCK_RATE = 5e-6


@dataclass(frozen=True)
class Workload:
    """What every arm computes; `block` is the one that midtune and `trl-block` train.

    Each step has all `prompts`. `warmup` steps precede the measured `steps`, and `profile` adds one.
    """

    prompts: list[str]
    group_size: int
    new_tokens: int
    block: int
    warmup: int
    steps: int
    micro_batch_tokens: int
    seed: int = 0
    profile: bool = False


def qlora() -> Any:
    """PEFT's configuration of `trl-qlora`'s adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
