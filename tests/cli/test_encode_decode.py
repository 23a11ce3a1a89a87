"""``vistok encode`` and ``vistok decode``: images to tokens and back, and what must not happen on the way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.cli.decode import cropped_size
from vistok.cli.encode import encode
from vistok.cli.main import main
from vistok.data.images import read_image, to_uint8
from vistok.data.transforms import EvalTransform
from vistok.hub.format import fingerprint

NAMES = ["a.png", "b.jpg", "deep/a.png", "deep/er/c d.bmp", "deep/er/c d.png"]


@pytest.fixture
def run(tokenizers, tmp_path, capfd):
    """Run a command; gives the exit status, and what it printed on stdout and stderr."""

    def run(*words):
        capfd.readouterr()
        status = main([str(word).replace("TOKENIZERS", str(tokenizers)) for word in words])
        return status, *capfd.readouterr()

    return run


def pixels(path):
    return np.array(Image.open(path))


def test_tokens_in_the_file_are_those_of_the_tokenizer(run, photos, tokenizers, tmp_path):
    status, out, err = run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "new" / "t")
    assert (status, err) == (0, "") and "5 images of 32x32, 6 tokens each, 48 bits (0.04688 per pixel)" in out
    file = vistok.load_tokens(tmp_path / "new" / "t")
    assert sorted(file.names) == NAMES
    assert file.original_sizes[file.names.index("b.jpg")] == (64, 32) and file.image_size == (32, 32)
    tokenizer = vistok.load(tokenizers / "titok")
    for i, name in enumerate(file.names):
        image = EvalTransform(32)(read_image(photos / name)).float()[None] / 255
        assert torch.equal(tokenizer.encode(image).indices["image"], file.tokens[i : i + 1].indices["image"])


def test_decoded_pictures_are_those_of_the_tokenizer_under_their_names(run, photos, tokenizers, tmp_path):
    run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t", "--batch-size", 2)
    status, out, err = run("decode", tmp_path / "t", "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "out")
    assert (status, err) == (0, "") and "5 images" in out
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.png", "b.png", "deep/a.png", "deep/er/c d-2.png", "deep/er/c d.png"]
    tokenizer, file = vistok.load(tokenizers / "titok"), vistok.load_tokens(tmp_path / "t")
    row = file.names.index("deep/a.png")
    expected = to_uint8(tokenizer.decode(file.tokens[row : row + 1]))[0].permute(1, 2, 0).numpy()
    # Batches of other sizes may round the last bit differently.
    assert np.abs(pixels(tmp_path / "out" / "deep/a.png").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_do_not_change_tokens_or_their_order(workers, run, photos, tmp_path):
    options = ["--tokenizer", "TOKENIZERS/titok", "--num-workers", workers, "--batch-size", 2]
    assert run("encode", photos, *options, "--out", tmp_path / "a")[0] == 0
    assert run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "b")[0] == 0
    first, second = (vistok.load_tokens(tmp_path / name) for name in "ab")
    assert first.names == second.names == sorted(first.names)
    assert torch.equal(first.tokens.indices["image"], second.tokens.indices["image"])


def test_size_and_crop_are_what_the_user_says(run, photos, tmp_path):
    options = ["--tokenizer", "TOKENIZERS/vqgan", "--size", "16,24", "--out", tmp_path / "t"]
    assert run("encode", photos / "a.png", *options)[0] == 0
    file = vistok.load_tokens(tmp_path / "t")
    assert file.image_size == (16, 24) and file.tokens.layout[0].grid == (8, 12)
    assert run("decode", tmp_path / "t", "--tokenizer", "TOKENIZERS/vqgan", "--out", tmp_path / "out")[0] == 0
    assert pixels(tmp_path / "out" / "a.png").shape == (16, 24, 3)
    status, _, err = run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--size", 64, "--out", tmp_path / "u")
    assert status == 2 and "takes images of 32x32 pixels; got 64x64" in err
    status, _, err = run("encode", photos, "--tokenizer", "TOKENIZERS/vqgan", "--size", 33, "--out", tmp_path / "u")
    assert status == 2 and "divisible by 2; got 33x33" in err
    options = ["--tokenizer", "TOKENIZERS/vqgan", "--size", "16,24", "--crop", "adm", "--out", tmp_path / "u"]
    status, _, err = run("encode", photos, *options)
    assert status == 2 and "square" in err and not (tmp_path / "u").exists()


def test_crop_of_training_is_the_default(photos, tmp_path, tokenizers):
    tokenizer = vistok.load(tokenizers / "titok")
    vistok.save(tokenizer, tmp_path / "adm", crop="adm")
    encode([str(photos / "a.png")], tokenizer=str(tmp_path / "adm"), out=tmp_path / "t", num_workers=0)
    image = EvalTransform(32, "adm")(read_image(photos / "a.png")).float()[None] / 255
    file = vistok.load_tokens(tmp_path / "t")
    assert file.metadata == {"tokenizer": "TiTok", "crop": "adm"}
    assert torch.equal(file.tokens.indices["image"], tokenizer.encode(image).indices["image"])


def test_original_size_scales_the_crop_back(run, photos, tmp_path):
    run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t")
    options = ["--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "out", "--original-size"]
    assert run("decode", tmp_path / "t", *options)[0] == 0
    # A square crop of a 40x60 image is 40x40 of its pixels; of a 64x32 one, 32x32.
    sizes = {name: pixels(tmp_path / "out" / name).shape[:2] for name in ("a.png", "b.png", "deep/a.png")}
    assert sizes == {"a.png": (40, 40), "b.png": (32, 32), "deep/a.png": (32, 32)}
    assert cropped_size((100, 400), (50, 100)) == (100, 200) and cropped_size((400, 100), (50, 100)) == (50, 100)


def test_unreadable_images_are_named_and_the_rest_go_on(run, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (photos / "deep" / "empty.png").write_bytes(b"")
    whole = (photos / "a.png").read_bytes()
    (photos / "half.png").write_bytes(whole[: len(whole) // 2])
    options = ["--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t", "--batch-size", 2]
    status, out, err = run("encode", photos, *options)
    assert status == 1 and "5 images" in out
    lines = err.splitlines()
    assert len(lines) == 4 and lines[-1] == "vistok: 3 of 8 images could not be read"
    for name in ("broken.jpg", "empty.png", "half.png"):
        assert any(line.startswith("vistok: skipped") and name in line for line in lines[:-1])
    assert sorted(vistok.load_tokens(tmp_path / "t").names) == NAMES


def test_nothing_readable_writes_nothing(run, tmp_path):
    (tmp_path / "x.png").write_text("x")
    status, _, err = run("encode", tmp_path / "x.png", "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t")
    assert status == 2 and "none of the 1 images could be read" in err and not (tmp_path / "t").exists()


def test_existing_file_is_kept_unless_told_otherwise(run, photos, tmp_path):
    (tmp_path / "t").write_text("precious")
    command = ["encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t"]
    status, _, err = run(*command)
    assert status == 2 and "t exists" in err and "--overwrite" in err and (tmp_path / "t").read_text() == "precious"
    assert run(*command, "--overwrite")[0] == 0
    assert len(vistok.load_tokens(tmp_path / "t").tokens) == 5


def test_existing_picture_is_kept_unless_told_otherwise(run, photos, tmp_path):
    run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.png").write_text("precious")
    command = ["decode", tmp_path / "t", "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "out"]
    status, _, err = run(*command)
    assert status == 2 and "deep/a.png exists" in err and not (tmp_path / "out" / "a.png").exists()
    assert run(*command, "--overwrite")[0] == 0 and pixels(tmp_path / "out" / "deep" / "a.png").shape == (32, 32, 3)


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_unwritable_output_is_noticed_before_the_tokenizer_is_loaded(command, run, photos, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        status, _, err = run(command, photos, "--tokenizer", "nowhere", "--out", out)
        assert status == 2 and "choose another --out" in err and len(err.splitlines()) == 1


def test_disk_full_is_one_clear_line(run, photos, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "new" / "t")
    assert status == 2 and err.splitlines()[-1].startswith("vistok: error: cannot write")
    assert "No space left on device" in err and not list((tmp_path / "new").iterdir())


def test_tokens_of_another_tokenizer_are_refused_unless_forced(run, photos, tokenizers, tmp_path):
    run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t")
    command = ["decode", tmp_path / "t", "--out", tmp_path / "out"]
    status, _, err = run(*command, "--tokenizer", "TOKENIZERS/other")
    ours, theirs = (fingerprint(vistok.load(tokenizers / name)) for name in ("titok", "other"))
    assert status == 2 and ours[:16] in err and theirs[:16] in err and not (tmp_path / "out").exists()
    assert run(*command, "--tokenizer", "TOKENIZERS/other", "--force")[0] == 0
    status, _, err = run(*command, "--tokenizer", "TOKENIZERS/vqgan", "--force", "--overwrite")
    assert status == 2 and "codebooks of (256,) codes" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["../../escaped.png", "/escaped.png", "a/../../escaped.png", "..", ".", "/"])
def test_names_that_lead_out_of_the_folder_are_refused(name, run, photos, tokenizers, tmp_path):
    tokenizer = vistok.load(tokenizers / "titok")
    tokens = tokenizer.encode(torch.rand(2, 3, 32, 32))
    facts = {"sizes": [(1, 1)] * 2, "image_size": (32, 32), "tokenizer_fingerprint": fingerprint(tokenizer)}
    vistok.save_tokens(tmp_path / "t", tokens, names=["good.png", name], **facts)
    folder = tmp_path / "deep" / "out"
    status, _, err = run("decode", tmp_path / "t", "--tokenizer", "TOKENIZERS/titok", "--out", folder)
    assert status == 2 and "leads out of the output folder" in err
    assert not list(tmp_path.rglob("*escaped*")) and not list(tmp_path.rglob("good*"))


def test_damaged_files_are_one_clear_line(run, photos, tokenizers, tmp_path):
    run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:-7])
    status, _, err = run("decode", tmp_path / "t", "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "out")
    assert status == 2 and err.startswith("vistok: error: ") and "is damaged" in err and len(err.splitlines()) == 1
    export = tmp_path / "export"
    vistok.save(vistok.load(tokenizers / "titok"), export)
    (export / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:1000])
    status, _, err = run("encode", photos, "--tokenizer", export, "--out", tmp_path / "u")
    assert status == 2 and "model.safetensors cannot be read" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 0], "--batch-size must be at least 1; got 0"),
        (["--num-workers", -1], "--num-workers must be at least 0; got -1"),
        (["--device", "gpu0"], "--device 'gpu0' cannot be used here"),
        (["--device", "meta"], "--device 'meta' cannot be used here"),
    ],
)
def test_impossible_options_are_one_clear_line(options, message, run, photos, tmp_path):
    status, _, err = run("encode", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "t", *options)
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_encode_that_is_killed_leaves_no_file(photos, tokenizers, tmp_path):
    # The last image is a pipe that nobody writes to: the command stands still in the middle of its work.
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    out = tmp_path / "out"
    script = "import sys; from vistok.cli.main import main; sys.exit(main())"
    words = ["encode", photos, pipe, "--tokenizer", tokenizers / "titok", "--out", out / "t", "--num-workers", "0"]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, words)], stderr=subprocess.PIPE)
    writer = None
    while writer is None and process.poll() is None:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails until the command has opened its end
        except OSError:
            time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    os.close(writer)
    assert list(out.iterdir()) == []
