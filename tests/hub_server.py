"""A small Hugging Face Hub on loopback, for the real `huggingface_hub` client and all that is built on it.

    with HubServer(folder) as hub:
        hub.add_user("me", "hf_token")
        hub.faults.append(Fault("drop_after", path="/commit/"))  # it lands, the client never hears of it
        ...  # a client whose HF_ENDPOINT is hub.endpoint
        hub.requests  # what it asked, and how many bytes went each way

Models and data sets live in the folder: contents by their sha256, commits, branches and tags. It knows users and
their tokens, private repositories, and LFS without Xet (the client's HF_HUB_DISABLE_XET=1). Large and binary files
are served by a second host name, as the Hub's are, and that one refuses a token. What it does not know is a 404.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 65536  # bytes, of what is read or sent at once
UNLOGGED = ("/api/agent-harnesses", "/api/telemetry")  # what the client asks once in a while for its own sake
LFS_SIZE = 10 * 1024**2  # bytes; a larger file goes to LFS, a smaller one if it is binary
GITATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # what a new repository holds


@dataclass
class Request:
    """What a client asked, in the order of arrival. `status` is None until, or unless, it was answered."""

    method: str
    path: str  # with the query, quoted as it came
    received: int = 0  # bytes of the request, headers included
    sent: int = 0  # bytes of the answer's body
    status: int | None = None


@dataclass
class Fault:
    """A rule by which requests go wrong. It hits a request that fits all that is given, `times` times.

    action: "drop", the connection breaks before anything is done; "drop_after", it is done, but the connection breaks
        before the answer, or half-way through a download; "fail", the answer is `status`, and nothing is done; "delay",
        it waits for `seconds`, or until the server stops; "corrupt", one bit of the answer's body is another.
    path: a regular expression that is searched in the path.
    request: the number of the request, an index into `HubServer.requests`.
    reached: set when it hits, so that a test can wait for it.
    """

    action: str
    method: str = ""
    path: str = ""
    request: int | None = None
    times: int = 1
    status: int = 500
    retry_after: int | None = None  # seconds
    seconds: float = 60.0
    reached: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        if self.action not in ("drop", "drop_after", "fail", "delay", "corrupt"):
            raise ValueError(f"a fault cannot {self.action!r}")

    def fits(self, request: Request, number: int) -> bool:
        return (
            self.times > 0
            and self.request in (None, number)
            and self.method in ("", request.method)
            and re.search(self.path, request.path) is not None
        )


class Refused(Exception):
    """An answer other than success: its status, what it says, and its name among the Hub's errors."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.status, self.headers = status, {**named, **headers}


