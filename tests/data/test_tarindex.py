"""The index of a shard, against webdataset's own reader and against brute force over every truncation."""

from __future__ import annotations

import gzip
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from webdataset.tariterators import tarfile_samples

from vistok.data import tarindex
from vistok.data.tarindex import ShardError, load_index, save_index, scan_tar

ODD_MEMBERS = [
    ("plain.jpg", b"a" * 700),
    ("plain.cls", b"3"),
    ("dir.with.dots/sub/IMAGE.JPG", b"b" * 20),
    ("dir.with.dots/sub/IMAGE.CLS", b"4"),
    ("./relative.png", b"c"),
    ("two.dots.jpg", b"not an image member: its suffix is dots.jpg"),
    ("text_only.txt", b"d"),
    ("__meta__", b"skipped"),
    ("__info__/x.jpg", b"skipped"),
    ("no_suffix", b"skipped"),
    (".hidden.jpg", b"skipped"),
    ("x/same.webp", b"e" * 513),
    ("y/same.jpeg", b""),
    ("both.png", b"p"),
    ("both.jpg", b"j"),
    ("ünï" * 60 + ".jpg", b"long name"),
    ("captioned.txt", "über".encode()),
    ("captioned.jpg", b"q"),
    ("captioned.cls", b"5"),
    ("plain.jpg", b"the same key again is another sample"),
]


def content(path, index) -> list[tuple[str, bytes, bytes | None, bytes | None]]:
    data = path.read_bytes()

    def member(place) -> bytes | None:
        return data[place[0] : place[0] + place[1]] if place[0] >= 0 else None

    parts = (index.images, index.labels, index.texts)
    return [(index.key(row), *(member(part[row]) for part in parts)) for row in range(len(index))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_and_bytes_agree_with_webdatasets_reader(tmp_path, format):
    path = tmp_path / "odd.tar"
    members = [m for m in ODD_MEMBERS if len(m[0]) < 100 or format != tarfile.USTAR_FORMAT]
    with tarfile.open(path, "w", format=format) as archive:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    expected = []
    for sample in tarfile_samples([{"url": str(path)}]):
        image = next((sample[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in sample), None)
        if image is not None:
            expected.append((sample["__key__"], image, sample.get("cls"), sample.get("txt")))
    index = scan_tar(path)
    assert content(path, index) == expected and len(expected) >= 7
    assert index.without_image == 2 and index.examples == ("two", "text_only")
    assert index.problem == ""


def test_every_truncation_keeps_exactly_the_complete_samples(tmp_path, make_tar):
    members = [(f"s{i}.{suffix}", bytes([i]) * size) for i in range(4) for suffix, size in (("jpg", 600), ("cls", 1))]
    whole = make_tar(tmp_path / "whole.tar", members)
    with tarfile.open(whole) as archive:
        ends = [member.offset_data + member.size for member in archive][1::2]  # where each sample is complete
    data, cut = whole.read_bytes(), tmp_path / "cut.tar"
    last_block = (ends[-1] + 511) // 512 * 512
    # Up to 2048 bytes nothing shows that the first image has a label too; afterwards every cut is unambiguous.
    for size in [512, 1024, *range(2048, last_block, 128), *ends, *(end - 1 for end in ends), last_block]:
        cut.write_bytes(data[:size])
        complete = sum(end <= size for end in ends)
        index = scan_tar(cut)
        assert len(index) == complete, f"cut after {size} bytes"
        assert f"after {complete} complete samples" in index.problem
    cut.write_bytes(data[: last_block + 512])
    assert len(scan_tar(cut)) == 4 and scan_tar(cut).problem == ""


def test_damage_in_the_middle_is_reported(tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"x" * 512) for i in range(5)])
    data = bytearray(path.read_bytes())
    data[1024 * 2 : 1024 * 2 + 512] = b"\xff" * 512
    path.write_bytes(data)
    index = scan_tar(path)
    assert [index.key(i) for i in range(len(index))] == ["0", "1"] and "damaged after 2" in index.problem


def test_what_is_no_tar_file_is_refused_with_the_reason(tmp_path, make_tar):
    tar = make_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    (tmp_path / "z.tar").write_bytes(gzip.compress(tar.read_bytes()))
    (tmp_path / "text.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    for name, reason in (
        ("z", "gzip; unpack"),
        ("text", "not a tar"),
        ("empty", "not a tar"),
        ("gone", "No such file"),
    ):
        with pytest.raises(ShardError, match=f"{name}.tar: .*{reason}"):
            scan_tar(tmp_path / f"{name}.tar")


def test_an_index_comes_back_from_its_file_only_for_the_same_stamp(tmp_path, make_tar):
    tar = make_tar(tmp_path / "odd.tar", ODD_MEMBERS)
    index, path = scan_tar(tar), tmp_path / "sub" / "shard.index"
    assert load_index(path, "stamp") is None
    save_index(index, path, "stamp")
    back = load_index(path, "stamp")
    assert content(tar, back) == content(tar, index)
    assert (back.size, back.problem, back.without_image, back.examples) == (
        *(index.size, index.problem, index.without_image, index.examples),
    )
    assert load_index(path, "other stamp") is None


def test_an_index_of_an_earlier_format_is_made_anew(tmp_path, make_tar, monkeypatch):
    path = tmp_path / "shard.index"
    monkeypatch.setattr(tarindex, "_FORMAT", 1)
    save_index(scan_tar(make_tar(tmp_path / "a.tar", [("a.jpg", b"x")])), path, "stamp")
    assert load_index(path, "stamp") is not None
    monkeypatch.undo()
    assert load_index(path, "stamp") is None


def test_a_damaged_index_is_not_believed(tmp_path, make_tar):
    path = tmp_path / "shard.index"
    save_index(scan_tar(make_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 50), ("b.jpg", b"y")])), path, "stamp")
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        assert load_index(path, "stamp") is None
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 0xFF
        path.write_bytes(damaged)
        assert load_index(path, "stamp") is None


def test_indexes_can_be_read_from_many_threads_at_once(tmp_path, make_tar):
    path = tmp_path / "shard.index"
    save_index(scan_tar(make_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 50)])), path, "stamp")
    with ThreadPoolExecutor(16) as pool:
        assert all(len(index) == 1 for index in pool.map(lambda _: load_index(path, "stamp"), range(3000)))
