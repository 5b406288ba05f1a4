"""A small server of the Hub's API on loopback, for the real huggingface_hub client; and ways to make it fail.

It keeps repositories in memory, as branches of commits of files. Files that git would keep as pointers go through the
LFS routes; `resolve` sends those on to another address, as the Hub does. What it leaves out: Xet, gated repositories,
pull request pages, tree pages past the first.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

KINDS = {"models": "", "datasets": "datasets/"}
LARGE = (".safetensors", ".png", ".jpg")


@dataclass(frozen=True)
class File:
    """What a commit holds at a path."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self):
        data = f"version 1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: what each commit holds, and where the branches are."""

    owner: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        oid = hashlib.sha1(repr((branch, message, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    pattern: str
    times: int
    status: int = 0
    headers: dict = field(default_factory=dict)
    cut_after: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event | None = None


class Refused(Exception):
    """An answer that is an error, with the Hub's code for it."""

    def __init__(self, status, text, code=None, **more):
        super().__init__(text)
        self.status, self.text, self.code, self.more = status, text, code, more


class Hub:
    """The state of the server: repositories, stored large files, tokens, faults, and the requests that came.

    Args:
        tokens: for each token, its user and whether it may write.
    """

    def __init__(self, tokens=None):
        self.tokens = {"writer": ("me", True), "reader": ("me", False), "stranger": ("you", True), **(tokens or {})}
        self.repos, self.stored, self.faults, self.requests = {}, {}, [], []
        self.lock = threading.RLock()
        self.url = self.cdn = ""

    def put(self, kind, name, files):
        """Make a public repository with these files, as if somebody had pushed it."""
        repo = self.repos[kind, name] = Repo(name.split("/")[0])
        repo.commit("main", {path: File(data, path.endswith(LARGE)) for path, data in files.items()}, "first")
        return repo

    def files(self, name, revision="main", kind="models"):
        """Return what a revision holds, path to bytes."""
        repo = self.repos[kind, name]
        held = repo.commits[repo.branches.get(revision, revision)]
        return {path: file.data for path, file in held.items()}

    def fail(self, method, pattern, status=0, times=1, **options):
        """Let the next matching requests fail; see `Fault`."""
        fault = Fault(method, pattern, times, status, **options)
        self.faults.append(fault)
        return fault

    def next_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    # What the routes do. Each returns a JSON-ready value, or (status, headers, bytes).

    def user(self, token):
        """Return the user of a token, None for no token."""
        if token is None:
            return None, False
        if token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header", "InvalidToken")
        return self.tokens[token]

    def find(self, kind, name, token, write=False):
        user, may_write = self.user(token)
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and user != repo.owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Unauthorized")
        if write and not (may_write and user == repo.owner):
            raise Refused(403, "Forbidden: you need write rights for this repository")
        return repo

    def held(self, repo, revision):
        """Return the id and the files of a revision."""
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def create(self, token, body):
        user, may_write = self.user(token)
        if user is None:
            raise Refused(401, "Unauthorized")
        asked = json.loads(body)
        owner = asked.get("organization") or user
        if owner != user or not may_write:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        if (kind, name) in self.repos:
            raise Refused(409, "You already created this repo", url=f"{self.url}/{KINDS[kind]}{name}")
        repo = self.repos[kind, name] = Repo(owner, asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial")
        return {"url": f"{self.url}/{KINDS[kind]}{name}", "name": name}

    def validate_yaml(self, token, body):
        content = json.loads(body)["content"]
        match = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            values = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            raise Refused(400, f"Invalid metadata in README.md: {error}") from error
        base = values.get("base_model") or "a/b"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            raise Refused(400, 'Invalid metadata in README.md: "base_model" with value ' + base)
        return {"errors": [], "warnings": []}

    def info(self, token, kind, name, revision="main"):
        oid, files = self.held(self.find(kind, name, token), revision)
        return {"id": name, "sha": oid, "siblings": [{"rfilename": path} for path in files], "tags": []}

    def tree(self, token, kind, name, revision):
        _, files = self.held(self.find(kind, name, token), revision)
        return [
            {"type": "file", "path": path, "size": len(file.data), "oid": file.git_oid}
            | ({"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.lfs else {})
            for path, file in files.items()
        ]

    def branch(self, token, body, kind, name, branch):
        repo = self.find(kind, name, token, write=True)
        if branch in repo.branches:
            raise Refused(409, f"Reference refs/heads/{branch} already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def preupload(self, token, body, kind, name, revision):
        _, files = self.held(self.find(kind, name, token, write=True), revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path, known = asked["path"], files.get(asked["path"])
            lfs = path.endswith(LARGE)
            oid = None if known is None else known.sha256 if lfs else known.git_oid
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, token, body, kind, name):
        self.find(kind, name, token, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            known = {} if oid in self.stored else {"actions": {"upload": {"href": f"{self.url}/lfs/{oid}"}}}
            objects.append({"oid": oid, "size": size, **known})
        return {"transfer": "basic", "objects": objects}

    def store(self, token, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The content does not have this sha256")
        self.stored[oid] = body
        return {}

    def commit(self, token, body, kind, name, revision, create_pr=False):
        repo = self.find(kind, name, token, write=True)
        parent, held = self.held(repo, revision)
        files, message = dict(held), ""
        for line in body.decode().splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Refused(400, f"The large file {value['path']} was not uploaded")
                files[value["path"]] = File(self.stored[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        oid = repo.commit(f"refs/pr/{number}" if create_pr else revision, files, message)
        address = f"{self.url}/{KINDS[kind]}{name}"
        pull = f"{address}/discussions/{number}" if create_pr else None
        return {"success": True, "commitOid": oid, "commitUrl": f"{address}/commit/{oid}", "pullRequestUrl": pull}

    def resolve(self, token, kind, name, revision, path):
        oid, files = self.held(self.find(kind, name, token), revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file, headers = files[path], {"X-Repo-Commit": oid}
        if not file.lfs:
            return 200, {**headers, "ETag": f'"{file.git_oid}"'}, file.data
        self.stored[file.sha256] = file.data
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        return 302, {**headers, **linked, "Location": f"{self.cdn}/cdn/{file.sha256}"}, b""


NAME = r"(?P<name>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets)"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/{KIND}/{NAME}", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", rf"/api/{KIND}/{NAME}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"/api/{KIND}/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{KIND}/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/(?P<kind>datasets/)?{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "store"),
    ("GET", rf"/(?P<kind>datasets/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """Reads requests, finds their route, and writes the answer, or the fault that was asked for."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self):
        from urllib.parse import unquote, urlsplit

        body = self.body()
        address = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
        fault = self.hub.next_fault(self.command, self.path)
        if fault is not None:
            fault.reached.set()
            if fault.release is not None:
                fault.release.wait(60)
            if fault.status:
                return self.send(fault.status, fault.headers, b'{"error": "asked for by the test"}')
        try:
            status, headers, data = self.route(address.path, body, "create_pr=1" in address.query, unquote)
        except Refused as refused:
            headers = {"X-Error-Message": refused.text}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            return self.send(refused.status, headers, json.dumps({"error": refused.text, **refused.more}).encode())
        return self.send(status, headers, data, fault.cut_after if fault else None)

    def route(self, path, body, create_pr, unquote):
        method = "GET" if self.command == "HEAD" else self.command
        given = self.headers.get("Authorization", "")
        token = given.removeprefix("Bearer ") or None
        if method == "GET" and path.startswith("/cdn/"):
            return self.part_of(200, {"ETag": f'"{path[5:]}"'}, self.hub.stored[path[5:]])
        for verb, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if verb != method or not match:
                continue
            values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            if "name" in values:
                values["kind"] = values.get("kind", "models").strip("/")
            values |= {"create_pr": create_pr} if name == "commit" else {}
            arguments = (token,) if method == "GET" else (token, body)
            with self.hub.lock:
                result = getattr(self.hub, name)(*arguments, **values)
            if isinstance(result, tuple):
                return self.part_of(*result)
            return 200, {"Content-Type": "application/json"}, json.dumps(result).encode()
        raise Refused(404, f"No route for {method} {path}")

    def part_of(self, status, headers, data):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**headers, "Accept-Ranges": "bytes"}
        if status != 200 or not asked:
            return status, headers, data
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    def send(self, status, headers, data, cut_after=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut_after is None else data[:cut_after])
            self.wfile.flush()
        if cut_after is not None:
            self.close_connection = True


@contextmanager
def running(hub=None):
    """Serve a Hub on a free port of loopback; give it."""
    hub = Hub() if hub is None else hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")  # another host, as the Hub's is
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
