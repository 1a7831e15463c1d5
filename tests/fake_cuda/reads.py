"""Where the host reads what the card has computed, and so waits until the card has done all it was given.

Every such read is an error in `steps.py` but those that are listed here. Who takes one out of the code strikes it here.
"""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import midtune

MIDTUNE = Path(midtune.__file__).parent


class Read(NamedTuple):
    """A read that is wanted.

    Attributes:
        function: of midtune, `file:qualified name`.
        code: part of the line that is running there.
        why: the reason.
        library: the function of a library that reads on midtune's behalf, `package/file:qualified name`.
    """

    function: str
    code: str
    why: str
    library: str = ""


class Site(NamedTuple):
    """Where a read has happened; see `Read`."""

    function: str
    line: str
    library: str

    def is_of(self, read: Read) -> bool:
        return (
            self.function == read.function
            and read.code in self.line
            and self.library.startswith(read.library)
        ) and bool(self.library) == bool(read.library)


class UnwantedRead(Exception):
    """The card's data was read where the list has nothing."""


class Reads:
    """Takes note of reads."""

    def __init__(self) -> None:
        self.seen: set[Read] = set()

    def __call__(self, func: Any) -> None:
        site = site_of(sys._getframe(1))
        wanted = [read for read in WANTED if site.is_of(read)]
        if not wanted:
            raise UnwantedRead(
                f"{func} reads the card's data in {site.function}, at `{site.line}`"
                + (f", by {site.library}" if site.library else "")
                + "; keep it on the card, or list it in tests/fake_cuda/reads.py with the reason"
            )
        self.seen.update(wanted)


def site_of(frame: FrameType | None) -> Site:
    """The innermost function of midtune that is running, and of a library that it has called."""
    library = ""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        # What counts operators only passes them on.
        if path.is_relative_to(MIDTUNE) and name != "Operators.__torch_dispatch__":
            line = linecache.getline(str(path), frame.f_lineno).strip()
            return Site(f"{path.relative_to(MIDTUNE).as_posix()}:{name}", line, library)
        _, found, inside = path.as_posix().rpartition("/site-packages/")
        if found and not library and not inside.startswith("torch/"):
            library = f"{inside}:{name}"
        frame = frame.f_back
    return Site("", "", library)


MASKS = "transformers/masking_utils.py:_ignore_causal_mask_sdpa"
NO_MASK = "Transformers drops a mask that masks nothing, for a faster kernel"
PACKED = "transformers/masking_utils.py:find_packed_sequence_indices"
SEVERAL_TEXTS = "Transformers looks for several texts in a row"
TRL_LOGS = "TRL logs means, each by itself"

