"""Seconds that a step of full-parameter GRPO, or of QLoRA, would take, from the measured phases of a midtune step.

The references are TRL's GRPOTrainer on the whole model, or with LoRA on every linear layer, with its
defaults: gradient checkpointing on, every prompt repeated for each of its completions, a second forward
pass as the reference when there is a KL term. Whatever the formulas leave out makes them look cheaper than
they are, never dearer.
"""

from __future__ import annotations

from dataclasses import dataclass

from midtune.model.sizes import Sizes


@dataclass(frozen=True)
class StepShape:
    """How much text one step works on.

    Args:
        prompts: different prompts.
        group_size: completions per prompt.
        prompt_tokens: mean tokens of a prompt.
        completion_tokens: mean tokens of a completion.
    """

    prompts: int
    group_size: int
    prompt_tokens: float
    completion_tokens: float


def estimate_phases(
    sizes: Sizes,
    shape: StepShape,
    *,
    adapters: bool,
    lowest_block: int,
    trained_blocks: int,
    measured: dict[str, float],
    updated_share: float = 1.0,
    reference: bool = False,
) -> dict[str, float]:
    """Seconds of the phases `rollout`, `reward` and `update` on the same step.

    Sampling and rewards are taken as measured in midtune: TRL's own sampling, which runs every prompt
    once per completion, is slower. Left out are the optimizer's pass over all parameters, LoRA's own
    matrices, and that a 4-bit layer is dequantized for each product.

    Args:
        sizes: the model's.
        shape: the step's text.
        adapters: QLoRA in place of full training.
        lowest_block: the first block that midtune trains, k.
        trained_blocks: how many blocks it trains.
        measured: seconds of midtune's phases, a mean over steps.
        updated_share: fraction of groups that midtune's update ran; it may skip those of equal rewards.
        reference: there is a KL term.
    """
    work = whole_update_work(sizes, shape, adapters=adapters, reference=reference) / (
        block_update_work(
            sizes, shape, lowest_block=lowest_block, trained_blocks=trained_blocks, reference=reference
        )
        * max(updated_share, 1 / shape.prompts)
    )
    return {
        "rollout": measured["rollout"],
        "reward": measured["reward"],
        "update": measured["update"] * work,
    }


def whole_update_work(
    sizes: Sizes,
    shape: StepShape,
    *,
    adapters: bool = False,
    reference: bool = False,
    checkpointing: bool = True,
) -> float:
    """Multiply-adds of an update that reaches all blocks.

    A forward f costs one multiply-add per parameter and token: all blocks over `prompts x group_size x
    (prompt + completion)` tokens, the head over the completion tokens. The update is f, f for activation
    gradients, f for weight gradients unless only adapters have any, f again with checkpointing, f for the
    reference model.
    """
    completions = shape.prompts * shape.group_size
    tokens = completions * (shape.prompt_tokens + shape.completion_tokens)
    forward = tokens * sizes.blocks * sizes.block
    forward += completions * shape.completion_tokens * (sizes.head or sizes.embedding)
    return forward * (2 + (not adapters) + checkpointing + reference)


def block_update_work(
    sizes: Sizes, shape: StepShape, *, lowest_block: int, trained_blocks: int, reference: bool = False
) -> float:
    """Multiply-adds of midtune's update of all groups.

    A forward t covers blocks k to L-1 over `prompts x (prompt + group_size x completion)` tokens, since
    a prompt passes once for its group, and the head over the completion tokens. The update is t, t for
    activation gradients, one multiply-add per token and parameter of the trained blocks, t for the reference.
    """
    completion_tokens = shape.prompts * shape.group_size * shape.completion_tokens
    tokens = shape.prompts * shape.prompt_tokens + completion_tokens
    tail = tokens * (sizes.blocks - lowest_block) * sizes.block
    tail += completion_tokens * (sizes.head or sizes.embedding)
    return tail * (2 + reference) + tokens * trained_blocks * sizes.block
