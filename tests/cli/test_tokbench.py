"""``vistok evaluate tokbench`` from words to scores, with a stand-in for the recogniser."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from vistok.cli.main import main
from vistok.eval.tokbench import suite
from vistok.eval.tokbench.annotations import TEXT_SETS

LEVELS = (40, 200, 120)


class Grey:
    """Reads the grey level of a crop, in steps of 40."""

    id, version, weights_sha256 = "grey", "1", "00"

    def read(self, crops):
        return [f"w{round(float(np.median(crop)) / 40)}" for crop in crops]


class Colour:
    id, version, weights_sha256, center = "colour", "1", "00", False

    def embed(self, image, landmarks):
        return image.reshape(-1, 3).mean(0) - 100


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suite, "make_recognizer", lambda *args, **kwargs: Grey())
    monkeypatch.setattr(suite, "make_embedder", lambda *args, **kwargs: Colour())


def picture(path, level):
    """90x60 pixels, in one grey but for a border."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[5:55, 5:85] = level
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def words(tmp_path):
    """Annotations of one's own, beside their images."""
    entries = []
    for number, level in enumerate(LEVELS):
        picture(tmp_path / "own" / "images" / f"{number}.png", level)
        word = {"rec": f"w{round(level / 40)}", "bbox": [20, 20, 50, 40]}
        entries.append({"file_name": f"images/{number}.png", "annotations": [word]})
    lines = tmp_path / "own" / "words.jsonl"
    lines.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    (tmp_path / "own" / "words.json").write_text(json.dumps(entries))
    return lines


def tokbench(subject, out, *options):
    return main(["evaluate", "tokbench", str(subject), "--out", str(out), "--device", "cpu", *map(str, options)])


