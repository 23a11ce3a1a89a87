"""``vistok models``: the table, and its JSON."""

import json

import pytest

from vistok.cli.main import main
from vistok.hub.catalog import CATALOG, find


def test_table_has_a_line_for_every_model_and_fits_the_screen(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(CATALOG) and max(map(len, lines)) <= 120
    assert lines[0].split() == ["name", "tokens", "codebook", "params", "px", "rFID", "licence", "source"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["titok-l-32"] == "32 4096x12 641M 256 2.21 apache-2.0 yucornetto/tokenizer_titok_l32_imagenet".split()
    assert rows["one-d-piece-s-256"][:2] == ["1-256", "4096x12"] and rows["llamagen-vq-8"][:2] == ["32x32", "16384x8"]
    assert rows["tatitok-sl-128-vae"][:3] == ["128", "16", "floats"]
    assert rows["taming-f16-16384"][-3:] == ["4.98", "mit", "heibox.uni-heidelberg.de"]


def test_family_keeps_the_models_whose_name_begins_so(capsys):
    assert main(["models", "--family", "One-D"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "one-d-piece-l-256",
        "one-d-piece-b-256",
        "one-d-piece-s-256",
    ]
    assert main(["models", "--family", "zebra"]) == 2
    assert "no published model begins with 'zebra'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--json"], ["--json", "--family", "llamagen"]])
def test_json_says_all_that_is_known(words, capsys):
    assert main(["models", *words]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert len(models) == (2 if "--family" in words else len(CATALOG))
    entry = find("llamagen-vq-16")
    assert models[entry.name]["config"] == entry.config and models[entry.name]["paper"] == "2406.06525"
    assert not models[entry.name]["continuous"]
