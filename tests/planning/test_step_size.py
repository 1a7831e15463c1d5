from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from midtune.config import load_config
from midtune.errors import InputError
from midtune.model.sizes import Sizes
from midtune.planning.budget import Loaded, Standing
from midtune.planning.step_size import Work, leaner, standing, work_of
from tests.planning.toy_sizes import SIZES

PLAIN = Work(load_config(None, {"model.name": "x", "training.beta": 0.0}), 10)


def stood(arm: str, sizes: Sizes = SIZES, **settings: Any) -> Standing:
    work = PLAIN.changed({key.replace("__", "."): value for key, value in settings.items()})
    full = arm == "trl-full"
    model = Loaded(PretrainedConfig(), torch.bfloat16, quantized=not full, on_card=True, full=full)
    return standing(model, sizes, arm, work, trained=1)


def held(arm: str, sizes: Sizes = SIZES, **settings: Any) -> dict[str, int]:
    found = stood(arm, sizes, **settings)
    return {**found.parts, "gradients": found.gradients, "step": found.step}


def test_what_midtune_holds() -> None:
    assert held("midtune", training__beta=0.1) == {
        "frozen blocks": 10 * (8452 + 100 * 2),
        "embeddings and head": 2010 * 2,
        "trained blocks, fp32": 16484 * 4,
        "optimizer": 16484 * 8,
        "reference": 16484 * 4,
        "gradients": 16484 * 4,
        "step": 16484 * 4,
    }


def test_states_in_eight_bits_take_a_quarter_and_their_scales() -> None:
    lean = held("midtune", training__optimizer="adamw_8bit")
    # Two moments of a byte, and 4 bytes for each 256 of both.
    assert lean["optimizer"] == round(16484 * (2 + 2 * 4 / 256))
    assert lean["step"] == 0 and "reference" not in lean


def test_a_cpu_steps_tensors_one_by_one() -> None:
    model = Loaded(PretrainedConfig(), torch.bfloat16, quantized=True, on_card=False)
    found = standing(model, SIZES, "midtune", PLAIN, trained=1)
    # The largest of a block is taken to be half of it; the trust region keeps a copy of the whole.
    assert found.step == 2 * (16384 // 2) * 4 + 16484 * 4
    by_number = PLAIN.changed({"training.lr": 1e-4})
    assert standing(model, SIZES, "midtune", by_number, trained=1).step == 2 * (16384 // 2) * 4


def test_an_embedding_on_the_host_is_not_held() -> None:
    assert held("midtune", model__embeddings="host")["embeddings and head"] == 1010 * 2
    tied = replace(SIZES, head=0, lookups=0)
    assert held("midtune", tied, model__embeddings="host")["embeddings and head"] == 1010 * 2
    assert held("midtune", tied)["embeddings and head"] == 1010 * 2


def test_gradients_in_bf16_take_half_until_the_optimizers_step() -> None:
    found = stood("midtune", training__gradients="bf16")
    # One tensor, of half a block, is in fp32 at a time.
    assert found.accumulated == 16484 * 2 + 8192 * 4
    assert found.gradients == 16484 * 4


def test_full_training_holds_sixteen_bytes_a_parameter_and_a_second_model() -> None:
    # What midtune saves is no part of TRL's arms.
    lean = {"training__optimizer": "adamw_8bit", "training__gradients": "bf16", "model__embeddings": "host"}
    found = held("trl-full", training__beta=0.1, **lean)
    assert sum(found[part] for part in ("blocks", "embeddings and head", "optimizer", "gradients")) == (
        SIZES.total * 16
    )
    assert found["reference"] == SIZES.total * 4


def test_adapters_and_their_states_are_in_two_bytes() -> None:
    found = held("trl-qlora", training__beta=0.1)
    adapters = 10 * 16 * 320
    assert (found["adapters"], found["optimizer"], found["gradients"]) == (
        adapters * 2,
        adapters * 4,
        adapters * 2,
    )
    # They are turned off for the reference.
    assert "reference" not in found


def test_a_step_is_that_of_the_configuration() -> None:
    config = load_config(None, {"model.name": "tiny", "training.sampled_prompts": 2, "model.unpack": "never"})
    work = work_of(config, 40)
    assert work.described() | {"prompts": 8, "recompute": False} == work.described()
    assert (work.described()["sampled_prompts"], work.described()["unpack"]) == (2, False)
    assert (work.sampled_prompts, work.changed({"training.sampled_prompts": 0}).sampled_prompts) == (2, 8)
    assert work.micro_prompts == config.training.prompts_per_step
    assert work.changed({"training.micro_batch_tokens": 100}).micro_prompts == 1
    # What was asked stays as it was.
    assert work.config == config


def test_a_step_beyond_any_is_refused() -> None:
    config = load_config(None, {"training.group_size": 10_000, "training.prompts_per_step": 10_000})
    with pytest.raises(
        InputError, match="a step of 100,000,000 completions .* at most 100,000,000 are planned"
    ):
        work_of(config, 512)


def remedies(phase: str, unpacked: int = 0) -> list[dict[str, Any]]:
    """Everything that is changed while a phase stays too large."""
    work, found = PLAIN.changed({"training.prompts_per_step": 4, "training.max_new_tokens": 502}), []
    # Four groups of 1,000 bytes each are 600 over what there is.
    update = {"activations": 3000, "workspace": 1000, "heap": 0}
    while True:
        phases = {"sampling": {"unpacked weights": unpacked}, "update": update}
        change = leaner(work, phase, phases, 3400)
        if change is None:
            return found
        unpacked = 0
        found.append(change)
        work = work.changed(change)


def test_the_cheapest_remedy_comes_first() -> None:
    assert remedies("sampling", unpacked=1) == [
        {"model.unpack": "never"},
        {"training.sampled_prompts": 2},
        {"training.sampled_prompts": 1},
    ]
    group = 4 * 512
    assert remedies("update") == [
        {"training.micro_batch_tokens": 2 * group},
        {"training.micro_batch_tokens": group},
        {"training.optimizer": "adamw_8bit"},
        {"training.gradients": "bf16"},
        {"training.recompute": True},
        {"training.micro_batch_tokens": 1024},
        {"training.micro_batch_tokens": 512},
    ]
    assert remedies("optimizer") == [{"training.optimizer": "adamw_8bit"}]
