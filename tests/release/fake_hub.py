"""A Hugging Face hub on the loopback: one repository of commits, as far as releases use it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

Json = dict[str, Any] | list[Any]


class FakeHub:
    """What a hub knows, and what it was asked."""

    def __init__(self, repo: str, token: str) -> None:
        self.repo, self.token = repo, token
        self.exists, self.private = False, True
        self.commits: dict[str, dict[str, bytes]] = {}
        """Files by commit; the last one is `main`."""
        self.stored: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.asked: list[tuple[str, str]] = []
        self.faults: list[Exception] = []
        """What this fake cannot do."""
        self.port = 0

    @property
    def files(self) -> dict[str, bytes]:
        """Of the branch."""
        return list(self.commits.values())[-1] if self.commits else {}

    def commit(self, files: dict[str, bytes]) -> str:
        """Make a commit of these files alone; its name."""
        content = json.dumps({n: hashlib.sha1(d).hexdigest() for n, d in sorted(files.items())})
        name = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.exists = True
        self.commits[name] = files
        return name

    def at(self, revision: str) -> str:
        """The commit that a revision names."""
        return list(self.commits)[-1] if revision == "main" else revision


class Answer(Exception):
    """A status, a body and headers."""

    def __init__(self, status: int, body: bytes | Json = b"", **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serve it; its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            url = urlparse(self.path)
            path = unquote(url.path)
            hub.asked.append((self.command, path))
            try:
                allowed = self.headers.get("authorization") == f"Bearer {hub.token}"
                _answer(hub, self.command, path, parse_qs(url.query), body, allowed)
            except Exception as error:
                answer = error if isinstance(error, Answer) else Answer(400, str(error).encode())
                if not isinstance(error, Answer):
                    hub.faults.append(error)
                self.send_response(answer.status)
                self.send_header("content-length", str(len(answer.body)))
                for name, value in answer.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{hub.port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(
    hub: FakeHub, method: str, path: str, query: dict[str, list[str]], body: bytes, allowed: bool
) -> None:
    api = f"/api/models/{hub.repo}"
    # A large file's address is signed: it takes no token.
    writes = method == "POST" and path != "/api/validate-yaml"
    open_to_all = path == "/api/agent-harnesses" or path.startswith("/large/")
    if (writes or hub.private) and not open_to_all and not allowed:
        raise Answer(401, {"error": "no"}, X_Error_Code="RepoNotFound")
    if path == "/api/repos/create":
        asked = json.loads(body)
        if hub.exists:
            raise Answer(409, {"url": f"http://127.0.0.1:{hub.port}/{hub.repo}"})
        hub.commit({".gitattributes": b"*"})  # as the hub begins a repository
        hub.private = asked.get("visibility") != "public"
        raise Answer(200, {"url": f"http://127.0.0.1:{hub.port}/{hub.repo}", "id": hub.repo})
    if path == "/api/validate-yaml":
        raise Answer(200, {"errors": [], "warnings": []})
    if not hub.exists:
        raise Answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
    if path == f"{api}/preupload/main":
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        raise Answer(200, {"files": modes})
    if path == f"/{hub.repo}.git/info/lfs/objects/batch":
        put = f"http://127.0.0.1:{hub.port}/large/"
        objects = [
            {**one, "actions": {"upload": {"href": put + one["oid"]}}}
            for one in json.loads(body)["objects"]
        ]
        raise Answer(200, {"transfer": "basic", "objects": objects})
    if method == "PUT" and path.startswith("/large/"):
        assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
        hub.stored[path.removeprefix("/large/")] = body
        raise Answer(200)
    if path == f"{api}/commit/main":
        raise Answer(200, _commit(hub, body))
    if path in (api, *(f"{api}/revision/{name}" for name in ("main", *hub.commits))):
        at = hub.at(path.rpartition("/")[2] if "/revision/" in path else "main")
        siblings = [{"rfilename": name} for name in hub.commits.get(at, {})]
        raise Answer(200, {"id": hub.repo, "sha": at, "private": hub.private, "siblings": siblings})
    if path.startswith(f"{api}/tree/"):
        files = hub.commits.get(hub.at(path.removeprefix(f"{api}/tree/")), {})
        raise Answer(
            200,
            [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in files.items()
            ],
        )
    start = f"/{hub.repo}/resolve/"
    if path.startswith(start):
        revision, _, name = path.removeprefix(start).partition("/")
        at = hub.at(revision)
        if name not in hub.commits.get(at, {}):
            raise Answer(404, X_Error_Code="EntryNotFound")
        data = hub.commits[at][name]
        raise Answer(200, data, ETag=f'"{_oid(data)}"', X_Repo_Commit=at)
    raise Answer(404, {"error": path})


def _commit(hub: FakeHub, body: bytes) -> dict[str, Any]:
    files = dict(hub.files)
    for line in body.decode().splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            files[value["path"]] = hub.stored[value["oid"]]
        elif operation["key"] == "deletedFile":
            del files[value["path"]]
    name = hub.commit(files)
    return {
        "commitUrl": f"http://127.0.0.1:{hub.port}/{hub.repo}/commit/{name}",
        "commitOid": name,
        "success": True,
    }


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
