"""The sections of a full evaluation: which are made, which are skipped and why, and where they keep their work."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from vistok import TiTok, VectorQuantizer
from vistok.data.source import ImageSource, Sample
from vistok.eval import sections
from vistok.eval.metric import MetricUnavailable, Originals, Pairs
from vistok.eval.protocol import preset
from vistok.eval.runner import Evaluation, Pass
from vistok.eval.sections import TokenizerSections
from vistok.eval.suites import Settings
from vistok.eval.tokens.store import TokenStore
from vistok.eval.variants import Codes, GivenVariant
from vistok.eval.weights import Weights
from vistok.tokenizers.base import Stream, Tokens


class Coloured(ImageSource):
    """Two classes that differ in colour."""

    def __init__(self, length, labelled=True):
        self.length, self.labelled = length, labelled

    def __len__(self):
        return self.length

    def read(self, index):
        draws = torch.Generator().manual_seed(index)
        image = torch.randint(0, 128, (3, 16, 16), generator=draws, dtype=torch.uint8)
        image[index % 2] += 100
        return Sample(image, index % 2 if self.labelled else -1, str(index))

    def manifest(self):
        return [f"{self.length} coloured images"] * 1000


def codes():
    torch.manual_seed(0)
    sizes = {"encoder_size": (32, 1, 2), "decoder_size": (32, 1, 2)}
    return Codes(TiTok(VectorQuantizer(16, 4), 16, 8, 3, **sizes).eval())


def make(folder, suite="full", size=(16, 16), **options):
    plan = preset("torch-fidelity", height=size[0], width=size[1], seed=5)
    numbers = np.arange(8)
    settings = Settings(suite, plan, Weights(folder, download=False), torch.device("cpu"), numbers)
    options = {"source": Coloured(8), "subject": "weights 1", **options}
    return TokenizerSections(settings, codes(), transform=lambda image: image, out=folder, **options)


def found(folder, layout=None, images=60):
    """A pass with stored tokens of a layout, of all codes at their upper end."""
    evaluation = Evaluation(GivenVariant(), {})
    if layout is not None:
        store = TokenStore()
        store.open(folder / "store", "a")
        indices = {
            stream.name: torch.tensor(stream.codebook_sizes).sub(1).expand(images, stream.length, -1).contiguous()
            for stream in layout
        }
        pixels = torch.zeros(images, 3, 16, 16, dtype=torch.uint8)
        batch = Originals(torch.arange(images), [""] * images, torch.zeros(images), pixels)
        store.update(Pairs(batch, pixels, Tokens(indices, layout)))
        store.merge(store.state_dict())
        evaluation.metrics["tokens"] = store
    index = torch.arange(8)
    return Pass([evaluation], index, [str(i) for i in range(8)], index % 2, "", 8, [], {})


def test_full_has_tokbench_and_a_model_of_the_tokens(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sections, "tokbench", lambda *arguments, **options: calls.append((arguments, options)) or {})
    monkeypatch.setattr(
        sections, "token_model_probe", lambda *arguments, **options: {"arguments": (arguments, options)}
    )
    made, skipped = make(tmp_path)(found(tmp_path, (Stream("image", 3, (16,)),)))
    assert made.keys() == {"tokbench", "token_model"} and skipped == {}
    (_, size, folder), options = calls[0]
    assert (size, folder, options["subject"]) == (16, tmp_path / "unfinished", "weights 1")
    (tokens, layout, pixels), options = made["token_model"]["arguments"]
    assert (tuple(tokens.shape), layout[0].length, pixels, options["seed"]) == ((60, 3), 3, 256, 5)


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_smaller_suites_have_no_sections(tmp_path, suite):
    assert make(tmp_path, suite)(found(tmp_path, (Stream("image", 3, (16,)),))) == ({}, {})


def test_without_tokens_there_is_no_model_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "tokbench", lambda *arguments, **options: {})
    assert make(tmp_path)(found(tmp_path)) == ({"tokbench": {}}, {})


def test_what_cannot_be_made_is_skipped_with_its_reason(tmp_path, monkeypatch):
    made, skipped = make(tmp_path, size=(16, 8))(found(tmp_path, (Stream("image", 3, (16,)),), images=8))
    assert made == {} and skipped["tokbench"] == "TokBench needs square images; got 16 x 8"
    assert "at least 40 images" in skipped["token_model"]


@pytest.mark.parametrize(
    "layout",
    [
        (Stream("image", 2, (16,)),),
        (Stream("coarse", 1, (16, 16)), Stream("fine", 4, (16, 16))),
        (Stream("image", 2, (1 << 36,)),),
        (Stream("a", 1, (1 << 30,)), Stream("b", 1, (1 << 30,)), Stream("c", 1, (1 << 30,))),
    ],
    ids=["one codebook", "streams of sub-codes", "huge codebook", "huge together"],
)
def test_the_model_gets_every_token_as_it_is(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(sections, "tokbench", lambda *arguments, **options: {})
    monkeypatch.setattr(sections, "token_model_probe", lambda tokens, *_, **__: {"tokens": tokens})
    made, _ = make(tmp_path)(found(tmp_path, layout))
    indices = Tokens.unflatten(made["token_model"]["tokens"].long(), layout).indices
    for stream in layout:
        assert (indices[stream.name] == torch.tensor(stream.codebook_sizes) - 1).all()


def test_a_linear_probe_tells_classes_apart_and_keeps_its_features_below_the_results(tmp_path, monkeypatch):
    plans, extract = [], sections.extract_features

    def noted(*arguments, **options):
        plans.append((arguments[3], options["plan"], options["chosen"]))
        return extract(*arguments, **options)

    monkeypatch.setattr(sections, "extract_features", noted)
    titles = []

    def progress(title, total):
        titles.append((title, total))
        return nullcontext(lambda steps: None)

    sections_of = make(tmp_path, "quick", probe_source=Coloured(80), progress=progress)
    made, skipped = sections_of(found(tmp_path))
    assert skipped == {} and made["linear_probe"]
    work = tmp_path / "unfinished" / "features"
    assert [folder for folder, _, _ in plans] == [work / "training", work / "evaluated"]
    assert plans[0][2] is None and plans[1][2].tolist() == list(range(8))
    assert all(plan["subject"] == "weights 1" and len(plan["images"]) == 64 for _, plan, _ in plans)
    assert [(plan["size"], plan["crop"]) for _, plan, _ in plans] == [([16, 16], "adm")] * 2
    assert titles[:2] == [("features, training", 80), ("features, evaluated", 8)]


def test_images_without_labels_have_no_linear_probe(tmp_path):
    made, skipped = make(tmp_path, "quick", probe_source=Coloured(80, labelled=False))(found(tmp_path))
    assert made == {} and "labels" in skipped["linear_probe"]


def test_an_error_that_is_no_reason_is_not_swallowed(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(sections, "tokbench", broken)
    with pytest.raises(RuntimeError, match="broken"):
        make(tmp_path)(found(tmp_path))
    monkeypatch.setattr(sections, "tokbench", unavailable)
    assert make(tmp_path)(found(tmp_path)) == ({}, {"tokbench": "no recogniser"})


def unavailable(*arguments, **options):
    raise MetricUnavailable("no recogniser")
