"""Push to a hub and load from it, against a stand-in server on this machine.

The client reads its settings when it is imported, so it runs in a process of its own. The stand-in keeps what is
committed and answers what the client asks; a request that it does not know is an error, and fails the test.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

import vistok

REPO = "someone/my-titok"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories as ``{branch: {path: bytes}}``, large files by their SHA-256."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
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
        api = f"/api/models/{REPO}"
        repo = self.server.repos.get(REPO)
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
        if REPO not in path:
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
        if path == f"/{REPO}.git/info/lfs/objects/batch":
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
        if path.startswith(f"/{REPO}/resolve/"):
            revision, name = path.removeprefix(f"/{REPO}/resolve/").split("/", 1)
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
        url = f"{self.server.url}/{REPO}/commit/{COMMIT}"
        self.answer(content={"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def branch(self, repo, revision):
        return repo.get("main" if revision == COMMIT else revision)

    def listing(self, repo, revision):
        files = self.branch(repo, revision)
        if files is None:
            return self.not_found("RevisionNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self.answer(content={"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

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


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
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


ROUND_TRIP = """
import vistok.hub.load
folder, images = sys.argv[1], torch.load(sys.argv[2])
tokenizer = vistok.load(folder)
address = vistok.push(tokenizer, "someone/my-titok", private=True, commit_message="First", metadata={"license": "mit"})
vistok.push(tokenizer, "someone/my-titok")  # a second time, to the repository that is there
tokenizer.push_to_hub("someone/my-titok", revision="trial")
print(address)
loaded = vistok.load("someone/my-titok")
other = vistok.load("someone/my-titok", revision="trial")
for name, tensor in tokenizer.state_dict().items():
    assert torch.equal(tensor, loaded.state_dict()[name]) and torch.equal(tensor, other.state_dict()[name]), name
tokens, again = tokenizer.encode(images), loaded.encode(images)
assert torch.equal(tokens.indices["image"], again.indices["image"])
assert torch.equal(tokenizer.decode(tokens), loaded.decode(again))
print(vistok.hub.load.load_with_source("someone/my-titok").source)
for revision in ("nothing", None):
    try:
        vistok.load("someone/my-titok" if revision else "someone/else", revision=revision)
    except FileNotFoundError as error:
        print("refused:", error)
"""

OFFLINE = """
tokenizer = vistok.load("someone/my-titok")
assert torch.equal(tokenizer.quantizer.codebook, vistok.load(sys.argv[1]).quantizer.codebook)
try:
    vistok.load("someone/not-cached")
except FileNotFoundError as error:
    print("refused:", error)
"""


def test_pushed_tokenizer_loads_from_the_hub_and_then_from_the_cache(hub, titok, images, tmp_path):
    import torch

    folder = vistok.save(titok(), tmp_path / "export")
    torch.save(images, tmp_path / "images.pt")
    run = client(ROUND_TRIP, folder, tmp_path / "images.pt", hub=hub, cache=tmp_path / "cache")
    assert run.returncode == 0, run.stderr
    address, source, bad_revision, bad_name = run.stdout.splitlines()
    assert address == f"{hub.url}/{REPO}/commit/{COMMIT}"
    assert source == f"repository {REPO} at {COMMIT}"
    assert "there is no folder 'someone/my-titok', and the repository of that name cannot be fetched" in bad_revision
    assert "there is no folder 'someone/else', and the repository of that name cannot be fetched" in bad_name
    assert set(hub.repos[REPO]) == {"main", "trial"} and hub.private == {REPO}
    assert {"config.json", "model.safetensors", "README.md"} < set(hub.repos[REPO]["main"])
    fetched = {line.rsplit("/", 1)[-1] for line in hub.log if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"config.json", "model.safetensors"}
    assert hub.messages == ["First", "Upload tokenizer", "Upload tokenizer"]
    assert 'vistok.load("someone/my-titok")' in hub.repos[REPO]["main"]["README.md"].decode()

    asked = len(hub.log)
    run = client(OFFLINE, folder, hub=hub, cache=tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused: there is no folder 'someone/not-cached'")
    assert len(hub.log) == asked
