"""Keep embeddings in host memory: only the rows looked up travel to the card."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from midtune.errors import InputError


def embed_on_host(model: PreTrainedModel, name: str) -> None:
    """Move the frozen `lookups` of a model to host memory, for good; does nothing on a CPU.

    Their weights stop being parameters, so moving the model leaves them there. Raises InputError if the only embedding
    is also the output head, which must be on the card.
    """
    if model.device.type == "cpu" or not is_here(model):
        return
    tables = lookups(model)
    if not tables:
        raise InputError(
            f"{name} uses its input embedding as its output head too, which has to be on the card; leave out "
            "model.embeddings=host."
        )
    for table in tables:
        move_out(table, model.device)


def lookups(model: PreTrainedModel) -> list[Any]:
    """Embeddings of tokens that are only looked up, those that later blocks add among them; not one that is the head.

    Embeddings of positions are smaller than that of tokens.
    """
    least, head = model.get_input_embeddings().weight.numel(), model.get_output_embeddings().weight
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding))
    return [part for part in tables if part.weight.numel() >= least and part.weight is not head]


def is_here(model: PreTrainedModel) -> bool:
    """Whether a model's embeddings are on its device rather than moved out."""
    return all(part._parameters for part in lookups(model))


def move_out(embedding: Any, device: torch.device) -> None:
    """Keep an embedding's weight on the host, and send the rows it looks up to `device`."""
    for held in (embedding._parameters, embedding._buffers):
        for name in list(held):
            setattr(embedding, name, held.pop(name).detach().to("cpu"))
    embedding.register_forward_pre_hook(lambda module, args: (args[0].to("cpu"), *args[1:]))
    embedding.register_forward_hook(lambda module, args, rows: rows.to(device))
