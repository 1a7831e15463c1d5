"""Floating-point operations of a step's weights, by arm, for plans, estimates and the bench.

Pure arithmetic: 2 operations per weight and token. Attention, norms, LoRA's own matrices and the optimizer are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from midtune.bench.workload import ARMS
from midtune.model.sizes import Sizes
from midtune.rl.tail import SHARED, WHOLE
from midtune.rl.trust_region import measured_completions


@dataclass(frozen=True)
class Batch:
    """Prompts and their completions that pass through a model together; tokens of each may be a mean."""

    prompts: int
    group_size: int
    prompt_tokens: float
    new_tokens: float

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size


def rollout_flops(sizes: Sizes, batch: Batch, arm: str) -> float:
    """Operations of sampling: all blocks for each token fed, the head for each token drawn.

    midtune passes a prompt once per group, TRL once per completion. A completion's last token is not fed.
    """
    prompts = batch.prompts if arm == "midtune" else batch.rows
    fed_back = batch.rows * (batch.new_tokens - 1)
    fed = prompts * batch.prompt_tokens + fed_back
    return 2 * (sizes.blocks * sizes.linear_passed * fed + sizes.projection * (prompts + fed_back))


def update_flops(
    sizes: Sizes,
    batch: Batch,
    arm: str,
    *,
    tail: int,
    trained: int,
    recompute: bool = False,
    reference: bool = False,
    checked: bool = False,
    kind: str = SHARED,
) -> float:
    """Operations of the update.

    Each block counts once for its forward pass, once for the gradient of its inputs, once for that of its weights,
    and once for each extra forward pass: recomputed activations, the reference of a KL term, or the trust region's
    check, which runs on some completions. `tail` blocks start at the first trained one. `recompute`, `checked` and the
    tail's `kind` are midtune's; TRL always recomputes if it checkpoints.
    """
    scored = batch.rows * batch.new_tokens
    extra = 0.0
    if arm == "midtune":
        tokens = _tail_tokens(batch, kind)
        below = sizes.blocks - tail if kind == WHOLE else 0
        blocks = (2 + recompute + reference) * tail + trained + (1 + reference) * below
        head = 2 + reference
        if checked:
            few = replace(batch, group_size=measured_completions(batch.group_size, scored))
            extra = _tail_tokens(few, kind) * sizes.linear_passed * (tail + below)
            extra += few.rows * few.new_tokens * sizes.projection
    else:
        tokens = batch.rows * (batch.prompt_tokens + batch.new_tokens)
        whole = ARMS[arm].trains == "all"
        # A single block's backward pass ends at that block.
        backward = tail + trained if ARMS[arm].trains == "blocks" else sizes.blocks * (1 + whole)
        blocks = sizes.blocks * (1 + ARMS[arm].checkpointing + reference) + backward
        # TRL's chunked head always runs again for its gradient.
        head = 3 + whole + reference
    return 2 * (tokens * sizes.linear_passed * blocks + scored * sizes.projection * head + extra)


def _tail_tokens(batch: Batch, kind: str) -> float:
    """Tokens that pass through midtune's tail: prompts, once if they are shared, and completions without the last."""
    prompts = batch.prompts if kind == SHARED else batch.rows
    return prompts * batch.prompt_tokens + batch.rows * (batch.new_tokens - 1)
