"""A vLLM server on localhost: the few endpoints that midtune asks, answered by plain transformers.

Its worker runs midtune's own extension.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from midtune.rollout.vllm_worker import BlockLoader


class Worker(BlockLoader):
    """What the extension finds in a worker of vLLM."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint)
        self.loaded: list[set[str]] = []

    def restart(self) -> None:
        # Loading a model anew would change transformers' global state from a thread.
        self.reload_weights(weights_path=str(self.checkpoint))
        self.midtune_digest = None

    def reload_weights(self, weights_iterator: Any = None, weights_path: str | None = None) -> None:
        if weights_path is not None:
            weights_iterator = load_file(Path(weights_path) / "model.safetensors").items()
        tensors = dict(weights_iterator)
        unknown = self.model.load_state_dict(tensors, strict=False).unexpected_keys
        self.loaded.append(set(tensors))
        if unknown:
            raise ValueError(f"unknown {unknown}")


class Toy:
    """A server and what it was asked for.

    Args:
        delay_s: how long it waits before it completes a prompt.
        disturb: called before each completion; what it changes, the completion does not see.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        extended: bool = True,
        delay_s: float = 0,
        disturb: Callable[[Toy], None] = lambda toy: None,
    ) -> None:
        self.worker = Worker(checkpoint)
        self.extended = extended
        self.delay_s = delay_s
        self.disturb = disturb
        self.url = ""
        self.alive = True
        self.loads_blocks = True
        self.forgets_prompts = True
        self.asked: list[dict[str, Any]] = []

    def restart(self) -> None:
        self.worker.restart()
        self.alive = True

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "toy"}]}
        if path == "/reset_prefix_cache?reset_running_requests=true":
            return 200, {"success": self.forgets_prompts}
        if path == "/collective_rpc":
            return self.call(body["method"], body["kwargs"])
        assert path == "/v1/completions"
        self.asked.append(body)
        time.sleep(self.delay_s)
        choices = self.choices(body)
        self.disturb(self)
        # Out of order: a client has to look at the numbers.
        return 200, {"choices": choices[::-1]}

    def call(self, method: str, arguments: dict[str, str]) -> tuple[int, Any]:
        if method != "reload_weights" and not self.extended:
            return 500, {"error": f"Method {method!r} is not implemented."}
        if method == "load_blocks" and not self.loads_blocks:
            return 200, {"results": [None]}
        try:
            return 200, {"results": [getattr(self.worker, method)(**arguments)]}
        except (OSError, ValueError) as error:
            return 500, {"error": str(error)}

    @torch.no_grad()
    def choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number in range(body["n"]):
            ids: list[int] = []
            values: list[float] = []
            own = torch.Generator().manual_seed(body["seed"] + number)
            while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
                logits = self.worker.model(torch.tensor([body["prompt"] + ids])).logits[0, -1]
                log_probs = (logits / body["temperature"]).log_softmax(-1)
                ids.append(int(torch.multinomial(log_probs.exp(), 1, generator=own)))
                values.append(float(log_probs[ids[-1]]))
            found.append(
                {
                    "index": number,
                    "token_ids": ids,
                    "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
                    "logprobs": {"token_logprobs": values},
                }
            )
        return found


@contextmanager
def serve(toy: Toy) -> Iterator[Toy]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            status, answer = toy.answer(self.path, body) if toy.alive else (0, None)
            if not toy.alive:
                self.close_connection = True
                return
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    toy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield toy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
