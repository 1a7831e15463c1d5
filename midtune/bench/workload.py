"""What the bench compares: the arms, and the work that each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ARMS = {
    "midtune": "midtune",
    "trl-full": "TRL, all parameters",
    "trl-block": "TRL, the same block over NF4",
    "trl-qlora": "TRL, QLoRA on all linear layers",
    "trl-qlora-fp32": "the same, adapters in fp32",
}
LORA_RANK = 16


@dataclass(frozen=True)
class Workload:
    """What every arm computes.

    Args:
        prompts: texts, as many for each step.
        new_tokens: tokens of every completion.
        block: the block that midtune and `trl-block` train.
        warmup, steps: steps that are not counted, and that are.
        profile: profile one more step.
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
    """PEFT's configuration of the adapters that `trl-qlora` trains."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
