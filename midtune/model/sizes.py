"""Count a model's parameters by place, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from midtune.model.blocks import config_from, find_blocks


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's parameters."""

    blocks: int
    linear: int  # in one block's linear layers
    rest: int  # elsewhere in one block
    widths: int  # inputs plus outputs of one block's linear layers, which LoRA's matrices span
    embedding: int
    head: int  # 0 if it is the input embedding
    outside: int  # all but the blocks, the embedding and the head
    hidden: int  # width of the residual stream

    @property
    def block(self) -> int:
        return self.linear + self.rest

    @property
    def projection(self) -> int:
        """Weights of the product that makes logits, tied or not."""
        return self.head or self.embedding

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.embedding + self.head + self.outside


def blocks_of(config: PretrainedConfig) -> int:
    """Number of decoder blocks."""
    return int(config.get_text_config().num_hidden_layers)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Sizes of the model that `config` describes; allocates nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_from(config, 0, 1))
    block = find_blocks(model)[1][0]
    linear = [part for part in block.modules() if isinstance(part, nn.Linear)]
    weights = sum(part.weight.numel() for part in linear)
    own = sum(p.numel() for p in block.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head_size = 0 if head is embedding else head.numel()
    whole = sum(p.numel() for p in model.parameters())
    return Sizes(
        blocks=blocks_of(config),
        linear=weights,
        rest=own - weights,
        widths=sum(part.in_features + part.out_features for part in linear),
        embedding=embedding.numel(),
        head=head_size,
        outside=whole - own - embedding.numel() - head_size,
        hidden=int(config.get_text_config().hidden_size),
    )
