"""A Hugging Face hub on this machine: as much of it as fetching a model asks for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest

NAME = "owner/name"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Hub:
    """One repository.

    Attributes:
        commits: the directory with the files of each commit.
        refs: the commit that each branch and tag names.
        refusal: the status that everything is answered with instead, and the hub's code for it.
        fetched: the names of files that were asked for, with their commits.

    """

    commits: dict[str, Path]
    refs: dict[str, str]
    refusal: tuple[int, str] | None = None
    fetched: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, path: str) -> Answer:
        """Status, headers and content."""
        if self.refusal:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b""
        what, _, rest = path.partition("?")[0].partition(f"/{NAME}/")
        kind, _, place = rest.partition("/")
        revision, _, file = place.partition("/")
        commit = self.refs.get(unquote(revision), revision)
        if not rest:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if kind == "resolve":
            self.fetched.append((commit, file))
            content = (self.commits[commit] / file).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, content
        assert what == "/api/models", path
        tree = [
            {"type": "file", "path": found.name, "size": found.stat().st_size, "oid": found.name}
            for found in self.commits[commit].iterdir()
        ]
        found = tree if kind == "tree" else {"id": NAME, "sha": commit}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


@contextmanager
def serving_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process have that hub instead of the real one, and a cache of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    with monkeypatch.context() as patch:
        use_hub(f"http://127.0.0.1:{server.server_port}", cache, patch)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def use_hub(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask another address."""
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
