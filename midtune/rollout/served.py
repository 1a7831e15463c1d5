"""Whether the decode engine serves a policy: its logits are held against the plain decoder's, once."""

from __future__ import annotations

import torch

from midtune.errors import one_line
from midtune.model.memory import is_out_of_memory
from midtune.model.policy import Policy
from midtune.rollout.decoding import Decoder
from midtune.rollout.engine import Engine
from midtune.rollout.sampling import Sampling, SamplingLimits, padded
from midtune.rollout.slots import NotInSlots

# Prompts and what is fed after each drawn token, to compare with the plain decoder.
CHECKED = [[3, 5, 7, 9, 4], [4, 6, 3]], [[5], [6, 8], [3, 4, 7], [9]]
# Largest difference of logits that rounding explains, as a share of the largest logit.
MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_engine(policy: Policy) -> None:
    """Compare logits with the plain decoder's; raises NotInSlots if the engine does not serve this model."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    prompts, said = ([[token % vocabulary for token in row] for row in rows] for rows in CHECKED)
    ids, mask = padded(policy, prompts, "left")
    found = []
    for make in (Decoder, Engine):
        decoder = make(policy, ids, mask, len(said) // len(prompts))
        try:
            decoder.draw(Sampling(1, temperature=0), [1] * len(said), None, leave=False)
            decoder.follow(range(len(said)), said)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            if make is Decoder or is_out_of_memory(error):
                raise
            # An unknown architecture may raise anything.
            raise NotInSlots(one_line(str(error))) from error
        found.append(decoder.logits.float())
    apart = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    if not apart <= MOST_ERROR[policy.compute_dtype]:
        raise NotInSlots(f"its logits differ by {apart:.0e} of the largest")


def serves(policy: Policy, limits: SamplingLimits) -> bool:
    """Whether the engine samples for this policy, which is tried once; says so if it does not."""
    if limits.plain:
        return False
    if policy.in_slots is None:
        try:
            check_engine(policy)
            policy.in_slots = True
        except NotInSlots as error:
            policy.in_slots = False
            if limits.rows.on_message is not None:
                limits.rows.on_message(
                    f"{policy.source.name} is sampled by the plain decoder, which is slower on a card: {error}."
                )
    return policy.in_slots
