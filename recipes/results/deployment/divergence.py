"""How far a model in 4-bit is from its unquantized self, before any training: the table in ../deployment.md.

python recipes/results/deployment/divergence.py RECIPE [WAY …] [--problems N] [--texts N]

A WAY is `nearest` or `calibrated`, with `@TOKENS` to calibrate on another number of tokens, and with `+14,16` to keep
those blocks unquantized. Prints a line of JSON each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from midtune.config import RunConfig, load_config, with_settings
from midtune.model import rounding
from midtune.model.policy import Policy
from midtune.report.terminal import Terminal
from midtune.rl.training import sampling_of
from midtune.stages.opening import Opened

TOKENS = rounding.TOKENS


def opened(config: RunConfig, way: str) -> tuple[Opened, Policy]:
    """The policy that a way gives, and what it was opened from; `none` is unquantized."""
    head, _, keep = way.partition("+")
    kind, _, tokens = head.partition("@")
    rounding.TOKENS = int(tokens or TOKENS)
    if kind != "none":
        config = with_settings(config, {"model.rounding": kind})
    found = Opened(config, Terminal(quiet=True))
    policy = found.policy(quantize="none" if kind == "none" else "nf4")
    for block in filter(None, keep.split(",")):
        policy.thaw(int(block))
    return found, policy


@torch.no_grad()
def log_probs(policy: Policy, texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Log-probs [T, V] at the completions' places of (prompt, completion)."""
    found = []
    for prompt, completion in texts:
        logits = policy.model(torch.tensor([prompt + completion], device=policy.device)).logits[0]
        found.append(logits[len(prompt) - 1 : -1].float().log_softmax(-1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("ways", nargs="*", default=["nearest", "calibrated"])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--texts", type=int, default=48)
    given = parser.parse_args()
    known = {"task.eval_size": max(given.problems, given.texts), "evaluation.samples": 0}
    config = load_config(given.recipe, known)

    def greedy(source: Opened, policy: Policy) -> float:
        source.score_first(given.problems)
        return float(source.score(source.sampler(policy), "scoring").greedy.mean())

    source, policy = opened(config, "none")
    sampler, sampling = source.sampler(policy), replace(sampling_of(config.training), group_size=1)
    torch.manual_seed(1)
    drawn = sampler.sample([row["prompt"] for row in source.task.held_out[: given.texts]], sampling)
    texts = list(zip(drawn.prompts(), drawn.completions(), strict=True))
    reference = log_probs(policy, texts)
    print(json.dumps({"way": "none", "greedy": greedy(source, policy)}), flush=True)
    for way in given.ways:
        source, policy = opened(config, way)
        own = log_probs(policy, texts)
        divergence: Any = (reference.exp() * (reference - own)).sum(-1)
        line = {
            "way": way,
            "kl": float(divergence.mean()),
            "same_token": float((reference.argmax(-1) == own.argmax(-1)).float().mean()),
            "greedy": greedy(source, policy),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
