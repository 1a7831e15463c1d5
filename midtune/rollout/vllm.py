"""Sample with a vLLM server, which is sent only the trained blocks.

TRL's own client needs vLLM in the trainer's environment, where its releases want an older transformers, and moves
weights only between CUDA devices. A server in its own environment can instead read weights from a folder: midtune
writes the trained blocks there, under the checkpoint's names and never in 4-bit, and asks the server to load them.
Works with vLLM 0.31 with its development endpoints on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors.torch import save_file

from midtune.errors import InputError, MidtuneError
from midtune.model.policy import Policy
from midtune.rollout.boundary import with_boundary
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits, padded
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import TextSampler

START = "VLLM_SERVER_DEV_MODE=1 vllm serve {model} --logprobs-mode processed_logprobs"


def require_server(url: str, model: Path) -> str:
    """Return the name of the model that the vLLM server at `url` serves.

    Raises InputError if no server answers or it accepts no weights; the message says to serve the folder `model`.
    """
    url = url.rstrip("/")
    start = START.format(model=model)
    try:
        served: str = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        takes_weights = requests.get(f"{url}/server_info", timeout=30).status_code == 200
    except (requests.RequestException, ValueError, LookupError):
        raise InputError(f"there is no vLLM server at {url}; start one with `{start}`.") from None
    if not takes_weights:
        raise InputError(
            f"the vLLM server at {url} takes no weights; start it with `{start}`, on this machine."
        )
    return served


class VLLMSampler(TextSampler):
    """A server at `url` completes the prompts instead of the policy; raises InputError if none accepts weights.

    The server's frozen weights are the checkpoint's, so a policy in 4-bit differs a little. The trained blocks go to
    `folder`, which the server reads under the same path.
    """

    def __init__(self, url: str, policy: Policy, limits: SamplingLimits, folder: Path) -> None:
        super().__init__(policy, limits, is_policy=False)
        self.url = url.rstrip("/")
        self.folder = folder.absolute()
        self.model = require_server(self.url, policy.source.folder)
        # An earlier run may have left its blocks in the server.
        self._load(policy.source.folder)

    def sync_weights(self) -> None:
        """Send the current trained blocks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.policy.deployed_blocks(), self.folder / "model.safetensors")
        self._load(self.folder)

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        """Complete with the blocks last sent; entropies are unknown, and zero."""
        asked = [prompt_ids(self.policy.tokenizer, prompt) for prompt in prompts[:: sampling.group_size]]
        answer = self._post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": asked,
                "n": sampling.group_size,
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "stop": list(sampling.stop_strings),
                "stop_token_ids": self.policy.stop_token_ids,
                "include_stop_str_in_output": True,
                "logprobs": 0,
                "return_token_ids": True,
            },
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        ids, mask = padded(self.policy, [choice["token_ids"] for choice in choices], "right")
        log_probs = torch.zeros(ids.shape, device=ids.device)
        known = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
        log_probs[mask.bool()] = torch.tensor(known, device=ids.device)
        cut = torch.tensor([choice["finish_reason"] == "length" for choice in choices], device=ids.device)
        entropies = torch.zeros_like(log_probs)
        rollout = Rollout(*padded(self.policy, asked, "left"), ids, mask, log_probs, entropies, cut)
        return with_boundary(self, rollout, boundary_block)

    def _load(self, folder: Path) -> None:
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        # Cached prompts were computed with the old weights.
        self._post("/reset_prefix_cache", {})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            answer = requests.post(f"{self.url}{path}", json=body, timeout=3600)
            answer.raise_for_status()
        except requests.RequestException as error:
            said = error.response.text[:200] if error.response is not None else str(error)[:200]
            raise MidtuneError(f"the vLLM server at {self.url} failed at {path} ({said}).") from None
        return answer.json() if answer.text else None
