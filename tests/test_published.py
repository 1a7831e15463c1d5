import pytest

from midtune.errors import InputError
from midtune.published import CARDS, card_named


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
