"""``vistok convert``: released checkpoints become exports with their origin."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vistok
from vistok.cli.main import main
from vistok.hub.format import fingerprint

ROOT = Path(os.environ.get("VISTOK_PARITY", Path(__file__).resolve().parents[2] / ".." / "shared" / "parity"))


@pytest.fixture
def run(capfd):
    """Run a command; gives the exit status, and what it printed on stdout and stderr."""

    def run(*words):
        capfd.readouterr()
        status = main([str(word) for word in words])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def fixture():
    def fixture(name):
        if not (ROOT / name).is_dir():
            pytest.skip(f"no fixtures in {ROOT} (set VISTOK_PARITY)")
        return ROOT / name

    return fixture


@pytest.fixture
def released(fixture, tmp_path):
    """A small file in the form and under the name of LlamaGen's."""
    torch.save({"model": load_file(fixture("llamagen-vq16") / "model.safetensors")}, tmp_path / "vq_ds16_c2i.pt")
    return tmp_path / "vq_ds16_c2i.pt"


def test_a_released_file_becomes_an_export_that_knows_its_origin(run, released, fixture, tmp_path):
    status, out, err = run("convert", released, "--out", tmp_path / "out")
    assert (status, err) == (0, "") and out == f"released checkpoint, {released} -> {tmp_path / 'out'}\n"
    tokenizer, original = vistok.load(tmp_path / "out"), vistok.load(released)
    assert fingerprint(tokenizer) == fingerprint(original)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), original.decode(original.encode(images)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image"]["crop"] == "adm" and config["metadata"] == {
        "published_model": "llamagen-vq-16",
        "source": "https://huggingface.co/FoundationVision/LlamaGen",
        "file": "vq_ds16_c2i.pt",
        "license": "mit",
        "paper": "arXiv:2406.06525",
        "published_rfid": 2.19,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "mit"' in card and "(VQGAN), released as llamagen-vq-16, converted to Vistok: 256x256" in card
    _, text, _ = run("info", tmp_path / "out")
    assert "published_rfid" in text and "2.19" in text


def test_weights_are_chosen_and_named(run, released, fixture, tmp_path):
    (released.parent / "other.bin").write_bytes(b"x")
    status, _, err = run("convert", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and "other.bin, vq_ds16_c2i.pt (llamagen-vq-16)" in err and len(err.splitlines()) == 1
    assert run("convert", tmp_path, "--filename", released.name, "--out", tmp_path / "out")[0] == 0
    released.rename(tmp_path / "mine.pt")
    assert run("convert", tmp_path / "mine.pt", "--out", tmp_path / "named")[0] == 2
    assert run("convert", tmp_path / "mine.pt", "--model", "llamagen-vq-16", "--out", tmp_path / "named")[0] == 0
    assert fingerprint(vistok.load(tmp_path / "named")) == fingerprint(vistok.load(tmp_path / "out"))
    status, _, err = run("convert", tmp_path / "mine.pt", "--model", "llamagen-16", "--out", tmp_path / "third")
    assert status == 2 and "did you mean 'llamagen-vq-16'" in err
    assert not (tmp_path / "third").exists()


def test_what_exists_is_replaced_only_if_asked_and_only_an_export(run, released, tmp_path):
    assert run("convert", released, "--out", tmp_path / "out")[0] == 0
    status, _, err = run("convert", released, "--out", tmp_path / "out")
    assert status == 2 and "exists; choose another --out, or give --overwrite" in err
    assert run("convert", released, "--out", tmp_path / "out", "--overwrite")[0] == 0
    (tmp_path / "out" / "mine.txt").write_text("precious")
    status, _, err = run("convert", released, "--out", tmp_path / "out", "--overwrite")
    assert status == 2 and "something other than an export" in err and (tmp_path / "out" / "mine.txt").exists()


def test_continuous_tokenizers_are_converted_too_and_have_no_tokens(run, fixture, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "teal").save(tmp_path / "a.png")
    assert run("convert", fixture("titok-singlestage-vae"), "--out", tmp_path / "out")[0] == 0
    tokenizer, images = vistok.load(tmp_path / "out"), torch.rand(1, 3, 64, 64)
    latents = tokenizer.encode_latents(images)
    assert torch.equal(latents, vistok.load(fixture("titok-singlestage-vae")).encode_latents(images))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["latents"] == list(latents.shape[1:])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "continuous image tokenizer" in card and "images = tokenizer.decode_latents(latents)" in card
    _, text, _ = run("info", tmp_path / "out")
    assert f"{latents.shape[1]} of {latents.shape[2]} channels, continuous: no tokens" in text and "bits" not in text
    status, _, err = run("encode", tmp_path / "a.png", "--tokenizer", tmp_path / "out", "--out", tmp_path / "t")
    assert status == 2 and "whose latents are continuous: it has no tokens" in err and not (tmp_path / "t").exists()
    words = ["--tokenizer", tmp_path / "out", "--out", tmp_path / "pictures", "--num-workers", 0]
    status, out, _ = run("reconstruct", tmp_path / "a.png", *words)
    assert status == 0 and out.splitlines()[0].split() == ["image", "PSNR", "(dB)"]


def test_decoders_that_read_text_are_refused_before_anything_is_written(run, fixture, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "teal").save(tmp_path / "a.png")
    tokenizer = fixture("tatitok-vq")
    words = ["--tokenizer", tokenizer, "--out", tmp_path / "t", "--num-workers", 0]
    assert run("encode", tmp_path / "a.png", *words)[0] == 0, "the encoder sees the image alone"
    for command, source in (("decode", tmp_path / "t"), ("reconstruct", tmp_path / "a.png")):
        status, _, err = run(command, source, "--tokenizer", tokenizer, "--out", tmp_path / command)
        assert status == 2 and "reads text features besides tokens" in err
        assert not list(tmp_path.glob(f"{command}/*"))
    assert run("convert", tokenizer, "--out", tmp_path / "out")[0] == 0
    assert "tokenizer.decode(tokens, context=features)" in (tmp_path / "out" / "README.md").read_text()
