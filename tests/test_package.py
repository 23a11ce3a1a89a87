"""The house itself: what is importable, from where, and what the wheel holds."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"tests", "benchmarks"}


def rooms() -> list[str]:
    """Folders that hold Python files, dotted, those inside others behind them."""
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/*.py")}
    return sorted(".".join(folder.parts) for folder in folders if folder.parts[0] not in NOT_PACKAGED | {"build"})


def modules() -> list[str]:
    return [f"vistok.{room}.{path.stem}" for room in rooms() for path in sorted((ROOT / folder(room)).glob("*.py"))]


def folder(room: str) -> str:
    return room.replace(".", "/")


def run(code: str, cwd: Path = ROOT, **env: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_packages_list_names_every_room():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == ["vistok", *(f"vistok.{room}" for room in rooms())]


def test_rooms_are_plain_folders():
    assert not [str(path) for path in ROOT.glob("[!.]*/**/__init__.py") if "build" not in path.parts]


def test_only_train_and_init_lie_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "train.py"]


def test_hugging_face_tokenizers_and_ours_live_in_one_process_at_the_root():
    code = (
        "import tokenizers, vistok.tokenizers.base as ours\n"
        "from tokenizers import AddedToken, Tokenizer\n"
        "assert 'site-packages' in tokenizers.__file__, tokenizers.__file__\n"
        "assert Tokenizer is not ours.Tokenizer\n"
    )
    run(code)
    run("import vistok.tokenizers.base, tokenizers; tokenizers.AddedToken")


def test_importing_the_package_imports_no_torch():
    run("import sys, vistok; assert vistok.__version__; assert 'torch' not in sys.modules")


def test_loading_code_imports_no_lightning():
    run("import sys, vistok; vistok.load, vistok.TiTok, vistok.VQGAN; assert 'lightning' not in sys.modules")


def test_every_public_name_resolves():
    import vistok

    for name in vistok.__all__:
        assert getattr(vistok, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        vistok.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("module", modules())
def test_every_module_imports(module):
    importlib.import_module(module)


def test_no_module_imports_a_room_by_its_bare_name():
    bare = re.compile(rf"^\s*(?:from|import) ({'|'.join(room for room in rooms() if '.' not in room)})\b", re.MULTILINE)
    for path in ROOT.glob("[!.]*/**/*.py"):
        found = bare.search(path.read_text())
        assert found is None or found[1] == "tokenizers", f"{path} imports {found[1]!r}; write .{found[1]}"


def test_configs_name_classes_by_their_full_path():
    paths = [
        (file.name, path)
        for file in (ROOT / "configs").rglob("*.yaml")
        for path in re.findall(r"class_path:\s*(\S+)", file.read_text())
    ]
    assert paths
    for name, path in paths:
        assert path.split(".")[0] not in rooms(), f"{name}: class_path {path} must start with vistok."


def test_wheel_holds_every_module_and_imports_elsewhere(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = {module.replace(".", "/") + ".py" for module in modules()}
    configs = {f"vistok/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert expected | configs | {"vistok/__init__.py", "vistok/train.py"} <= names
    assert not [name for name in names if name.startswith(("vistok/tests", "vistok/benchmarks"))]
    code = f"import vistok\nassert vistok.__file__.startswith({str(tmp_path)!r}), vistok.__file__\n"
    code += "".join(f"import {module}\n" for module in modules())
    run(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
