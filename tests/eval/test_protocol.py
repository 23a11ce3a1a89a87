"""The record of how a number was measured, and the file that carries both."""

import json
from dataclasses import fields, replace

import pytest

from vistok.eval.protocol import PRESETS, Protocol, preset
from vistok.eval.results import Results, VariantResult

OTHER = {
    "preset": "adm",
    "dataset": "abc",
    "num_images": 50_000,
    "height": 256,
    "width": 128,
    "crop": "none",
    "rounding": "truncate",
    "reference": "statistics.npz:abc",
    "extractor": "other",
    "extractor_sha256": "123",
    "resize": "clean",
    "extractor_dtype": "float64",
    "inception_score": "adm",
    "psnr": "dataset",
    "ssim": "uniform-7",
    "precision": "bf16",
    "other_weights": "vgg16:1234abcd",
    "weights": "raw",
    "seed": 1,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Protocol)])
def test_the_hash_changes_with_every_field(name):
    changed = replace(Protocol(), **{name: OTHER[name]})
    assert changed.hash != Protocol().hash
    assert Protocol().differences(changed) == {name: (getattr(Protocol(), name), OTHER[name])}


def test_equal_protocols_have_one_hash_in_every_process():
    assert Protocol().hash == Protocol(dataset="").hash == replace(preset("adm"), **vars(Protocol())).hash
    assert len(Protocol().hash) == 12


def test_presets_are_named_after_themselves_and_all_different():
    assert all(protocol.preset == name for name, protocol in PRESETS.items())
    assert len({replace(protocol, preset="").hash for protocol in PRESETS.values()}) == len(PRESETS)
    assert preset("titok").extractor_dtype == "float64" and preset("titok").inception_score == "one-split"
    assert preset("adm", crop="center").crop == "center"


@pytest.mark.parametrize(
    "field", ["crop", "rounding", "resize", "inception_score", "extractor_dtype", "precision", "weights"]
)
def test_values_that_mean_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*; got 'whatever'"):
        preset("adm", **{field: "whatever"})
    with pytest.raises(ValueError, match="protocol must be one of torch-fidelity, adm"):
        preset("whatever")


def results():
    return Results(
        {"name": "a"},
        {"name": "photographs"},
        preset("adm", dataset="abc", num_images=3),
        3,
        4,
        [VariantResult("reconstruction", "reconstruction", metrics={"psnr": 20.5, "rfid": float("nan")})],
        {"pfid": {"mean": float("inf")}},
        {"kid": "needs 1000 images"},
        ["x.png: damaged"],
        "1 of 4 images could not be read",
        {"read": 1.5},
        "0.1",
    )


def test_results_survive_saving(tmp_path):
    results().save(tmp_path / "results.json")
    found = Results.load(tmp_path / "results.json")
    assert found.protocol == results().protocol
    assert found.main.metrics == {"psnr": 20.5, "rfid": None}
    assert found.sections == {"pfid": {"mean": None}}
    assert replace(found, variants=[], sections={}) == replace(results(), variants=[], sections={})


def test_the_file_is_strict_json_with_the_hash_of_its_protocol(tmp_path):
    results().save(tmp_path / "results.json")
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert values["protocol_hash"] == results().protocol.hash and values["format"] == 1


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda values: values["protocol"].update(num_images=50_000), "does not have the hash"),
        (lambda values: values["protocol"].pop("seed"), "seed missing or unknown"),
        (lambda values: values.update(format=2), "not a result of format 1; got 2"),
        (lambda values: values.pop("evaluated"), "not a whole result .*evaluated"),
        (lambda values: values.update(extra=1), "not a whole result .*extra"),
    ],
)
def test_edited_and_foreign_files_are_refused(tmp_path, edit, complaint):
    path = tmp_path / "results.json"
    results().save(path)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=complaint):
        Results.load(path)


def test_a_cut_off_file_is_refused_by_name(tmp_path):
    path = tmp_path / "results.json"
    results().save(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"results.json is not a result of vistok evaluate"):
        Results.load(path)
