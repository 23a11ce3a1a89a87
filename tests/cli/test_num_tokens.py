"""Fewer tokens than there are: ``--num-tokens`` of encode, decode and reconstruct."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.cli.main import main
from vistok.cli.parser import parse_lengths
from vistok.cli.pictures import row
from vistok.data.images import read_image
from vistok.data.transforms import EvalTransform

TOKENS, BITS, SIDE = 6, 5, 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The export of a tokenizer of 1 to 6 tokens of 5 bits each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"encoder_size": (32, 1, 2), "decoder_size": (32, 1, 2)}
        quantizer = vistok.VectorQuantizer(2**BITS, 8)
        parts = {"regularizers": [vistok.TailTokenDrop()], **sizes}
        model = vistok.TiTok(quantizer, SIDE, 8, num_latent_tokens=TOKENS, **parts)
        torch.nn.init.normal_(model.decoder.to_pixels.weight, std=0.3)  # so that tokens make a difference
        return vistok.save(model, tmp_path_factory.mktemp("tokenizers") / "variable")


@pytest.fixture
def run(capfd):
    """Run a command; gives the exit status, and what it printed on stdout and stderr."""

    def run(*words):
        capfd.readouterr()
        status = main([str(word) for word in words])
        return status, *capfd.readouterr()

    return run


def tensor(path):
    return EvalTransform(SIDE)(read_image(path)).float()[None] / 255


def test_encode_keeps_the_first_tokens(run, photos, tokenizer, tmp_path):
    words = ["encode", photos, "--tokenizer", tokenizer, "--num-workers", 0, "--out"]
    status, out, _ = run(*words, tmp_path / "short", "--num-tokens", 2)
    assert status == 0 and f"2 tokens each, {2 * BITS} bits" in out
    assert run(*words, tmp_path / "long")[0] == 0
    short, long = (vistok.load_tokens(tmp_path / name).tokens for name in ("short", "long"))
    assert torch.equal(short.indices["image"], long.indices["image"][:, :2]) and long.layout[0].length == TOKENS


def test_decode_of_a_prefix_is_the_same_however_it_was_cut(run, photos, tokenizer, tmp_path):
    run("encode", photos, "--tokenizer", tokenizer, "--num-workers", 0, "--out", tmp_path / "t")
    run("encode", photos, "--tokenizer", tokenizer, "--num-workers", 0, "--out", tmp_path / "t4", "--num-tokens", 4)
    for name, file, extra in (("all", "t", []), ("a", "t", [2]), ("b", "t4", [2]), ("c", "t4", []), ("d", "t", [4])):
        words = ["decode", tmp_path / file, "--tokenizer", tokenizer, "--out", tmp_path / name]
        assert run(*words, *(["--num-tokens", *extra] if extra else []))[0] == 0
    pixels = {name: np.array(Image.open(tmp_path / name / "a.png")) for name in ("all", "a", "b", "c", "d")}
    assert np.array_equal(pixels["a"], pixels["b"]) and np.array_equal(pixels["c"], pixels["d"])
    assert not np.array_equal(pixels["a"], pixels["c"]) and not np.array_equal(pixels["d"], pixels["all"])
    model = vistok.load(tokenizer)
    expected = model.decode(model.encode(tensor(photos / "a.png")).truncate(2))[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels["a"] / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_reconstruct_shows_and_measures_every_length(run, photos, tokenizer, tmp_path):
    words = ["reconstruct", photos, "--tokenizer", tokenizer, "--num-workers", 0, "--out", tmp_path / "out"]
    status, out, err = run(*words, "--num-tokens", "1,6,3")
    assert (status, err) == (0, "")
    head, *lines, _ = out.splitlines()
    assert head.split() == ["PSNR", "(dB)", "1", "token", "6", "tokens", "3", "tokens"]
    assert len({len(line) for line in (head, *lines)}) == 1, "columns are aligned"
    model, means = vistok.load(tokenizer), np.zeros(3)
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/er/c d.png", "deep/er/c d.bmp"):
        image = tensor(photos / name)
        tokens = model.encode(image)
        errors = [(model.decode(tokens.truncate(n)) - image).square().mean().item() for n in (1, 6, 3)]
        expected = np.array([-10 * math.log10(error) for error in errors])
        (line,) = [line for line in lines if line.startswith(name.ljust(15))]
        assert np.abs(np.array(line[15:].split(), dtype=float) - expected).max() < 0.006
        means += expected / 5
    table = {line[:15].strip(): np.array(line[15:].split(), dtype=float) for line in lines}
    assert np.abs(table["mean"] - means).max() < 0.006
    assert np.allclose(table["bits/pixel"], np.array([1, 6, 3]) * BITS / SIDE**2, rtol=1e-3)
    picture = np.array(Image.open(tmp_path / "out" / "a.png"))
    step = (picture.shape[1] + 4) // 4
    tokens = model.encode(tensor(photos / "a.png"))
    for column, length in enumerate((1, 6, 3), start=1):
        decoded = model.decode(tokens.truncate(length))[0].permute(1, 2, 0).numpy()
        shown = picture[:SIDE, column * step : column * step + SIDE] / 255
        assert np.abs(shown - decoded).max() <= 0.5 / 255 + 1e-6
        assert (picture[SIDE:, column * step : (column + 1) * step - 4] < 128).any(), "there is a caption below"
    assert np.array_equal(picture[:SIDE, :SIDE], (tensor(photos / "a.png")[0].permute(1, 2, 0) * 255).round().numpy())


@pytest.mark.parametrize("length", [1, 6])
def test_one_length_alone_is_a_table_too(length, run, photos, tokenizer, tmp_path):
    words = ["reconstruct", photos / "a.png", "--tokenizer", tokenizer, "--num-workers", 0, "--out", tmp_path / "out"]
    status, out, _ = run(*words, "--num-tokens", length)
    assert status == 0 and out.splitlines()[0].split()[2:4] == [str(length), "token" if length == 1 else "tokens"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("7", "--num-tokens must lie between 1 and 6 here; got 7"),
        ("1,7", "--num-tokens must lie between 1 and 6 here; got 7"),
        ("0", "--num-tokens: expected one number or different numbers"),
        ("1,1", "--num-tokens: expected one number or different numbers"),
        ("1;2", "--num-tokens: expected one number or different numbers"),
    ],
)
def test_lengths_that_there_are_not_are_refused(value, message, run, photos, tokenizer, tmp_path):
    words = ["reconstruct", photos, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--num-tokens", value]
    status, _, err = run(*words)
    assert status == 2 and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_encode_and_decode_name_the_range(run, photos, tokenizer, tmp_path):
    words = ["encode", photos, "--tokenizer", tokenizer, "--num-workers", 0, "--out", tmp_path / "t"]
    for value, message in ((7, "between 1 and 6 here; got 7"), (-1, "--num-tokens must be at least 0; got -1")):
        status, _, err = run(*words, "--num-tokens", value)
        assert status == 2 and message in err and not (tmp_path / "t").exists()
    assert run(*words, "--num-tokens", 3)[0] == 0
    words = ["decode", tmp_path / "t", "--tokenizer", tokenizer, "--out", tmp_path / "out"]
    status, _, err = run(*words, "--num-tokens", 4)
    assert status == 2 and "between 1 and 3 here; got 4" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct"])
def test_tokenizers_of_fixed_length_say_so(command, run, photos, tokenizers, tmp_path):
    run("encode", photos, "--tokenizer", tokenizers / "titok", "--num-workers", 0, "--out", tmp_path / "t")
    source = tmp_path / "t" if command == "decode" else photos
    words = [command, source, "--tokenizer", tokenizers / "titok", "--out", tmp_path / "out", "--num-tokens", 2]
    status, _, err = run(*words)
    assert status == 2 and "is a TiTok of 6 tokens, and decodes no fewer" in err
    assert not list(tmp_path.glob("out/*"))


def test_lengths_keep_their_order():
    assert parse_lengths("32") == (32,) and parse_lengths("1, 256,8") == (1, 256, 8)
    for text in ("", "a", "1,,2", "-1", "0", "1,", "1.5", "8,8"):
        with pytest.raises(ValueError, match="one number or different numbers"):
            parse_lengths(text)


def test_columns_of_a_row_are_as_wide_as_their_captions():
    captions = ["original", "1 token\n12.34 dB\n0.0005 bpp"]
    narrow, wide = (row([(torch.zeros(3, 8, width), text) for text in captions]) for width in (8, 200))
    step = (narrow.shape[2] + 4) // 2
    assert 8 < step < 100 and (narrow[:, :8, :8] == 0).all() and (narrow[:, :8, step : step + 8] == 0).all()
    assert (narrow[:, :, step - 4 : step] == 255).all(), "there is a gap between the columns"
    ink = [int((255 - picture[:, 8:].long()).sum()) for picture in (narrow, wide)]
    assert ink[0] == ink[1] > 0, "nothing is cut off"
