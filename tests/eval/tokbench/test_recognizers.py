"""What reads text: the networks' own rules, and real reading where a recogniser is installed."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokbench.parseq import PARSeqRecognizer, fit
from vistok.eval.tokbench.parseq import normalize as normalize_parseq
from vistok.eval.tokbench.recognizer import file_sha256, make_recognizer
from vistok.eval.tokbench.tesseract import TesseractRecognizer, normalize

WORDS = ["Hello", "garden", "4729", "RIVER", "lemon", "2.75", "Morning", "quick"]


def printed(text, size=32, ink="black", ground="white"):
    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(v) for v in font.getbbox(text))
    image = Image.new("RGB", (right - left + 4, bottom - top + 4), ground)
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=ink, font=font)
    return np.array(image)


def crops():
    light = [printed(word, 20 + 4 * number) for number, word in enumerate(WORDS)]
    return light + [printed(word, 30, "yellow", "navy") for word in WORDS]


def test_rapidocr_reads_words_in_their_order():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    reader = make_recognizer("rapidocr")
    assert reader.id.startswith("rapidocr/PP-OCR") and len(reader.weights_sha256) == 64
    assert reader.version.startswith("rapidocr 3")
    assert reader.read(crops()) == WORDS * 2
    assert reader.read([]) == []


def test_rapidocr_takes_rgb():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed")
    reader, seen = make_recognizer("rapidocr"), []
    reader._reader = lambda request: seen.extend(request.img) or type("Output", (), {"txts": ["x"]})
    reader.read([np.full((4, 4, 3), (1, 2, 3), np.uint8)])
    assert (seen[0] == (3, 2, 1)).all()  # RapidOCR's order


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="there is no tesseract")
def test_tesseract_reads_words_in_their_order():
    reader = make_recognizer("tesseract")
    found = reader.read(crops())
    assert sum(a == b for a, b in zip(found, WORDS * 2, strict=True)) >= 12


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_missing_packages_are_said_in_one_line(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MetricUnavailable, match=r"pip install 'rapidocr>=3.10' onnxruntime") as error:
        make_recognizer("rapidocr")
    assert "\n" not in str(error.value)


def test_missing_weights_and_packages_of_parseq_are_said(tmp_path, monkeypatch):
    with pytest.raises(MetricUnavailable, match=r"no file was named; fetch https://.*parseq-56125471.pt"):
        make_recognizer("parseq")
    with pytest.raises(MetricUnavailable, match="there is no .*none.pt"):
        make_recognizer("parseq", tmp_path / "none.pt")
    (tmp_path / "some.pt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "doctr", None)
    with pytest.raises(MetricUnavailable, match="pip install python-doctr"):
        make_recognizer("parseq", tmp_path / "some.pt")
    with pytest.raises(ValueError, match="recognizer must be one of parseq, rapidocr, tesseract; got 'easyocr'"):
        make_recognizer("easyocr")


@pytest.mark.parametrize(
    ("size", "inner"),
    [((32, 128), (32, 128)), ((10, 40), (32, 128)), ((20, 200), (12, 128)), ((64, 64), (32, 32)), ((90, 10), (32, 3))],
)
def test_parseq_crops_keep_their_proportions_above_zeros(size, inner):
    crop = np.random.RandomState(0).randint(1, 256, (*size, 3), dtype=np.uint8)
    image = fit(crop)
    assert image.shape == (3, 32, 128)
    floats = torch.from_numpy(crop).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(floats, inner, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(image[:, : inner[0], : inner[1]], expected)
    assert (image[:, inner[0] :] == 0).all() and (image[:, :, inner[1] :] == 0).all()


def test_parseq_normalises_by_its_own_statistics():
    images = torch.zeros(2, 3, 32, 128)
    images[1] = torch.tensor([0.694, 0.695, 0.693]).view(3, 1, 1)
    found = normalize_parseq(images)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([-0.694 / 0.299, -0.695 / 0.296, -0.693 / 0.301]))
    assert found[1].abs().max() == 0


def test_parseq_runs_on_weights_of_its_architecture(tmp_path):
    pytest.importorskip("doctr", reason="python-doctr is not installed")
    from doctr.models.recognition import parseq

    torch.manual_seed(0)
    torch.save(parseq(pretrained=False, pretrained_backbone=False).state_dict(), tmp_path / "w.pt")
    reader = PARSeqRecognizer(tmp_path / "w.pt", batch_size=3)
    assert reader.id == f"parseq-{file_sha256(tmp_path / 'w.pt')[:8]}" and reader.version.startswith("python-doctr ")
    together = reader.read(crops()[:4])
    assert len(together) == 4 and all(isinstance(text, str) for text in together)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not hold weights of docTR's PARSeq"):
        PARSeqRecognizer(tmp_path / "other.pt")


def test_tesseract_gets_print():
    dark = normalize(printed("Hello", 20, "white", "black"))
    light = normalize(printed("Hello", 20, "black", "white"))
    assert dark.mode == "L" and dark.height == 48 + 20
    assert np.array_equal(np.asarray(dark), np.asarray(light))
    assert (np.asarray(dark)[:10] == 255).all()


FAKE = """#!/bin/sh
case "$1" in
--list-langs) printf 'List of available languages in "%s" (1):\\neng\\n' "{folder}";;
--version) printf 'tesseract 5.3.0\\n leptonica\\n';;
*) n=0; while read -r line; do n=$((n + 1)); [ -f "$line" ] && printf 'word%s\\n\\f' "$n"; done < "$1";;
esac
exit 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_tesseract_reads_one_page_for_every_crop(tmp_path, monkeypatch):
    program = tmp_path / "tesseract"
    program.write_text(FAKE.format(folder=tmp_path))
    program.chmod(0o755)
    (tmp_path / "eng.traineddata").write_bytes(b"data")
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    reader = TesseractRecognizer()
    assert (reader.id, reader.version) == ("tesseract/eng", "tesseract 5.3.0")
    assert reader.weights_sha256 == file_sha256(tmp_path / "eng.traineddata")
    assert reader.read(crops()[:3]) == ["word1", "word2", "word3"] and reader.read([]) == []
    with pytest.raises(MetricUnavailable, match="lacks the language deu"):
        TesseractRecognizer("deu")
    program.write_text(FAKE.format(folder=tmp_path).replace("-f", "-d"))  # finds no crop
    with pytest.raises(RuntimeError, match="tesseract read 0 of 3 crops"):
        reader.read(crops()[:3])


def test_a_missing_program_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MetricUnavailable, match="apt-get install tesseract-ocr"):
        make_recognizer("tesseract")
