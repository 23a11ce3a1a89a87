"""Token files: an exact round trip, the smallest integers, and nothing but a whole file."""

import json
import os
import signal
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import vistok
from vistok.hub.token_files import TokenFileError
from vistok.tokenizers.base import Stream, Tokens

SIZES = (2, 128, 129, 256, 257, 32768, 65536, 65537, 2**31, 2**31 + 1, 2**62)


def write(path, tokens, **changes):
    arguments = {
        "names": [f"image {i}.png" for i in range(len(tokens))],
        "sizes": [(10 + i, 20) for i in range(len(tokens))],
        "tokenizer_fingerprint": "f" * 64,
        "image_size": (32, 48),
    }
    return vistok.save_tokens(path, tokens, **arguments | changes)


def plain_tokens(size=256, batch=3):
    ids = torch.arange(batch * 4).reshape(batch, 4, 1) % size
    return Tokens({"image": ids}, (Stream("image", 4, (size,), (2, 2)),))


@st.composite
def any_tokens(draw):
    """Several streams, sub-codes, codebooks of all sizes; all kept, some dropped, with and without a mask."""
    batch, streams, indices, mask = draw(st.integers(1, 4)), [], {}, {}
    masked = draw(st.booleans())
    dropped = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for i in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 5))
        sizes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
        stream = Stream(f"stream {i}", length, sizes, (1, length) if draw(st.booleans()) else None)
        ids = torch.stack([torch.randint(size, (batch, length), generator=generator) for size in sizes], -1)
        ids[0, 0] = torch.tensor(sizes) - 1
        if dropped:
            ids[-1, -1] = -1
        streams.append(stream)
        indices[stream.name] = ids
        mask[stream.name] = torch.rand(batch, length, generator=generator) < 0.7
    return Tokens(indices, tuple(streams), mask if masked else None)


@settings(deadline=None, max_examples=60)
@given(any_tokens(), st.data())
def test_round_trip_is_exact(tmp_path_factory, tokens, data):
    name = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
    names = data.draw(st.lists(name, min_size=len(tokens), max_size=len(tokens), unique=True))
    sizes = [(i + 1, 70_000 - i) for i in range(len(tokens))]
    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    write(path, tokens, names=names, sizes=sizes, metadata={"crop": "adm", "n": [1, 2.5, None]})
    file = vistok.load_tokens(path)
    assert file.tokens.layout == tokens.layout
    for stream in tokens.layout:
        assert file.tokens.indices[stream.name].dtype == torch.int64
        assert torch.equal(file.tokens.indices[stream.name], tokens.indices[stream.name])
        if tokens.mask is not None:
            assert torch.equal(file.tokens.mask[stream.name], tokens.mask[stream.name])
    assert (file.tokens.mask is None) == (tokens.mask is None)
    assert file.names == names and file.original_sizes == sizes
    assert file.fingerprint == "f" * 64 and file.image_size == (32, 48)
    assert file.metadata == {"crop": "adm", "n": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("size", "dropped", "dtype"),
    [
        (256, False, torch.uint8),
        (257, False, torch.uint16),
        (65536, False, torch.uint16),
        (65537, False, torch.int32),
        (2**31 + 1, False, torch.int64),
        (128, True, torch.int8),
        (129, True, torch.int16),
        (32769, True, torch.int32),
    ],
)
def test_indices_take_the_smallest_integers_that_hold_the_codebook(size, dropped, dtype, tmp_path):
    tokens = plain_tokens(size)
    tokens.indices["image"][0, 0, 0] = -1 if dropped else size - 1
    with safe_open(write(tmp_path / "t", tokens), framework="pt") as file:
        assert file.get_tensor("indices.image").dtype == dtype


def test_names_that_are_no_unicode_survive(tmp_path):
    names = ["a", os.fsdecode(b"caf\xe9.jpg"), "日本/ü.png"]
    assert vistok.load_tokens(write(tmp_path / "t", plain_tokens(), names=names)).names == names


def test_slices_of_one_batch_can_be_written(tmp_path):
    ids = torch.arange(24).reshape(2, 6, 2)
    streams = (Stream("a", 3, (32, 32)), Stream("b", 3, (2**40,) * 2))
    tokens = Tokens({"a": ids[:, :3], "b": ids[:, 3:]}, streams)
    assert torch.equal(vistok.load_tokens(write(tmp_path / "t", tokens)).tokens.indices["b"], ids[:, 3:])


