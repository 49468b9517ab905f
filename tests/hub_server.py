"""A Hub in a thread: the part of its HTTP interface that creating, committing and downloading need, kept in memory.

It stores what is uploaded, as commits of branches, and serves it again by branch or commit. What it does not know is
answered by 404 and remembered in `unknown`, so that a test notices when a client asks for more.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
USER = "tester"
ORGANISATION = "someone"
_LFS_SUFFIXES = (".safetensors", ".bin")


class Repository:
    """Branches and commits of one model.

    Attributes:
        private (`bool`): visibility that it was created with.
        branches (`dict[str, str]`): name -> commit.
        commits (`dict[str, dict[str, bytes]]`): commit -> path -> content.
        messages (`list[tuple[str, str]]`): (branch, first line) of each upload, oldest first.
    """

    def __init__(self, private: bool):
        self.private = private
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: list[tuple[str, str]] = []
        # a new repository of the Hub has a first commit
        self.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        parts = [branch, str(len(self.commits))]
        parts += [f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in sorted(files.items())]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class HubServer:
    """`with HubServer() as hub:` serves on `hub.url`.

    Attributes:
        repositories (`dict[str, Repository]`): by `"owner/name"`.
        requests (`list[tuple[str, str]]`): (method, path) of all that was asked.
        unknown (`list[tuple[str, str]]`): those that this server has no answer for.
        faults (`list[tuple[str, str, int]]`): (method, pattern of the path, status) of what is to fail.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One request; `_ROUTES` say which method answers it."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self.read_body()
        self.hub.requests.append((self.command, path))
        for method, pattern, status in self.hub.faults:
            if method == self.command and re.search(pattern, path):
                return self.send_json({"error": "refused by the test"}, status)
        for methods, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods:
                return getattr(self, name)(**found.groupdict())
        self.hub.unknown.append((self.command, path))
        return self.fail(404, "EntryNotFound")

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content: object, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def fail(self, status: int, code: str) -> None:
        self.send_json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, or None after an answer of 401. Only its owner sees a private one, or changes any."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self.may_write()):
            self.fail(401, "RepoNotFound")
            return None
        if self.command == "POST" and not self.may_write():
            self.fail(401, "Unauthorized")
            return None
        return found

    def files(self, repo_id: str, revision: str) -> tuple[Repository, str, dict[str, bytes]] | None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound")
            return None
        return repository, commit, repository.commits[commit]

    def whoami(self) -> None:
        if not self.may_write():
            return self.fail(401, "Unauthorized")
        return self.send_json({"type": "user", "name": USER, "orgs": [{"name": ORGANISATION, "roleInOrg": "write"}]})

    def create(self) -> None:
        if not self.may_write():
            return self.fail(401, "Unauthorized")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self.send_json(answer | {"error": "You already created this model repo"}, 409)
        # older clients say `private`, newer ones `visibility`
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private)
        return self.send_json(answer)

    def validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        found = self.files(repo_id, revision or "main")
        if found is not None:
            repository, commit, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.send_json(
                {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private, "siblings": siblings}
            )

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        found = self.files(repo_id, revision)
        if found is None:
            return None
        prefix = f"{folder}/" if folder else ""
        files = {path: content for path, content in found[2].items() if path.startswith(prefix)}
        if prefix and not files:
            return self.fail(404, "EntryNotFound")
        return self.send_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(files.items())
            ]
        )

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        if name in repository.branches:
            return self.fail(409, "Conflict")
        repository.branches[name] = repository.branches["main"]
        return self.send_json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        if self.files(repo_id, revision) is None:
            return
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(_LFS_SUFFIXES) else "regular" for path in paths}
        self.send_json({"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]})

    def lfs_batch(self, repo_id: str) -> None:
        if self.repository(repo_id) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/lfs/{asked['oid']}"
            known = asked["oid"] in self.hub.objects
            objects.append(asked if known else {**asked, "actions": {"upload": {"href": href, "header": {}}}})
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "BadObject")
        self.hub.objects[oid] = self.body
        return self.send(b"")

    def commit(self, repo_id: str, revision: str) -> None:
        found = self.files(repo_id, revision)
        if found is None:
            return None
        repository, head, files = found
        files = dict(files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message, parent = value["summary"], value.get("parentCommit")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                return self.fail(400, "BadRequest")
        if parent not in (None, head):
            return self.fail(412, "PreconditionFailed")
        commit = repository.add(revision, files)
        repository.messages.append((revision, message))
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        return self.send_json({"commitOid": commit, "commitUrl": url, "success": True})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self.files(repo_id, revision)
        if found is None:
            return None
        _, commit, files = found
        if path not in files:
            return self.send_json({"error": "EntryNotFound"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[path]
        return self.send(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{_REPO}", "info"),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
