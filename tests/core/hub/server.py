"""A small Hub on the loopback: what huggingface_hub asks for to read a repository and to push one commit."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

Repositories = dict[str, dict[str, dict[str, bytes]]]
"""By repository and revision, the files by path."""


def commit_of(files: dict[str, bytes]) -> str:
    """The name of a commit: forty hexadecimal digits."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories of the server."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def repositories(self) -> Repositories:
        return self.server.repositories

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "models", owner, name]:
                self.describe(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self.describe(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision, *_]:
                files = self.files(f"{owner}/{name}", revision)
                if files is not None:
                    entries = [
                        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for path, data in files.items()
                    ]
                    self.answer(entries)
            case [owner, name, "resolve", revision, *path]:
                self.send_file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.answer({"error": self.path}, 404)

    def do_POST(self):
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repository = f"{asked.get('organization') or 'owner'}/{asked['name']}"
                self.repositories.setdefault(repository, {"main": {}})
                self.answer({"url": f"{self.server.address}/{repository}", "id": repository})
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
                self.answer({"files": files})
            case ["api", "models", owner, name, "commit", revision]:
                self.commit(f"{owner}/{name}", revision, body)
            case _:
                self.answer({"error": self.path}, 404)

    def files(self, repository: str, revision: str):
        """The files of a revision, by branch or commit; answers itself where there is none."""
        revisions = self.repositories.get(repository)
        if revisions is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        found = {**revisions, **{commit_of(files): files for files in revisions.values()}}.get(revision)
        if found is None:
            self.answer({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return found

    def describe(self, repository: str, revision: str):
        files = self.files(repository, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": repository, "sha": commit_of(files), "siblings": siblings, "private": False, "tags": []})

    def send_file(self, repository: str, revision: str, path: str):
        files = self.files(repository, revision)
        if files is None:
            return
        if path not in files:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit_of(files))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def commit(self, repository: str, revision: str, body: bytes):
        files = dict(self.repositories[repository].get(revision, {}))
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.server.messages.append(entry["value"]["summary"])
            if entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.repositories[repository][revision] = files
        oid = commit_of(files)
        self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{repository}/commit/{oid}"}
        )

    def answer(self, content, status=200, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def running_hub() -> Iterator[ThreadingHTTPServer]:
    """A Hub on a free port of the loopback, for the duration of the block; `repositories` is what it has."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.asked, server.messages = {}, [], []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
