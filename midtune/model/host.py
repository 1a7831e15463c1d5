"""Keep the input embedding in host memory: only the rows looked up travel to the card."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from midtune.errors import InputError


def embed_on_host(model: PreTrainedModel, name: str) -> None:
    """Move a frozen input embedding to host memory, for good; does nothing on a CPU.

    Its weight stops being a parameter, so moving the model leaves it there. Raises InputError if the embedding is also
    the output head, which must be on the card.
    """
    embedding = model.get_input_embeddings()
    if model.device.type == "cpu" or not is_here(embedding):
        return
    if model.get_output_embeddings().weight is embedding.weight:
        raise InputError(
            f"{name} uses its input embedding as its output head too, which has to be on the card; leave out "
            "model.embeddings=host."
        )
    move_out(embedding, model.device)


def is_here(embedding: Any) -> bool:
    """Whether an embedding is on the model's device rather than moved out."""
    return next(embedding.parameters(), None) is not None


def move_out(embedding: Any, device: torch.device) -> None:
    """Keep an embedding's weight on the host, and send the rows it looks up to `device`."""
    for held in (embedding._parameters, embedding._buffers):
        for name in list(held):
            setattr(embedding, name, held.pop(name).detach().to("cpu"))
    embedding.register_forward_pre_hook(lambda module, args: (args[0].to("cpu"), *args[1:]))
    embedding.register_forward_hook(lambda module, args, rows: rows.to(device))
