"""Sample with vLLM servers, which are sent only the trained blocks.

TRL's own client needs vLLM in the trainer's environment, where its releases want an older transformers, and moves
weights only between CUDA devices. A server in its own environment can instead read weights from a folder: midtune
writes the trained blocks there, under the checkpoint's names and never in 4-bit, and asks each server to load them.
Works with vLLM 0.31 with its development endpoints and midtune's `vllm_worker` on.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors.torch import save

from midtune.errors import InputError, MidtuneError, RunStopped, one_line
from midtune.model.policy import Policy
from midtune.rollout.boundary import with_boundary
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits, padded
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import TextSampler

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve {model} --logprobs-mode processed_logprobs "
    "--worker-extension-cls midtune.rollout.vllm_worker.BlockLoader"
)
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5, 3600


class Lost(Exception):
    """A server fails or holds other blocks; the message says how."""


@dataclass(eq=False)
class Server:
    """A vLLM server. Its methods raise Lost if it fails."""

    url: str
    model: str = ""  # its own name of the model; empty: it is not in use
    lost: str | None = None  # why it is not in use

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, read as JSON; raises MidtuneError for a request that the server finds invalid."""
        method, timeout = "GET" if body is None else "POST", (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S)
        try:
            answer = requests.request(method, self.url.rstrip("/") + path, json=body, timeout=timeout)
            said = one_line(answer.text, 200)
            if answer.status_code in (400, 422):
                raise MidtuneError(f"the vLLM server at {self.url} refused {path} ({said}).")
            if not answer.ok:
                raise Lost(f"failed at {path} ({said})")
            return answer.json()
        except requests.RequestException as error:
            raise Lost(f"failed at {path} ({type(error).__name__})") from None

    def call(self, method: str, **arguments: str) -> list[Any]:
        """What this method of its workers returned, one result a worker."""
        results: list[Any] = self.ask("/collective_rpc", {"method": method, "kwargs": arguments})["results"]
        return results

    def load(self, checkpoint: Path, blocks: Path, digest: str) -> None:
        """Load the blocks, and first all other weights if it was not in use: it may hold another run's."""
        if not self.model:
            self.model = self.ask("/v1/models")["data"][0]["id"]
            self.call("reload_weights", weights_path=str(checkpoint))
        self.call("load_blocks", path=str(blocks))
        # Cached prompts were computed with the old weights. Work that somebody has left would keep them.
        if not self.ask("/reset_prefix_cache?reset_running_requests=true", {})["success"]:
            raise Lost("keeps prompts that were computed with old blocks")
        self.check(digest)

    def check(self, digest: str) -> None:
        """Raise Lost unless every worker has loaded the file with this SHA-256, and nothing after it."""
        if set(self.call("blocks_digest")) != {digest}:
            raise Lost("holds other blocks than were sent")


def require_servers(urls: Sequence[str], model: Path) -> None:
    """Raise InputError if no vLLM server answers at `urls`, or one takes no blocks; it says to serve `model`."""
    start, answers = START.format(model=model), False
    for server in map(Server, urls):
        try:
            server.ask("/v1/models")
        except (Lost, MidtuneError):
            continue
        answers = True
        try:
            server.call("blocks_digest")
        except (Lost, MidtuneError, LookupError, TypeError):
            raise InputError(
                f"the vLLM server at {server.url} takes no blocks; start it with `{start}` on this machine, in an "
                "environment in which midtune was installed by `pip install --no-deps`."
            ) from None
    if not answers:
        raise InputError(f"there is no vLLM server at {' or '.join(urls)}; start one with `{start}`.")


