"""Peak memory of sampling and of the update, by running their code on a model without data.

What a phase holds grows with the number of blocks by the same amount for each, so two shallow models say
what a deep one takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, PretrainedConfig

from midtune.model.skeleton import SkeletonPolicy, len_of
from midtune.rl.tail import completion_log_probs
from midtune.rollout.boundary import BoundaryStates, positions
from midtune.rollout.keys_values import shared_prompts
from midtune.rollout.sampler import ROOM, Rollout, choose
from midtune.savings.tracker import Tracker


@dataclass(frozen=True)
class Batch:
    """What passes through a model together.

    Attributes:
        prompts: different ones.
        group_size: completions of each.
        prompt_tokens, new_tokens: of the longest.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size


@dataclass(frozen=True)
class Frozen:
    """A model as midtune loads it, and where training begins."""

    config: PretrainedConfig
    quantized: bool
    compute_dtype: torch.dtype

    def policy(self, depth: int, trained: int) -> SkeletonPolicy:
        """A model of so many blocks, the first `trained` of which are trained."""
        policy = SkeletonPolicy(
            self.config, depth=depth, quantized=self.quantized, compute_dtype=self.compute_dtype
        )
        for block in range(trained):
            policy.thaw(block)
        return policy


def update_bytes(model: Frozen, batch: Batch, *, depth: int, trained: int, recompute_tokens: int = 0) -> int:
    """Peak bytes of a micro-batch's forward and backward pass, above weights, gradients and optimizer states.

    Args:
        depth: blocks from the first trained one to the last.
        trained: how many of them are trained; which ones makes no difference but for the first.
        recompute_tokens: as for `completion_log_probs`.
    """

    def measure(blocks: int) -> int:
        policy = model.policy(blocks, trained)
        hidden = policy.model.config.hidden_size
        prompt_mask = torch.ones(batch.prompts, batch.prompt_tokens, dtype=torch.long)
        completion_mask = torch.ones(batch.rows, batch.new_tokens, dtype=torch.long)
        rollout = Rollout(
            torch.zeros_like(prompt_mask),
            prompt_mask,
            torch.zeros_like(completion_mask),
            completion_mask,
            torch.zeros(completion_mask.shape),
            torch.zeros(completion_mask.shape),
            BoundaryStates(
                0, policy.empty(*prompt_mask.shape, hidden), policy.empty(*completion_mask.shape, hidden)
            ),
        )
        for _ in range(2):
            # The second time gradients are there to be added to.
            with Tracker() as tracker:
                log_probs, _ = completion_log_probs(
                    policy, rollout, temperature=1.0, recompute_tokens=recompute_tokens
                )
                log_probs.mean().backward()  # type: ignore[no-untyped-call]
        return tracker.peak

    return _by_depth(measure, trained + 1, depth)


def sampling_bytes(model: Frozen, batch: Batch) -> int:
    """Peak bytes of sampling above the weights: keys and values, and what a step works with.

    The first pass over the prompts and the last step of all completions are run; states that enter the first
    trained block are left out.
    """

    @torch.no_grad()
    def measure(blocks: int) -> int:
        policy = model.policy(blocks, 0)
        ones = torch.ones(batch.prompts, batch.prompt_tokens, dtype=torch.long)
        with Tracker() as tracker, policy.autocast():
            cache = shared_prompts(room=min(batch.new_tokens, ROOM))
            policy.model(
                input_ids=torch.zeros_like(ones),
                attention_mask=ones,
                position_ids=positions(ones),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(batch.group_size)
            for layer in cache.layers:
                assert layer.keys is not None and layer.values is not None
                rows, heads, _, width = layer.keys.shape
                layer.update(*(policy.empty(rows, heads, max(batch.new_tokens - 2, 0), width) for _ in range(2)))
            ones = torch.ones(batch.rows, batch.prompt_tokens + batch.new_tokens - 1, dtype=torch.long)
            logits = policy.model(
                input_ids=torch.zeros(batch.rows, 1, dtype=torch.long),
                attention_mask=ones,
                position_ids=positions(ones)[:, -1:],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            choose(logits.float(), 1.0, LogitsProcessorList(), torch.zeros(batch.rows))
        return tracker.peak

    return _by_depth(measure, 1, len_of(model.config))


def _by_depth(measure: Callable[[int], int], shallow: int, depth: int) -> int:
    """`measure` of a model of `depth` blocks, from two shallow ones."""
    if depth <= shallow + 1:
        return measure(depth)
    first, second = measure(shallow), measure(shallow + 1)
    return first + (depth - shallow) * (second - first)
