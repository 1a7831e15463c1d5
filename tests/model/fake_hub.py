"""A hub on localhost: the few endpoints that huggingface_hub asks for a model's files, or sends them to."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

COMMIT = "a" * 40
Repositories = dict[str, dict[str, bytes]]


@dataclass
class Received:
    """What a hub was sent: the repositories that are private, and the method, path and token of each request."""

    private: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


@contextmanager
def serve(
    repositories: Repositories, delay_s: float = 0.0, received: Received | None = None, token: str = ""
) -> Iterator[str]:
    """Serve `{"org/name": {file: content}}`; yields the address to use as the hub's endpoint.

    Whoever has the `token` can create repositories and commit files to them.
    """
    received = received or Received()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_POST(self) -> None:
            lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
            path = self.path.split("?")[0].strip("/").split("/")
            name = "/".join(path[2:4])
            code, answer = 200, dict[str, Any]()
            if self.note() != f"Bearer {token}":
                code = 401
            elif path[:3] == ["api", "repos", "create"]:
                asked = json.loads(lines[0])
                name = f"{asked['organization']}/{asked['name']}"
                code = 409 if name in repositories else 200
                repositories.setdefault(name, {})
                # Newer clients name the visibility.
                if code == 200 and (asked.get("private") or asked.get("visibility") == "private"):
                    received.private.add(name)
                answer = {"url": f"{address}/{name}"}
            elif path[4:5] == ["preupload"]:
                files = json.loads(lines[0])["files"]
                answer["files"] = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
                ]
            elif path[4:5] == ["commit"]:
                for line in map(json.loads, lines):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        repositories[name][line["value"]["path"]] = content
                answer = {"commitUrl": f"{address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            self.reply(code, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def note(self) -> str | None:
            received.requests.append((self.command, self.path, self.headers["Authorization"]))
            return self.headers["Authorization"]

        def reply(self, code: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def answer(self, with_body: bool) -> None:
            time.sleep(delay_s)
            self.note()
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
                about = {"id": name, "sha": COMMIT, "tags": [], "private": name in received.private}
                body = json.dumps({**about, "siblings": siblings}).encode()
            else:
                body = files["/".join(parts[4:])]
                headers |= {"ETag": f'"{sha1(body)}"', "X-Repo-Commit": COMMIT}
            self.reply(200 if files is not None else 404, body, headers, with_body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()


def sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
