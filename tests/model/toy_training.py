"""What stands in for training: seeded noise on whatever is trained."""

from __future__ import annotations

import torch

from midtune.model.policy import Policy

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


def perturb(policy: Policy) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)


@torch.no_grad()
def logits_of(policy: Policy) -> torch.Tensor:
    """[2, 12, V], of the same tokens for every policy."""
    return policy.model(input_ids=TOKENS).logits
