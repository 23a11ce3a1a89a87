"""Files from an address: resumed, checked, whole or not at all; against a server on this machine that misbehaves."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vistok.hub.fetch import FetchError, fetch

CONTENT = bytes(range(256)) * 20_000  # 5 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content``; ``cuts`` are how many bytes each next answer sends before the connection breaks."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.resumes, self.status = CONTENT, '"one"', True, 200
        self.cuts, self.ranges, self.sent = [], [], 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/weights.ckpt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, text = self.server, self.headers.get("Range")
        server.ranges.append(text)
        if server.status != 200:
            return self.send_error(server.status)
        start = int(text.removeprefix("bytes=").rstrip("-")) if text and server.resumes else 0
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(server.content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        body = server.content[start:]
        part = body[: server.cuts.pop(0)] if server.cuts else body
        server.sent += len(part)
        self.wfile.write(part)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "downloads" / "weights.ckpt"


def partials(path):
    return [file for file in path.parent.iterdir() if file.suffix == ".partial"]


def test_a_file_is_fetched_once_and_then_taken_from_the_disk(server, path):
    assert fetch(server.address, path, sha256=DIGEST) == path
    assert path.read_bytes() == CONTENT and not partials(path)
    fetch(server.address, path, sha256=DIGEST)
    assert server.ranges == [None]


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_broken_connection_is_resumed_where_it_broke(server, path, etag):
    server.cuts, server.etag = [1_000_000, 2_000_000], etag
    fetch(server.address, path, sha256=DIGEST, pause=0)
    assert path.read_bytes() == CONTENT and not partials(path)
    assert server.ranges == [None, "bytes=1000000-", "bytes=3000000-"]
    assert server.sent == len(CONTENT), "nothing is sent twice"


def test_what_has_arrived_before_the_end_of_the_program_is_kept(server, path):
    server.cuts = [1_500_000, 0, 0, 0]
    with pytest.raises(FetchError, match="broke after 1500000 of 5120000 bytes; what has arrived is kept"):
        fetch(server.address, path, pause=0)
    assert not path.exists() and len(partials(path)) == 1
    server.cuts.clear()
    fetch(server.address, path, sha256=DIGEST, pause=0)
    assert server.ranges[-1] == "bytes=1500000-" and server.sent == len(CONTENT)


def test_a_server_that_cannot_resume_is_asked_for_the_whole_file(server, path):
    server.cuts, server.resumes = [1_000_000], False
    fetch(server.address, path, sha256=DIGEST, pause=0)
    assert path.read_bytes() == CONTENT and not partials(path)
    assert server.ranges == [None, "bytes=1000000-"]


def test_a_file_that_its_owner_replaced_is_not_put_together_from_two_versions(server, path):
    server.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(FetchError):
        fetch(server.address, path, pause=0)
    server.cuts.clear()
    server.content, server.etag = CONTENT[::-1], '"two"'
    fetch(server.address, path, pause=0)
    assert path.read_bytes() == CONTENT[::-1] and not partials(path)


def test_more_bytes_than_the_file_has_are_thrown_away(server, path):
    server.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(FetchError):
        fetch(server.address, path, pause=0)
    server.cuts.clear()
    partials(path)[0].write_bytes(CONTENT)  # complete, but the program ended before it was checked
    fetch(server.address, path, sha256=DIGEST, pause=0)
    assert path.read_bytes() == CONTENT


def test_a_file_with_another_hash_is_deleted(server, path):
    with pytest.raises(FetchError, match=f"SHA-256 {DIGEST} instead of {'0' * 64}.*deleted"):
        fetch(server.address, path, sha256="0" * 64)
    assert not path.exists() and not partials(path)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 4)])
def test_refusals_are_reported_and_only_passing_ones_are_tried_again(server, path, status, requests):
    server.status = status
    with pytest.raises(FetchError, match=rf"cannot be fetched: .*{status}.*put it at .*weights.ckpt"):
        fetch(server.address, path, pause=0)
    assert len(server.ranges) == requests and not path.exists()


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_asks_nobody_and_says_where_the_file_goes(server, path, by, monkeypatch):
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="weights.ckpt is not there, and downloads are off.*put it there"):
        fetch(server.address, path, local_files_only=by == "argument")
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert fetch(server.address, path, local_files_only=by == "argument").read_bytes() == b"mine"
    assert server.ranges == []


def test_a_server_that_is_not_there_is_reported(path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(FetchError, match="127.0.0.1:9/x cannot be fetched"):
        fetch("http://127.0.0.1:9/x", path, pause=0)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://example.org/x", "weights.ckpt", ""])
def test_other_kinds_of_address_are_refused(address, path):
    with pytest.raises(ValueError, match="must begin with http"):
        fetch(address, path)


def test_two_that_want_one_file_fetch_it_once(server, path):
    threads = [threading.Thread(target=fetch, args=(server.address, path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT and server.ranges == [None]