WANTED = [
    # Once every few sampled tokens.
    Read("rollout/graphs.py:OnItsWay.__init__", "self._host.copy_(", "rows that have ended make room"),
    # Once a policy: the engine is held against the plain decoder.
    Read("rollout/decoding.py:Decoder._forward", "self.policy.model(", NO_MASK, MASKS),
    Read("rollout/decoding.py:Decoder.draw", "if not going.any()", "drawing ends when every row has ended"),
    Read(
        "rollout/keys_values.py:RoomyLayer.batch_select_indices",
        ".nonzero()",
        "only rows that move are copied",
    ),
    Read(
        "rollout/decoding.py:Decoder._close_up",
        "self._mask.sum(1).max()",
        "columns without tokens are dropped",
    ),
    Read("rollout/engine.py:check_engine", "apart = float(", "whether logits are equal"),
    # Once for each prompt of a run, where prompts are chosen.
    Read("rl/prompts.py:PromptChooser._passed", "policy.model(", SEVERAL_TEXTS, PACKED),
    Read("rl/prompts.py:PromptChooser._passed", "last.float().cpu()", "the host predicts from states"),
    # Once a policy: decoders and tails are held against the plain model.
    Read("rollout/boundary.py:plain_log_probs", "policy.model(", SEVERAL_TEXTS, PACKED),
    Read("model/blocks.py:returned_by", "model(input_ids=", SEVERAL_TEXTS, PACKED),
    Read("rl/tail.py:_exact_tail", "apart = float(", "whether log-probs are equal"),
    Read("rl/tail.py:_exact_tail.<locals>.<genexpr>", "isfinite()", "whether gradients are numbers"),
    # Once a rollout, and once more where waiting prompts take the room.
    Read("model/norms.py:_added_by", "torch.allclose(", "whether norms can be fused"),
    Read("rollout/engine.py:Engine._prefill", "self.policy.model(", NO_MASK, MASKS),
    # Once a rollout, or a turn of one.
    Read(
        "rollout/text.py:_rollout_of",
        "longest = int(drawn.lengths.max())",
        "completions and their states are cut to the longest",
    ),
    Read("rollout/sampling.py:Rollout.prompts", "tolist()", "TRL takes prompts as lists"),
    Read("rollout/sampling.py:Rollout.unpadded", "values.tolist()", "rewards read text"),
    Read("rollout/decoding.py:Drawn.rows", "self.lengths.tolist()", "actions end where they end"),
    Read("rollout/decoding.py:Drawn.rows.<locals>.<genexpr>", "values.tolist()", "environments read text"),
    Read("rollout/boundary.py:_below.<locals>.below", "policy.model(", NO_MASK, MASKS),
    # Once a step.
    Read(
        "rl/trainer.py:LayerGRPOTrainer._prepare_inputs",
        "self._generate_and_score_completions(",
        "TRL logs lengths, rewards and completions, and pads anew what it got as lists",
        "trl/",
    ),
    Read(
        "rl/trainer.py:LayerGRPOTrainer._calculate_rewards", "super()._calculate_rewards(", TRL_LOGS, "trl/"
    ),
    Read(
        "rl/trainer.py:LayerGRPOTrainer._calculate_rewards",
        ".double().cpu()",
        "advantages are formed in NumPy",
    ),
    Read(
        "rl/trainer.py:LayerGRPOTrainer._prepare_inputs",
        "self.cut_share =",
        "the share of cut completions is shown",
    ),
    Read("rl/training.py:train_blocks", "trainer.train(", "Trainer logs the loss", "transformers/trainer.py"),
    Read(
        "rl/training.py:train_blocks",
        "trainer.train(",
        "fp16 leaves out a step whose gradients overflow",
        "accelerate/optimizer.py",
    ),
    # With training.lr=auto.
    Read(
        "rl/trainer.py:LayerGRPOTrainer.taught_tokens",
        "return int(",
        "without advantages there is no step to fit, and long completions are not all measured",
    ),
    Read("rl/trainer.py:LayerGRPOTrainer.step_kl", ".tolist()", "the rate follows how far the step went"),
    Read(
        "rl/trust_region.py:TrustRegion.on_pre_optimizer_step.<locals>.<genexpr>",
        '.to("cpu"',
        "a step may be taken back",
    ),
    # Once a micro-batch.
    Read("rl/trainer.py:LayerGRPOTrainer._take_gradient", "super()._compute_loss(", TRL_LOGS, "trl/"),
    Read(
        "rl/trainer.py:LayerGRPOTrainer._share",
        "return float(",
        "a piece's share of its micro-batch's tokens",
    ),
    Read("rl/trainer.py:teaching", ".nonzero()", "groups that teach nothing are left out"),
    Read("rl/tail.py:_on_shared_prompts", "rollout.prompt_mask.argmax(1).min()", "padding of all is cut off"),
    Read("rl/tail.py:_on_shared_prompts.<locals>.run", "policy.tail(", NO_MASK, MASKS),
    Read("rl/tail.py:_on_shared_prompts", "prompt_of_row[scored]", "first tokens that have log-probs"),
    Read("rl/tail.py:_on_shared_prompts", "scored.nonzero()", "first tokens that have log-probs"),
    Read("rl/tail.py:_on_shared_prompts", "(lengths - 1).tolist()", "packs are of like length"),
    # Once a pack.
    Read("rl/tail.py:_on_shared_prompts", "int(lengths[pack].max())", "a pack is cut to its longest row"),
    Read("rl/tail.py:_on_shared_prompts", "kept.nonzero()", "tokens that have log-probs"),
    # Once a run, or a checkpoint.
    Read("rl/checks.py:compare_log_probs", "difference =", "the update has to compute what the sampler did"),
    Read("rl/checks.py:_checksum", "return int(", "no frozen tensor may move"),
    Read("rl/trainer.py:LayerGRPOTrainer._save", "save_file(", "a checkpoint is a file", "safetensors/"),
    Read(
        "rl/trainer.py:LayerGRPOTrainer._write_checkpoint",
        "super()._save_checkpoint(",
        "so is fp16's loss scale",
        "transformers/trainer.py",
    ),
    # With model.embeddings=host.
    Read("model/host.py:move_out", 'held.pop(name).detach().to("cpu")', "it leaves the card, once"),
    Read(
        "model/host.py:move_out.<locals>.<lambda>", 'args[0].to("cpu")', "the host looks up each token's row"
    ),
]
