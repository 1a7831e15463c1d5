"""Every decoder-only architecture: what the sampler, the tail and the plain model compute is the same.

`python -m tests.test_architectures` writes the table of them, recipes/results/architectures.md; names may follow. With
`--seconds` it measures the column of seconds alone, for which nothing else should run.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from midtune.model.loading import load_policy
from midtune.model.patch import apply_patch, deployed_tensors, merge_patch, save_patch
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.planning.skeleton import planned_tail
from midtune.rl.tail import TAILS, completion_log_probs
from midtune.rollout.apart import ApartDecoder, WholeDecoder
from midtune.rollout.boundary import whole_rows, with_boundary
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits
from midtune.rollout.text import TextSampler, sample
from tests.architectures import EVERY
from tests.conftest import write_checkpoint
from tests.model.toy_training import perturb
from tests.plain import PROMPTS, plain_log_probs, stop_early

Load = Callable[..., Policy]
TABLE = Path(__file__).parents[1] / "recipes" / "results" / "architectures.md"
# Of each way to sample and to update, and of what makes an architecture difficult.
FAST = (
    "gpt2 opt bloom granite cohere gemma3n_text gemma4_text minicpm3 modernbert-decoder openai-gpt "
    "qwen3_5_text falcon_h1 lfm2 mamba2 mamba"
).split()
# No configuration says that they have no cache, or one of their own, or that Gemma 3n's streams cannot be shared.
PLANNED_OTHERWISE = {"openai-gpt", "rwkv", "xlstm", "gemma3n_text"}
FAST_TO_MERGE = {"gpt2", "gemma3n_text", "qwen3_5_text", "mamba2", "lfm2"}
SAMPLERS = {None: "slots", ApartDecoder: "apart", WholeDecoder: "no cache"}


@dataclass
class Found:
    """What one architecture shows; differences are the largest over the blocks."""

    sampler: str
    tails: list[str]
    log_probs: float
    gradient: float


def gradient(policy: Policy, log_probs: torch.Tensor) -> torch.Tensor:
    """Of a weighted sum of log-probs, over all trained parameters; 0 where a parameter plays no part."""
    weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(policy.trained_parameters().values())
    loss = (log_probs * weights).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def compare(policy: Policy, block: int) -> tuple[float, float]:
    """Largest difference of log-probs, and relative one of gradients, to the plain model's, row by row."""
    policy.thaw(block)
    torch.manual_seed(0)
    rollout = sample(policy, PROMPTS[:3], Sampling(max_new_tokens=9, group_size=2), boundary_block=block)
    assert rollout.boundary is not None
    found, _ = completion_log_probs(policy, rollout, temperature=1.0)
    right, _ = plain_log_probs(policy, rollout, 1.0)
    log_probs = max(float((part - right).detach().abs().max()) for part in (found, rollout.log_probs))
    ours, theirs = gradient(policy, found), gradient(policy, right)
    again = with_boundary(TextSampler(policy, SamplingLimits()), rollout, block).boundary
    assert again is not None
    fed = (rollout.completion_mask.cumsum(1) < rollout.completion_mask.sum(1, keepdim=True))[..., None]
    torch.testing.assert_close(
        again.completion * fed, rollout.boundary.completion * fed, atol=1e-3, rtol=1e-4
    )
    policy.restore()
    return log_probs, float((ours - theirs).norm() / theirs.norm())


def exactness(policy: Policy, blocks: Sequence[int]) -> Found:
    stop_early(policy)
    differences = [compare(policy, block) for block in blocks]
    architecture = policy.model.config.model_type
    planned = [planned_tail(policy.model.config, block) for block in blocks]
    assert architecture in PLANNED_OTHERWISE or planned == [policy.tails[block] for block in blocks]
    log_probs, gradients = map(max, zip(*differences, strict=True))
    sampler = "slots" if policy.in_slots else SAMPLERS.get(policy.decoder, "shared")
    return Found(sampler, [policy.tails[block] for block in blocks], log_probs, gradients)


# Other blocks share their parameters.
OWN = {"zamba": (0, 2), "zamba2": (0, 2)}


@pytest.mark.parametrize("architecture", FAST)
def test_what_is_computed_is_exact(load: Load, architecture: str) -> None:
    found = exactness(load(architecture, "nf4", **EVERY[architecture]), [2])
    assert (found.log_probs < 1e-4, found.gradient < 1e-4) == (True, True), found


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("architecture", EVERY)
def test_what_is_computed_is_exact_everywhere(load: Load, architecture: str, quantize: str) -> None:
    found = exactness(load(architecture, quantize, **EVERY[architecture]), OWN.get(architecture, (0, 2, 3)))
    assert (found.log_probs < 1e-4, found.gradient < 1e-4) == (True, True), found


MERGED = [pytest.param(name, marks=() if name in FAST_TO_MERGE else pytest.mark.slow) for name in EVERY]


