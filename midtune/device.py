"""A run's device: which one, in which dtype, and how much memory is left.

All questions to CUDA are asked here, so a test can replace `torch.cuda` and needs no card.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from midtune.errors import InputError

if TYPE_CHECKING:
    import torch

# Set once this process and its children see a single card: the number by which the user named it.
ONLY_CARD = "MIDTUNE_ONLY_CARD"
# Share of a card's memory a process may take if the driver would spill to the host.
MOST_ON_CARD = 0.95
DTYPES = ("bf16", "fp16", "fp32")


def show_one_card(name: str, cards: int) -> None:
    """Hide every card but the one `name` (`auto`, `cpu`, `cuda` or `cuda:N`) means; call it before torch starts CUDA.

    Trainer spreads a model over all visible cards, and accelerate moves it to the first. Each of several processes sees
    the card of its own number. `cards` is how many the machine has; raises InputError if those are fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
    _, _, number = name.partition(":")
    index = int(number) if number.isdecimal() else 0
    if name == "cpu" or ONLY_CARD in os.environ:
        return
    if cards > 0 and (processes := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
        if number or processes > len(visible):
            raise InputError(
                f"{processes} processes need a card each, but --device {name} has {1 if number else len(visible)}; "
                "start no more than there are cards, and choose among them with CUDA_VISIBLE_DEVICES."
            )
        index = int(os.environ["LOCAL_RANK"])
        # accelerate would look for it under its old number.
        os.environ["LOCAL_RANK"] = "0"
    elif "LOCAL_RANK" in os.environ or index >= len(visible) > 0:
        return
    if len(visible) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index]
        os.environ[ONLY_CARD] = str(index)


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device; raises InputError if there is no such device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N.") from None
    if target.type == "cuda":
        if str(target.index) == os.environ.get(ONLY_CARD):
            target = torch.device("cuda:0")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (target.index or 0) >= found:
            raise InputError(
                f"device {name} was asked for, but this machine has {found} CUDA devices that torch "
                f"{torch.__version__} can use; use --device cpu, or install a CUDA build of torch."
            )
        if spills_to_host():
            torch.cuda.set_per_process_memory_fraction(MOST_ON_CARD, target)
    elif target.type != "cpu":
        raise InputError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    return target


def spills_to_host() -> bool:
    """Whether a full card spills to host memory, which is slow: on Windows and WSL."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def compute_dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on GPUs that have it, fp16 on older ones; fp32 on CPUs, most of which are slow in bf16."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def dtype_named(name: str) -> torch.dtype | None:
    """`bf16`, `fp16` or `fp32` as a dtype; None for `auto`."""
    import torch

    return dict(zip(DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True)).get(name)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of activations on a device: the named one, or for `auto` the one that suits it."""
    return dtype_named(name) or compute_dtype_of(device)


def total_bytes(device: Any) -> int:
    """Total memory in bytes of a torch device or device name."""
    if is_cuda(device):
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    return int(psutil.virtual_memory().total)


def free_bytes(device: Any) -> int:
    """Bytes that can still be allocated on a torch device or device name.

    Includes freed memory that torch's allocator keeps; the driver counts it as taken.
    """
    if is_cuda(device):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    import psutil

    return int(psutil.virtual_memory().available)


def reachable_bytes(device: Any) -> int:
    """Bytes that this process can hold in all on a device: what can still be allocated, and what its tensors hold."""
    if is_cuda(device):
        import torch

        return free_bytes(device) + int(torch.cuda.memory_allocated(device))
    return free_bytes(device)


def is_cuda(device: Any) -> bool:
    """Whether a torch device or device name is a card."""
    return str(device).startswith("cuda")


def random_state(device: torch.device) -> torch.Tensor:
    """State of the generator that draws on `device`."""
    import torch

    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore what `random_state` returned."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def cuda_devices(device: torch.device) -> list[torch.device]:
    """The cards whose generators `torch.random.fork_rng` must save."""
    return [device] if device.type == "cuda" else []
