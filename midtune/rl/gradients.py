"""Accumulate gradients in bf16, half the bytes, while parameters stay in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Bf16Gradients:
    """Moves each gradient into a bf16 sum as soon as backward has made it.

    PyTorch keeps `.grad` in its parameter's dtype, so the sums stay outside it until the optimizer's step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._held: dict[nn.Parameter, torch.Tensor] = {}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in parameters]

    def __enter__(self) -> Bf16Gradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        for hook in self._hooks:
            hook.remove()

    def clear(self) -> None:
        """Drop the sums."""
        self._held.clear()

    def put_back(self) -> None:
        """Move the sums into `.grad`, in fp32."""
        for parameter in list(self._held):
            parameter.grad = self._held.pop(parameter).to(parameter.dtype)

    def _take(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None and isinstance(parameter, nn.Parameter)
        held = self._held.get(parameter)
        self._held[parameter] = gradient.to(torch.bfloat16) if held is None else held.add_(gradient)
