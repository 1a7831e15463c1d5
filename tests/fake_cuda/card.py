"""A card that is not there: tensors on `cuda:0` whose values are on the host.

Above the kernels everything is CUDA's: autocast, the dispatcher, the rules of devices, the code that asks for a card.
The kernels are the CPU's, so results are true, and with them whatever is decided by reading them. Fake tensors would
have CUDA's rules too, but no values to read and no backward pass: without a driver the autograd engine raises.

Needs a CUDA build of torch, since others do not know CUDA's devices below Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from midtune.model.policy import Policy
from tests.recorded import GRAPHS

CARD = torch.device("cuda:0")
MEMORY_BYTES = 2**33
aten = torch.ops.aten
# One tensor is written into another, which may be on the other device.
CROSSINGS = (aten._to_copy.default, aten.copy_.default)
# What is indexed may be on the card and the indices on the host, but not the other way round.
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
# What an operator returns depends on values, or how much it returns.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Called with each operator whose result the host has to wait for.
OnRead = Callable[[Any], None]


class OnCard(torch.Tensor):
    """A tensor on the card; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        found: OnCard = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CARD,
        )
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {}, on_read=lambda func: None)

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copied = OnCard(self.held.clone())
            memo[id(self)] = as_parameter(copied, self) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A file holds values; they come back on the host, where Trainer loads them.
        return self.held.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnCard) -> None:
        torch.Tensor.data.__set__(self, value)
        self.held = value.held


class Card(TorchDispatchMode):
    """Computes what is asked of the card."""

    def __init__(self, on_read: OnRead) -> None:
        super().__init__()
        self.on_read = on_read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {}, self.on_read)


def computed(func: Any, args: Any, kwargs: dict[str, Any], on_read: OnRead) -> Any:
    """What an operator returns, on the device where it would be with a card."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    asked = kwargs.get("device")
    there = any(isinstance(tensor, OnCard) for tensor in tensors)
    to_card = torch.device(asked).type == "cuda" if asked is not None else there
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if not there and not to_card:
        return func(*args, **kwargs)
    check_devices(func, args, kwargs, tensors)
    if func is aten.copy_.default:
        to_card = isinstance(args[0], OnCard)
    if is_read(func, args, there, to_card):
        on_read(func)
    held_args, held_kwargs = tree_map_only(OnCard, lambda tensor: tensor.held, (args, kwargs))
    if asked is not None:
        held_kwargs["device"] = "cpu"
    efficient = func is aten._scaled_dot_product_efficient_attention.default
    found = (efficient_attention if efficient else func)(*held_args, **held_kwargs)
    if not to_card or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(found)):
        return found
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, OnCard, found))


def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    wants_totals: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """CUDA's kernel by the CPU's: with one mask for all heads, and totals for a multiple of 32 queries."""
    found, totals = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, is_causal, attn_mask=mask.expand(*query.shape[:3], -1), scale=scale
    )
    queries = query.size(2)
    totals = torch.nn.functional.pad(totals, (0, -queries % 32))
    return found, totals, torch.zeros(()), torch.zeros(())


def check_devices(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    """Raise as CUDA does where tensors of two devices meet, or a generator is on the wrong one."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"{func}: the generator is on {generator.device}, the result on {CARD}")
    if func in CROSSINGS:
        return
    if func in INDEXING and isinstance(args[0], OnCard):
        tensors = [args[0], *args[2:3]]
    # A single number may come from the host.
    if len({tensor.device for tensor in tensors if tensor.dim() > 0 or isinstance(tensor, OnCard)}) > 1:
        where = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{func}: tensors are on different devices: {where}")


def is_read(func: Any, args: Any, there: bool, to_card: bool) -> bool:
    """Whether the host waits for values that the card has."""
    if func in CROSSINGS:
        return there and not to_card
    if func in INDEXING:
        masked = any(isinstance(index, OnCard) and index.dtype == torch.bool for index in args[1])
        # To write a single number by a mask takes no list of places.
        return masked and not (len(args) > 2 and args[2].numel() == 1)
    return there and bool(READING & set(func.tags))


