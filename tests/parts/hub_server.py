"""A local server of the Hub's file protocol: downloads, new repositories and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: branch -> commit, commit -> files, and the messages of pushed commits in order."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def head(self, branch: str = "main") -> Files:
        return self.commits[self.branches[branch]]


class Hub(ThreadingHTTPServer):
    """The server; tests read `repos` and `requests` (method and path of each). ``token`` gives access to everything."""

    daemon_threads = True
    token = "hf_tests"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: Files, **options: Any) -> Repo:
        self.repos[name] = Repo(**options)
        self.repos[name].commit(files)
        return self.repos[name]


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve until the block ends."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    """An error answer: status, the Hub's code for it, message."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self._read()
        try:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    answer(self, *match.groups())
                    return
            raise _Refused(404, "EntryNotFound", f"no such page: {path}")
        except _Refused as refused:
            status, code, message = refused.args
            self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repo(self, name: str, content: bool = True) -> Repo:
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not known):
            raise _Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if repo.gated and content and not known:
            raise _Refused(401, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name, content=False)
        commit = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        about = {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        self._answer(200, about)

    def _tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit_of(repo, revision)]
        entries = [{"type": "file", "path": p, "size": len(d), "oid": _git_hash(d)} for p, d in sorted(files.items())]
        self._answer(200, entries)

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        commit = self._commit_of(repo, revision)
        if path not in repo.commits[commit]:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist")
        data = repo.commits[commit][path]
        self._answer(200, data, X_Repo_Commit=commit, ETag=f'"{_git_hash(data)}"', Accept_Ranges="bytes")

    def _create(self) -> None:
        self._know()
        wish = json.loads(self.body)
        name = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else f"me/{wish['name']}"
        about = {"url": f"{self.server.url}/{name}", "name": name, "id": "1"}
        if name in self.server.repos:
            self._answer(409, {**about, "error": "You already created this model repo"})
            return
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.server.add(name, {".gitattributes": b""}, private=private)
        self._answer(200, about)

    def _branch(self, name: str, branch: str) -> None:
        self._know()
        repo = self._repo(name)
        if branch in repo.branches:
            raise _Refused(409, "BranchExists", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._answer(200, {})

    def _preupload(self, name: str, revision: str) -> None:
        self._know()
        self._commit_of(self._repo(name), revision)
        wishes = json.loads(self.body)["files"]
        modes = [(wish["path"], "lfs" if wish["path"].endswith(".safetensors") else "regular") for wish in wishes]
        self._answer(200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})

    def _batch(self, name: str) -> None:
        self._know()
        objects = [
            {**wish, "actions": {"upload": {"href": f"{self.server.url}/blobs/{wish['oid']}"}}}
            for wish in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _blob(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self._answer(200)

    def _commit(self, name: str, revision: str) -> None:
        self._know()
        repo = self._repo(name)
        files = dict(repo.commits[self._commit_of(repo, revision)])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                repo.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, revision)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _know(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise _Refused(401, "", "Invalid username or password.")

    def _valid(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler._info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/?", _Handler._tree),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._file),
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler._branch),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler._preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/blobs/(\w+)", _Handler._blob),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler._commit),
    ("POST", r"/api/validate-yaml", _Handler._valid),
]