@pytest.mark.parametrize("architecture", MERGED)
def test_patch_and_base_are_what_is_merged_and_generates(
    load: Load, architecture: str, tmp_path: Path
) -> None:
    policy = load(architecture, "nf4", **EVERY[architecture])
    policy.thaw(2)
    perturb(policy)
    save_patch(policy, tmp_path / "patch")
    source = policy.source
    tensors = deployed_tensors(source, tmp_path / "patch")
    merge_patch(source, tensors, tmp_path / "merged")
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "merged")
    )
    expected = {**base, **tensors}
    assert merged.keys() == expected.keys() == base.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    fresh = load(architecture, "none", **EVERY[architecture])
    apply_patch(fresh, tmp_path / "patch")
    (drawn,) = sample(fresh, PROMPTS[:1], Sampling(max_new_tokens=6, temperature=0)).completions()
    said = list(PROMPTS[0])
    for token in drawn:
        with torch.no_grad():
            found = whole(input_ids=torch.tensor([said]), use_cache=False).logits[0, -1].argmax()
        assert int(found) == token
        said.append(token)


@contextmanager
def saved(architecture: str) -> Iterator[Callable[[str], Policy]]:
    """A function that loads a random model, `none` or `nf4`."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), architecture, **EVERY[architecture])
        yield lambda quantize: load_policy(resolve(folder), quantize=quantize, device="cpu")


def fastest(run: Callable[[], object]) -> float:
    """The least seconds of seven runs, fewer where they are long, after one that does not count."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 8 and sum(seconds) < 6):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def update_cost(architecture: str, kind: str | None = None) -> float:
    """Seconds of an update of the third block, in forward passes of the whole model over the same rows.

    `kind` is that of the tail; None: the policy's own.
    """
    with saved(architecture) as load:
        policy = load("none")
        policy.thaw(2)
    if kind is not None:
        policy.tails[2] = kind
    torch.manual_seed(0)
    prompts, completions = (torch.randint(3, 250, shape) for shape in ((4, 64), (32, 32)))
    ones, none = torch.ones_like(completions), torch.zeros(completions.shape)
    rollout = Rollout(prompts, torch.ones_like(prompts), completions, ones, none, none, none[:, 0].bool())
    rollout = with_boundary(TextSampler(policy, SamplingLimits()), rollout, 2)
    ids = whole_rows(rollout)[0]

    def update() -> None:
        gradient(policy, completion_log_probs(policy, rollout, temperature=1.0)[0])

    def forward() -> None:
        with torch.no_grad():
            policy.model(input_ids=ids, use_cache=False)

    return fastest(update) / fastest(forward)


@cache
def shared_cost() -> float:
    return update_cost("qwen3", "shared")


def seconds(architecture: str) -> str:
    """The last cell of an architecture's row."""
    return f"{update_cost(architecture) / shared_cost():.1f}"


def row(architecture: str) -> list[str]:
    """The cells of the architecture's row, without the seconds."""
    found = []
    with saved(architecture) as load:
        for quantize in ("none", "nf4"):
            policy = load(quantize)
            found.append(exactness(policy, OWN.get(architecture, (0, 2, 3))))
    kinds = len(policy.kinds([0, 1, 2, 3]).split(",")) if policy.kinds([0, 1, 2, 3]) else 1
    tails = "/".join(dict.fromkeys(found[1].tails))
    log_probs, slope = max(part.log_probs for part in found), max(part.gradient for part in found)
    return [str(kinds), found[1].sampler, tails, f"{log_probs:.0e}", f"{slope:.0e}"]


def rows_of(text: str) -> dict[str, list[str]]:
    """Architecture → its cells in a table."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return {first: rest for first, *rest in cells[2:]}


def test_the_table_lists_what_is_tested_and_all_of_it_is_exact() -> None:
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    assert rows.keys() == EVERY.keys()
    assert all(float(cell) < 1e-4 for cells in rows.values() for cell in cells[3:5])
    assert all(float(cells[5]) > 0 for cells in rows.values())


def test_the_readme_names_architectures_of_the_table() -> None:
    readme = (TABLE.parents[2] / "README.md").read_text(encoding="utf-8")
    named = re.search(r"\[(\d+) architectures\]\S+\s+are tested, (.*?) among them", readme, re.DOTALL)
    assert named is not None
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    assert int(named[1]) == len(rows)
    for name in re.split(r",\s+|\s+and\s+", named[2]):
        family = name.lower().replace(".", "_")
        assert any(row.startswith(family) for row in rows), name


def main(names: Sequence[str], *, only_seconds: bool) -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = rows_of(text)
    for name in names or (rows if only_seconds else EVERY):
        try:
            known = rows[name][:5] if only_seconds else row(name)
            rows[name] = [*known, seconds(name)]
        except Exception as error:
            print(f"{name}: {type(error).__name__} {error}", file=sys.stderr)
            continue
        print(name, *rows[name], flush=True)
        head = [line for line in text.splitlines() if line[:2] != "| " or line.startswith("| architecture")]
        lines = ["| " + " | ".join([name, *rows[name]]) + " |" for name in EVERY if name in rows]
        TABLE.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    costs = {kind: update_cost("qwen3", kind) / shared_cost() for kind in TAILS}
    told = ", ".join(f"{kind} {cost:.1f}" for kind, cost in costs.items())
    text = re.sub(r"(?<=each tail: ).*(?=\.$)", told, TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    main([name for name in given if name != "--seconds"], only_seconds="--seconds" in given)
