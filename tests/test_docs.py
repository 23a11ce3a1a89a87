"""The README and the docs tell the truth about this tree."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

import vistok
from vistok import TiTok, VectorQuantizer
from vistok.cli.main import COMMANDS, TRAINING
from vistok.hub.catalog import CATALOG

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_two_bash_blocks_are_the_set_up_commands():
    quickstart, tests = blocks("bash")
    assert len(quickstart.strip().splitlines()) == len(tests.strip().splitlines()) == 1
    assert quickstart.strip().endswith("pip install -e . && python train.py fit --config configs/quickstart.yaml")
    assert tests.strip().endswith("pip install -e '.[test]' && python -m pytest")


def test_continuous_integration_runs_the_second_block():
    script = (ROOT / ".ci" / "run").read_text().replace('bash -euo pipefail -c "$command"', 'printf "%s" "$command"')
    script = script.replace('cd "$(dirname "$0")/.."', f"cd {ROOT}").replace('echo "+ $command"', "")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == blocks("bash")[1].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"`((?:configs|benchmarks|docs|tests)/[\w./-]+\.\w+)`", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_recipe_is_in_the_readme():
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{config.name}" in README


def test_every_quantizer_is_on_its_page_and_in_its_figure():
    page = (ROOT / "docs" / "quantizers.md").read_text()
    examples = sorted((ROOT / "configs" / "quantizers").glob("*.yaml"))
    assert examples
    for example in examples:
        assert f"`{yaml.safe_load(example.read_text())['class_path'].rsplit('.', 1)[1]}`" in page
    figures = json.loads((ROOT / "docs" / "quantizers.json").read_text())
    assert set(figures) == {example.stem for example in examples if not example.stem.endswith("_1d")}


def test_the_readme_names_only_commands_and_options_that_exist():
    from vistok.cli import decode, encode, evaluate, export, info, reconstruct  # noqa: F401 -- imported to have their signatures

    shown = re.findall(r"^\$ vistok (\w+) (.*)$", "\n".join(blocks("console")), re.MULTILINE)
    assert {command for command, _ in shown} <= set(COMMANDS) | set(TRAINING)
    modules = {
        module.__name__.rsplit(".", 1)[1]: module for module in (encode, decode, evaluate, export, info, reconstruct)
    }
    for command, rest in shown:
        accepted = getattr(modules[command], command).__annotations__
        for option in re.findall(r"--([\w-]+)", rest):
            assert option.replace("-", "_") in accepted, f"vistok {command} --{option}"


def test_the_python_snippet_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = TiTok(
        VectorQuantizer(16, 4), 16, 8, num_latent_tokens=3, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2)
    ).eval()
    tokenizer.save_pretrained(tmp_path / "runs" / "quickstart" / "export")
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    snippet, published = blocks("python")
    names = {"images": images}
    exec(snippet, names)  # noqa: S102 -- the README's own text
    assert names["ids"].shape == (2, 3)
    assert torch.equal(names["images"], tokenizer.decode(tokenizer.encode(images)))
    named = re.findall(r'load\("([^"]+)"', published)
    known = {model.name for model in CATALOG} | {model.source for model in CATALOG} | {"fun-research/TiTok"}
    assert len(named) == 3 and set(named) <= known and f"lists {len(CATALOG)} of them" in README


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room in {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - {"tests", "benchmarks", "build"}:
        assert f"`{room}/`" in page, room


def test_the_version_is_in_the_changelog_or_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{vistok.__version__}]" in changelog
