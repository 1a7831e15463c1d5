import pytest

from midtune.savings.estimate import (
    ModelNumbers,
    StepShape,
    block_update_work,
    estimate_full_training,
    full_peak_bytes,
    full_update_work,
)

# 10 blocks of 100 parameters, hidden 4, intermediate 8, a vocabulary of 20 (head 80), tied: 1,080 in all.
MODEL = ModelNumbers.from_config(
    {
        "hidden_size": 4,
        "num_hidden_layers": 10,
        "vocab_size": 20,
        "intermediate_size": 8,
        "tie_word_embeddings": True,
    },
    total_parameters=1080,
)
SHAPE = StepShape(prompts=2, group_size=4, prompt_tokens=10, completion_tokens=5)


def test_sizes_from_a_config() -> None:
    assert (MODEL.block_parameters, MODEL.head_parameters) == (100, 80)
    untied = ModelNumbers.from_config(
        {
            "text_config": {"hidden_size": 4, "num_hidden_layers": 10, "vocab_size": 20},
            "tie_word_embeddings": False,
        },
        total_parameters=1160,
    )
    assert (untied.block_parameters, untied.intermediate) == (100, 16)


def test_work_of_full_training() -> None:
    # 8 completions of 15 tokens: 120 tokens x 1,000 block parameters + 40 completion tokens x 80.
    forward = 120 * 1000 + 40 * 80
    assert full_update_work(MODEL, SHAPE, checkpointing=False) == 3 * forward
    assert full_update_work(MODEL, SHAPE) == 4 * forward
    assert full_update_work(MODEL, SHAPE, reference=True) == 5 * forward


def test_work_of_one_block() -> None:
    # 2 prompts of 10 tokens once, 8 completions of 5: 60 tokens through blocks 6 to 9, 40 through the head.
    tail = 60 * 400 + 40 * 80
    assert block_update_work(MODEL, SHAPE, lowest_block=6, trained_blocks=1) == 2 * tail + 60 * 100
    assert (
        block_update_work(MODEL, SHAPE, lowest_block=6, trained_blocks=2, reference=True)
        == 3 * tail + 60 * 200
    )


def test_training_everything_from_block_0_without_shared_prompts_is_full_training() -> None:
    single = StepShape(prompts=8, group_size=1, prompt_tokens=10, completion_tokens=5)
    full = full_update_work(MODEL, single, checkpointing=False)
    ours = block_update_work(MODEL, single, lowest_block=0, trained_blocks=10)
    assert full - ours == 40 * 80  # the head's weight gradient


def test_peak_bytes() -> None:
    # 1,080 parameters at 16 bytes; 7 tokens x (10 blocks x 4 + inside 10 x 4 + 3 x 8) x 4 bytes.
    assert full_peak_bytes(MODEL, backward_tokens=7) == 1080 * 16 + 7 * (40 + 64) * 4
    assert full_peak_bytes(MODEL, backward_tokens=7, checkpointing=False) == 1080 * 16 + 7 * 640 * 4
    assert (
        full_peak_bytes(MODEL, backward_tokens=7, reference=True, weight_bytes=2, compute_bytes=2)
        == 1080 * 10 + 7 * 104 * 2
    )


def test_estimate_scales_the_measured_update() -> None:
    full = estimate_full_training(
        MODEL,
        SHAPE,
        lowest_block=6,
        trained_blocks=1,
        rollout_s=2.0,
        reward_s=0.5,
        update_s=1.0,
        backward_tokens=7,
        process_bytes=1000,
    )
    assert full.update_s == pytest.approx(4 * 123_200 / 60_400)
    assert full.step_s == pytest.approx(2.5 + full.update_s)
    assert full.peak_bytes == 1080 * 16 + 7 * 104 * 4 + 1000
    assert full.source == "estimated"


def test_skipped_groups_made_the_measured_update_shorter() -> None:
    def update_s(share: float) -> float:
        return estimate_full_training(
            MODEL,
            SHAPE,
            lowest_block=6,
            trained_blocks=1,
            rollout_s=0,
            reward_s=0,
            update_s=1.0,
            backward_tokens=7,
            updated_share=share,
        ).update_s

    assert update_s(0.5) == pytest.approx(2 * update_s(1.0))
    assert update_s(0.0) == update_s(0.5)  # at least one of two groups


def test_against_a_measured_update_of_smollm2() -> None:
    """SmolLM2-135M, block 15, two cores, fp32: updates measured at 3.06 s (block) and 17.7 s (full)."""
    smollm = ModelNumbers.from_config(
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "intermediate_size": 1536,
            "tie_word_embeddings": True,
        },
        total_parameters=134_515_008,
    )
    full = estimate_full_training(
        smollm,
        StepShape(prompts=4, group_size=8, prompt_tokens=46, completion_tokens=24),
        lowest_block=15,
        trained_blocks=1,
        rollout_s=5.2,
        reward_s=0.0,
        update_s=3.06,
        checkpointing=False,
        backward_tokens=2240,
    )
    assert 0.8 * 17.7 < full.update_s < 17.7