def failure(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_words_are_read_before_and_after_the_tokenizer(tokenizers, words, tmp_path, capsys):
    assert tokbench(tokenizers / "titok", tmp_path / "out", "--data", words) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokbench.json"]
    result = json.loads((tmp_path / "out" / "tokbench.json").read_text())
    text = result["text"]
    assert text["rows"]["original"]["accuracy"]["small"] == text["rows"]["resize"]["accuracy"]["small"] == 1
    assert text["counts"] == {"small": 3, "medium": 0, "large": 0} and text["size"] == 32
    assert text["rows"]["model"]["accuracy"]["small"] < 1  # an untrained tokenizer keeps no greys
    assert not text["comparable"] and result["subject"]["name"].endswith("titok")
    printed = capsys.readouterr().out
    assert "T-ACC, %" in printed and "not comparable with published numbers: read by grey" in printed
    assert "–" in printed and "nan" not in printed
    assert tokbench(tokenizers / "titok", tmp_path / "json", "--data", words.with_suffix(".json")) == 0
    again = json.loads((tmp_path / "json" / "tokbench.json").read_text())["text"]
    assert again["rows"] == text["rows"]


def test_reconstructions_that_were_saved_score_by_what_they_show(words, tmp_path, capsys):
    for number, level in enumerate((LEVELS[0], LEVELS[1], 0)):
        picture(tmp_path / "rec" / "images" / f"{number}.png", level)
    assert tokbench(tmp_path / "rec", tmp_path / "out", "--data", words, "--saved") == 2
    assert "--saved needs --size" in failure(capsys)
    saved = ("--data", words, "--saved", "--size", 256)
    assert tokbench(tmp_path / "rec", tmp_path / "out", *saved) == 0
    text = json.loads((tmp_path / "out" / "tokbench.json").read_text())["text"]
    assert text["rows"]["model"]["accuracy"]["large"] == pytest.approx(2 / 3) and text["save"] == "files"
    (tmp_path / "rec" / "images" / "1.png").unlink()
    assert tokbench(tmp_path / "rec", tmp_path / "other", *saved) == 2
    assert "lacks reconstructions of 1 of 3 images: images/1.png" in failure(capsys)


def test_the_published_layout_gives_text_and_faces(tokenizers, tmp_path, capsys):
    root = tmp_path / "TokBench"
    assert tokbench(tokenizers / "titok", tmp_path / "out", "--data", root) == 2
    assert "there are no annotations at" in failure(capsys)
    (root / "annotations").mkdir(parents=True)
    for number, name in enumerate(TEXT_SETS):
        picture(root / "images" / "text_data" / name / "a.jpg", LEVELS[number % 3])
        word = {"rec": f"w{round(LEVELS[number % 3] / 40)}", "bbox": [20, 20, 50, 40], "ratio": 0.2}
        entry = {"file_name": "a.jpg", "annotations": [word]}
        (root / "annotations" / f"text_{name}.json").write_text(json.dumps([entry]))
    picture(root / "images" / "face_data" / "b.jpg", 200)
    points = [[30, 20], [60, 20], [45, 30], [32, 42], [58, 42]]
    faces = [{"image_name": "b.jpg", "faces": [{"kps": points, "box": [20, 10, 70, 50]}]}]
    (root / "annotations" / "face_meta.json").write_text(json.dumps(faces))
    options = ("--data", root, "--embedder", "dlib", "--save", "jpeg75-if-jpg", "--size", 64)
    assert tokbench(tokenizers / "vqgan", tmp_path / "out", *options) == 0
    result = json.loads((tmp_path / "out" / "tokbench.json").read_text())
    assert set(result["text"]["groups"]) == set(TEXT_SETS) and sum(result["text"]["counts"].values()) == 8
    assert sum(result["faces"]["counts"].values()) == 1
    assert "published sizes are 256" in result["text"]["reason"] and "only a part" not in result["text"]["reason"]
    printed = capsys.readouterr().out
    assert "T-ACC, %" in printed and "T-NED, %" in printed and "F-Sim" in printed


def test_an_interrupted_run_goes_on_and_overwriting_begins_anew(tokenizers, words, tmp_path, capsys, monkeypatch):
    from vistok.eval.variants import Codes

    reconstruct, calls = Codes.reconstruct, []

    def interrupted(codes, images):
        calls.append(len(images))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return reconstruct(codes, images)

    monkeypatch.setattr(Codes, "reconstruct", interrupted)
    out, options = tmp_path / "out", ("--data", words, "--batch-size", 1)
    assert tokbench(tokenizers / "titok", out, *options) == 130
    assert "give the command again to go on" in failure(capsys) and not (out / "tokbench.json").exists()
    assert tokbench(tokenizers / "other", out, *options) == 2
    assert "belongs to a run with other subject" in failure(capsys)
    del calls[:]
    calls.append(0)
    calls.append(0)  # no more interruptions
    assert tokbench(tokenizers / "titok", out, *options) == 0
    assert calls[2:] == [1, 1]  # the first image was done before
    assert tokbench(tokenizers / "other", out, *options) == 2
    assert "tokbench.json exists" in failure(capsys)
    assert tokbench(tokenizers / "other", out, *options, "--overwrite") == 0
    assert calls[4:] == [1, 1, 1] and [path.name for path in out.iterdir()] == ["tokbench.json"]
    del calls[:]
    assert tokbench(tokenizers / "titok", out, *options, "--overwrite") == 130
    assert tokbench(tokenizers / "other", out, *options, "--overwrite") == 0  # also what an interrupted run left


def test_overwriting_spares_what_is_not_ours(tokenizers, words, tmp_path):
    (tmp_path / "out" / "tokbench").mkdir(parents=True)
    (tmp_path / "out" / "tokbench" / "mine.txt").write_text("data of the user")
    (tmp_path / "out" / "unfinished" / "parts").mkdir(parents=True)
    assert tokbench(tokenizers / "titok", tmp_path / "out", "--data", words, "--overwrite") == 0
    assert (tmp_path / "out" / "tokbench" / "mine.txt").exists()
    assert [path.name for path in (tmp_path / "out" / "unfinished").iterdir()] == ["parts"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--pages", "0"], "pages must be at least 1; got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--embedder", "dlib"], "faces need data"),
        (["--recognizer", "eyes"], "--recognizer: expected one of 'rapidocr'"),
        (["--size", "48"], "takes images of 32x32 pixels"),
        (["--size", "0"], "--size must be at least 1; got 0"),
        (["--saved"], "--saved needs --size"),
    ],
)
def test_mistakes_are_one_clear_line(tokenizers, tmp_path, capsys, options, complaint):
    assert tokbench(tokenizers / "titok", tmp_path / "out", *options) == 2
    assert complaint in failure(capsys)
