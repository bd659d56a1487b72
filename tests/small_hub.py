"""A hub of one folder on the loopback, by the few requests that loading a model makes of one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest


@dataclass
class Hub:
    """Serves `folders`, by model id and revision, to who shows the token."""

    token: str
    folders: dict[tuple[str, str], Path] = field(default_factory=dict)
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    """Model id, revision and file of what was asked for and is there."""
    requests: int = 0

    def find(self, path: str) -> tuple[str, bytes] | None:
        """The commit and the content of `/ID/resolve/REVISION/FILE`."""
        model_id, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        for (known_id, known), folder in self.folders.items():
            commit = hashlib.sha1(f"{known_id} {known}".encode()).hexdigest()
            if known_id == model_id and revision in (known, commit) and (folder / name).is_file():
                self.asked.add((model_id, known, name))
                return commit, (folder / name).read_bytes()
        return None


@contextmanager
def small_hub(cache: Path, token: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Have this process use a hub that runs inside, and `cache` for what comes from it."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, whole: bool) -> None:
            hub.requests += 1
            found = hub.find(self.path)
            allowed = self.headers["Authorization"] == f"Bearer {hub.token}"
            if not allowed or found is None:
                self.send_response(404 if allowed else 401)
                self.send_header("X-Error-Code", "EntryNotFound" if allowed else "GatedRepo")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            commit, content = found
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if whole:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
