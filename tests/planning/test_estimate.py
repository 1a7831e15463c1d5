import pytest

from midtune.planning.budget import Sizes
from midtune.planning.estimate import StepShape, block_update_work, estimate_phases, whole_update_work

# 10 blocks of 100 parameters, hidden 4, a vocabulary of 20 (head 80), tied: 1,080 in all.
SIZES = Sizes(blocks=10, linear=90, rest=10, widths=40, embedding=80, head=0, outside=0, hidden=4)
SHAPE = StepShape(prompts=2, group_size=4, prompt_tokens=10, completion_tokens=5)


def test_work_of_full_training() -> None:
    # 8 completions of 15 tokens: 120 tokens x 1,000 block parameters + 40 completion tokens x 80.
    forward = 120 * 1000 + 40 * 80
    assert whole_update_work(SIZES, SHAPE, checkpointing=False) == 3 * forward
    assert whole_update_work(SIZES, SHAPE) == 4 * forward
    assert whole_update_work(SIZES, SHAPE, reference=True) == 5 * forward


def test_adapters_need_no_gradients_of_weights() -> None:
    assert whole_update_work(SIZES, SHAPE, adapters=True) == 3 * (120 * 1000 + 40 * 80)


def test_work_of_one_block() -> None:
    # 2 prompts of 10 tokens once, 8 completions of 5: 60 tokens through blocks 6 to 9, 40 through the head.
    tail = 60 * 400 + 40 * 80
    assert block_update_work(SIZES, SHAPE, lowest_block=6, trained_blocks=1) == 2 * tail + 60 * 100
    assert (
        block_update_work(SIZES, SHAPE, lowest_block=6, trained_blocks=2, reference=True)
        == 3 * tail + 60 * 200
    )


def test_training_everything_from_block_0_without_shared_prompts_is_full_training() -> None:
    single = StepShape(prompts=8, group_size=1, prompt_tokens=10, completion_tokens=5)
    full = whole_update_work(SIZES, single, checkpointing=False)
    ours = block_update_work(SIZES, single, lowest_block=0, trained_blocks=10)
    assert full - ours == 40 * 80  # the head's weight gradient


def test_the_measured_update_is_scaled() -> None:
    full = estimate_phases(
        SIZES,
        SHAPE,
        adapters=False,
        lowest_block=6,
        trained_blocks=1,
        measured={"rollout": 2.0, "reward": 0.5, "update": 1.0},
    )
    assert full == {"rollout": 2.0, "reward": 0.5, "update": pytest.approx(4 * 123_200 / 60_400)}


def test_skipped_groups_made_the_measured_update_shorter() -> None:
    def update_s(share: float) -> float:
        return estimate_phases(
            SIZES,
            SHAPE,
            adapters=False,
            lowest_block=6,
            trained_blocks=1,
            measured={"rollout": 0, "reward": 0, "update": 1.0},
            updated_share=share,
        )["update"]

    assert update_s(0.5) == pytest.approx(2 * update_s(1.0))
    assert update_s(0.0) == update_s(0.5)  # at least one of two groups


def test_against_a_measured_update_of_smollm2() -> None:
    """SmolLM2-135M, block 15, two cores, fp32: updates measured at 3.06 s (block) and 17.7 s (full, kept)."""
    block = 9 * 576 * 64 * 2 + 3 * 64 * 576 * 2 + 3 * 576 * 1536 + 2 * 576
    smollm = Sizes(
        blocks=30,
        linear=block - 2 * 576,
        rest=2 * 576,
        widths=0,
        embedding=49152 * 576,
        head=0,
        outside=576,
        hidden=576,
    )
    assert smollm.total == 134_515_008
    shape = StepShape(prompts=4, group_size=8, prompt_tokens=46, completion_tokens=24)
    work = whole_update_work(smollm, shape, checkpointing=False) / block_update_work(
        smollm, shape, lowest_block=15, trained_blocks=1
    )
    assert 0.8 * 17.7 < 3.06 * work < 17.7
