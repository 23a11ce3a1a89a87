"""An evaluation from images to files: what it says about itself, and that a kill at any moment costs nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.eval import evaluate as evaluation
from vistok.eval.evaluate import Subject, choose, evaluate
from vistok.eval.metric import EvaluationError, MetricUnavailable
from vistok.eval.processes import Processes
from vistok.eval.protocol import preset
from vistok.eval.report.per_image import read_per_image
from vistok.eval.results import Results
from vistok.eval.runner import Evaluation
from vistok.eval.suites import Suite

_spec = importlib.util.spec_from_file_location("vistok_test_eval_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

SUBJECT = Subject({"name": "it", "kind": "images"}, {"name": "random"}, "weights 1")


class Plain(small.Darker):
    name = kind = "reconstruction"
    settings = {}


class Refuses(small.PixelSum):
    def compute(self):
        raise MetricUnavailable("too few images")


def build():
    metrics = {"brightness": small.Brightness(), "sum": small.PixelSum(), "table": small.Table(), "refuses": Refuses()}
    return [Evaluation(small.OriginalsVariant(), {"brightness": small.Brightness()}), Evaluation(Plain(), metrics),
            Evaluation(small.Darker(), {"brightness": small.Brightness()})]  # fmt: skip


def suite(**options):
    return Suite(preset("adm", height=8, width=8), build, {"rfid": "no weights"}, manifest="files", **options)


def measure(out, source=None, made=None, subject=SUBJECT, **options):
    options = {"batch_size": 4, **options}
    source = small.RandomImages() if source is None else source
    return evaluate(source, small.same, made or suite(), subject, out, **options)


def test_results_say_what_was_measured(tmp_path):
    results = measure(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_image.parquet", "report.html", "results.json"]
    saved = Results.load(tmp_path / "results.json")
    assert saved.main.metrics == results.main.metrics and saved.protocol == results.protocol
    assert [variant.name for variant in results.variants] == ["reconstruction", "dark/half"]
    assert results.variants[1].settings == {"factor": 0.5}
    assert results.skipped == {"rfid": "no weights", "refuses": "too few images"}
    assert (results.evaluated, results.expected, results.partial, results.unreadable) == (23, 23, "", [])
    assert (results.protocol.preset, results.protocol.num_images) == ("adm", 23)
    assert len(results.protocol.dataset) == 64 and results.data == {"name": "random", "num_images": 23}
    assert results.version and results.timing["read"] > 0


def test_the_table_has_the_values_of_every_image_by_variant(tmp_path):
    results = measure(tmp_path, small.RandomImages(damaged=(4,)))
    index, keys, columns = read_per_image(tmp_path / "per_image.parquet")
    expected = [i for i in range(23) if i != 4]
    assert index.tolist() == expected and keys == [f"image {i}" for i in expected]
    assert list(columns) == ["label", "brightness", "first_pixel", "dark/half/brightness", "dark/half/first_pixel"]
    assert columns["label"].tolist() == [i % 3 for i in expected]
    darker = torch.stack([small.RandomImages().image(i) // 2 for i in expected])
    assert columns["first_pixel"].tolist() == darker[:, 0, 0, 0].tolist()
    assert columns["brightness"].mean() == pytest.approx(results.main.metrics["brightness"], rel=1e-6)


@pytest.mark.parametrize(
    ("source", "options", "partial"),
    [
        ({}, {"num_images": 23}, ""),
        ({}, {"num_images": 10}, "a subset: 10 of 23 images"),
        ({"damaged": (0, 9)}, {}, "2 of 23 images could not be read"),
        ({}, {"missing": ["x: no partner"]}, "1 image without a partner"),
        (
            {"damaged": (0,)},
            {"num_images": 3, "note": "measured during training", "missing": ["x"]},
            "measured during training; a subset: 3 of 23 images; 1 of 3 images could not be read; 1 image without a "
            "partner",
        ),
    ],
)
def test_a_result_that_is_not_whole_says_why(tmp_path, source, options, partial):
    results = measure(tmp_path, small.RandomImages(**source), **options)
    assert results.partial == partial
    assert results.evaluated + len(source.get("damaged", ())) == results.expected == options.get("num_images", 23)
    assert results.unreadable[len(source.get("damaged", ())) :] == options.get("missing", [])


def test_metrics_that_gave_up_on_a_batch_are_skipped_with_their_reason(tmp_path):
    class GivesUp(small.PixelSum):
        def update(self, pairs):
            raise MetricUnavailable("nothing to say")

    made = Suite(preset("adm"), lambda: [Evaluation(Plain(), {"sum": small.PixelSum(), "gives up": GivesUp()})])
    results = measure(tmp_path, made=made)
    assert results.skipped == {"gives up": "nothing to say"} and "pixel_sum" in results.main.metrics


def test_images_are_chosen_evenly_and_all_by_default():
    assert choose(5, None).tolist() == [0, 1, 2, 3, 4]
    assert choose(10, 4).tolist() == [0, 2, 5, 7]
    assert choose(10, 10).tolist() == list(range(10))
    for number in (0, 11):
        with pytest.raises(EvaluationError, match=f"between 1 and 10, the size of the dataset; got {number}"):
            choose(10, number)
    with pytest.raises(EvaluationError, match="the dataset is empty"):
        choose(0, None)


def test_a_dataset_that_is_empty_or_unreadable_gives_no_result(tmp_path):
    with pytest.raises(EvaluationError, match="the dataset is empty"):
        measure(tmp_path, small.RandomImages(0))
    with pytest.raises(EvaluationError, match="none of the 23 images could be read; the first: image 0: damaged"):
        measure(tmp_path, small.RandomImages(damaged=range(23)))
    assert not (tmp_path / "results.json").exists()


class Killed(BaseException):
    pass


STEPS = ("run_pass", "collect", "write_per_image", "write_report", "save", "rmtree")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_any_step_goes_on_to_the_same_result(tmp_path, monkeypatch, step, before):
    places = {"save": (Results, "save"), "rmtree": (evaluation.shutil, "rmtree")}
    place, name = places.get(step, (evaluation, step))
    function = getattr(place, name)

    def killed(*arguments, **options):
        if not before:
            function(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        with pytest.raises(Killed):
            measure(tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "results.json").exists() == (step == "rmtree" or (step == "save" and not before))
    if (step, before) != ("rmtree", False):  # else nothing was left to do
        progress = []
        results = measure(out, resume=True, advance=progress.append)
        assert progress == ([0, 4, 4, 4, 4, 4, 3] if (step, before) == ("run_pass", True) else [23])
        whole = measure(tmp_path / "whole")
        assert (results.variants, results.protocol) == (whole.variants, whole.protocol)
        (_, keys, mine), (_, whole_keys, other) = (
            read_per_image(path / "per_image.parquet") for path in (out, tmp_path / "whole")
        )
        assert keys == whole_keys and mine["brightness"].tolist() == other["brightness"].tolist()
    assert sorted(path.name for path in out.iterdir()) == ["per_image.parquet", "report.html", "results.json"]


def test_folders_of_the_user_stay(tmp_path):
    for name in ("parts", "rows", "features", "tokbench", "references"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    measure(tmp_path)
    assert len([*tmp_path.glob("*/mine")]) == 5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"subject": Subject(SUBJECT.subject, SUBJECT.data, "weights 2")},
            "weights: 'weights 1' there, 'weights 2' now",
        ),
        ({"subject": Subject({"name": "other"}, SUBJECT.data, "weights 1")}, "subject: 'it' there, 'other' now"),
        ({"subject": Subject(SUBJECT.subject, {"name": "other"}, "weights 1")}, "data: 'random' there, 'other' now"),
        ({"made": Suite(preset("adm", height=8, width=8), build, manifest="other")}, "manifest: 'files' there"),
        ({"made": Suite(preset("adm", height=8, width=9), build, manifest="files")}, "protocol: "),
        ({"made": Suite(preset("adm", height=8, width=8), lambda: build()[:2], manifest="files")}, "suite: "),
        ({"num_images": 22}, "num_images: 23 there, 22 now"),
        ({"source": small.RandomImages(24), "num_images": 23}, "of: 23 there, 24 now"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(tmp_path, monkeypatch, change, complaint):
    monkeypatch.setattr(evaluation, "collect", stop)
    with pytest.raises(Killed):
        measure(tmp_path)
    with pytest.raises(EvaluationError, match=rf"was begun with other settings \({complaint}"):
        measure(tmp_path, resume=True, **change)
    with pytest.raises(FileExistsError, match="--resume"):
        measure(tmp_path)


def stop(*arguments):
    raise Killed


def test_sections_are_added_with_their_reasons(tmp_path):
    def sections(found):
        assert (tmp_path / "unfinished").is_dir() and len(found.index) == 23
        return {"probe": {"accuracy": 0.5}}, {"tokbench": "no recogniser"}

    results = measure(tmp_path, sections=sections)
    assert results.sections["probe"] == {"accuracy": 0.5} and results.skipped["tokbench"] == "no recogniser"
    assert Results.load(tmp_path / "results.json").sections["probe"] == {"accuracy": 0.5}


def test_a_suite_sees_the_pass_before_anything_is_computed(tmp_path):
    def finish(found):
        seen.append(len(found.index))
        assert not (tmp_path / "results.json").exists()

    seen = []
    measure(tmp_path, made=suite(finish=finish))
    assert seen == [23]


def test_only_the_first_rank_writes(tmp_path):
    calls = []
    assert measure(tmp_path, processes=Processes(1, 2, lambda: calls.append(None))) is None
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"] and len(calls) == 3


def test_two_evaluations_do_not_share_a_folder(tmp_path, monkeypatch):
    import fcntl

    def taken(*arguments):
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", taken)
    with pytest.raises(EvaluationError, match=f"another evaluation is at work in {tmp_path}"):
        measure(tmp_path)
    monkeypatch.setattr(fcntl, "lockf", lambda *arguments: (_ for _ in ()).throw(OSError("no locks here")))
    assert measure(tmp_path).evaluated == 23
