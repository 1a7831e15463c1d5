"""The policy: a frozen model in which a few blocks are trained."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from midtune.errors import InputError
from midtune.model.blocks import cache_argument, find_blocks, logits_of, resumed, returned_by
from midtune.model.host import is_here
from midtune.model.names import Names
from midtune.model.quantize import count_values, expert_modules, is_quantized, plain_name, thawed
from midtune.model.sources import Source, checkpoint_files, stored_tensors

if TYPE_CHECKING:
    from peft import PeftModel


class Policy:
    """A causal language model, frozen except for the blocks in `trained`.

    The tokenizer has a chat template. `compute_dtype` is that of activations; trained parameters are always fp32.
    `thaw` reads a block's original tensors from `source`, unless that is itself in 4-bit (`stored_quantized`). The
    experts of a trained block stay frozen unless `with_experts`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        *,
        compute_dtype: torch.dtype,
        stored_quantized: bool = False,
        with_experts: bool = True,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        # Whether the decode engine serves this model; None until it is tried.
        self.in_slots: bool | None = None
        # The plain decoder that is exact for this model, and by first block the tail that is; tried once each.
        self.decoder: Any = None
        self.tails: dict[int, str] = {}
        self.tokenizer, self.source = tokenizer, source
        self.compute_dtype, self.stored_quantized = compute_dtype, stored_quantized
        self.with_experts = with_experts
        self.stack_name, self.blocks = find_blocks(model)
        self.quantized = is_quantized(model)
        self.total_parameters = count_parameters(model)
        self.adapter: PeftModel | None = None
        self.adapted: list[int] = []
        self._frozen: dict[int, nn.Module] = {}
        self._reference: dict[int, nn.Module] = {}
        # Values of the parameters outside the blocks before `thaw_all`.
        self._outside: dict[nn.Parameter, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def computes(self) -> str:
        """Device and dtype, for people: `cuda:0 in bfloat16`."""
        return f"{self.device} in {str(self.compute_dtype).removeprefix('torch.')}"

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def kinds(self, blocks: list[int]) -> str:
        """What some blocks mix tokens with, for people, where a model's blocks differ: ` (linear attention)`."""
        config: Any = self.model.config.get_text_config()
        known = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
        found = dict.fromkeys(known[block].replace("_", " ") for block in blocks if block < len(known))
        return f" ({', '.join(found)})" if len(set(known)) > 1 and found else ""

    @property
    def trained(self) -> list[int]:
        """Numbers of the blocks trained now, ascending."""
        return self.adapted or sorted(self._frozen)

    @property
    def whole(self) -> bool:
        """Whether every parameter is trained, embeddings and head too."""
        return bool(self._outside)

    @property
    def stop_token_ids(self) -> list[int]:
        """Every token that ends a completion, by the generation config and the tokenizer."""
        declared = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return stop_ids(declared, self.tokenizer)

    def autocast(self) -> AbstractContextManager[Any]:
        """Let fp32 blocks work among activations of the compute dtype; does nothing in fp32."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @cached_property
    def cache_argument(self) -> str:
        return cache_argument(self.model)

    @cached_property
    def _returned(self) -> int:
        return returned_by(self.model, self.blocks[0])

    def tail(self, first: int, states: torch.Tensor | None, *, checkpointing: bool = False) -> nn.Module:
        """The model without its head, with `states` entering block `first`; see `resumed`."""
        returned = self._returned if first > 0 else 0
        return resumed(
            self.model, self.stack_name, first, states, returned=returned, checkpointing=checkpointing
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of states [T, H] that leave the last norm, as the architecture makes them."""
        return logits_of(self.model, self.stack_name, hidden)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model → parameter, for everything that requires a gradient."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def thaw(self, block: int) -> None:
        """Replace `block` by trainable fp32 masters from the checkpoint.

        Raises InputError if it does not exist, or if other blocks use its parameters too.
        """
        self.check_block(block)
        own = {id(parameter) for parameter in self.blocks[block].parameters()}
        for other, part in enumerate(self.blocks):
            if other != block and any(id(parameter) in own for parameter in part.parameters()):
                raise InputError(
                    f"block {block} was asked for, but in {self.source.name} it shares parameters with block {other}, "
                    "so it cannot be trained alone; choose a block with its own."
                )
        if block not in self._frozen:
            frozen = self.blocks[block]
            self.blocks[block] = thawed(frozen, self.original_tensors(block), with_experts=self.with_experts)
            self._frozen[block] = frozen

    def thaw_all(self) -> None:
        """Make every parameter trainable, embeddings, final norm and head too.

        Raises InputError if the model is in 4-bit or its input embedding on the host.
        """
        if self.quantized:
            raise InputError(
                f"full training of {self.source.name} was asked for, but its blocks are in 4-bit, so it would start "
                "from other weights; add --quantize none."
            )
        if not is_here(self.model):
            raise InputError(
                f"full training of {self.source.name} trains its input embedding, which is kept on the host; leave out "
                "model.embeddings=host."
            )
        for block in range(self.num_blocks):
            self.thaw(block)
        inside = {id(p) for p in self.blocks.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in inside:
                self._outside[parameter] = parameter.data
                parameter.data = parameter.data.float().clone()
                parameter.requires_grad_(True)

    def restore(self) -> None:
        """Undo thawing and LoRA, bit for bit; drops what was trained."""
        if self.adapter is not None:
            self.adapter.unload()
            self.adapter, self.adapted = None, []
        self._put(self._frozen, self._outside)
        for parameter in self._outside:
            parameter.grad = None
            parameter.requires_grad_(False)
        for kept in (self._frozen, self._reference, self._outside):
            kept.clear()

    def _put(self, blocks: Mapping[int, nn.Module], outside: Mapping[nn.Parameter, torch.Tensor]) -> None:
        for number, block in blocks.items():
            self.blocks[number] = block
        for parameter, data in outside.items():
            parameter.data = data

    def add_lora(self, blocks: list[int], rank: int) -> None:
        """Put LoRA matrices (PEFT's, fp32) on every linear layer of `blocks`, which stay frozen."""
        from peft import LoraConfig, get_peft_model

        for block in blocks:
            self.check_block(block)
        linears = [
            f"{self.stack_name}.{block}.{name}"
            for block in blocks
            for name, part in self.blocks[block].named_modules()
            if isinstance(part, nn.Linear)
        ]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, task_type="CAUSAL_LM")
        self.use_adapter(get_peft_model(self.model, config), blocks)

    def use_adapter(self, adapter: PeftModel, blocks: list[int]) -> None:
        """Train an existing PEFT adapter of this policy's model on `blocks`."""
        self.adapter, self.adapted = adapter, sorted(blocks)
        for parameter in self.trained_parameters().values():
            parameter.data = parameter.data.float()

    def keep_reference(self) -> None:
        """Keep a copy of the trained blocks; `reference` computes with it."""
        if self.adapter is None:
            for k in self._frozen:
                shared = {id(part): part for part in self.blocks[k].parameters() if not part.requires_grad}
                self._reference[k] = copy.deepcopy(self.blocks[k], shared).requires_grad_(False)

    def reference(self) -> AbstractContextManager[None]:
        """Compute as the model did at `keep_reference` (LoRA: as the base does)."""
        return self._with(self._reference)

    def untrained(self) -> AbstractContextManager[None]:
        """Compute as the base does, with the blocks that thawing replaced."""
        return self._with(self._frozen)

    @contextlib.contextmanager
    def _with(self, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
        if self.adapter is not None:
            with self.adapter.disable_adapter():
                yield
            return
        current = {k: self.blocks[k] for k in blocks}
        outside = {parameter: parameter.data for parameter in self._outside}
        try:
            self._put(blocks, self._outside)
            yield
        finally:
            self._put(current, outside)

    @cached_property
    def names(self) -> Names:
        """Which of the checkpoint's tensors hold which parameters."""
        stored = checkpoint_files(self.source.folder)
        return Names(self.model, stored, self.source.name, quantized=self.stored_quantized)

    def checkpoint_names(self, block: int) -> list[str]:
        """Names of the checkpoint's tensors that hold what is trained in a block; raises InputError if it lacks one."""
        prefix = f"{self.stack_name}.{block}."
        experts = () if self.with_experts else expert_modules(self.blocks[block])
        frozen = tuple(f"{prefix}{name}." for name in experts)
        names = [name for name in self.names.parameters if name.startswith(prefix)]
        return self.names.stored_names([name for name in names if not name.startswith(frozen)])

    def original_tensors(self, block: int) -> dict[str, torch.Tensor]:
        """A block's parameters in the checkpoint, by name inside it, in fp32 on the CPU; none if it is quantized."""
        if self.stored_quantized:
            return {}
        stored = dict(stored_tensors(self.source.folder, self.checkpoint_names(block)))
        return self._inside(block, self.names.in_memory(stored))

    def _inside(self, block: int, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prefix = f"{self.stack_name}.{block}."
        return {
            name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)
        }

    def load_blocks(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors, by the checkpoint's names, into the trained blocks; raises KeyError if one is missing."""
        parameters = self.names.in_memory(tensors)
        with torch.no_grad():
            for block in self.trained:
                given = self._inside(block, parameters)
                for name, parameter in self.blocks[block].named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(given[plain_name(name)])

    def deployed_blocks(self, *, as_stored: bool = False) -> dict[str, torch.Tensor]:
        """The trained blocks as an unquantized model holds them, by the checkpoint's names, on the CPU.

        LoRA is multiplied into the checkpoint's own weights. With `as_stored`, tensors have the checkpoint's dtype
        unless it is quantized; otherwise they are fp32.
        """
        parameters = {}
        for block in self.trained:
            if self.adapter is None:
                own = self.blocks[block].named_parameters()
                values = {plain_name(name): value.detach() for name, value in own if value.requires_grad}
            else:
                values = self._with_adapter(block)
            for name, value in values.items():
                parameters[f"{self.stack_name}.{block}.{name}"] = value.to("cpu", torch.float32)
        tensors = self.names.on_disk(parameters)
        if as_stored and not self.stored_quantized:
            for name, original in stored_tensors(self.source.folder, list(tensors)):
                tensors[name] = tensors[name].to(original.dtype)
        return {name: value.contiguous() for name, value in tensors.items()}

    def _with_adapter(self, block: int) -> dict[str, torch.Tensor]:
        values = self.original_tensors(block)
        for name in values:
            place, _, last = name.rpartition(".")
            layer: Any = self.blocks[block].get_submodule(place)
            if last == "weight" and hasattr(layer, "get_delta_weight"):
                values[name] = values[name] + layer.get_delta_weight("default").detach().to("cpu")
        return values

    def check_block(self, block: int) -> None:
        """Raise InputError if the model has no block of that number."""
        if not 0 <= block < self.num_blocks:
            raise InputError(
                f"block {block} was asked for, but {self.source.name} has {self.num_blocks} blocks, "
                f"numbered 0 to {self.num_blocks - 1}; choose among those."
            )


def stop_ids(declared: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those that a generation config declares, and the tokenizer's own."""
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    own = tokenizer.eos_token_id
    return list(dict.fromkeys(ids + ([own] if own is not None else [])))


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Inside `Policy.autocast`, compute in the dtype of the inputs: fp32 stays fp32.

    For log-probs, entropies and sums over the vocabulary: autocast lowers products and raises sums, logarithms and
    norms, and not the same ones on CPU and GPU.
    """
    return torch.autocast(device.type, enabled=False)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; 4-bit ones count as the weights they stand for, shared ones once."""
    return sum(count_values(parameter) for parameter in module.parameters())
