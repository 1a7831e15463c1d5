"""Score a policy on held-out problems, greedily and by sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from midtune import processes
from midtune.device import cuda_devices, free_bytes
from midtune.model.memory import slices
from midtune.model.policy import Policy
from midtune.rollout.sampling import Sampler, Sampling
from midtune.rollout.speech import prompt_ids
from midtune.tasks import Reward, Row, completion_of

# More rows gain nothing on a CPU and little on a GPU.
MOST_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """Scores of the same problems in the same order."""

    greedy: NDArray[np.float64]  # [n]
    sampled: NDArray[np.float64] | None  # [n] mean over `samples`; None without
    completions: list[str]  # the greedy ones
    samples: NDArray[np.float64] | None = None  # [n, samples] at the training temperature
    kept: bool = False  # from an earlier run

    @property
    def scores(self) -> NDArray[np.float64]:
        """What is compared, [n]: samples if there are any, since they show a gain first."""
        return self.greedy if self.sampled is None else self.sampled


def evaluate(
    sampler: Sampler,
    rows: Sequence[Row],
    score: Reward,
    sampling: Sampling,
    *,
    samples: int,
    seed: int = 0,
    on_problems: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score the policy of `sampler` on `rows`, greedily and by `samples` completions per problem; 0 draws none.

    `score` has TRL's reward signature, and is called on all completions of a batch of problems. Greedy `sampling`
    differs only in temperature. `seed` is the samples'; the caller's random state is unchanged. `on_problems` is
    called with the completions finished since the last call and their tokens. Processes share the problems out, and
    all return the scores of all.
    """
    policy = sampler.policy
    tokenized = [prompt_ids(policy.tokenizer, row["prompt"]) for row in rows]
    lengths = [len(ids) for ids in tokenized]
    # Batch problems of similar length, to keep padding small.
    order = sorted(range(len(rows)), key=lengths.__getitem__)

    def run(how: Sampling) -> tuple[NDArray[np.float64], list[str]]:
        draws = how.group_size
        scores = np.zeros((len(rows), draws))
        texts = [""] * len(rows)
        scored: list[tuple[int, list[float], str]] = []
        # Batches do not depend on free memory, or a seed's samples would.
        for part in slices(len(order), max(1, sampler.most_rows // draws)):
            own = processes.share(part.stop - part.start)
            batch = order[part][own]
            here = replace(how, others=(own.start * draws, (part.stop - part.start - own.stop) * draws))
            together = rows_that_fit(policy, lengths[batch[-1]] + how.max_new_tokens)
            places = [i for i in batch for _ in range(draws)]
            repeated = [rows[i] for i in places]
            # An environment begins with a prompt of its own.
            prompts = [
                tokenized[i] if begun is rows[i] else begun["prompt"]
                for i, begun in zip(places, sampler.begin(repeated), strict=True)
            ]
            with sampler.limits.rows.at_most(together):
                rollout = sampler.sample(prompts, here)
            ids = rollout.completions()
            seen = {} if rollout.environments is None else {"environments": rollout.environments}
            decoded = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found = score_completions(score, repeated, decoded, ids, **seen)
            for place, i in enumerate(batch):
                scored.append((i, found[place * draws : (place + 1) * draws], decoded[place * draws]))
            if on_problems is not None:
                on_problems(len(ids), sum(map(len, ids)))
        for i, values, text in processes.gathered(scored):
            scores[i], texts[i] = values, text
        return scores, texts

    greedy, completions = run(replace(sampling, temperature=0.0, group_size=1))
    drawn = None
    if samples:
        with torch.random.fork_rng(devices=cuda_devices(policy.device)):
            torch.manual_seed(seed)
            drawn, _ = run(replace(sampling, group_size=samples))
    return Evaluation(greedy[:, 0], None if drawn is None else drawn.mean(axis=1), completions, drawn)


def score_completions(
    score: Reward, rows: Sequence[Row], texts: Sequence[str], ids: Sequence[list[int]], **seen: Any
) -> list[float]:
    """Call a reward as TRL does, with every other column of the rows and `seen`; None counts as 0."""
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    found = score(
        prompts=[row["prompt"] for row in rows],
        completions=[completion_of(row["prompt"], text) for row, text in zip(rows, texts, strict=True)],
        completion_ids=list(ids),
        **seen,
        **columns,
    )
    return [0.0 if value is None else float(value) for value in found]


def rows_that_fit(policy: Policy, tokens: int) -> int:
    """How many rows of `tokens` tokens fit into memory together, by their keys and values."""
    if policy.device.type != "cuda":
        return MOST_ROWS
    config: Any = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * policy.num_blocks * heads * width * tokens * policy.compute_dtype.itemsize
    # A step holds its logits several times in fp32.
    row_bytes += 20 * config.vocab_size
    # A growing cache briefly holds its old and its new tensors.
    return int(max(1, min(MOST_ROWS, free_bytes(policy.device) // 3 // row_bytes)))
