"""A hub on localhost: the few endpoints that huggingface_hub asks for a model's files."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "a" * 40
Repositories = dict[str, dict[str, bytes]]


@contextmanager
def serve(repositories: Repositories, delay_s: float = 0.0) -> Iterator[str]:
    """Serve `{"org/name": {file: content}}`; yields the address to use as the hub's endpoint."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            time.sleep(delay_s)
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            name = "/".join(parts[:2])
            files = repositories.get(name)
            headers = {}
            body = b""
            if files is None:
                headers["X-Error-Code"] = "RepoNotFound"
            elif api and parts[2:3] == ["tree"]:
                body = json.dumps(
                    [{"type": "file", "path": f, "size": len(b), "oid": sha1(b)} for f, b in files.items()]
                ).encode()
            elif api:
                siblings = [{"rfilename": f, "size": len(b)} for f, b in files.items()]
                body = json.dumps({"id": name, "sha": COMMIT, "tags": [], "siblings": siblings}).encode()
            else:
                body = files["/".join(parts[4:])]
                headers |= {"ETag": f'"{sha1(body)}"', "X-Repo-Commit": COMMIT}
            self.send_response(200 if files is not None else 404)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