@contextlib.contextmanager
def card(on_read: OnRead) -> Iterator[None]:
    """There is a card inside, for torch and for all that asks torch."""
    # As FakeTensorMode does: no driver is asked for streams, and `torch.tensor` fills on the host what it then moves.
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    answer_for_contexts()
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attention, "AutogradCUDA")
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        for name, answer in ANSWERS.items():
            patch.setattr(torch.cuda, name, answer)
            if hasattr(torch.cuda.random, name):
                patch.setattr(torch.cuda.random, name, answer)
        # A module that moves gets other parameters, and one that stays gets other values.
        patch.setattr(torch, "_has_compatible_shallow_copy_type", lambda old, new: old.device == new.device)
        with Card(on_read):
            yield
    library._destroy()
    torch._C._set_only_lift_cpu_tensors(False)


def nothing(*_: Any) -> None:
    """Does nothing."""


def no_bytes(*_: Any) -> int:
    """As many as a card's allocator holds that is never asked."""
    return 0


class Event:
    """What was asked of the card before has always been done."""

    record = synchronize = nothing


# What torch.cuda answers. The card draws from the host's generator.
ANSWERS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda **_: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
    "get_device_capability": lambda *_: (8, 9),
    "get_device_name": lambda *_: "no card",
    "get_device_properties": lambda *_: SimpleNamespace(
        name="no card", uuid="0", major=8, minor=9, total_memory=MEMORY_BYTES, multi_processor_count=64
    ),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    "memory_allocated": no_bytes,
    "memory_reserved": no_bytes,
    "max_memory_allocated": no_bytes,
    "max_memory_reserved": no_bytes,
    "reset_peak_memory_stats": nothing,
    "init": nothing,
    "_lazy_init": nothing,
    "set_device": nothing,
    "synchronize": nothing,
    "empty_cache": nothing,
    "manual_seed": nothing,
    "manual_seed_all": nothing,
    "Event": Event,
    **GRAPHS,
}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """In plain operators: to choose between its kernels, CUDA asks the driver."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    found: torch.Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, is_causal, **kwargs
    )[0]
    return found


@ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)
def has_primary_context(hooks: int, device: int) -> bool:
    """Whether streams of the card are in use that a backward pass has to wait for."""
    return False


@functools.cache
def answer_for_contexts() -> Any:
    """Let `has_primary_context` answer for the method of that name of torch's CUDA hooks, which would ask a driver.

    Nothing in Python reaches it, so it is replaced in a copy of the object's table of virtual methods, where its
    place is found by trying: any other leaves the backward pass as it is, which raises.

    Returns:
        The table, which has to live as long as the process.
    """
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    torch_cpu._ZN2at6detail12getCUDAHooksEv.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = torch_cpu._ZN2at6detail12getCUDAHooksEv()
    # Two words come before the methods, of which the first two destroy the object.
    word, before, most = ctypes.sizeof(ctypes.c_void_p), 2, 16
    real = hooks[0]
    for place in range(2, most):
        words = ctypes.string_at(real - before * word, 64 * word)
        table = (ctypes.c_void_p * 64).from_buffer_copy(words)
        table[before + place] = ctypes.cast(has_primary_context, ctypes.c_void_p).value
        hooks[0] = ctypes.addressof(table) + before * word
        try:
            OnCard(torch.ones(())).requires_grad_().mul(2).backward()
            return table
        except RuntimeError:
            hooks[0] = real
    raise RuntimeError(f"torch {torch.__version__} asks for CUDA contexts in a way that is not known here")


def move(policy: Policy) -> Policy:
    """Put a policy on the card; loading cannot, since bitsandbytes writes through pointers when it packs."""
    moved: dict[int, nn.Parameter] = {}
    for module in policy.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = as_parameter(OnCard(parameter.detach()), parameter)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else OnCard(buffer)
    return policy


def as_parameter(tensor: torch.Tensor, like: Any) -> nn.Parameter:
    """`tensor` as a parameter with what `like` carries, such as a 4-bit state."""
    made = nn.Parameter(tensor, requires_grad=like.requires_grad)
    for name, value in vars(like).items():
        if name not in ("held", "_is_param"):
            setattr(made, name, moved_state(value) if name == "quant_state" else value)
    return made


def moved_state(state: Any) -> Any:
    """A 4-bit state whose tensors are on the card."""
    if state is not None and not isinstance(state.absmax, OnCard):
        state.absmax, state.code = OnCard(state.absmax), OnCard(state.code)
        if state.nested:
            state.offset, state.state2 = OnCard(state.offset), moved_state(state.state2)
    return state