class Repository:
    """The commits, branches and tags of one repository, and the contents that they point to, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def exists(self) -> bool:
        return (self.folder / "repository.json").exists()

    def create(self, private: bool):
        (self.folder / "objects").mkdir(parents=True)
        (self.folder / "commits").mkdir()
        self._write("repository.json", {"private": private, "branches": {}, "tags": {}})
        self.commit("main", {".gitattributes": self.store(GITATTRIBUTES.encode())}, "initial commit", parent=None)

    @property
    def private(self) -> bool:
        return self._read("repository.json")["private"]

    def set_private(self, private: bool):
        self._write("repository.json", {**self._read("repository.json"), "private": private})

    @property
    def branches(self) -> dict[str, str]:
        return self._read("repository.json")["branches"]

    @property
    def tags(self) -> dict[str, str]:
        return self._read("repository.json")["tags"]

    def point(self, kind: str, name: str, commit: str | None):
        """Moves one of the "branches" or "tags" to a commit; to None: removes it."""
        state = self._read("repository.json")
        state[kind][name] = commit
        if commit is None:
            del state[kind][name]
        self._write("repository.json", state)

    def resolve(self, revision: str) -> str:
        """The id of the commit that a branch, a tag, or the begin of an id means."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for path in (self.folder / "commits").glob(f"{revision}*.json"):
                return path.stem
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def read_commit(self, revision: str) -> dict:
        """id, parent, title, message, author, date and files: {path: {size, sha256, oid, lfs}}, oid as git's."""
        name = self.resolve(revision)
        return {"id": name, **self._read(f"commits/{name}.json")}

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a person would find in a clone: the contents by their paths."""
        return {path: self.object(file).read_bytes() for path, file in self.read_commit(revision)["files"].items()}

    def log(self, revision: str = "main") -> list[dict]:
        """The commits up to a revision, the last one first."""
        commits = [self.read_commit(revision)]
        while commits[-1]["parent"]:
            commits.append(self.read_commit(commits[-1]["parent"]))
        return commits

    def commit(self, branch: str, files: dict, title: str, parent: str | None, message: str = "", author: str = ""):
        """Writes a commit, moves the branch to it and returns its id."""
        written = {"parent": parent, "title": title, "message": message, "author": author, "files": files}
        written["date"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        name = hashlib.sha1(json.dumps(written, sort_keys=True).encode()).hexdigest()
        self._write(f"commits/{name}.json", written)
        self.point("branches", branch, name)
        return name

    def store(self, content: bytes) -> dict:
        """Keeps the content of a regular file and describes it as `read_commit` does."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / "objects" / sha256).write_bytes(content)
        return {"size": len(content), "sha256": sha256, "oid": git_hash(content), "lfs": False}

    def describe(self, sha256: str) -> dict:
        """Describes a file of LFS that was sent before."""
        if not (self.folder / "objects" / sha256).exists():
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = (self.folder / "objects" / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"size": size, "sha256": sha256, "oid": git_hash(pointer), "lfs": True, "pointer_size": len(pointer)}

    def object(self, file: dict) -> Path:
        return self.folder / "objects" / file["sha256"]

    def _read(self, name: str):
        return json.loads((self.folder / name).read_text())

    def _write(self, name: str, content):
        """In one step, so that a server that is stopped or killed meanwhile leaves the old or the new."""
        (self.folder / "written").write_text(json.dumps(content))
        (self.folder / "written").replace(self.folder / name)


