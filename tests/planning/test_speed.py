import math

import pytest

from midtune.bench.flops import rollout_flops, update_flops
from midtune.config import load_config
from midtune.errors import InputError
from midtune.model.sizes import Sizes
from midtune.planning.speed import step_seconds
from midtune.planning.step_size import Work
from midtune.published import CARDS, PublishedCard, card_named


def test_a_card_by_its_memory_or_by_its_name() -> None:
    assert (card_named("24GB").memory, card_named("24 gb").flops) == (24 * 2**30, 71.2e12)
    assert card_named("20GB").name == "20GB (RTX 3090)" and card_named("20GB").memory == 20 * 2**30
    assert card_named("4090").name == card_named("rtx-4090").name == "RTX 4090"
    assert card_named("a100 80gb").memory == 80 * 2**30
    assert card_named("1TB".replace("1T", "999G")[:-1]).flops == CARDS[-1].flops


@pytest.mark.parametrize("text", ["", "0GB", "-3GB", "lots", "GB"])
def test_what_is_no_card_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(InputError, match="give its memory, such as 24GB, or one of RTX 4060"):
        card_named(text)


SIZES = Sizes(blocks=4, linear=1000, rest=0, widths=0, embedding=500, head=0, outside=0, hidden=1)
WORK = Work(
    load_config(
        None, {"training.prompts_per_step": 2, "training.group_size": 3, "training.max_new_tokens": 5}
    ),
    10,
)


def seconds(
    arm: str, card: PublishedCard, *, unpacked: bool = False, cache: int = 0, **settings: object
) -> dict[str, float]:
    work = WORK.changed({f"training.{key}": value for key, value in settings.items()})
    return step_seconds(
        card, SIZES, arm, work, tail=2, trained=1, quantized=True, unpacked=unpacked, cache=cache
    )


@pytest.mark.parametrize("arm", ["midtune", "trl-full", "trl-full-kept", "trl-block", "trl-qlora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_has_to_be_computed(arm: str, recompute: bool) -> None:
    card = PublishedCard("all memory at once", 1, 10.0, math.inf)
    # A KL term's reference is left out.
    update = update_flops(SIZES, WORK.batch(), arm, tail=2, trained=1, recompute=recompute)
    assert seconds(arm, card, recompute=recompute, beta=0.1) == {
        "sampling": rollout_flops(SIZES, WORK.batch(), arm) / 10,
        "update": update / 10,
    }


def test_what_has_to_be_read() -> None:
    card = PublishedCard("computes at once", 1, math.inf, 1.0)
    packed = 500 + 15 + 0
    ours = seconds("midtune", card, cache=100)
    # Each of five tokens reads all blocks and the head in two bytes, and on average half the cache.
    assert ours["sampling"] == 5 * (4 * packed + 2 * 500 + 50)
    assert seconds("midtune", card, unpacked=True)["sampling"] == 5 * (2 * 4000 + 2 * 500)
    assert seconds("midtune", card, sampled_prompts=1)["sampling"] == 5 * 2 * (4 * packed + 2 * 500)
    assert ours["update"] == 2 * 2 * packed
    assert seconds("midtune", card, micro_batch_tokens=1)["update"] == 2 * 2 * 2 * packed
    assert seconds("trl-qlora", card)["update"] == 3 * 4 * packed
