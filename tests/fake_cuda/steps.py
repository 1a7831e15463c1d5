"""Everything between loading a model and a checkpoint, on a card that is not there; `test_fake_cuda.py` runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from trl import GRPOTrainer

from midtune.bench.profile import Operators
from midtune.model.host import embed_on_host, is_here
from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.rl import prompts
from midtune.rl import trainer as trainer_module
from midtune.rollout.decoding import Decoder
from midtune.rollout.evaluation import evaluate
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits
from midtune.rollout.text import TextSampler, sample
from tests.fake_cuda.card import CARD, card, move
from tests.fake_cuda.reads import WANTED, Reads, UnwantedRead
from tests.plain import PROMPTS, stop_early
from tests.rl.toy_training import (
    even_share,
    question_rows,
    sampler_of,
    short_questions_only,
    train,
    trained,
)
from tests.rollout.corridor import OWN, PLAYED, episode_sampler

# Weak opinions, or bf16 rounds log-probs of random models too far apart.
SMALL = {"initializer_range": 0.05}
READS = Reads()

if torch.version.cuda is None:
    pytest.fail("needs a CUDA build of torch: run test_fake_cuda.py, which has one installed", pytrace=False)

OnCardPolicy = Callable[..., Policy]


@pytest.fixture
def on_card(
    random_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OnCardPolicy]:
    """A function: architecture → a policy on the card, which is there until the test ends."""
    # What this card's products take is of no use to others.
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "cache"))
    with contextlib.ExitStack() as stack:

        def load(
            architecture: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **overrides: object
        ) -> Policy:
            folder = random_checkpoint(architecture, **SMALL, **overrides)
            policy = load_policy(resolve(str(folder)), device="cpu", dtype=dtype)
            # Without data, no decoder can be seen to be exact.
            policy.decoder = Decoder
            stop_early(policy)
            stack.enter_context(card(READS))
            return move(policy)

        yield load


def values(policy: Policy) -> torch.Tensor:
    """Those that are trained, seen without reading them from the card."""
    found: Any = trained(policy)
    return found.held


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Policy], Watched]]:
    """A function that watches what a policy's training computes until the test ends."""
    with contextlib.ExitStack() as stack:

        def begin(policy: Policy) -> Watched:
            watched = Watched()
            for module in policy.model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(lambda module, args, out: watched.see("activations", out))
            draw, scores = TextSampler.sample, trainer_module.completion_log_probs
            loss = GRPOTrainer._compute_loss
            replace = monkeypatch.setattr
            replace(TextSampler, "sample", lambda *args, **named: watched.rollout(draw(*args, **named)))
            replace(
                trainer_module,
                "completion_log_probs",
                lambda *args, **named: watched.see("update", *scores(*args, **named)),
            )
            replace(
                GRPOTrainer, "_compute_loss", lambda *args, **named: watched.see("loss", loss(*args, **named))
            )
            stack.callback(register_optimizer_step_post_hook(watched.step).remove)
            return watched

        yield begin


class Watched:
    """Checks dtype and device of what is computed, and says in `seen` which kinds of it there were."""

    BF16 = {"activations", "boundary"}

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def see(self, kind: str, *tensors: torch.Tensor) -> Any:
        wanted = torch.bfloat16 if kind in self.BF16 else torch.float32
        for tensor in tensors:
            assert (tensor.dtype, tensor.device) == (wanted, CARD), kind
        self.seen.add(kind)
        return tensors if len(tensors) > 1 else tensors[0]

    def rollout(self, rollout: Rollout) -> Rollout:
        assert rollout.boundary is not None
        self.see("rollout", rollout.log_probs, rollout.entropies)
        self.see("boundary", rollout.boundary.prompt, rollout.boundary.completion)
        return rollout

    def step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state[parameter]
            self.see("gradients", parameter.grad)
            self.see("masters", parameter)
            self.see("states", state["exp_avg"], state["exp_avg_sq"])


ALL = {"activations", "boundary", "rollout", "update", "loss", "gradients", "masters", "states"}


@pytest.mark.parametrize("blocks", [(2,), (1, 2, 3)])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text"])
def test_blocks_are_trained(
    on_card: OnCardPolicy,
    watch: Callable[[Policy], Watched],
    tmp_path: Path,
    architecture: str,
    blocks: tuple[int, ...],
) -> None:
    policy = on_card(architecture)
    for block in blocks:
        policy.thaw(block)
    before = values(policy)
    watched = watch(policy)
    _, metrics = train(policy, tmp_path, steps=1, beta=0.1)
    assert policy.in_slots
    assert watched.seen == ALL
    assert metrics[-1]["grad_norm"] > 0
    assert not torch.equal(values(policy), before)


