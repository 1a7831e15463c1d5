"""A vLLM server on localhost: the few endpoints that midtune asks, answered by plain transformers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Toy:
    """What the server holds, and what it was asked for."""

    def __init__(self, checkpoint: Path, *, takes_weights: bool = True) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint)
        self.takes_weights = takes_weights
        self.url = ""
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[set[str]] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "toy"}]}
        if path == "/server_info":
            return (200, {}) if self.takes_weights else (404, {})
        if path == "/reset_prefix_cache":
            return 200, None
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            return self.load(Path(body["kwargs"]["weights_path"]))
        assert path == "/v1/completions"
        self.asked.append(body)
        # Out of order: a client has to look at the numbers.
        return 200, {"choices": list(reversed(self.choices(body)))}

    def load(self, folder: Path) -> tuple[int, Any]:
        try:
            tensors = load_file(folder / "model.safetensors")
        except OSError:
            return 500, {"error": f"no weights in {folder}"}
        unknown = self.model.load_state_dict(tensors, strict=False).unexpected_keys
        self.loaded.append(set(tensors))
        return (500, {"error": f"unknown {unknown}"}) if unknown else (200, {"results": [None]})

    @torch.no_grad()
    def choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for prompt in body["prompt"]:
            for _ in range(body["n"]):
                ids: list[int] = []
                values: list[float] = []
                while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
                    logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
                    log_probs = (logits / body["temperature"]).log_softmax(-1)
                    ids.append(int(torch.multinomial(log_probs.exp(), 1)))
                    values.append(float(log_probs[ids[-1]]))
                found.append(
                    {
                        "index": len(found),
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
            status, answer = toy.answer(self.path, body)
            content = b"" if answer is None else json.dumps(answer).encode()
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
