"""What a step of full-parameter GRPO would take, from the measured phases of a midtune step.

The reference is TRL's GRPOTrainer on the whole model with its defaults: weights, gradients and both
Adam moments kept in one precision, gradient checkpointing on, every prompt repeated for each of its
completions, a second model as the reference when there is a KL term. Whatever the formulas leave out
makes full training look cheaper than it is, never dearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ModelNumbers:
    """The sizes of a model that time and memory depend on.

    Args:
        total_parameters: all of them, a tied embedding counted once.
        blocks: decoder blocks, L.
        block_parameters: parameters of one block.
        head_parameters: parameters of the output head, vocabulary x hidden.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
    """

    total_parameters: int
    blocks: int
    block_parameters: int
    head_parameters: int
    hidden: int
    intermediate: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], total_parameters: int) -> ModelNumbers:
        """Read the sizes from a transformers config as a dict (`model.config.to_dict()`)."""
        text = config.get("text_config") or config
        hidden, blocks = int(text["hidden_size"]), int(text["num_hidden_layers"])
        head = int(text["vocab_size"]) * hidden
        tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
        embeddings = head if tied else 2 * head
        return cls(
            total_parameters=total_parameters,
            blocks=blocks,
            block_parameters=(total_parameters - embeddings) // blocks,
            head_parameters=head,
            hidden=hidden,
            intermediate=int(text.get("intermediate_size") or 4 * hidden),
        )


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


@dataclass(frozen=True)
class FullTraining:
    """Estimated seconds of a step and peak bytes of full-parameter training."""

    rollout_s: float
    reward_s: float
    update_s: float
    peak_bytes: int
    source: Literal["estimated"] = "estimated"

    @property
    def step_s(self) -> float:
        """Seconds of a whole step."""
        return self.rollout_s + self.reward_s + self.update_s


def estimate_full_training(
    model: ModelNumbers,
    shape: StepShape,
    *,
    lowest_block: int,
    trained_blocks: int,
    rollout_s: float,
    reward_s: float,
    update_s: float,
    backward_tokens: int,
    updated_share: float = 1.0,
    reference: bool = False,
    checkpointing: bool = True,
    weight_bytes: int = 4,
    compute_bytes: int = 4,
    process_bytes: int = 0,
) -> FullTraining:
    """Full-parameter training of the same model on the same step.

    Sampling and rewards are taken as measured in midtune: TRL's own sampling, which runs every prompt
    once per completion, is slower, and the optimizer's pass over all parameters is left out.

    Args:
        model: the model's sizes.
        shape: the step's text.
        lowest_block: the first block that midtune trains, k.
        trained_blocks: how many blocks it trains.
        rollout_s, reward_s, update_s: measured seconds of midtune's phases, a mean over steps.
        backward_tokens: prompt and completion tokens, with padding, in one backward pass.
        updated_share: fraction of groups that midtune's update ran; it may skip those of equal rewards.
        reference: there is a KL term.
        checkpointing: full training runs each block's forward twice and keeps less, TRL's default.
        weight_bytes: bytes of one of full training's weights; 4 for the fp32 that RL needs.
        compute_bytes: bytes of one activation.
        process_bytes: resident memory of the process before the model was loaded; 0 on CUDA.
    """
    work = full_update_work(model, shape, reference=reference, checkpointing=checkpointing) / (
        block_update_work(
            model, shape, lowest_block=lowest_block, trained_blocks=trained_blocks, reference=reference
        )
        * max(updated_share, 1 / shape.prompts)
    )
    peak = full_peak_bytes(
        model,
        backward_tokens=backward_tokens,
        reference=reference,
        checkpointing=checkpointing,
        weight_bytes=weight_bytes,
        compute_bytes=compute_bytes,
    )
    return FullTraining(rollout_s, reward_s, update_s * work, peak + process_bytes)


def full_update_work(
    model: ModelNumbers, shape: StepShape, *, reference: bool = False, checkpointing: bool = True
) -> float:
    """Multiply-adds of full training's update.

    A forward f costs one multiply-add per parameter and token: all blocks over `prompts x group_size x
    (prompt + completion)` tokens, the head over the completion tokens. The update is f, backward 2 f
    (half for activations, half for weights), f again with checkpointing, f for the reference model.
    """
    completions = shape.prompts * shape.group_size
    tokens = completions * (shape.prompt_tokens + shape.completion_tokens)
    forward = tokens * model.blocks * model.block_parameters
    forward += completions * shape.completion_tokens * model.head_parameters
    return forward * (3 + checkpointing + reference)


def block_update_work(
    model: ModelNumbers, shape: StepShape, *, lowest_block: int, trained_blocks: int, reference: bool = False
) -> float:
    """Multiply-adds of midtune's update of all groups.

    A forward t covers blocks k to L-1 over `prompts x (prompt + group_size x completion)` tokens, since
    a prompt passes once for its group, and the head over the completion tokens. The update is t, t for
    activation gradients, one multiply-add per token and parameter of the trained blocks, t for the reference.
    """
    completion_tokens = shape.prompts * shape.group_size * shape.completion_tokens
    tokens = shape.prompts * shape.prompt_tokens + completion_tokens
    tail = tokens * (model.blocks - lowest_block) * model.block_parameters
    tail += completion_tokens * model.head_parameters
    return tail * (2 + reference) + tokens * trained_blocks * model.block_parameters


def full_peak_bytes(
    model: ModelNumbers,
    *,
    backward_tokens: int,
    reference: bool = False,
    checkpointing: bool = True,
    weight_bytes: int = 4,
    compute_bytes: int = 4,
) -> int:
    """Peak bytes of full training's update.

    `4 x weight_bytes` per parameter (weight, gradient, two Adam moments; 16 in fp32), one more weight
    per parameter for a reference model, and activations per token: with checkpointing the input of
    every block and the inside of one, else the inside of all. The inside of a block is about
    `10 hidden + 3 intermediate` values: norms, q, k, v, attention, residuals; gate, up and their product.
    Logits (TRL computes them in chunks), key/value caches and fragmentation are left out.
    """
    inside = 10 * model.hidden + 3 * model.intermediate
    kept = model.blocks * model.hidden + inside if checkpointing else model.blocks * inside
    parameters = model.total_parameters * weight_bytes * (4 + reference)
    return parameters + backward_tokens * kept * compute_bytes