def test_lora_is_trained(on_card: OnCardPolicy, watch: Callable[[Policy], Watched], tmp_path: Path) -> None:
    policy = on_card()
    policy.add_lora([2], rank=4)
    watched = watch(policy)
    _, metrics = train(policy, tmp_path, steps=1, beta=0.1)
    assert watched.seen == ALL
    assert metrics[-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": "auto", "micro_batch_tokens": 64},
        {"recompute": True, "micro_batch_tokens": 64},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "temperature": 0.8, "stop_strings": ["ab"]},
        {"algorithm": "gspo", "reward": short_questions_only},
        {"algorithm": "bnpo", "update_rows": 4},
        {"algorithm": "rloo"},
        {"gradients": "bf16", "optimizer": "adamw_8bit"},
    ],
    ids=str,
)
def test_settings(on_card: OnCardPolicy, tmp_path: Path, settings: dict[str, Any]) -> None:
    policy = on_card()
    policy.thaw(2)
    _, metrics = train(policy, tmp_path, steps=1, **settings)
    assert metrics[-1]["grad_norm"] > 0


def test_prompts_are_chosen(on_card: OnCardPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "FEWEST_KNOWN", 2)
    policy = on_card()
    policy.thaw(2)
    _, metrics = train(policy, tmp_path, steps=2, prompts="auto")
    assert metrics[-1]["grad_norm"] > 0


def test_fp16_scales_its_loss(on_card: OnCardPolicy, tmp_path: Path) -> None:
    policy = on_card(dtype=torch.float16)
    policy.thaw(2)
    before = values(policy)
    train(policy, tmp_path, steps=1)
    assert not torch.equal(values(policy), before)


def test_embeddings_stay_on_the_host(on_card: OnCardPolicy, tmp_path: Path) -> None:
    policy = on_card("llama")
    embed_on_host(policy.model, "the model")
    policy.thaw(2)
    train(policy, tmp_path, steps=1)
    embedding: Any = policy.model.get_input_embeddings()
    assert not is_here(policy.model) and embedding.weight.device.type == "cpu"


def test_games_are_learned(on_card: OnCardPolicy, tmp_path: Path) -> None:
    policy = on_card()
    policy.thaw(2)
    settings = {"steps": 1, "algorithm": "gigpo", "max_new_tokens": 60}
    step, _ = train(episode_sampler(policy), tmp_path, OWN, PLAYED, **settings)
    assert step == 1


def test_a_resumed_run_equals_one_that_was_never_stopped(on_card: OnCardPolicy, tmp_path: Path) -> None:
    def patch(folder: str, **arguments: Any) -> torch.Tensor:
        torch.manual_seed(0)
        policy.thaw(2)
        train(policy, tmp_path / folder, steps=2, **arguments)
        found = values(policy)
        policy.restore()
        return found

    policy = on_card()
    whole = patch("whole")
    patch("halves", stop_after=1)
    torch.rand(5, device="cuda")
    resumed = patch("halves", resume_from=tmp_path / "halves" / "checkpoint-1")
    assert torch.equal(resumed, whole)


def test_a_policy_is_evaluated(on_card: OnCardPolicy) -> None:
    policy = on_card()
    before = torch.cuda.get_rng_state()
    found = evaluate(sampler_of(policy), question_rows(), even_share, Sampling(6), samples=3)
    assert found.greedy.shape == (6,)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_decoded_token_takes_few_operators(on_card: OnCardPolicy) -> None:
    policy = on_card()
    limits = SamplingLimits(graphs=False)
    sampling, operators = Sampling(6, group_size=2), Operators(policy.blocks[-1])
    sample(policy, PROMPTS, sampling, limits=limits)  # the engine is tried
    counted = operators.per_pass(lambda: sample(policy, PROMPTS, sampling, limits=limits))
    # Of transformers' generate, in bf16: 59.
    assert counted <= 28


def test_tensors_of_two_devices_do_not_meet(on_card: OnCardPolicy) -> None:
    on_card()
    with pytest.raises(RuntimeError, match="on different devices: \\(2,\\) on cuda:0, \\(2,\\) on cpu"):
        torch.ones(2, device="cuda") + torch.ones(2)
    with pytest.raises(RuntimeError, match="on different devices"):
        torch.ones(2)[torch.ones(2, device="cuda", dtype=torch.bool)]
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())


def test_a_read_that_is_not_listed_is_an_error(on_card: OnCardPolicy) -> None:
    on_card()
    values = torch.ones(2, device="cuda")
    for read in (values.tolist, values.cpu, values.nonzero, values.sum().item, lambda: values[values > 0]):
        with pytest.raises(UnwantedRead):
            read()


def test_every_read_that_is_listed_is_still_there() -> None:
    """Stands last: the tests above read."""
    left = [read for read in WANTED if read not in READS.seen]
    assert not left, f"strike from tests/fake_cuda/reads.py what is no longer read: {left}"