class VLLMSampler(TextSampler):
    """Servers complete the prompts instead of the policy.

    The servers' frozen weights are the checkpoint's, so a policy in 4-bit differs a little. The trained blocks go to
    `folder`, which the servers read under the same path.

    A completion counts only if the server's workers say, both after they were sent the blocks and after the
    completion, that the file they loaded last has the SHA-256 of the one written. That proves which file was given to
    vLLM's loader, not what the loader did with it. Groups are drawn from one queue, each with a seed of its own, so
    that equal servers give equal completions up to rounding, whichever answers. What a lost server had in work is
    asked of the others. It is out of use until it has been sent the blocks again, which each step tries.
    """

    def __init__(self, urls: Sequence[str], policy: Policy, limits: SamplingLimits, folder: Path) -> None:
        super().__init__(policy, limits, is_policy=False)
        self.servers = [Server(url) for url in urls]
        self.blocks = folder.absolute() / "model.safetensors"
        self.digest = ""

    def sync_weights(self) -> None:
        """Send the current trained blocks to every server that answers."""
        self.blocks.parent.mkdir(parents=True, exist_ok=True)
        content = save(self.policy.deployed_blocks())
        self.digest = hashlib.sha256(content).hexdigest()
        self.blocks.write_bytes(content)
        checkpoint, digest = self.policy.source.folder, self.digest
        self._at_once(self.servers, lambda server: server.load(checkpoint, self.blocks, digest))
        for server in self.servers:
            if server.model and server.lost is not None:
                server.lost = None
                self._say(f"the vLLM server at {server.url} is in use again.")

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        """Complete with the blocks last sent; entropies are unknown, and zero. Raises RunStopped without servers."""
        asked = [prompt_ids(self.policy.tokenizer, prompt) for prompt in prompts[:: sampling.group_size]]
        seeds = torch.randint(2**31, (len(asked),)).tolist()
        settings = {
            "n": sampling.group_size,
            "max_tokens": sampling.max_new_tokens,
            **{name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")},
            "stop": list(sampling.stop_strings),
            "stop_token_ids": self.policy.stop_token_ids,
            "include_stop_str_in_output": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
        groups: dict[int, list[dict[str, Any]]] = {}

        def complete(server: Server) -> None:
            for group in waiting:
                body = {**settings, "model": server.model, "prompt": asked[group], "seed": seeds[group]}
                choices = server.ask("/v1/completions", body)["choices"]
                server.check(self.digest)
                groups[group] = sorted(choices, key=lambda choice: choice["index"])

        while left := [group for group in range(len(asked)) if group not in groups]:
            servers = [server for server in self.servers if server.model]
            if not servers:
                why = "; ".join(f"{server.url} {server.lost}" for server in self.servers)
                raise RunStopped(f"no vLLM server is left: {why}. Start one again, then go on with --resume.")
            waiting = iter(left)
            # A quarter of the groups waits for the server that is first to end some.
            together = len(left) if len(servers) == 1 else -(-3 * len(left) // (4 * len(servers)))
            self._at_once(servers * together, complete)
        choices = [choice for group in range(len(asked)) for choice in groups[group]]
        ids, mask = padded(self.policy, [choice["token_ids"] for choice in choices], "right")
        log_probs = torch.zeros(ids.shape, device=ids.device)
        known = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
        log_probs[mask.bool()] = torch.tensor(known, device=ids.device)
        cut = torch.tensor([choice["finish_reason"] == "length" for choice in choices], device=ids.device)
        entropies = torch.zeros_like(log_probs)
        rollout = Rollout(*padded(self.policy, asked, "left"), ids, mask, log_probs, entropies, cut)
        return with_boundary(self, rollout, boundary_block)

    def _at_once(self, servers: Sequence[Server], work: Callable[[Server], None]) -> None:
        """Let all servers work, one named twice in two threads; those that fail are lost, which is said once."""
        failed: list[tuple[Server, Exception]] = []

        def run(server: Server) -> None:
            try:
                work(server)
            except Exception as error:
                failed.append((server, error))

        # An interrupt waits for no daemon.
        threads = [threading.Thread(target=run, args=(server,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for server, error in failed:
            if not isinstance(error, Lost):
                raise error
            server.model = ""
            if server.lost is None:
                server.lost = str(error)
                self._say(f"the vLLM server at {server.url} {error}; it is left out until it takes blocks.")

    def _say(self, message: str) -> None:
        if self.limits.rows.on_message is not None:
            self.limits.rows.on_message(message)
