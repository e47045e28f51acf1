"""A stand-in of the Hugging Face Hub's HTTP interface on the loopback, for its real client.

It knows one kind of repository, whatever a client calls it, keeps it in memory, and answers what `snapshot_download` and
`create_commit` ask. `Hub.variables` point a client at it.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
TOKEN = "hf_of_this_test"  # noqa: S105 - opens nothing


@dataclass
class Repository:
    """Commits by their names, and what branches and tags point to."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, *references: str) -> str:
        """Add a commit on top of `main`, and point `main` and `references` to it."""
        content = {**self.commits.get(self.references.get("main", ""), {}), **files}
        name = _digest(repr(sorted(content.items())).encode())[:40]
        self.commits[name] = content
        self.references |= dict.fromkeys(("main", *references), name)
        return name

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        name = self.references.get(revision, revision)
        return name if name in self.commits else None


@dataclass
class Hub:
    """The stand-in: its repositories, and requests it got."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, files: Files, *references: str) -> str:
        """Commit files to a repository, which is made where it is missing."""
        return self.repositories.setdefault(name, Repository()).commit(files, *references)

    def variables(self, home: Any) -> dict[str, str]:
        """Environment of a client with its cache at `home`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of the loopback."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self._body()
        match self._parts():
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                self._preupload(f"{owner}/{name}", json.loads(body))
            case ["api", "models", owner, name, "commit", _]:
                self._commit(f"{owner}/{name}", body)
            case _:
                self._json({"error": f"not known here: {self.path}"}, 404)

    def _parts(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            return ["api", "models", *parts[2:]]
        return parts[1:] if parts[0] == "datasets" else parts

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, headers)

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _get(self) -> None:
        match self._parts():
            case ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "tree", revision, *_]:
                self._tree(f"{owner}/{name}", revision)
            case [owner, name, "resolve", revision, *path]:
                self._file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._json({"error": f"not known here: {self.path}"}, 404)

    def _found(self, name: str, revision: str) -> tuple[str, Files] | None:
        """A commit's name and files; answers an error where there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        commit = repository.find(revision)
        if commit is None:
            code = {"X_Error_Code": "RevisionNotFound"}
            self._json({"error": f"Invalid rev id: {revision}"}, 404, **code)
            return None
        return commit, repository.commits[commit]

    def _info(self, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is not None:
            commit, files = found
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is not None:
            self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _digest(data)[:40]}
                    for path, data in found[1].items()
                ]
            )

    def _file(self, name: str, revision: str, path: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        headers = {"ETag": f'"{_digest(files[path])}"', "X-Repo-Commit": commit}
        self._send(files[path], 200, headers)

    def _create(self, asked: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
            return
        name = f"{asked['organization']}/{asked['name']}"
        made = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            self._json({**made, "error": "You already created this model repo"}, 409)
            return
        # Clients before 2 say `private`.
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.hub.add(name, {".gitattributes": b""})
        self._json(made)

    def _preupload(self, name: str, asked: dict[str, Any]) -> None:
        """Every file comes in the commit itself, however large."""
        if self._found(name, "main") is not None:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"], **regular} for file in asked["files"]]})

    def _commit(self, name: str, body: bytes) -> None:
        items = [json.loads(line) for line in body.splitlines()]
        values = [item["value"] for item in items if item["key"] == "file"]
        files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        commit = self.hub.add(name, files)
        address = f"{self.hub.address}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address})


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
