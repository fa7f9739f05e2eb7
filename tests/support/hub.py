"""A Hugging Face Hub in this process: enough of its calls, and its rules, for the real clients to publish and load.

It keeps what a client relies on: tokens are checked on every write, an upload's sha256 is checked, a commit that names
an object nobody uploaded or a parent that is not the head is refused, and errors carry the Hub's codes. Storage by xet
is not part of it: clients must run with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


READ, WRITE = "read", "write"
_LARGE = (".safetensors", ".jpg", ".png", ".bin")


@dataclass
class Repo:
    """Branches (name -> commit), commits (id -> path -> content), and who may see it.

    `before_commit` is called when a commit arrives, `drops` is how many uploads of parts break off.
    """

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    before_commit: Callable[[Repo], None] | None = None
    drops: int = 0

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with `files` over those of the branch."""
        content = self.commits.get(self.branches.get(branch, ""), {}) | files
        seed = (
            f"{branch}{len(self.commits)}{sorted((name, hashlib.sha1(b).hexdigest()) for name, b in content.items())}"
        )
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = content, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit; KeyError when there is none."""
        return self.commits[self.branches.get(revision, revision)]


class HubServer(ThreadingHTTPServer):
    """The Hub; `with HubServer() as hub:` serves on `hub.url`.

    Attributes:
        repos: by id.
        tokens: token -> (account, right).
        log: method, path and body of every request.
        chunk_size: bytes from which an upload is cut into parts, and their size.
    """

    daemon_threads = True

    def __init__(self, chunk_size: int = 1 << 30) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, tuple[str, str]] = {}
        self.log: list[tuple[str, str, bytes]] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.chunk_size = chunk_size
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(**options)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def sent(self, method: str, part: str) -> list[bytes]:
        """The bodies of the requests whose path contains `part`."""
        return [body for verb, path, body in self.log if verb == method and part in path]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


def client_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a process whose clients know the Hub at `url` and keep their cache in `home`."""
    tests = Path(__file__).parents[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "TRANSFORMERS_OFFLINE": "",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", content: Any = None) -> None:
        self.status, self.code, self.message, self.content = status, code, message, content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        with self.server.lock:
            self.server.log.append((self.command, path, body))
            try:
                for method, pattern, action in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        # A slash inside a branch's name is quoted.
                        return action(self, body, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                raise _Refusal(404, message=f"no such call: {self.command} {path}")
            except _Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                content = refusal.content if refusal.content is not None else {"error": refusal.message}
                self._reply(content, refusal.status, {name: value for name, value in headers.items() if value})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Rights

    def _account(self) -> tuple[str, str] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.server.tokens:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return self.server.tokens.get(given)

    def _readable(self, repo_id: str, contents: bool = False) -> Repo:
        account, repo = self._account(), self.server.repos.get(repo_id)
        owner = account is not None and repo_id.startswith(f"{account[0]}/")
        if repo is None or (repo.private and not owner):
            raise _Refusal(401 if account is None else 404, "RepoNotFound", "Repository not found")
        if contents and repo.gated and not owner:
            raise _Refusal(401 if account is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repo

    def _writable(self, repo_id: str) -> Repo:
        self._may_write(repo_id)
        return self._readable(repo_id)

    def _may_write(self, repo_id: str) -> None:
        account = self._account()
        if account is None:
            raise _Refusal(401, message="Invalid username or password.")
        if account[1] != WRITE or not repo_id.startswith(f"{account[0]}/"):
            raise _Refusal(403, message=f"You don't have the rights to write to {repo_id}")

    def _revision(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Accounts, repositories, branches

    def whoami(self, body: bytes) -> None:
        account = self._account()
        if account is None:
            raise _Refusal(401, message="Invalid username or password.")
        self._reply({"type": "user", "name": account[0], "auth": {"accessToken": {"role": account[1]}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        account = self._account()
        repo_id = f"{asked.get('organization') or (account[0] if account else '')}/{asked['name']}"
        self._may_write(repo_id)
        if repo_id in self.server.repos:
            raise _Refusal(409, message="You already created this model repo", content={"url": self._page(repo_id)})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.add(repo_id, private=private)
        self._reply({"url": self._page(repo_id), "name": repo_id, "id": repo_id})

    def _page(self, repo_id: str) -> str:
        return f"{self.server.url}/{repo_id}"

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        try:
            metadata = yaml.safe_load(text.split("---\n")[1])
            errors = [] if isinstance(metadata, dict) and metadata.get("license") else ["license is required"]
        except (yaml.YAMLError, IndexError) as error:
            errors = [str(error)]
        if errors:
            raise _Refusal(400, content={"errors": [{"message": error} for error in errors], "warnings": []})
        self._reply({"errors": [], "warnings": []})

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repo = self._writable(repo_id)
        if name in repo.branches:
            raise _Refusal(409, message="Reference already exists")
        repo.branches[name] = self._revision(repo, json.loads(body or b"{}").get("startingPoint") or "main")
        self._reply({})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        repo = self._readable(repo_id)
        sha = self._revision(repo, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(repo.commits[sha])]
        metadata = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        self._reply(metadata | {"tags": [], "downloads": 0, "likes": 0, "gated": "auto" if repo.gated else False})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._readable(repo_id, contents=True)
        files = repo.commits[self._revision(repo, revision)]
        self._reply([_entry(name, content) for name, content in sorted(files.items())])

    def refs(self, body: bytes, repo_id: str) -> None:
        repo = self._readable(repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        self._reply({"branches": branches, "tags": [], "converts": []})

    # Uploads

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        present = repo.commits[self._revision(repo, revision)]
        files = []
        for asked in json.loads(body)["files"]:
            name = asked["path"]
            mode = "lfs" if name.endswith(_LARGE) else "regular"
            oid = None if name not in present else _oid(name, present[name])
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._reply({"files": files})

    def batch(self, body: bytes, repo_id: str) -> None:
        repo = self._writable(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repo.objects:
                address = f"{self.server.url}/objects/{repo_id}/{oid}"
                upload: dict[str, Any] = {"href": address}
                if size > self.server.chunk_size:
                    parts = -(-size // self.server.chunk_size)
                    header = {f"{number + 1:05d}": f"{address}/{number + 1}" for number in range(parts)}
                    upload = {"href": f"{address}/complete", "header": header | {"chunk_size": self.server.chunk_size}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            objects.append(answer)
        self._reply({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, repo_id: str, oid: str, part: str | None = None) -> None:
        repo = self.server.repos[repo_id]
        if repo.drops:
            repo.drops -= 1
            self.close_connection = True
            self.connection.close()
            return
        if part is not None:
            self.server.parts[oid, int(part)] = body
        else:
            self._store(repo, oid, body)
        self._reply(b"", headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, repo_id: str, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        if numbers != sorted(numbers) or any((oid, number) not in self.server.parts for number in numbers):
            raise _Refusal(400, message="parts are missing")
        self._store(self.server.repos[repo_id], oid, b"".join(self.server.parts.pop((oid, n)) for n in numbers))
        self._reply({})

    def _store(self, repo: Repo, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refusal(422, message="the content does not match its oid")
        repo.objects[oid] = content

    def verify(self, body: bytes, repo_id: str, oid: str) -> None:
        repo = self._writable(repo_id)
        if len(repo.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise _Refusal(404, message="no such object")
        self._reply({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        if repo.before_commit is not None:
            repo.before_commit(repo)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._revision(repo, revision)
        if header.get("parentCommit") not in (None, head):
            raise _Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise _Refusal(400, message=f"the object of {value['path']} was never uploaded")
                files[value["path"]] = repo.objects[value["oid"]]
        sha = repo.commit(files, revision)
        self._reply({"success": True, "commitOid": sha, "commitUrl": f"{self._page(repo_id)}/commit/{sha}"})

    # Downloads

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self._readable(repo_id, contents=True)
        sha = self._revision(repo, revision)
        if name not in repo.commits[sha]:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        content = repo.commits[sha][name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(name, content)}"'}
        if name.endswith(_LARGE):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        self._reply(content, headers=headers)


def _oid(name: str, content: bytes) -> str:
    if name.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _oid(name, content)}
    if name.endswith(_LARGE):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 130}
    return entry


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_OBJECT = rf"/objects/{_ID}/(?P<oid>[0-9a-f]{{64}})"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), rf"/api/models/{_ID}/branch/(?P<name>[^/]+)", _Handler.branch),
    (("POST",), rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET",), rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("GET",), rf"/api/models/{_ID}/refs", _Handler.refs),
    (("GET",), rf"/api/models/{_ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), rf"/api/models/{_ID}", _Handler.info),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), rf"{_OBJECT}(?:/(?P<part>\d+))?", _Handler.put),
    (("POST",), rf"{_OBJECT}/complete", _Handler.complete),
    (("POST",), rf"{_OBJECT}/verify", _Handler.verify),
    (("GET", "HEAD"), rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
