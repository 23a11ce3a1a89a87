"""A stand-in for the Hub on this machine, and a client of it in a process of its own.

The client reads its settings when it is imported, hence the process. The stand-in keeps what is committed and answers
what the client asks; a request that it does not know is an error, and fails the test.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories as ``{branch: {path: bytes}}``, large files by their SHA-256."""

    def __init__(self, repo_id):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo_id = repo_id  # answered for also while it does not exist
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.log: list[str] = []
        self.unknown: list[str] = []
        self.messages: list[str] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, content=None, body=b"", **headers):
        body = json.dumps(content).encode() if content is not None else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def not_found(self, code):
        self.answer(404, {"error": code}, X_Error_Code=code)

    def handle_request(self):
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append(f"{self.command} {path}")
        self.repo_id = next((name for name in self.server.repos if name in path), self.server.repo_id)
        api = f"/api/models/{self.repo_id}"
        repo = self.server.repos.get(self.repo_id)
        if path == "/api/repos/create":
            data = json.loads(body)
            name = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
            if name in self.server.repos:
                return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            self.server.repos[name] = {"main": {".gitattributes": b"", "photo.png": b"x", "training.ckpt": b"x"}}
            if data.get("private") or data.get("visibility") == "private":
                self.server.private.add(name)
            return self.answer(content={"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer(content={"errors": [], "warnings": []})
        if path.startswith("/large/"):
            self.server.large[path.split("/")[-1]] = body
            return self.answer()
        if self.repo_id not in path:
            return self.not_found("RepoNotFound")  # another repository, or a question about the hub itself
        if repo is None:
            return self.not_found("RepoNotFound")
        if path.startswith(f"{api}/branch/"):
            repo.setdefault(path.split("/")[-1], dict(repo["main"]))
            return self.answer(content={})
        if path.startswith(f"{api}/preupload/"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(content={"files": modes})
        if path == f"/{self.repo_id}.git/info/lfs/objects/batch":
            objects = [
                item | {"actions": {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(content={"transfer": "basic", "objects": objects})
        if path.startswith(f"{api}/commit/"):
            return self.commit(repo[path.split("/")[-1]], body)
        if path.startswith(f"{api}/revision/"):
            return self.listing(repo, path.split("/")[-1])
        if path == api:
            return self.listing(repo, "main")
        if path.startswith(f"{api}/tree/"):
            return self.tree(repo, path.split("/")[-1])
        if path.startswith(f"/{self.repo_id}/resolve/"):
            revision, name = path.removeprefix(f"/{self.repo_id}/resolve/").split("/", 1)
            return self.file(repo, revision, name)
        self.server.unknown.append(f"{self.command} {self.path}")
        return self.answer(500, {"error": "the stand-in does not know this"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def commit(self, branch, body):
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server.messages.append(value["summary"])
            elif item["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                branch[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{self.repo_id}/commit/{COMMIT}"
        self.answer(content={"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def branch(self, repo, revision):
        return repo.get("main" if revision == COMMIT else revision)

    def listing(self, repo, revision):
        files = self.branch(repo, revision)
        if files is None:
            return self.not_found("RevisionNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self.answer(
            content={"id": self.repo_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        )

    def tree(self, repo, revision):
        files = self.branch(repo, revision)
        if files is None:
            return self.not_found("RevisionNotFound")
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return self.answer(content=entries)

    def file(self, repo, revision, name):
        files = self.branch(repo, revision)
        if files is None:
            return self.not_found("RevisionNotFound")
        if name not in files:
            return self.not_found("EntryNotFound")
        tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self.answer(body=files[name], ETag=tag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")


@contextmanager
def running_hub(repo_id):
    """A stand-in that knows of one repository; more can be put into ``repos``."""
    server = Hub(repo_id)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(script, *arguments, hub, cache, **environment):
    """Run a script as somebody who is logged in to the stand-in."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_of_a_test",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", "import sys, torch, vistok\n" + script, *map(str, arguments)]
    run = subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True)
    assert not hub.unknown, hub.unknown
    return run