def git_hash(content: bytes) -> str:
    """The id of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The Hub. Its state is the folder: a server that is started again there, or another, goes on.

    `requests` is the log and may be cleared; `faults` are tried in turn, and the first that fits a request hits it;
    `bandwidth`, in bytes a second, is shared by all connections, each way by itself; None is as fast as it goes.
    """

    def __init__(self, folder: str | Path, port: int = 0):
        self.folder = Path(folder)
        self.port = port  # 0: any that is free
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.bandwidth: float | None = None
        self.lock = threading.RLock()  # of the log, the faults and the repositories
        self._users: dict[str, dict] = {}  # by token
        self._server = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        self.stopping, self.connections = threading.Event(), set()
        self._lines = {"in": (threading.Lock(), [0.0]), "out": (threading.Lock(), [0.0])}
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.hub, self.port = self, self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        """Breaks all connections and refuses new ones; `start` takes them again at the same address."""
        if self._server is None:
            return
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            close(connection)
        self._server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where large files are: another host for a client, which must not send its token there."""
        return f"http://localhost:{self.port}"

    def add_user(self, name: str, token: str, role: str = "write", organizations: tuple[str, ...] = ()):
        """A person who owns the namespaces `name` and `organizations`. `role`: "write", or "read" for a token that may
        change nothing."""
        self._users[token] = {"name": name, "role": role, "organizations": organizations}

    def repository(self, name: str, kind: str = "models") -> Repository:
        return Repository(self.folder / kind / name)

    def user_of(self, token: str | None) -> dict | None:
        if token is None:
            return None
        if token not in self._users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self._users[token]

    def throttle(self, direction: str, size: int):
        """Waits until `size` bytes have gone "in" or "out" at the line's speed."""
        if self.bandwidth:
            lock, free_at = self._lines[direction]
            with lock:
                free_at[0] = max(time.monotonic(), free_at[0]) + size / self.bandwidth
                until = free_at[0]
            self.stopping.wait(max(0.0, until - time.monotonic()))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = allow_reuse_port = True  # a fixed port may be held for the server, and is taken again at once
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that went away is no error; all else is printed."""
        if not self.hub.stopping.is_set():
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for 40 ms
    rbufsize = CHUNK

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):  # a connection that a fault has broken
            super().finish()

    def log_message(self, *_):
        pass

    def answer_request(self):
        """One request, from the log and the faults to the answer."""
        self.has_body_left, self.fault = True, None
        try:
            try:
                self.meet_fault(self.log_request_and_find_fault())
                self.route()
            except Refused as refused:
                self.reply({"error": str(refused)}, refused.status, **refused.headers)
        except ConnectionError:
            self.close_connection = True
            close(self.connection)

    def log_request_and_find_fault(self) -> Fault | None:
        self.request_log = Request(self.command, self.path, len(self.raw_requestline) + len(bytes(self.headers)))
        if self.path.startswith(UNLOGGED):
            return None
        with self.hub.lock:
            number = len(self.hub.requests)
            self.hub.requests.append(self.request_log)
            fault = next((one for one in self.hub.faults if one.fits(self.request_log, number)), None)
            if fault:
                fault.times -= 1
                fault.reached.set()
            return fault

    def meet_fault(self, fault: Fault | None):
        """What a fault does before the request is carried out; the rest is in `start_reply` and `send_body`."""
        self.fault = fault and fault.action
        if self.fault == "drop":
            raise ConnectionAbortedError
        if self.fault == "delay":
            self.hub.stopping.wait(fault.seconds)
        if self.fault == "fail":
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            raise Refused(fault.status, "This request was told to fail", **wait)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    def route(self):
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        matches = (
            (re.fullmatch(pattern, path), answer) for method, pattern, answer in ROUTES if method == self.command
        )
        match, answer = next((one for one in matches if one[0]), (None, None))
        if match is None:
            raise Refused(404, f"no such page: {path}")
        named = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        if path.startswith("/storage/"):
            if self.headers["Authorization"]:
                raise Refused(400, "Only one auth mechanism allowed: the address is signed, and a token came with it")
            return answer(self, **named)
        authorization = self.headers["Authorization"]
        self.user = self.hub.user_of(authorization.removeprefix("Bearer ") if authorization else None)
        if "name" in named:
            kind, name = named.pop("kind", "models"), named.pop("name")
            repository = self.hub.repository(name, kind)
            self.name, self.kind = name, kind
            may_see = repository.exists and (not repository.private or self.owns(name))
            if not may_see:
                raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
            is_reading = self.command in ("GET", "HEAD") or answer is _Handler.paths_info
            if not is_reading:
                self.demand_rights(name)
            named["repository"] = repository
        answer(self, **named)

    def owns(self, name: str) -> bool:
        return self.user is not None and name.split("/")[0] in (self.user["name"], *self.user["organizations"])

    def demand_rights(self, name: str):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self.owns(name) or self.user["role"] != "write":
            raise Refused(403, f"You don't have the rights to write to {name}")

    # --- users and repositories ---

    def whoami(self):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.user["role"]}
        about = {"type": "user", "id": self.user["name"], "name": self.user["name"], "fullname": self.user["name"]}
        organizations = [{"type": "org", "id": one, "name": one} for one in self.user["organizations"]]
        self.reply({**about, "orgs": organizations, "auth": {"type": "access_token", "accessToken": token}})

    def create_repository(self):
        asked = self.json_body()
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        if not self.owns(name) or self.user["role"] != "write":
            namespace = name.split("/")[0]
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        kind = f"{asked.get('type') or 'model'}s"
        repository = self.hub.repository(name, kind)
        about = {"url": self.url_of(name, kind), "name": name, "id": name}
        with self.hub.lock:
            if repository.exists:
                return self.reply({"error": f"You already created this {kind[:-1]} repo", **about}, 409)
            repository.create(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply(about)

    def delete_repository(self):
        asked = self.json_body()
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        repository = self.hub.repository(name, f"{asked.get('type') or 'model'}s")
        if not repository.exists:
            raise Refused(404, "Repository not found", "RepoNotFound")
        self.demand_rights(name)
        with self.hub.lock:
            shutil.rmtree(repository.folder)
        self.reply({})

    def settings(self, repository):
        private = self.json_body().get("visibility") == "private"
        with self.hub.lock:
            repository.set_private(private)
        self.reply({"private": private})

    def validate_yaml(self):
        self.json_body()
        self.reply({"errors": [], "warnings": []})

    # --- reading ---

    def info(self, repository, revision="main"):
        commit = repository.read_commit(revision)
        siblings = []
        for path, file in commit["files"].items():
            siblings.append({"rfilename": path})
            if self.query.get("blobs"):
                siblings[-1] |= {"size": file["size"], "blobId": file["oid"]}
                if file["lfs"]:
                    sizes = {"size": file["size"], "pointerSize": file["pointer_size"]}
                    siblings[-1]["lfs"] = {"sha256": file["sha256"], **sizes}
        about = {"id": self.name, "modelId": self.name, "author": self.name.split("/")[0], "sha": commit["id"]}
        dates = {"lastModified": commit["date"], "createdAt": repository.log(revision)[-1]["date"]}
        rest = {"private": repository.private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        self.reply({"_id": self.name, **about, **dates, **rest, "siblings": siblings})

    def refs(self, repository):
        def listed(names, prefix):
            return [{"name": one, "ref": f"{prefix}{one}", "targetCommit": commit} for one, commit in names.items()]

        branches, tags = listed(repository.branches, "refs/heads/"), listed(repository.tags, "refs/tags/")
        self.reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def log(self, repository, revision):
        def shown(commit):
            authors = [{"user": commit["author"]}]
            return {name: commit[name] for name in ("id", "title", "message", "date")} | {"authors": authors}

        self.reply([shown(commit) for commit in repository.log(revision)])

    def tree(self, repository, revision, path=""):
        entries = entries_of(repository.read_commit(revision)["files"])
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        below = {name: entry for name, entry in entries.items() if not path or name.startswith(f"{path}/")}
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            depth = path.count("/") + 1 if path else 0
            below = {name: entry for name, entry in below.items() if name.count("/") == depth}
        self.reply(list(below.values()))

    def paths_info(self, repository, revision):
        body = self.whole_body().decode()
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        entries = entries_of(repository.read_commit(revision)["files"])
        self.reply([entries[path] for path in paths if path in entries])

    def resolve(self, repository, revision, path):
        commit = repository.read_commit(revision)
        about = {"X-Repo-Commit": commit["id"]}
        file = commit["files"].get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **about)
        if not file["lfs"]:
            return self.send_file(repository.object(file), ETag=f'"{file["oid"]}"', **about)
        about |= {"X-Linked-Etag": f'"{file["sha256"]}"', "X-Linked-Size": str(file["size"])}
        location = f"{self.hub.storage}/storage/{self.kind}/{self.name}/{file['sha256']}"
        self.reply({}, 302, Location=location, ETag=f'"{file["oid"]}"', **about)

    # --- writing ---

    def preupload(self, repository, revision):
        self.demand_branch(repository, revision)
        there = repository.read_commit(revision)["files"]
        ignored = repository.object(there[".gitignore"]).read_text().split() if ".gitignore" in there else []
        answers = []
        for file in self.json_body()["files"]:
            is_large = file["size"] > LFS_SIZE or file["path"].endswith(".safetensors")
            is_lfs = is_large or b"\0" in base64.b64decode(file["sample"])
            old = there.get(file["path"])
            oid = old and (old["sha256"] if old["lfs"] else old["oid"])
            is_ignored = any(fnmatch.fnmatch(Path(file["path"]).name, pattern) for pattern in ignored)
            mode = {"uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": is_ignored}
            answers.append({"path": file["path"], **mode, "oid": oid})
        self.reply({"files": answers, "commitOid": repository.resolve(revision)})

    def lfs_batch(self, repository):
        answers = []
        for one in self.json_body()["objects"]:
            answers.append({"oid": one["oid"], "size": one["size"]})
            if not (repository.folder / "objects" / one["oid"]).exists():
                storage = f"{self.hub.storage}/storage/{self.kind}/{self.name}/{one['oid']}"
                verify = f"{self.url_of(self.name, self.kind)}.git/info/lfs/verify"
                answers[-1]["actions"] = {"upload": {"href": storage}, "verify": {"href": verify}}
        self.reply({"transfer": "basic", "objects": answers}, content_type="application/vnd.git-lfs+json")

    def lfs_verify(self, repository):
        asked = self.json_body()
        path = repository.folder / "objects" / asked["oid"]
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise Refused(404, f"no such object: {asked['oid']}")
        self.reply({})

    def receive_object(self, kind, name, oid):
        """A file of LFS comes in. What is not what it was called, or not whole, is not kept."""
        objects = self.hub.repository(name, kind).folder / "objects"
        arriving = objects / f"{oid}.{threading.get_ident()}"
        digest = hashlib.sha256()
        try:
            with arriving.open("wb") as file:
                for part in self.body():
                    digest.update(part)
                    file.write(part)
            if digest.hexdigest() != oid:
                raise Refused(400, "The content has another sha256 than its name")
            arriving.replace(objects / oid)
        finally:
            arriving.unlink(missing_ok=True)
        self.reply({})

    def send_object(self, kind, name, oid):
        path = self.hub.repository(name, kind).folder / "objects" / oid
        if not path.exists():
            raise Refused(404, "no such object")
        self.send_file(path, ETag=f'"{oid}"')

    def commit(self, repository, revision):
        lines = [json.loads(line) for line in self.whole_body().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            self.demand_branch(repository, revision)
            head = repository.branches[revision]
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.read_commit(head)["files"])
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "file":
                    files[value["path"]] = repository.store(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    files[value["path"]] = repository.describe(value["oid"])
                elif key in ("deletedFile", "deletedFolder"):
                    is_folder = key == "deletedFolder"
                    gone = [path for path in files if path == value["path"] and not is_folder]
                    gone += [path for path in files if path.startswith(value["path"].rstrip("/") + "/") and is_folder]
                    if not gone:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    for path in gone:
                        del files[path]
                elif key != "header":
                    raise Refused(400, f"a commit cannot hold {key!r}")
            summary, description = header["summary"], header.get("description", "")
            name = repository.commit(revision, files, summary, head, description, self.user["name"])
        url = f"{self.url_of(self.name, self.kind)}/commit/{name}"
        self.reply({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def create_branch(self, repository, branch):
        with self.hub.lock:
            if branch in repository.branches:
                raise Refused(409, f"Reference already exists: {branch}")
            repository.point("branches", branch, repository.resolve(self.json_body().get("startingPoint") or "main"))
        self.reply({}, 201)

    def delete_branch(self, repository, branch):
        if branch == "main":
            raise Refused(403, "main cannot be deleted")
        self.demand_branch(repository, branch)
        with self.hub.lock:
            repository.point("branches", branch, None)
        self.reply({})

    def create_tag(self, repository, revision):
        tag = self.json_body()["tag"]
        with self.hub.lock:
            commit = repository.resolve(revision)
            if tag in repository.tags:
                raise Refused(409, f"Tag reference exists already: {tag}")
            repository.point("tags", tag, commit)
        self.reply({}, 201)

    def delete_tag(self, repository, tag):
        with self.hub.lock:
            if tag not in repository.tags:
                raise Refused(404, f"Invalid rev id: {tag}", "RevisionNotFound")
            repository.point("tags", tag, None)
        self.reply({})

    def demand_branch(self, repository, name: str):
        if name not in repository.branches:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def url_of(self, name: str, kind: str) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"

    # --- bytes ---

    def body(self):
        """The parts of the request's body that were not read yet, as fast as the line allows."""
        if not self.has_body_left:
            return
        self.has_body_left = False
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._read(int(self.headers.get("Content-Length") or 0))

    def _read(self, size: int):
        while size:
            part = self.rfile.read1(min(size, CHUNK))
            if not part:
                raise ConnectionAbortedError  # the client went away
            size -= len(part)
            self.request_log.received += len(part)
            self.hub.throttle("in", len(part))
            yield part

    def whole_body(self) -> bytes:
        return b"".join(self.body())

    def json_body(self) -> dict:
        return json.loads(self.whole_body() or b"{}")

    def reply(self, content, status=200, content_type="application/json", **headers: str):
        body = json.dumps(content).encode()
        self.start_reply(status, len(body), **{"Content-Type": content_type, **headers})
        self.send_body([body], len(body))

    def send_file(self, path: Path, **headers: str):
        """The file, or the part of it that a Range asks for."""
        size, start, stop = path.stat().st_size, 0, None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else None
            if start >= size:
                raise Refused(416, "there is nothing at this range", **{"Content-Range": f"bytes */{size}"})
        stop = min(size, stop or size)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.start_reply(206 if asked else 200, stop - start, **{"Accept-Ranges": "bytes", **headers})
        with path.open("rb") as file:
            file.seek(start)
            parts = iter(lambda: file.read(min(CHUNK, stop - file.tell())), b"")
            self.send_body(parts, stop - start)

    def start_reply(self, status: int, length: int, **headers: str):
        for _ in self.body():
            pass
        if self.fault == "drop_after" and self.command != "GET":
            raise ConnectionAbortedError
        self.request_log.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, parts, length: int):
        for part in parts:
            if self.command == "HEAD":
                return
            if self.fault == "corrupt":
                part, self.fault = bytes([part[0] ^ 1]) + part[1:], None
            if self.fault == "drop_after":
                part = part[: length // 2]
            self.hub.throttle("out", len(part))
            self.wfile.write(part)
            self.request_log.sent += len(part)
            if self.fault == "drop_after":
                raise ConnectionAbortedError


def entries_of(files: dict) -> dict[str, dict]:
    """Files, and the folders that they are in, as the Hub lists them."""
    entries = {}
    for path, file in sorted(files.items()):
        for parent in reversed(Path(path).parents[:-1] if "/" in path else []):
            folder = {"type": "directory", "oid": git_hash(str(parent).encode()), "size": 0, "path": str(parent)}
            entries.setdefault(str(parent), folder)
        entries[path] = {"type": "file", "oid": file["oid"], "size": file["size"], "path": path}
        if file["lfs"]:
            sizes = {"size": file["size"], "pointerSize": file["pointer_size"]}
            entries[path]["lfs"] = {"oid": file["sha256"], **sizes}
    return entries


def hold_port() -> tuple[int, socket.socket]:
    """A free port that is a HubServer's alone, as long as the socket is kept. Nobody answers there before it starts."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held.getsockname()[1], held


def close(connection: socket.socket):
    """Ends a connection at once, whoever reads or writes there."""
    with contextlib.suppress(OSError):  # the other side was first
        connection.shutdown(socket.SHUT_RDWR)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_PAGE = rf"(?:/(?P<kind>datasets))?/{_NAME}"
_REVISION = r"(?P<revision>[^/]+)"
_OBJECT = r"/storage/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"

ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repository),
    ("DELETE", "/api/repos/delete", _Handler.delete_repository),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _API, _Handler.info),
    ("GET", f"{_API}/revision/{_REVISION}", _Handler.info),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}/commits/{_REVISION}", _Handler.log),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", _Handler.paths_info),
    ("PUT", f"{_API}/settings", _Handler.settings),
    ("POST", f"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"{_API}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"{_API}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("DELETE", f"{_API}/branch/(?P<branch>[^/]+)", _Handler.delete_branch),
    ("POST", f"{_API}/tag/{_REVISION}", _Handler.create_tag),
    ("DELETE", f"{_API}/tag/(?P<tag>[^/]+)", _Handler.delete_tag),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"{_PAGE}\.git/info/lfs/verify", _Handler.lfs_verify),
    ("HEAD", f"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("GET", f"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("PUT", _OBJECT, _Handler.receive_object),
    ("HEAD", _OBJECT, _Handler.send_object),
    ("GET", _OBJECT, _Handler.send_object),
]
