"""Load a policy from a resolved model folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from midtune.device import compute_dtype_of, resolve_device
from midtune.errors import WHY, InputError, explained
from midtune.model.architectures import built, stored_method, text_class, trains_experts
from midtune.model.blocks import find_blocks
from midtune.model.configs import read_config
from midtune.model.memory import freed_at_once
from midtune.model.policy import Policy
from midtune.model.quantize import (
    clear_quantized_markers,
    compute_in,
    forbid_cpu_packing,
    nf4_config,
    unpack_on_use,
    weights_read_directly,
)
from midtune.model.sources import Source


def load_policy(
    source: Source,
    *,
    quantize: str = "nf4",
    experts: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    on_message: Callable[[str], None] = lambda text: None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Policy:
    """Load a model with every parameter frozen, and its tokenizer, unless it is given.

    With `quantize="nf4"`, the blocks' linear layers and experts are quantized one by one while the checkpoint is read,
    so a full-precision copy never exists. Embeddings, norms and head stay as stored, and so do experts in MXFP4.
    `experts` says which of a block's are trained with it, `all` or none (`frozen`); None: all that can be.
    `dtype` is that of activations (None: see `compute_dtype_of`); a model that overflows fp16 computes in fp32, and
    `on_message` is told. Raises InputError if there is no such device, or the model is not decoder-only.
    """
    target = resolve_device(device)
    compute_dtype = dtype or compute_dtype_of(target)
    tokenizer = tokenizer or load_tokenizer(source, trust_remote_code)
    config = read_config(source.folder, source.name, trust_remote_code=trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    with_experts = trains_experts(config, experts, source.name)
    in_mxfp4 = stored_method(config) == "mxfp4"
    if in_mxfp4:
        del config.quantization_config
    stored_quantized = stored is not None and not in_mxfp4
    unusable = (
        f"{source.name} cannot be loaded as a causal language model ({WHY}); "
        "use a decoder-only model in Hugging Face layout."
    )
    with explained(unusable, keep=(torch.OutOfMemoryError,)):
        with torch.device("meta"):
            skeleton = built(config, trust_remote_code=trust_remote_code)
        _check_vocabulary(tokenizer, skeleton, source)
        stack_name, _ = find_blocks(skeleton)
        quantization = None
        if in_mxfp4 or (quantize == "nf4" and not stored_quantized):
            linears = [name for name, part in skeleton.named_modules() if isinstance(part, nn.Linear)]
            inside = f"{stack_name}." if quantize == "nf4" else "no module"
            outside = [name for name in linears if not name.startswith(inside)]
            outside += weights_read_directly(skeleton)
            quantization = nf4_config(compute_dtype, keep=outside or ["lm_head"], experts=True)
        with freed_at_once():
            model: PreTrainedModel = text_class(skeleton).from_pretrained(
                source.folder,
                config=skeleton.config,
                dtype=compute_dtype,
                device_map={"": target},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **({"quantization_config": quantization} if quantization is not None else {}),
            )
    clear_quantized_markers(model)
    if stored_quantized:
        compute_in(model, compute_dtype)
    forbid_cpu_packing(model)
    unpack_on_use(model, compute_dtype)
    if compute_dtype == torch.float16 and _overflows(model, tokenizer):
        on_message(f"{source.name} overflows fp16, so it computes in fp32, in more memory.")
        compute_dtype = torch.float32
        for part in model.float().modules():
            if hasattr(part, "compute_dtype"):
                vars(part)["compute_dtype"] = compute_dtype
    return Policy(
        model,
        tokenizer,
        source,
        compute_dtype=compute_dtype,
        stored_quantized=stored_quantized,
        with_experts=with_experts,
    )


@torch.no_grad()
def _overflows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether logits are no numbers after a short text; first tokens have the largest activations."""
    ids = torch.tensor([tokenizer.encode("The answer is 12.")], device=model.device)
    return not bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with left padding, a padding token and a chat template; raises InputError if it cannot."""
    # config.json leads to the tokenizer: check it first, so that the right file gets the blame.
    read_config(source.folder, source.name, trust_remote_code=trust_remote_code)
    missing = (
        f"{source.name} has no tokenizer that can be read ({WHY}); put its files (tokenizer.json, "
        "tokenizer_config.json) beside config.json."
    )
    with explained(missing):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, padding_side="left"
        )
        known = set(tokenizer.encode("a 1", add_special_tokens=False)) - set(tokenizer.all_special_ids)
        if not known:
            # transformers makes an empty tokenizer when the files are missing.
            raise ValueError("its vocabulary is empty")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of {source.name} has neither a padding token nor one that ends a text; name one in its "
                'tokenizer_config.json, such as "eos_token": "</s>".'
            )
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        # A base model: its prompts are the messages' plain text.
        plain = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        # A tokenizer that puts BOS before texts does not do so for chats: there the template has to write it.
        first = tokenizer("a 1")["input_ids"][:1]
        adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + plain
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module, source: Source) -> None:
    """Raise InputError if a token has no row in the input embedding."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        shown = ", ".join(f"{token!r}" for _, token in beyond[:3]) + ", …" * (len(beyond) > 3)
        raise InputError(
            f"the tokenizer of {source.name} has {len(beyond)} tokens ({shown}) beyond the {rows} that its embedding "
            "has rows for; use the tokenizer that the checkpoint was saved with, or grow the model with "
            "`resize_token_embeddings` and save it again."
        )
