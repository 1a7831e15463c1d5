"""The input embedding in the host's memory: only the rows that are asked for travel to the card."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from midtune.errors import InputError


def embed_on_host(model: PreTrainedModel, name: str, device: torch.device | None = None) -> None:
    """Keep the input embedding out of the card's memory, for good; on a CPU nothing changes.

    Its weight stops being a parameter, so whatever moves the model leaves it where it is.

    Args:
        model: with frozen embeddings.
        name: what messages call it.
        device: where the model computes; None: where it is.

    Raises:
        InputError: the output head is the embedding too, and has to be on the card.
    """
    device = device or model.device
    if device.type == "cpu":
        return
    embedding = model.get_input_embeddings()
    if not is_here(embedding):
        return
    if model.get_output_embeddings().weight is embedding.weight:
        raise InputError(
            f"{name} uses its input embedding as its output head too, which has to be on the card; leave out "
            "model.embeddings=host."
        )
    move_out(embedding, device)


def is_here(embedding: Any) -> bool:
    """Whether an embedding is where the model is, not moved out."""
    return next(embedding.parameters(), None) is not None


def move_out(embedding: Any, device: torch.device) -> None:
    """Keep what an embedding holds on the host, and send the rows that it looks up to `device`."""
    for held in (embedding._parameters, embedding._buffers):
        for name in list(held):
            value = held.pop(name)
            setattr(embedding, name, value.detach().to("cpu"))
    embedding.register_forward_pre_hook(lambda module, args: (args[0].to("cpu"), *args[1:]))
    embedding.register_forward_hook(lambda module, args, rows: rows.to(device))
