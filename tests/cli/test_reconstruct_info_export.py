"""``vistok reconstruct``, ``info`` and ``export``."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.cli.main import main
from vistok.cli.pictures import contact_sheet, pair
from vistok.data.images import read_image
from vistok.data.transforms import EvalTransform
from vistok.hub.format import fingerprint


@pytest.fixture
def run(tokenizers, capfd):
    """Run a command; gives the exit status, and what it printed on stdout and stderr."""

    def run(*words):
        capfd.readouterr()
        status = main([str(word).replace("TOKENIZERS", str(tokenizers)) for word in words])
        return status, *capfd.readouterr()

    return run


def test_reconstruct_reports_psnr_and_rate_of_every_image(run, photos, tokenizers, tmp_path):
    status, out, err = run("reconstruct", photos, "--tokenizer", "TOKENIZERS/titok", "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    tokenizer, expected = vistok.load(tokenizers / "titok"), {}
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/er/c d.png", "deep/er/c d.bmp"):
        image = EvalTransform(32)(read_image(photos / name)).numpy() / 255.0
        decoded = tokenizer.decode(tokenizer.encode(torch.from_numpy(image).float()[None]))[0].numpy()
        expected[name] = -10 * math.log10(np.mean((image - decoded) ** 2))
    expected["mean"] = sum(expected.values()) / len(expected)
    rows = {line[:15].strip(): line[15:].split() for line in out.splitlines()[1:-1]}
    assert set(rows) == set(expected)
    for name, value in expected.items():
        assert float(rows[name][0]) == pytest.approx(value, abs=0.006)
        assert float(rows[name][1]) == pytest.approx(6 * 8 / 32**2, rel=1e-3)


def test_reconstruct_shows_original_and_reconstruction_side_by_side(run, photos, tokenizers, tmp_path):
    run("reconstruct", photos / "a.png", "--tokenizer", "TOKENIZERS/vqgan", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "reconstructions.png"]
    picture = np.array(Image.open(tmp_path / "out" / "a.png"))
    image = EvalTransform(32)(read_image(photos / "a.png"))
    assert np.array_equal(picture[:32, :32], image.permute(1, 2, 0).numpy())
    tokenizer = vistok.load(tokenizers / "vqgan")
    decoded = tokenizer.decode(tokenizer.encode(image.float()[None] / 255))[0].permute(1, 2, 0).numpy()
    assert np.abs(picture[:32, 36:68] / 255 - decoded).max() <= 0.5 / 255 + 1e-6
    assert (picture[32:] < 128).any(), "there is a caption below"
    sheet = np.array(Image.open(tmp_path / "out" / "reconstructions.png"))
    assert np.array_equal(sheet[4 : 4 + len(picture), 4 : 4 + picture.shape[1]], picture)


def test_picture_named_like_the_sheet_gets_another_name(run, photos, tmp_path):
    (photos / "a.png").rename(photos / "reconstructions.png")
    command = ["reconstruct", photos / "reconstructions.png", "--tokenizer", "TOKENIZERS/titok"]
    run(*command, "--out", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["reconstructions-2.png", "reconstructions.png"]


def test_reconstruct_goes_on_without_unreadable_images(run, photos, tmp_path):
    (photos / "a.png").write_bytes(b"")
    command = ["reconstruct", photos, "--tokenizer", "TOKENIZERS/titok", "--batch-size", 1, "--out", tmp_path / "out"]
    status, out, err = run(*command)
    assert status == 1 and "1 of 5 images could not be read" in err and not (tmp_path / "out" / "a.png").exists()
    assert len(out.splitlines()) == 1 + 4 + 1 + 1
    status, _, err = run(*command)
    assert status == 2 and "exists (and 4 more files)" in err


def test_caption_fits_beside_tiny_images():
    image = torch.zeros(3, 8, 8)
    picture = pair(image, image, "12.34 dB   0.5 bpp")
    assert (picture[:, :8, :8] == 0).all() and picture.shape[2] > 60
    assert (picture[:, 8:, -2:] == 255).all(), "the text ends before the edge"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
def test_contact_sheet_holds_every_picture_once(count):
    pictures = [torch.full((3, 20, 40), 5 * (i + 1), dtype=torch.uint8) for i in range(count)]
    sheet = contact_sheet(pictures)
    values, counts = sheet[0].unique(return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
        **{5 * (i + 1): 800 for i in range(count)},
        255: sheet[0].numel() - 800 * count,
    }
    assert count < 7 or 0.4 < sheet.shape[1] / sheet.shape[2] < 2.5


def test_info_states_what_the_tokenizer_is(run, tokenizers):
    status, out, err = run("info", "TOKENIZERS/vqgan", "--json")
    facts, tokenizer = json.loads(out), vistok.load(tokenizers / "vqgan")
    assert status == 0
    assert facts["class"] == "vistok.tokenizers.vqgan.VQGAN" and facts["fingerprint"] == fingerprint(tokenizer)
    counts = facts["parameters"]
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in tokenizer.parameters())
    assert counts["encoder"] == sum(p.numel() for p in tokenizer.encoder.parameters())
    assert facts["image"] == {"size": [32, 32], "stride": 2, "any_image_size": True, "crop": "center"}
    assert facts["streams"] == [{"name": "image", "length": 256, "codebook_sizes": [64], "grid": [16, 16]}]
    assert (facts["tokens"], facts["bits_per_image"], facts["bits_per_pixel"]) == (256, 1536.0, 1.5)
    assert facts["source"] == f"folder {tokenizers / 'vqgan'}"
    _, text, _ = run("info", "TOKENIZERS/vqgan")
    for part in (facts["class"], facts["fingerprint"], "256 tokens (16x16 grid), codebook 64", "1536 per image, 1.5"):
        assert part in text


@pytest.fixture
def training_run(tokenizers, tmp_path):
    """The folder of a run whose averaged weights are those of ``other``, its raw ones those of ``titok``."""
    raw, averaged = (vistok.load(tokenizers / name) for name in ("titok", "other"))
    state = {f"tokenizer.{name}": tensor for name, tensor in raw.state_dict().items()}
    state |= {f"ema_tokenizer.{name}": tensor for name, tensor in averaged.state_dict().items()}
    entry = {"format_version": 1, "vistok_version": "0", "tokenizer": json.dumps(raw.config), "global_step": 30}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, "vistok": entry}, tmp_path / "run" / "checkpoints" / "step=00000030.ckpt")
    return tmp_path / "run"


def test_export_writes_the_averaged_weights_of_a_run_or_the_raw_ones(run, training_run, tokenizers, tmp_path):
    status, out, err = run("export", training_run, "--out", tmp_path / "ema")
    assert (status, err) == (0, "") and "step 30, averaged (EMA) weights" in out
    assert run("export", training_run, "--out", tmp_path / "raw", "--no-ema")[0] == 0
    for name, original in (("ema", "other"), ("raw", "titok")):
        assert fingerprint(vistok.load(tmp_path / name)) == fingerprint(vistok.load(tokenizers / original))
        metadata = json.loads((tmp_path / name / "config.json").read_text())["metadata"]
        assert metadata == {"training_step": 30, "weights": name}


def test_run_folder_and_its_export_are_one_tokenizer_to_the_commands(run, training_run, photos, tmp_path):
    run("export", training_run, "--out", tmp_path / "export")
    assert run("encode", photos, "--tokenizer", training_run, "--out", tmp_path / "t")[0] == 0
    assert run("decode", tmp_path / "t", "--tokenizer", tmp_path / "export", "--out", tmp_path / "out")[0] == 0


def test_export_refuses_a_folder_that_holds_something_else(run, training_run, photos):
    status, _, err = run("export", training_run, "--out", photos)
    assert status == 2 and "something other than an export" in err and len(err.splitlines()) == 1
    status, _, err = run("export", photos, "--out", photos)
    assert status == 2 and "is no checkpoint" in err
    status, _, err = run("export", "TOKENIZERS/titok", "--no-ema", "--out", photos)
    assert status == 2 and "ema=False is for training checkpoints" in err
