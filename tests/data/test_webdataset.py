"""Shards as a source: finding, indexing, planning, reading, and everything that can be wrong with them."""

from __future__ import annotations

import http.server
import logging
import multiprocessing
import os
import pickle
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vistok.data import shardcache, webdataset
from vistok.data.images import ImageError
from vistok.data.webdataset import WebDataset

AWKWARD = [([5, 1, 9, 3, 3, 8, 2], 1), ([5, 1, 9, 3, 3, 8, 2], 2), ([5, 1, 9, 3, 3, 8, 2], 3), ([7, 4], 5), ([6], 4)]


def keys(source: WebDataset) -> list[str]:
    return [source.read(i).key for i in range(len(source))]


# ---------------------------------------------------------------------------------------------------- finding shards
def test_braces_globs_lists_and_joined_patterns_name_the_same_shards(tmp_path, make_shards):
    pattern = make_shards(tmp_path, [2, 1, 3])
    names = [f"s{i}-{j}" for i, count in enumerate([2, 1, 3]) for j in range(count)]
    one, two, three = (f"{tmp_path}/shard-{i:03d}.tar" for i in range(3))
    for shards in (
        pattern,
        f"{tmp_path}/*.tar",
        [one, two, three],
        f"{one}::{tmp_path}/shard-00{{1..2}}.tar",
        [one, f"file://{two}", f"{tmp_path}/shard-00[2-9].tar"],
    ):
        assert keys(WebDataset(shards)) == names


def test_missing_shards_are_named_before_anything_runs(tmp_path, make_shards):
    make_shards(tmp_path, [2, 2])
    with pytest.raises(FileNotFoundError, match="2 of 4 do not exist: .*shard-002.tar, .*shard-003.tar.*on_missing"):
        WebDataset(f"{tmp_path}/shard-{{000..003}}.tar").prepare()
    with pytest.raises(FileNotFoundError, match="none.*tar"):
        WebDataset(f"{tmp_path}/none*.tar", on_missing="skip").prepare()


def test_missing_shards_may_be_skipped_and_are_reported(tmp_path, make_shards, caplog):
    make_shards(tmp_path, [2, 2])
    source = WebDataset(f"{tmp_path}/shard-{{000..002}}.tar", on_missing="skip")
    assert len(source) == 4
    assert "shard-002.tar: does not exist" in caplog.text and source.problems == [r.message for r in caplog.records]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shards": []}, "at least one"),
        ({"shards": "s3://bucket/a.tar"}, "'s3'.*pipe:aws s3 cp"),
        ({"shards": "a-${NOT_DEFINED}.tar"}, "NOT_DEFINED"),
        ({"shards": "a.tar", "shuffle_shards": 0}, "shuffle_shards.*0"),
        ({"shards": "a.tar", "samples_per_shard": 0}, "samples_per_shard.*0"),
        ({"shards": "a.tar", "on_missing": "ignore"}, "'error' or 'skip'.*'ignore'"),
        ({"shards": "a.tar", "cache_gb": 0}, "cache_gb.*0"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        WebDataset(**arguments)


def test_a_shard_listed_twice_is_refused(tmp_path, make_shards):
    pattern = make_shards(tmp_path, [1, 1])
    with pytest.raises(ValueError, match="more than once: .*shard-001.tar"):
        WebDataset([pattern, f"{tmp_path}/shard-001.tar"]).prepare()


# ---------------------------------------------------------------------------------------------------------- indexing
def test_shards_are_scanned_once_and_again_when_they_change(tmp_path, make_shards, monkeypatch):
    scanned, scan = [], webdataset.scan_tar
    monkeypatch.setattr(webdataset, "scan_tar", lambda path: scanned.append(path) or scan(path))
    pattern = make_shards(tmp_path, [2, 3])
    assert len(WebDataset(pattern)) == len(WebDataset(pattern)) == 5
    assert len(scanned) == 2
    make_shards(tmp_path / "new", [4])
    os.replace(tmp_path / "new" / "shard-000.tar", tmp_path / "shard-000.tar")
    assert len(WebDataset(pattern)) == 7 and len(scanned) == 3


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, make_shards, monkeypatch, caplog):
    pattern = make_shards(tmp_path, [2])
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "file"))
    assert keys(WebDataset(pattern)) == ["s0-0", "s0-1"]
    assert "cannot be kept" in caplog.text


def test_labels_are_read_and_a_false_one_is_named(tmp_path, picture, make_tar):
    members = [("a.jpg", picture()), ("a.cls", b" 17\n"), ("b.jpg", picture()), ("c.cls", b"cat"), ("c.jpg", picture())]
    source = WebDataset(str(make_tar(tmp_path / "a.tar", members)))
    assert [source.read(i).label for i in range(2)] == [17, -1]
    with pytest.raises(ImageError, match="a.tar/c: label b'cat' is not an integer"):
        source.read(2)


