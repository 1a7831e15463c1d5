"""Count a model's parameters by place, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from midtune.model.architectures import built
from midtune.model.blocks import find_blocks
from midtune.model.host import lookups
from midtune.model.quantize import expert_weights

# Names of the number of experts that a token passes.
PASSED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's parameters; those of one block are means, where blocks differ."""

    blocks: int
    linear: int  # in one block's linear layers and experts
    rest: int  # elsewhere in one block
    widths: int  # inputs plus outputs of one block's linear layers, which LoRA's matrices span
    embedding: int
    head: int  # 0 if it is the input embedding
    outside: int  # all but the blocks, the embedding and the head
    hidden: int  # width of the residual stream
    lookups: int = 0  # of those in embeddings that are only looked up, which the host may keep
    experts: int = 0  # in one block's experts
    passed: float = 1.0  # share of the experts that a token passes

    @property
    def block(self) -> int:
        return self.linear + self.rest

    @property
    def linear_passed(self) -> int:
        """Weights of `linear` that one token is multiplied with."""
        return self.linear - round(self.experts * (1 - self.passed))

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


def sizes_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Sizes:
    """Sizes of the model that `config` describes; allocates nothing."""
    with torch.device("meta"):
        model = built(config, trust_remote_code=trust_remote_code)
    blocks = find_blocks(model)[1]
    parts = [part for part in blocks.modules() if isinstance(part, nn.Linear)]
    packed = [(part, name) for part in blocks.modules() for name in expert_weights(part)]
    experts = [getattr(part, name) for part, name in packed]
    linear = sum(part.weight.numel() for part in parts)
    routed = sum(weight.numel() for weight in experts)
    own = sum(p.numel() for p in blocks.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head_size = 0 if head is embedding else head.numel()
    whole = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    passed = next((count for name in PASSED if (count := getattr(text, name, None))), None)
    count = len(blocks)
    return Sizes(
        blocks=count,
        linear=(linear + routed) // count,
        rest=(own - linear - routed) // count,
        widths=sum(part.in_features + part.out_features for part in parts) // count,
        embedding=embedding.numel(),
        head=head_size,
        outside=whole - own - embedding.numel() - head_size,
        hidden=int(text.hidden_size),
        lookups=sum(part.weight.numel() for part in lookups(model)),
        experts=routed // count,
        passed=passed / len(experts[0]) if passed and experts else 1.0,
    )
