"""Names and layouts on disk against those in memory, through transformers' own conversions.

A checkpoint may store each expert of a layer by itself, for example, where the model holds one tensor of all experts.
transformers converts when it loads and back when it saves; here a few tensors go the same ways.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from midtune.errors import InputError
from midtune.model.architectures import without_data


class Names:
    """The tensors of a model that was loaded from a checkpoint, as the checkpoint stores them."""

    def __init__(
        self, model: PreTrainedModel, stored: Collection[str], checkpoint: str, *, quantized: bool = False
    ) -> None:
        """`stored` are the names in `checkpoint`; of one in 4-bit (`quantized`) only names can be converted."""
        self.stored, self.checkpoint = stored, checkpoint
        # A quantizer's own conversions have no way back.
        self._conversions = None if quantized else getattr(model, "_weight_conversions", None)
        self._skeleton = without_data(model)
        # Every parameter by its name in the model, without data.
        self.parameters = dict(self._skeleton.named_parameters())

    def on_disk(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters by name in the model → tensors by name in the checkpoint; raises InputError if it lacks one."""
        self._skeleton._weight_conversions = copy.deepcopy(self._conversions)
        reverted = revert_weight_conversion(self._skeleton, dict(tensors))
        return {self._as_stored(name): tensor for name, tensor in reverted.items()}

    def stored_names(self, parameters: Collection[str]) -> list[str]:
        """Names of the checkpoint's tensors that hold these parameters."""
        return sorted(self.on_disk({name: self.parameters[name] for name in parameters}))

    def in_memory(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name in the checkpoint → fp32 parameters by name in the model, on the CPU."""
        try:
            load_config = LoadStateDictConfig(
                device_map={"": "cpu"}, weight_mapping=copy.deepcopy(self._conversions)
            )
            convert_and_load_state_dict_in_model(self._skeleton, dict(tensors), load_config)
            loaded = self._skeleton.named_parameters()
            return {name: parameter.detach() for name, parameter in loaded if not parameter.is_meta}
        finally:
            for name, parameter in self.parameters.items():
                place, _, last = name.rpartition(".")
                setattr(self._skeleton.get_submodule(place), last, parameter)

    def _as_stored(self, name: str) -> str:
        # A checkpoint may be that of the inner model alone, or add a head to it.
        prefix = f"{self._skeleton.base_model_prefix}."
        for found in (name, name.removeprefix(prefix), prefix + name):
            if found in self.stored:
                return found
        raise InputError(
            f"{self.checkpoint} has no tensor {name}, which {type(self._skeleton).__name__} stores; save it once with "
            "transformers' save_pretrained and use that folder."
        )
