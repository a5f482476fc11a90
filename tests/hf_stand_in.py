"""A Hugging Face hub on the loopback address: as much of it as its client asks for; and a wicked one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from lora_lightning.files.hubs import remote

TOKEN = "hf_standInStandInStandIn"


class Hub:
    """Repositories in memory: name -> branch -> path -> contents. A branch has one commit.

    Attributes:
        private: repositories that are read with the token alone; `gated` need more than that.
        stated: path -> what is said of a file in place of the truth: `size`, `sha`.
        answer: path of a file -> a function that answers for it in place of its contents.
        seen: what was asked for, one line each.
        tokens: of each request, the token that came with it.
        refuses: a status for every request; 0 is none.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.stated: dict[str, dict[str, Any]] = {}
        self.answer: dict[str, Any] = {}
        self.lfs: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.tokens: list[str] = []
        self.refuses = 0
        self.url = ""

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> None:
        self.repos.setdefault(repo, {"main": {}}).setdefault(branch, {}).update(files)

    def commit(self, repo: str, branch: str) -> str:
        files = self.repos[repo][branch]
        text = repr(sorted((n, hashlib.sha1(f).hexdigest()) for n, f in files.items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        for branch, files in self.repos[repo].items():
            if revision in (branch, self.commit(repo, branch)):
                return files
        return None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            length = self.headers.get("Content-Length")
            self.body = self.rfile.read(int(length)) if length else self._chunks()
            path = unquote(urlparse(self.path).path)
            hub.seen.append(f"{self.command} {path}")
            hub.tokens.append((self.headers.get("Authorization") or "").removeprefix("Bearer "))
            if hub.refuses:
                return self.error(hub.refuses, "no")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.model("/".join(parts[2:4]), parts[4:])
            if path == "/api/repos/create":
                asked = json.loads(self.body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.put(name, {})
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(name)
                return self.json({"url": f"{hub.url}/{name}", "id": name})
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if path.endswith(".git/info/lfs/objects/batch"):
                return self.batch()
            if parts[0] == "lfs":
                hub.lfs[parts[1]] = self.body
                return self.json({})
            if len(parts) > 4 and parts[2] == "resolve":
                return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            self.error(404, "EntryNotFound")

        do_GET = do_POST = do_PUT = do_HEAD = do

        def allowed(self, repo: str) -> bool:
            token = hub.tokens[-1]
            if token and token != TOKEN:
                self.error(401, "", "Invalid credentials in Authorization header")
            elif repo not in hub.repos or (repo in hub.private and not token):
                self.error(404 if token else 401, "RepoNotFound")
            elif repo in hub.gated:
                self.error(403, "GatedRepo")
            else:
                return True
            return False

        def model(self, repo: str, rest: list[str]) -> None:
            if not self.allowed(repo):
                return
            revision = rest[1] if len(rest) > 1 else "main"
            if rest[:1] == ["branch"]:
                hub.repos[repo].setdefault(revision, dict(hub.repos[repo]["main"]))
                return self.json({})
            files = hub.files(repo, revision)
            if files is None:
                return self.error(404, "RevisionNotFound")
            if rest[:1] in ([], ["revision"]):
                branch = next(b for b in hub.repos[repo] if revision in (b, hub.commit(repo, b)))
                return self.json({"id": repo, "sha": hub.commit(repo, branch), "siblings": []})
            if rest[0] == "paths-info":
                paths = parse_qs(self.body.decode())["paths"]
                return self.json([self.about(p, files[p]) for p in paths if p in files])
            if rest[0] == "preupload":
                asked = [f["path"] for f in json.loads(self.body)["files"]]
                large = [path.endswith("safetensors") for path in asked]
                modes = [
                    {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                    for path, lfs in zip(asked, large, strict=True)
                ]
                return self.json({"files": modes})
            if rest[0] == "commit":
                for line in self.body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "lfsFile":
                        files[entry["value"]["path"]] = hub.lfs[entry["value"]["oid"]]
                commit = hub.commit(repo, revision)
                return self.json(
                    {"success": True, "commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit}
                )
            self.error(404, "EntryNotFound")

        def about(self, path: str, contents: bytes) -> dict[str, Any]:
            git = hashlib.sha1(f"blob {len(contents)}\0".encode() + contents).hexdigest()
            stated = hub.stated.get(path, {})
            size = stated.get("size", len(contents))
            found = {
                "type": stated.get("type", "file"),
                "path": path,
                "size": size,
                "oid": stated.get("sha", git),
            }
            if path.endswith(".safetensors"):
                sha = stated.get("sha", hashlib.sha256(contents).hexdigest())
                found["lfs"] = {"oid": sha, "size": size, "pointerSize": 130}
            return found

        def batch(self) -> None:
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(self.body)["objects"]
            ]
            self.json({"transfer": "basic", "objects": objects})

        def file(self, repo: str, revision: str, path: str) -> None:
            if not self.allowed(repo):
                return
            files = hub.files(repo, revision)
            if files is None or path not in files:
                return self.error(404, "EntryNotFound")
            if path in hub.answer and self.command == "GET":
                return hub.answer[path](self)
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[path])))
            self.send_header("ETag", f'"{hashlib.sha1(files[path]).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.commit(repo, next(iter(hub.repos[repo]))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(files[path])

        def json(self, value: Any) -> None:
            out = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(out)

        def error(self, status: int, code: str, message: str = "no") -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _chunks(self) -> bytes:
            found = b""
            while self.headers.get("Transfer-Encoding") == "chunked":
                size = int(self.rfile.readline(), 16)
                found += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            return found

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: Any, handler: type[BaseHTTPRequestHandler]) -> Iterator[Any]:
    """A server of the loopback address within this context; `hub.url` is its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hf_hub() -> Any:
    """A hub that serves within this context."""
    hub = Hub()
    return serving(hub, _handler(hub))


def ask(hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process ask this hub, with its token, and keep what it fetches in a folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(remote, "SECONDS", 1.0)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
