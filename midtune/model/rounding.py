"""Round frozen linear layers to 4-bit so that what they give stays close, rather than each weight by itself.

GPTQ (arXiv 2210.17323) over bitsandbytes' NF4: the columns of a layer are rounded one after another, and the error of
each is made up for by those that follow, as second moments of the layer's inputs say. Scales stay those of
bitsandbytes, so the result is an ordinary 4-bit layer of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from midtune.model.policy import Policy, full_precision
from midtune.model.quantize import linears_in_4_bit, set_codes, thawed

# Most tokens that decide (four times as many bring SmolLM2 no closer), and of them from one text.
TOKENS, TEXT_TOKENS = 4096, 512
# Share of the mean second moment that is added to each, so that rare inputs do not decide.
DAMPING = 0.01
# Columns after which the others are corrected, all at once.
COLUMNS = 128


@torch.no_grad()
def calibrate(policy: Policy, texts: Sequence[Sequence[int]]) -> None:
    """Round the 4-bit linear layers of all blocks again, by what enters them in `texts` (token ids).

    One forward pass: before a block computes, its layers are rounded for what the rounded blocks below give. Memory
    holds one unquantized block at a time. Experts stay as they are, and so does a layer that no text reaches.
    """
    # No token sees the padding, which is on the right.
    ids = pad_sequence([torch.tensor(text) for text in texts], True, -1).to(policy.device)
    counts = ids >= 0

    def round_block(number: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        hooks[number].remove()
        moments: dict[str, torch.Tensor] = {}

        def add(name: str, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if args[0].shape[:-1] == counts.shape:
                given = args[0][counts].float()
                with full_precision(ids.device):
                    moments[name] = given.T @ given

        whole = thawed(block, policy.original_tensors(number), with_experts=False)
        layers = linears_in_4_bit(block)
        for name in layers:
            whole.get_submodule(name).register_forward_pre_hook(partial(add, name))
        whole(*args, **kwargs)
        for name, squares in moments.items():
            original: Any = whole.get_submodule(name)
            weight = original.weight.T if isinstance(original, Conv1D) else original.weight
            with full_precision(ids.device):
                set_codes(layers[name].weight, partial(rounded, weight, squares))

    hooks = [
        block.register_forward_pre_hook(partial(round_block, number), with_kwargs=True)
        for number, block in enumerate(policy.blocks)
    ]
    body = policy.model.get_submodule(policy.stack_name.partition(".")[0])
    with policy.autocast():
        body(input_ids=ids.clamp_min(0), use_cache=False)


def rounded(
    weight: torch.Tensor, moments: torch.Tensor, scales: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """For each weight [O, I] the place in `values`, ascending, of the one which times its scale [O, I] stands for it.

    `moments` [I, I] are second moments of the layer's inputs. Columns with large inputs come first: many others can
    still make up for their error.
    """
    squares = moments.diagonal()
    order = squares.argsort(descending=True, stable=True)
    damped = moments + torch.diag((DAMPING * squares.mean()).clamp_min(1e-12).expand_as(squares))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    # Row i: how an error in column i is shared among those after it.
    shares = torch.linalg.cholesky(inverse, upper=True)
    # [I, O], so that a column's values lie together.
    rest, scales = weight.T[order].contiguous(), scales.T[order].contiguous()
    between = (values[1:] + values[:-1]) / 2
    codes = torch.empty_like(rest, dtype=torch.long)
    for first in range(0, len(order), COLUMNS):
        last = min(first + COLUMNS, len(order))
        for i in range(first, last):
            codes[i] = torch.bucketize(rest[i] / scales[i], between)
            error = (rest[i] - values[codes[i]] * scales[i]) / shares[i, i]
            rest[i + 1 : last] -= shares[i, i + 1 : last, None] * error
            rest[i] = error
        rest[last:] -= shares[first:last, last:].T @ rest[first:last]
    return codes[order.argsort()].T
