from __future__ import annotations

import copy
from typing import Any, get_args

import pytest

from midtune.config import TrainingConfig
from midtune.rl.algorithms import ALGORITHMS, algorithm_arguments, groups_per_micro_batch


@pytest.mark.parametrize(
    ("prompts", "group_tokens", "budget", "groups"),
    [
        (8, 100, 1000, 8),  # all fit
        (8, 100, 800, 8),
        (8, 100, 799, 4),  # 7 fit, 4 divides 8
        (8, 100, 350, 2),  # 3 fit
        (6, 100, 550, 3),  # 5 fit, 3 divides 6
        (7, 100, 600, 1),  # 7 is prime
        (8, 100, 50, 1),  # a single group may exceed the budget
        (1, 100, 100, 1),
    ],
)
def test_micro_batches_are_whole_groups_that_divide_a_step(
    prompts: int, group_tokens: int, budget: int, groups: int
) -> None:
    assert groups_per_micro_batch(prompts, group_tokens, budget) == groups


def test_every_algorithm_of_the_configuration_is_known() -> None:
    assert set(get_args(TrainingConfig.model_fields["algorithm"].annotation)) == set(ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_an_epsilon_the_authors_clip_range_is_used(algorithm: Any) -> None:
    assert algorithm_arguments(TrainingConfig(algorithm=algorithm)) == ALGORITHMS[algorithm]


def test_an_epsilon_replaces_the_clip_range_on_both_sides() -> None:
    found = algorithm_arguments(TrainingConfig(algorithm="dapo", epsilon=0.1))
    assert found == {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.1}


def test_the_table_of_algorithms_is_never_changed() -> None:
    before = copy.deepcopy(ALGORITHMS)
    algorithm_arguments(TrainingConfig(algorithm="gspo", epsilon=0.5))["loss_type"] = "other"
    assert before == ALGORITHMS
