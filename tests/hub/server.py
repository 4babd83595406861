"""A Hub in memory, over HTTP: what huggingface_hub asks of the real one, and its faults on demand.

Answers are in the form that huggingface_hub 2.4 reads; nothing in it is of the project's code.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "testOnlyTestOnly" * 2
READER = "hf_" + "readOnlyReadOnly" * 2
_LARGE = re.compile(r".*\.(?:safetensors|png|gz)")
_ID = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """Commits are {path: content}; `refs` names them: branches, tags/... and pr/..."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str) -> str:
        content = repr((sorted(files.items()), len(self.commits))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha


@dataclass
class Fault:
    """What to do instead, `times` times, for requests whose "METHOD /path" has `pattern`.

    `act` is a status to answer with, or is called with the handler and whether to go on.
    """

    pattern: str
    act: "int | Callable[[Handler], None]"
    times: int = 1


class Hub(ThreadingHTTPServer):
    """Runs in a thread: `with Hub() as hub: ... hub.url`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.hidden: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.served: dict[str, bytes] = {}

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was killed, is no news; anything else is a bug here."""
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)

    def fault(self, pattern: str, act: Any, times: int = 1) -> None:
        self.faults.append(Fault(pattern, act, times))

    def take_fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.pattern in line:
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do(self) -> None:
        self.place = urlsplit(self.path)
        line = f"{self.command} {unquote(self.path)}"
        self.server.asked.append(line)
        fault = self.server.take_fault(line)
        if fault is not None and callable(fault.act):
            return fault.act(self)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is not None:
            assert isinstance(fault.act, int)
            return self.refuse(fault.act, "", "planted")
        if self.token() not in (None, TOKEN, READER):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, unquote(self.place.path))
            if found and self.command in method.split():
                repo = found.groupdict().get("id")
                if repo in self.server.hidden or (repo is not None and not self.visible(repo)):
                    return self.refuse(404, "RepoNotFound", "Repository not found")
                return getattr(self, name)(**found.groupdict())
        return self.refuse(404, "EntryNotFound", "Entry not found")

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def token(self) -> str | None:
        value = self.headers.get("Authorization")
        return value.removeprefix("Bearer ") if value else None

    def visible(self, repo: str) -> bool:
        there = self.server.repos.get(repo)
        return there is not None and not (there.private and self.token() is None)

    def may_write(self) -> bool:
        if self.token() == TOKEN:
            return True
        self.refuse(403 if self.token() else 401, "", "this token cannot write")
        return False

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def cut(self, data: bytes = b"") -> None:
        """End the connection with half of what was promised."""
        if data:
            self.send_response(200)
            self.send_header("Content-Length", str(2 * len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def files(self, id: str, rev: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.server.repos[id]
        sha = repo.refs.get(rev) or repo.refs.get(f"tags/{rev}") or rev
        if sha not in repo.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            return None
        return sha, repo.commits[sha]

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write():
            return None
        if name in self.server.repos or name in self.server.hidden:
            place = {"url": f"{self.server.url}/{name}", "error": "You already created this repo"}
            return self.answer(place, 409)
        repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        return self.answer({"url": f"{self.server.url}/{name}"})

    def info(self, id: str, rev: str | None = None) -> None:
        found = self.files(id, rev or "main")
        if found is not None:
            names = [{"rfilename": name} for name in found[1]]
            self.answer(
                {"id": id, "sha": found[0], "private": self.server.repos[id].private,
                 "siblings": names, "tags": []}
            )  # fmt: skip

    def tree(self, id: str, rev: str, under: str | None = None) -> None:
        found = self.files(id, rev)
        if found is None:
            return None
        if under:
            return self.refuse(404, "EntryNotFound", "no such folder")
        return self.answer([_entry(name, content) for name, content in sorted(found[1].items())])

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, id: str, rev: str) -> None:
        found = self.files(id, rev)
        if found is None or not self.may_write():
            return
        modes = []
        for each in json.loads(self.body)["files"]:
            path, there = each["path"], found[1].get(each["path"])
            oid = None if there is None else _oid(path, there)
            mode = "lfs" if _LARGE.fullmatch(path) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def batch(self, id: str) -> None:
        if not self.may_write():
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            about = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.large:
                place = f"{self.server.url}/large/{each['oid']}?X-Amz-Signature={'s' * 64}"
                about["actions"] = {"upload": {"href": place}}
            objects.append(about)
        self.answer({"transfer": "basic", "objects": objects})

    def large(self, oid: str) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "", "content does not have this SHA-256")
        self.server.large[oid] = self.body
        return self.answer(b"")

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def commit(self, id: str, rev: str) -> None:
        found, repo = self.files(id, rev), self.server.repos[id]
        if found is None or not self.may_write():
            return None
        head, files, header = found[0], dict(found[1]), {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.large:
                    return self.refuse(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                del files[value["path"]]
        if header.get("parentCommit", head) != head:
            return self.refuse(412, "", "A commit has happened since")
        ref, answer = rev, {}
        if "create_pr" in parse_qs(self.place.query):
            repo.pulls.append(header["summary"])
            ref = f"refs/pr/{len(repo.pulls)}"
            place = f"{self.server.url}/{id}/discussions/{len(repo.pulls)}"
            answer = {"pullRequestUrl": place}
        sha = repo.commit(files, ref)
        place = f"{self.server.url}/{id}/commit/{sha}"
        return self.answer({"commitUrl": place, "commitOid": sha, **answer})

    def branch(self, id: str, rev: str) -> None:
        refs = self.server.repos[id].refs
        if rev in refs:
            return self.refuse(409, "", "Reference already exists")
        refs[rev] = refs["main"]
        return self.answer({})

    def tag(self, id: str, rev: str) -> None:
        found, name = self.files(id, rev), json.loads(self.body)["tag"]
        refs = self.server.repos[id].refs
        if f"tags/{name}" in refs:
            return self.refuse(409, "", "Tag reference exists already")
        if found is not None:
            refs[f"tags/{name}"] = found[0]
            self.answer({})
        return None

    def references(self, id: str) -> None:
        groups: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
        for name, sha in self.server.repos[id].refs.items():
            short = name.removeprefix("tags/")
            group = "tags" if short != name else "branches"
            ref = f"refs/{'tags' if short != name else 'heads'}/{short}"
            groups[group].append({"name": short, "ref": ref, "targetCommit": sha})
        self.answer(groups)

    def discussions(self, id: str) -> None:
        found = [
            {"title": title, "num": number, "author": {"name": "tester"}, "status": "open",
             "createdAt": "2026-11-22T00:00:00.000Z", "repo": {"name": id, "type": "model"},
             "isPullRequest": True}
            for number, title in enumerate(self.server.repos[id].pulls, start=1)
        ]  # fmt: skip
        self.answer({"discussions": found, "count": len(found), "start": 0})

    def resolve(self, id: str, rev: str, path: str) -> None:
        found = self.files(id, rev)
        if found is None:
            return None
        if path not in found[1]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = found[1][path]
        etag = f'"{_oid(path, content)}"'
        content = self.server.served.get(path, content)
        headers = {"ETag": etag, "X_Repo_Commit": found[0], "Accept_Ranges": "bytes"}
        length = str(len(content))
        if self.command == "HEAD":
            return self.answer(b"", Content_Length=length, **headers)
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin is None:
            return self.answer(content, **headers)
        first = int(begin[1])
        headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{length}"
        return self.answer(content[first:], 206, **headers)


def _oid(path: str, content: bytes) -> str:
    """Git's name of a small file, SHA-256 of a large one."""
    if _LARGE.fullmatch(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _LARGE.fullmatch(path):
        large = {"oid": entry["oid"], "size": len(content), "pointerSize": 130}
        return {**entry, "oid": "0" * 40, "lfs": large}
    return entry


_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/models/{_ID}(?:/revision/(?P<rev>.+))?", "info"),
    ("GET", f"/api/models/{_ID}/tree/(?P<rev>refs/pr/\\d+|[^/]+)(?:/(?P<under>.+))?", "tree"),
    ("POST", f"/api/models/{_ID}/preupload/(?P<rev>.+)", "preupload"),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", "large"),
    ("POST", f"/api/models/{_ID}/commit/(?P<rev>.+)", "commit"),
    ("POST", f"/api/models/{_ID}/branch/(?P<rev>.+)", "branch"),
    ("POST", f"/api/models/{_ID}/tag/(?P<rev>.+)", "tag"),
    ("GET", f"/api/models/{_ID}/refs", "references"),
    ("GET", f"/api/models/{_ID}/discussions", "discussions"),
    ("GET HEAD", f"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