def test_captions_are_read_only_if_wanted(tmp_path, picture, make_tar):
    members = [("a.jpg", picture()), ("a.txt", " Ein Bär \n".encode()), ("b.jpg", picture()), ("c.txt", b"\xff!")]
    path = str(make_tar(tmp_path / "a.tar", [*members, ("c.jpg", picture())]))
    source = WebDataset(path, text=True)
    assert source.has_text and [source.read(i).text for i in range(3)] == ["Ein Bär", "", "\ufffd!"]
    source = WebDataset(path)
    assert not source.has_text and [source.read(i).text for i in range(3)] == ["", "", ""]


def test_an_index_out_of_range_is_refused(tmp_path, make_shards):
    with pytest.raises(IndexError, match="between 0 and 1; got 2"):
        WebDataset(make_shards(tmp_path, [2])).read(2)


# ---------------------------------------------------------------------------------------------------------- planning
@pytest.mark.parametrize(("counts", "world_size"), AWKWARD)
@pytest.mark.parametrize("shuffle_shards", [1, 2, 16])
def test_ranks_get_equal_disjoint_shares_that_leave_out_less_than_one_sample_each(
    tmp_path, make_shards, counts, world_size, shuffle_shards
):
    source = WebDataset(make_shards(tmp_path, counts), shuffle_shards=shuffle_shards)
    for epoch in range(3):
        shares = [source.order(epoch, 3, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {sum(counts) // world_size}
        together = np.concatenate(shares)
        assert len(set(together.tolist())) == len(together) and together.dtype == np.int64
        assert set(together.tolist()) <= set(range(sum(counts)))


def test_epochs_and_seeds_differ_and_repeat_exactly(tmp_path, make_shards):
    pattern = make_shards(tmp_path, [5, 1, 9, 3, 3, 8, 2])
    orders = {
        (seed, epoch, rank): tuple(WebDataset(pattern).order(epoch, seed, rank, 2).tolist())
        for seed in (0, 1)
        for epoch in (0, 1, 2)
        for rank in (0, 1)
    }
    assert len(set(orders.values())) == 12
    assert len({frozenset(order) for order in orders.values()}) > 6, "a rank keeps to the same shards in every epoch"
    again = WebDataset(pattern)
    assert all(tuple(again.order(e, s, r, 2).tolist()) == order for (s, e, r), order in orders.items())


def test_a_rank_opens_few_shards_and_a_window_mixes_them_completely(tmp_path, make_shards):
    source = WebDataset(make_shards(tmp_path, [6] * 12), shuffle_shards=3)
    mine = [int(source.read(i).label) for i in source.order(0, 0, 1, 2)]  # the label is the number of the shard
    assert len(set(mine)) == 6
    for start in (0, 18):
        assert Counter(mine[start : start + 18]).most_common()[-1][1] == 6, "a window holds whole shards"
    assert sum(a != b for a, b in zip(mine[:18], mine[1:18], strict=False)) > 6, "shards follow one another unmixed"


def test_replacements_leave_the_shard(tmp_path, make_shards):
    source = WebDataset(make_shards(tmp_path, [4, 4, 4]))
    first, *others = (source.replacement(1, attempt) for attempt in range(4))
    assert first == 2
    assert {i // 4 for i in others} == {0, 1, 2} and len(source) == 12


# ----------------------------------------------------------------------------------------------------- damaged shards
def test_a_truncated_tar_keeps_its_complete_samples_and_is_reported(tmp_path, make_shards, caplog):
    pattern = make_shards(tmp_path, [3, 3])
    path = tmp_path / "shard-001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    usable = keys(WebDataset(pattern))
    assert usable[:3] == ["s0-0", "s0-1", "s0-2"] and 3 < len(usable) < 6
    assert f"shard-001.tar: truncated or damaged after {len(usable) - 3} complete samples" in caplog.text


def test_a_shard_that_is_no_tar_file_is_reported_and_left_out(tmp_path, make_shards, caplog):
    pattern = make_shards(tmp_path, [2, 2])
    (tmp_path / "shard-000.tar").write_bytes(b"not found" * 200)
    assert keys(WebDataset(pattern)) == ["s1-0", "s1-1"]
    assert "shard left out: " in caplog.text and "shard-000.tar: not a tar file" in caplog.text


def test_nothing_usable_is_an_error_that_says_why(tmp_path, make_tar):
    (tmp_path / "a.tar").write_bytes(b"not found" * 200)
    make_tar(tmp_path / "b.tar", [("x.txt", b"text")])
    with pytest.raises(ValueError, match="none of 2 .*a.tar: not a tar.*b.tar: 1 samples left out.*no image: x"):
        WebDataset(f"{tmp_path}/{{a,b}}.tar").prepare()


def test_samples_without_an_image_are_counted_and_named(tmp_path, picture, make_tar, caplog):
    path = make_tar(tmp_path / "a.tar", [("t1.txt", b""), ("a.jpg", picture()), ("t2.json", b"{}")])
    assert keys(WebDataset(str(path))) == ["a"]
    assert "a.tar: 2 samples left out, they hold no image: t1, t2" in caplog.text


def test_a_corrupt_image_is_an_error_of_that_sample_named_by_shard_and_key(tmp_path, picture, make_tar):
    path = make_tar(tmp_path / "a.tar", [("x/1.jpg", picture()[:-20]), ("x/2.jpg", picture())])
    source = WebDataset(str(path))
    with pytest.raises(ImageError, match=f"{path}/x/1: .*truncated"):
        source.read(0)
    assert source.read(1).key == "x/2"


def test_a_shard_that_vanishes_or_changes_during_the_run_is_an_error_of_its_samples(tmp_path, make_shards):
    pattern = make_shards(tmp_path, [2, 2, 2])
    source = WebDataset(pattern)
    source.prepare()
    (tmp_path / "shard-000.tar").unlink()
    with open(tmp_path / "shard-001.tar", "ab") as file:
        file.write(b"more")
    for _ in range(2):
        with pytest.raises(ImageError, match="shard-000.tar: No such file"):
            source.read(0)
        with pytest.raises(ImageError, match="shard-001.tar: was .* bytes when it was indexed"):
            source.read(3)
    assert source.read(4).key == "s2-0"


def test_more_shards_than_open_files_can_be_read_in_any_order(tmp_path, make_shards, monkeypatch):
    monkeypatch.setattr(webdataset, "OPEN_FILES", 2)
    source = WebDataset(make_shards(tmp_path, [2] * 6))
    for index in np.random.default_rng(0).integers(0, 12, 60):
        assert source.read(index).key == f"s{index // 2}-{index % 2}"
    assert len(source._files._descriptors) == 2


def test_a_pickled_source_reads_on_without_the_index_files(tmp_path, make_shards, own_cache, monkeypatch):
    source = WebDataset(make_shards(tmp_path, [2, 2]))
    assert source.read(3).key == "s1-1"
    data = pickle.dumps(source)
    monkeypatch.setattr(webdataset, "scan_tar", None)
    for path in own_cache.rglob("*.index"):
        path.unlink()
    assert keys(pickle.loads(data)) == ["s0-0", "s0-1", "s1-0", "s1-1"]


# ------------------------------------------------------------------------------------------------------ remote shards
class Server:
    """A web server on this machine that counts what is asked of it."""

    def __init__(self, folder: Path) -> None:
        requests = self.requests = Counter()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                requests[self.path] += 1
                if "broken" in self.path:
                    self.send_response(200)
                    self.send_header("Content-Length", "100000")
                    self.end_headers()
                    self.wfile.write(b"half of it")
                else:
                    super().do_GET()

            def log_message(self, *args) -> None:
                """Nothing on the console."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "remote")
    yield server
    server.server.shutdown()
    server.server.server_close()


def read_all(source: WebDataset, results) -> None:
    results.put([source.read(i).key for i in range(len(source))])


def test_two_processes_fetch_every_remote_shard_once(tmp_path, make_shards, server):
    make_shards(tmp_path / "remote", [3, 3])
    source = WebDataset(f"{server.url}/shard-{{000..001}}.tar", samples_per_shard=3)
    source.prepare()
    assert len(source) == 6 and not server.requests, "an epoch starts before anything is fetched"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=read_all, args=(source, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    seen = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert seen[0] == seen[1] == [f"s{i}-{j}" for i in range(2) for j in range(3)]
    assert server.requests == {"/shard-000.tar": 1, "/shard-001.tar": 1}


def test_without_a_count_remote_shards_are_fetched_before_the_run_and_kept(tmp_path, make_shards, server):
    make_shards(tmp_path / "remote", [3, 1])
    pattern = f"{server.url}/shard-{{000..001}}.tar"
    source = WebDataset(pattern, cache_dir=str(tmp_path / "kept"))
    source.prepare()
    assert sum(server.requests.values()) == 2
    server.server.shutdown()
    again = WebDataset(pattern, cache_dir=str(tmp_path / "kept"))
    assert keys(again) == keys(source) == ["s0-0", "s0-1", "s0-2", "s1-0"]
    assert not list((tmp_path / "kept").glob(".*.partial"))


def test_the_cache_stays_within_its_limit_and_fetches_again_what_it_dropped(tmp_path, make_shards, server):
    make_shards(tmp_path / "remote", [2] * 5)
    size = (tmp_path / "remote" / "shard-000.tar").stat().st_size
    cache = tmp_path / "kept"
    source = WebDataset(f"{server.url}/shard-{{000..004}}.tar", str(cache), cache_gb=2.5 * size / 1e9)
    for _ in range(2):
        assert keys(pickle.loads(pickle.dumps(source))) == [f"s{i}-{j}" for i in range(5) for j in range(2)]
        assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= 2.5 * size
    source = WebDataset(f"{server.url}/shard-{{000..004}}.tar", str(cache), cache_gb=2.5 * size / 1e9)
    server.requests.clear()
    assert len(source) == 10 and not server.requests, "the indexes outlive the shards"


def test_a_remote_shard_that_cannot_be_fetched_is_reported(tmp_path, make_shards, server, caplog):
    make_shards(tmp_path / "remote", [2])
    (tmp_path / "remote" / "page.tar").write_bytes(b"<html>" * 300)
    names = ["shard-000", "missing", "broken", "page"]
    source = WebDataset([f"{server.url}/{name}.tar" for name in names])
    assert keys(source) == ["s0-0", "s0-1"]
    for name, reason in (("missing", "404"), ("broken", "10 of 100000 bytes"), ("page", "not a tar file")):
        assert [r for r in caplog.messages if f"{name}.tar" in r and reason in r], caplog.text
    folder = source._cache.folder
    assert len(list(folder.glob("*.tar"))) == 1 and not list(folder.glob(".*tmp")), "half a file was left behind"


def test_a_lazily_fetched_shard_that_fails_costs_one_request_and_its_samples(tmp_path, make_shards, server, caplog):
    make_shards(tmp_path / "remote", [2, 4])
    source = WebDataset(
        [f"{server.url}/{name}.tar" for name in ("gone", "shard-000", "shard-001")], samples_per_shard=3
    )
    for index in (0, 1, 2):
        with pytest.raises(ImageError, match="gone.tar: .*404"):
            source.read(index)
    assert server.requests["/gone.tar"] == 1
    assert [source.read(i).key for i in (3, 4, 6, 7, 8)] == ["s0-0", "s0-1", "s1-0", "s1-1", "s1-2"]
    with pytest.raises(ImageError, match="sample 2 does not exist; .* 2 samples, but samples_per_shard is 3"):
        source.read(5)
    assert "shard-001.tar: holds 4 samples; those beyond samples_per_shard=3" in caplog.text


def test_a_failed_shard_is_tried_again_later(tmp_path, make_shards, server, monkeypatch):
    source = WebDataset(f"{server.url}/shard-000.tar", samples_per_shard=2)
    with pytest.raises(ImageError, match="404"):
        source.read(0)
    make_shards(tmp_path / "remote", [2])
    with pytest.raises(ImageError, match="404"):
        source.read(0)
    monkeypatch.setattr(webdataset, "RETRY_SECONDS", 0)
    assert source.read(0).key == "s0-0"


def test_any_url_that_webdataset_opens_works_and_a_failing_command_is_named(tmp_path, make_shards, caplog):
    make_shards(tmp_path, [2])
    source = WebDataset([f"pipe:cat {tmp_path}/shard-000.tar", f"pipe:cat {tmp_path}/nothing.tar 2>/dev/null"])
    assert keys(source) == ["s0-0", "s0-1"]
    assert [r for r in caplog.messages if "nothing.tar" in r]


def test_a_damaged_cached_index_is_made_anew(tmp_path, make_shards, server):
    make_shards(tmp_path / "remote", [2])
    source = WebDataset(f"{server.url}/shard-000.tar", str(tmp_path / "kept"))
    source.prepare()
    index = next((tmp_path / "kept").glob("*.index"))
    index.write_bytes(index.read_bytes()[:100])
    assert keys(WebDataset(f"{server.url}/shard-000.tar", str(tmp_path / "kept"))) == ["s0-0", "s0-1"]


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path, make_shards, server):
    make_shards(tmp_path / "remote", [1])
    cache = shardcache.ShardCache(tmp_path / "kept")
    path = cache.path(f"{server.url}/shard-000.tar")
    path.parent.mkdir()
    (path.parent / f".{path.name}.99-1.partial").write_bytes(b"half")
    cache.fetch(f"{server.url}/shard-000.tar")
    assert not list(path.parent.glob(".*tmp"))


def test_nothing_is_logged_when_nothing_is_wrong(tmp_path, make_shards, caplog):
    with caplog.at_level(logging.WARNING):
        keys(WebDataset(make_shards(tmp_path, [2, 2])))
    assert not caplog.records