def test_header_stays_small_however_many_names_there_are(tmp_path):
    tokens = plain_tokens(batch=20_000)
    path = write(tmp_path / "t", tokens, names=[f"{i:050d}" for i in range(20_000)])
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] < 2_000
    assert vistok.load_tokens(path).names[-1] == f"{19_999:050d}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"names": ["a", "b"]}, "one entry for each of the 3 images; got 2 names"),
        ({"sizes": [(1, 1)]}, "1 sizes"),
        ({"names": ["a", "b", "a"]}, r"must be different; repeated: \['a'\]"),
        ({"names": ["a", "b", ""]}, "must not be empty"),
        ({"names": ["a", "b", "c\0d"]}, "zero byte"),
    ],
)
def test_names_and_sizes_that_cannot_be_kept_are_refused(changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        write(tmp_path / "t", plain_tokens(), **changes)
    assert not list(tmp_path.iterdir())


def test_indices_outside_the_codebook_are_not_written(tmp_path):
    tokens = plain_tokens(16)
    tokens.indices["image"][1, 2, 0] = 16
    with pytest.raises(ValueError, match="index 16 of image 1"):
        write(tmp_path / "t", tokens)


def test_truncated_file_is_refused_wherever_it_is_cut(tmp_path):
    path = write(tmp_path / "t.safetensors", plain_tokens())
    data = path.read_bytes()
    for cut in [0, 1, 8, 20, *range(50, len(data), 40), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(TokenFileError, match="t.safetensors is not a token file, or is damaged"):
            vistok.load_tokens(path)


def test_foreign_files_are_refused(tmp_path, titok):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(TokenFileError, match="not a token file"):
        vistok.load_tokens(tmp_path / "text")
    with pytest.raises(TokenFileError, match="holds no tokens"):
        vistok.load_tokens(vistok.save(titok(), tmp_path / "export") / "model.safetensors")
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no token file"):
            vistok.load_tokens(missing)


def edit(path, header=None, arrays=None):
    """Rewrite a token file with other content."""
    with safe_open(path, framework="pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}
        text = json.loads(file.metadata()["vistok_tokens"])
    text = text | (header or {})
    save_file(content | (arrays or {}), path, {"vistok_tokens": json.dumps(text)})


STREAM = {"name": "image", "length": 4, "codebook_sizes": [256], "grid": [2, 2]}


@pytest.mark.parametrize(
    ("header", "arrays", "reason"),
    [
        ({"format_version": 2}, {}, "format_version 2 is unknown; Vistok .* reads 1"),
        ({"streams": [STREAM | {"codebook_sizes": [8]}]}, {}, "index 8 of image 2.* out of range"),
        ({"streams": [STREAM | {"length": 5, "grid": None}]}, {}, r"must have shape \(B, N, G\)"),
        ({"streams": [STREAM | {"grid": [3, 3]}]}, {}, "does not hold 4 tokens"),
        ({"streams": [STREAM | {"name": "other"}]}, {}, "indices.other"),
        ({"streams": []}, {}, "at least one stream"),
        ({"streams": None}, {}, "does not fit together"),
        ({"fingerprint": 3}, {}, "fingerprint must be text"),
        ({"image_size": [1]}, {}, "does not fit together"),
        ({}, {"names": torch.tensor([97], dtype=torch.uint8)}, "1 names and 3 sizes for 3 images"),
        ({}, {"names": torch.tensor([97, 0, 97, 0, 97], dtype=torch.uint8)}, "names are repeated"),
        ({}, {"original_sizes": torch.zeros(3, 3, dtype=torch.int32)}, "does not fit together"),
        ({}, {"indices.image": torch.full((3, 4, 1), 0.5)}, "integers"),
        ({}, {"mask.image": torch.ones(3, 4)}, "must be bool"),
    ],
)
def test_content_that_does_not_fit_together_is_refused(header, arrays, reason, tmp_path):
    path = write(tmp_path / "t.safetensors", plain_tokens())
    edit(path, header, arrays)
    with pytest.raises(TokenFileError, match=f"t.safetensors: .*{reason}"):
        vistok.load_tokens(path)


def test_disk_full_keeps_the_earlier_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "t", plain_tokens())

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*t: No space left on device. Free some space"):
        write(path, plain_tokens(batch=5))
    monkeypatch.undo()
    assert len(vistok.load_tokens(path).tokens) == 3 and list(tmp_path.iterdir()) == [path]


def test_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write .*file/t: "):
        write(tmp_path / "file" / "t", plain_tokens())


def test_killed_write_keeps_the_earlier_file(tmp_path):
    path = write(tmp_path / "t", plain_tokens())
    script = (
        "import os, signal, sys, torch, vistok\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tokens = vistok.load_tokens(sys.argv[1])\n"
        "vistok.save_tokens(sys.argv[1], tokens.tokens[:1], names=['a'], sizes=[(1, 1)],"
        " tokenizer_fingerprint='', image_size=(1, 1))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == -signal.SIGKILL
    assert len(vistok.load_tokens(path).tokens) == 3
