from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from midtune.model.configs import config_of
from midtune.model.loading import load_policy
from midtune.model.sizes import Sizes, sizes_of
from midtune.model.sources import resolve

# Millions of parameters as published on the models' pages.
PUBLISHED = {
    "Qwen/Qwen3-8B": 8191,
    "Qwen/Qwen3-1.7B": 1721,
    "Qwen/Qwen2.5-7B-Instruct": 7616,
    "meta-llama/Llama-3.1-8B-Instruct": 8030,
    "google/gemma-3-1b-it": 1000,
    "mistralai/Mistral-7B-Instruct-v0.3": 7248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5,
    "HuggingFaceTB/SmolLM3-3B": 3075,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    assert sizes_of(config_of(name)).total / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_sizes_are_those_of_the_loaded_model(random_checkpoint: Callable[..., Path]) -> None:
    policy = load_policy(resolve(str(random_checkpoint("qwen3"))))
    sizes = sizes_of(policy.model.config)
    assert sizes.total == policy.total_parameters
    assert sizes.blocks == policy.num_blocks
    assert sizes.block == sum(
        p.numel() for p in load_policy(policy.source, quantize="none").blocks[0].parameters()
    )


@pytest.mark.parametrize(("head", "total", "projection"), [(800, 3405, 800), (0, 2605, 500)])
def test_all_parameters_are_counted_once(head: int, total: int, projection: int) -> None:
    sizes = Sizes(2, linear=1000, rest=50, widths=0, embedding=500, head=head, outside=5, hidden=8)
    assert (sizes.total, sizes.projection) == (total, projection)
