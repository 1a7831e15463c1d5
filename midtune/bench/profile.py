"""Where the time of a step goes, by kind of work, and the speed of matrix products alone."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.rollout.sampling import Sampling, SamplingLimits, padded
from midtune.rollout.text import sample

# Kind of work → parts of its operators' names; the first match counts.
KINDS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::matmul", "::_linear_pointwise", "gemm"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "unpacking weights": ("dequantize", "_reorder_linear_weight"),
}
# Operators that allocate and compute nothing.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view")
# Sampled to count operators.
FEW_TOKENS = 4
OTHER, BETWEEN = "other operators", "between operators"


def kind_of(operator: str) -> str:
    """The kind of work that an operator such as `aten::mm` does."""
    return next((kind for kind, names in KINDS.items() if any(name in operator for name in names)), OTHER)


class BenchMeter(Meter):
    """A meter that enters the context made by `during_rollout` for the length of each rollout."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.during_rollout: Callable[[], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), self.during_rollout() if name == "rollout" else nullcontext():
            yield


class Profile(TrainerCallback):
    """Profiles the last step of a trainer: its `rollout`, and what follows as `update`."""

    def __init__(self, meter: BenchMeter, device: torch.device, last: int) -> None:
        self.meter = meter
        self.last = last
        # Peak bytes before the last step, since the profiler's records take memory too.
        self.peak = 0
        self.found: dict[str, dict[str, float]] = {}
        self._cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities)
        self._update = ExitStack()

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.last - 1:
            self.peak = self.meter.peak_bytes()
            self._profiler.start()
            self.meter.during_rollout = partial(self._rollout, self.meter.during_rollout)

    @contextmanager
    def _rollout(self, inner: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        with inner(), self._phase("rollout"):
            yield
        self._update.enter_context(self._phase("update"))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with record_function(name):
            yield
            if self._cuda:
                # Kernels launched inside belong to the phase, whenever the card runs them.
                torch.cuda.synchronize()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            self._update.close()
            self._profiler.stop()
            self.found = seconds_by_kind(self._profiler.events(), ("rollout", "update"), on_card=self._cuda)


def seconds_by_kind(
    events: Iterable[Any], phases: Sequence[str], *, on_card: bool
) -> dict[str, dict[str, float]]:
    """Seconds by phase and kind of work or `between operators`; `phases` names the events that stand for phases.

    On a card each kernel appears twice: as its own event, and in the device time of the operator that launched it,
    which is what counts.
    """
    events = [event for event in events if event.device_type.name == "CPU"]
    found: dict[str, dict[str, float]] = {}
    for name in phases:
        whole = next(event for event in events if event.name == name)
        own: dict[str, float] = {}
        for event in events:
            inside = whole.time_range.start <= event.time_range.start <= whole.time_range.end
            if event is whole or not inside or event.name in phases:
                continue
            microseconds = event.self_device_time_total if on_card else event.self_cpu_time_total
            own[kind_of(event.name)] = own.get(kind_of(event.name), 0.0) + microseconds / 1e6
        seconds = whole.time_range.elapsed_us() / 1e6
        own[BETWEEN] = max(0.0, seconds - sum(own.values()))
        found[name] = own
    return found


class Operators(TorchDispatchMode):
    """Counts the operators that compute while `block` passes one token a row; views and empty tensors do not count."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block, self._inside = block, False
        self.passes = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        is_view = any(part.alias_info and not part.alias_info.is_write for part in func._schema.returns)
        self.count += self._inside and not is_view and func.overloadpacket.__name__ not in FREE
        return found

    def per_pass(self, decode: Callable[[], Any]) -> float:
        """Operators of a pass, the mean of those in `decode`."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._inside = hidden.size(1) == 1
            self.passes += self._inside

        def leave(*_: Any) -> None:
            self._inside = False

        hooks = [
            self._block.register_forward_pre_hook(enter, with_kwargs=True),
            self._block.register_forward_hook(leave),
        ]
        try:
            with self:
                decode()
        finally:
            for hook in hooks:
                hook.remove()
        return self.count / max(self.passes, 1)


def operators_per_token(policy: Policy, prompts: list[list[int]], group_size: int) -> dict[str, float]:
    """Operators of a block and decoded token, by midtune's `sampler` and by transformers' `generate`."""
    block = policy.blocks[-1]
    sampling = Sampling(FEW_TOKENS, group_size=group_size)
    ids, mask = padded(policy, prompts, "left")
    limits = SamplingLimits(graphs=False)
    ours = Operators(block).per_pass(lambda: sample(policy, prompts, sampling, limits=limits))
    with torch.no_grad(), policy.autocast():
        theirs = Operators(block).per_pass(
            lambda: policy.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                max_new_tokens=FEW_TOKENS,
                num_return_sequences=group_size,
            )
        )
    return {"sampler": ours, "generate": theirs}


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest of ten products of square matrices."""
    # A card is not at full speed on smaller ones.
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * size**3 / min(timeit.repeat(product, number=1, repeat=10))
