"""Which of transformers' models a configuration describes, without the parts that text never enters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

from midtune.errors import InputError

KNOWN = "model such as Qwen, Llama, Mistral, Gemma, Phi-3, SmolLM3 or gpt-oss"
# Quantized checkpoints that can be trained over; None: in bitsandbytes 4-bit, of older versions.
STORED = ("mxfp4", "bitsandbytes", None)


# Architectures that cannot be trained block by block, and why.
UNFIT = {
    "longcat_flash": "has two attentions in each block, whose keys are numbered as blocks of their own",
    "recurrent_gemma": "remembers a text in its blocks instead of a cache",
}


def check_trainable(config: PretrainedConfig, name: str) -> None:
    """Raise InputError if the model `name` of this configuration cannot be trained, for reasons that it tells."""
    text = config.get_text_config()
    auto = auto_class(config)
    why = UNFIT.get(text.model_type)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        why = "is an encoder-decoder"
    elif type(config) in AutoModelForMaskedLM._model_mapping and not getattr(text, "is_decoder", True):
        why = "is an encoder, which fills gaps in a text"
    elif not hasattr(config, "auto_map"):
        if type(config) not in auto._model_mapping:
            why = "has no language model in transformers"
        elif not issubclass(auto._model_mapping[type(config)], GenerationMixin):
            why = "does not write one token after another, as diffusion models do not"
    if why:
        raise InputError(f"{name} is a {config.model_type} model, which {why}; use a decoder-only {KNOWN}.")
    if hasattr(config, "quantization_config") and (method := stored_method(config)) not in STORED:
        raise InputError(
            f"{name} is stored with {method} quantization, which midtune cannot train over; use its unquantized "
            "checkpoint, or one in bitsandbytes 4-bit."
        )


def stored_method(config: PretrainedConfig) -> str | None:
    """How a checkpoint's weights are quantized, as transformers names it; None if they are not or it is not said."""
    stored: Any = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def trains_experts(config: PretrainedConfig, asked: str | None, name: str) -> bool:
    """Whether the experts of a trained block are trained, `all` or none (`frozen`); None: if they can be.

    Raises InputError if they cannot.
    """
    in_mxfp4 = stored_method(config) == "mxfp4"
    if in_mxfp4 and asked == "all":
        raise InputError(
            f"all experts of {name} were to be trained, but they are stored in MXFP4, which cannot hold what training "
            "makes of them; add --experts frozen, or use a checkpoint in bf16."
        )
    return asked != "frozen" and not in_mxfp4


def auto_class(config: PretrainedConfig) -> Any:
    """What loads a whole model of this configuration, of one that also sees with its vision part."""
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def built(config: PretrainedConfig, *, trust_remote_code: bool = False, **settings: Any) -> PreTrainedModel:
    """A new model of the class that `config` describes; of one that also sees or hears, its text part."""
    auto = auto_class(config)
    if hasattr(config, "rescale_every"):
        # RWKV would scale weights in place for inference, trained ones too.
        config.rescale_every = 0
    model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code, **settings)
    return _drop(model)


def text_alone(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text part alone, where transformers has a class for it; its blocks are the same."""
    text = config.get_text_config()
    return text if type(text) in AutoModelForCausalLM._model_mapping else config


def text_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of a model that `built` made, whose instances are without the same parts and do not load them."""
    whole = type(model)
    if model.config.get_text_config() is model.config:
        return whole

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)
        _drop(self)

    # transformers chooses a checkpoint's conversions by class name and module.
    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})


def without_data(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in fp32 without values."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)


def _drop(model: PreTrainedModel) -> PreTrainedModel:
    """Remove all modules but the decoder, what holds it, and the output head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if model.config.get_text_config() is model.config:
        return model
    place = next(name for name, part in model.named_modules() if part is decoder)
    while place:
        place, _, kept = place.rpartition(".")
        holder = model.get_submodule(place)
        for name, part in list(holder.named_children()):
            if name != kept and part is not head:
                setattr(holder, name, None)
    return model
