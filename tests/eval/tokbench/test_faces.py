"""F-Sim and its embedders."""

import math

import numpy as np
import pytest

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokbench.alignment import TEMPLATE
from vistok.eval.tokbench.annotations import AnnotatedImage, Face
from vistok.eval.tokbench.arcface import ArcFaceEmbedder
from vistok.eval.tokbench.buckets import Buckets
from vistok.eval.tokbench.dlibface import DlibEmbedder, face_chip
from vistok.eval.tokbench.embedder import make_embedder
from vistok.eval.tokbench.faces import FaceJudge, face_summary

BUCKETS = Buckets((0.0, 0.1, 0.2, 1.0), False)
POINTS = tuple(map(tuple, TEMPLATE.tolist()))


class Colour:
    """The colour at a face's nose, far from zero like the embeddings that need centring."""

    id, version, weights_sha256, center = "colour", "1", "00", False

    def embed(self, image, landmarks):
        x, y = np.round(landmarks[2]).astype(int)
        return image[y, x].astype(np.float32) + 500


def face_image(name, colour, ratio):
    pixels = np.full((112, 112, 3), colour, np.uint8)
    return AnnotatedImage(name, "", (Face(POINTS, ratio),), lambda: pixels)


def cosine(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


IMAGES = [
    face_image("a", (10, 20, 250), 0.05),
    face_image("b", (250, 30, 0), 0.05),
    face_image("c", (0, 200, 0), 0.1),
    face_image("d", (99, 88, 77), 0.2),
    face_image("e", (1, 2, 3), 1.0),
]


def judged(change):
    judge = FaceJudge(Colour(), 112, BUCKETS)
    images = [image for image in IMAGES if judge.counts(image)]
    return judge.judge(images, [i.load() for i in images], lambda _, originals: [change(o) for o in originals])


def test_similarity_is_the_mean_cosine_by_bucket():
    entries = judged(lambda pixels: pixels[..., ::-1])
    summary = face_summary(lambda: entries, center=False)
    assert summary["counts"] == {"small": 2, "medium": 1, "large": 1} and summary["empty"] == []
    found = summary["rows"]["model"]["similarity"]
    small = (cosine([510, 520, 750], [750, 520, 510]) + cosine([750, 530, 500], [500, 530, 750])) / 2
    assert found["small"] == pytest.approx(small)
    assert found["large"] == pytest.approx(cosine([599, 588, 577], [577, 588, 599]))
    assert found["mean"] == pytest.approx((found["small"] + found["medium"] + found["large"]) / 3)
    assert summary["rows"]["resize"]["similarity"] == pytest.approx({"small": 1, "medium": 1, "large": 1, "mean": 1})


def test_centring_subtracts_the_mean_original():
    entries = judged(lambda pixels: pixels[..., ::-1])
    colours = np.array([[10, 20, 250], [250, 30, 0], [0, 200, 0], [99, 88, 77]], float)
    mean = colours.mean(0)
    found = face_summary(lambda: iter(entries), center=True)["rows"]["model"]["similarity"]
    assert found["medium"] == pytest.approx(cosine(colours[2] - mean, colours[2] - mean))
    assert found["large"] == pytest.approx(cosine(colours[3] - mean, colours[3][::-1] - mean), abs=1e-5)
    raw = face_summary(lambda: iter(entries), center=False)["rows"]["model"]["similarity"]
    assert found["small"] < raw["small"] - 0.5


def test_centring_needs_two_faces_and_empty_buckets_have_no_value():
    entries = judged(lambda pixels: pixels)[2:3]
    with pytest.raises(MetricUnavailable, match="at least 2 faces"):
        face_summary(lambda: entries, center=True)
    summary = face_summary(lambda: entries, center=False)
    assert summary["empty"] == ["small", "large"]
    assert summary["rows"]["model"]["similarity"]["medium"] == pytest.approx(1)
    assert math.isnan(summary["rows"]["model"]["similarity"]["mean"])


def test_an_embedding_without_direction_is_like_nothing():
    class Black(Colour):
        def embed(self, image, landmarks):
            return super().embed(image, landmarks) - 500

    entries = FaceJudge(Black(), 112, BUCKETS).judge(
        IMAGES[:1], [IMAGES[0].load()], lambda _, originals: [np.zeros_like(o) for o in originals]
    )
    assert face_summary(lambda: entries, center=False)["rows"]["model"]["similarity"]["small"] == 0


def write_network(path):
    """An ONNX network that gives back the mean of every colour: written as bytes, since ``onnx`` may be missing."""

    def field(number, value):
        if isinstance(value, int):
            return bytes([number << 3, value])
        value = value.encode() if isinstance(value, str) else value
        assert len(value) < 128
        return bytes([number << 3 | 2, len(value)]) + value

    def tensor(name, *dims):
        shape = b"".join(field(1, field(2, d) if isinstance(d, str) else field(1, d)) for d in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    def node(kind, source, target, attributes=b""):
        return field(1, field(1, source) + field(2, target) + field(4, kind) + attributes)

    graph = node("GlobalAveragePool", "x", "m") + node("Flatten", "m", "y") + field(2, "g")
    graph += field(11, tensor("x", "n", 3, 112, 112)) + field(12, tensor("y", "n", 3))
    head = field(1, 7) + field(8, field(2, 11))
    path.write_bytes(head + bytes([7 << 3 | 2, len(graph) & 127 | 128, len(graph) >> 7]) + graph)
    return path


def test_arcface_gets_the_aligned_face_in_rgb_from_minus_one_to_one(tmp_path):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "antelopev2"
    folder.mkdir()
    write_network(folder / "glintr100.onnx")
    embedder = make_embedder("insightface", folder)
    assert embedder.id == "insightface/antelopev2/glintr100" and not embedder.center
    assert len(embedder.weights_sha256) == 64
    image = np.zeros((200, 200, 3), np.uint8)
    image[30:142, 40:152] = (255, 127, 0)
    found = embedder.embed(image, TEMPLATE + [40, 30])
    np.testing.assert_allclose(found, [1, -0.5 / 127.5, -1], atol=1e-6)


def test_missing_weights_are_said_in_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(MetricUnavailable, match=r"F-Sim has no weights: unpack https.*antelopev2.zip") as error:
            ArcFaceEmbedder(folder)
        assert "\n" not in str(error.value)


def test_a_broken_network_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "glintr100.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not an ONNX network"):
        ArcFaceEmbedder(tmp_path)


def test_dlib_is_explained_where_it_is_missing(tmp_path):
    with pytest.raises(MetricUnavailable, match="pip install (dlib-bin|face_recognition_models)"):
        DlibEmbedder(tmp_path / "none.dat")
    with pytest.raises(ValueError, match="embedder must be one of insightface, dlib; got 'facenet'"):
        make_embedder("facenet")


def test_dlib_gets_the_face_where_its_mean_face_is():
    dlib = pytest.importorskip("dlib")
    rows, columns = np.mgrid[:240, :240]
    image = np.stack([rows, columns, (rows + columns) // 2], -1).astype(np.uint8)  # colours say where a pixel was
    mean = np.array([[0.2255, 0.2160], [0.7548, 0.2160], [0.4901, 0.5156], [0.2541, 0.7802], [0.7261, 0.7802]])
    landmarks = (mean + 0.25) / 1.5 * 150 + [70, 50]
    chip = face_chip(dlib, image, landmarks.tolist())
    assert chip.shape == (150, 150, 3) and np.abs(chip.astype(int) - image[50:200, 70:220]).max() <= 1
