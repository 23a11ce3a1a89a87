"""The ``vistok`` command itself: help, mistakes, exit status, and what it does not import."""

import inspect
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest
from docstring_parser import parse as parse_docstring

import vistok
from vistok.cli import info as info_module
from vistok.cli.errors import CommandError
from vistok.cli.main import COMMANDS, TRAINING, main
from vistok.cli.parser import parse_size


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in [*COMMANDS, *TRAINING])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vistok {vistok.__version__}\n"
    assert main([]) == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_explains_every_argument(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: vistok {name}" in text and "<" not in text, "Python types say nothing to somebody who types words"
    documented = {item.arg_name: item.description for item in parse_docstring(function_of(name).__doc__).params}
    assert set(documented) == set(inspect.signature(function_of(name)).parameters)
    words = text.split()
    for parameter, description in documented.items():
        assert parameter.upper() in words or "--" + parameter.replace("_", "-") in words
        assert " ".join(description.split()) in " ".join(words)


def function_of(name):
    return getattr(import_module(f"vistok.cli.{name}"), name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encod"], "unknown command 'encod'; did you mean 'encode'?"),
        (["frobnicate"], "unknown command 'frobnicate'; commands: encode, "),
        (["encode", "x", "--tokeniser", "t", "--out", "o"], "unrecognized arguments: --tokeniser t"),
        (["encode", "x", "--tokenizer", "t"], "the following arguments are required: --out"),
        (["encode", "--tokenizer", "t", "--out", "o"], "required: INPUTS"),
        (["encode", "x", "--tokenizer", "t", "--out", "o", "--batch-size", "q"], "--batch-size: expected int"),
        (["encode", "x", "--tokenizer", "t", "--out", "o", "--batch", "3"], "unrecognized arguments: --batch 3"),
        (["encode", "x", "--tokenizer", "t", "--out", "o", "--crop", "z"], "--crop: expected one of 'auto', 'center'"),
        (["encode", "x", "--tokenizer", "t", "--out", "o", "--size", "1,2,3"], "--size: expected one number or"),
        (["decode", "a", "b", "--tokenizer", "t", "--out", "o"], "unrecognized arguments: b"),
        (["info"], "required: TOKENIZER"),
        (["info", "nowhere"], "nothing to load at 'nowhere'"),
        (["encode", "nowhere", "--tokenizer", "t", "--out", "o"], "there is no file or folder 'nowhere'"),
        (["decode", "nowhere", "--tokenizer", "t", "--out", "o"], "there is no token file nowhere"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("vistok") and ": error: " in err and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CommandError("two\nlines"), 2, "vistok: error: two lines\n"),
        (PermissionError(13, "Permission denied", "x.png"), 2, "vistok: error: Permission denied: x.png\n"),
        (KeyboardInterrupt(), 130, "vistok: error: interrupted\n"),
    ],
)
def test_errors_that_a_user_can_cause_show_no_traceback(error, status, message, capsys, monkeypatch):
    def failing(tokenizer: str) -> int:
        """Fail.

        Args:
            tokenizer: Something.
        """
        raise error

    monkeypatch.setattr(info_module, "info", failing)
    assert main(["info", "x"]) == status
    assert capsys.readouterr().err == message


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    def failing(tokenizer: str) -> int:
        """Fail.

        Args:
            tokenizer: Something.
        """
        raise ValueError("a bug")

    monkeypatch.setattr(info_module, "info", failing)
    with pytest.raises(ValueError, match="a bug"):
        main(["info", "x"])


@pytest.mark.parametrize("name", TRAINING)
def test_training_commands_are_handed_over_as_they_are(name, monkeypatch):
    received = []
    module = type(sys)("vistok.training.cli")
    module.main = received.append
    monkeypatch.setitem(sys.modules, "vistok.training.cli", module)
    assert main([name, "--config", "x.yaml"]) == 0
    assert received == [[name, "--config", "x.yaml"]]


def test_sizes_are_height_then_width():
    assert parse_size("256") == (256, 256) and parse_size("256,128") == (256, 128)
    for text in ("", "a", "1,2,3", "-1", "0", "1,", "1.5"):
        with pytest.raises(ValueError, match="one number or height,width"):
            parse_size(text)


IMPORTS = """
import contextlib, io, sys
from vistok.cli.main import main

heavy = ("torch", "lightning", "pytorch_lightning", "huggingface_hub")
loaded = lambda: [name for name in heavy if name in sys.modules]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for words in (["--version"], ["--help"], ["models"], ["encode", "--help"], ["decode"], ["x"], ["info", "--wrong"]):
        main(words)
        assert not loaded(), (words, loaded())
tokenizer, photos, out = sys.argv[1:]
for words in (
    ["encode", photos, "--tokenizer", tokenizer, "--out", out + "/t", "--num-workers", "0"],
    ["decode", out + "/t", "--tokenizer", tokenizer, "--out", out + "/decoded"],
    ["reconstruct", photos, "--tokenizer", tokenizer, "--out", out + "/pairs", "--num-workers", "0"],
    ["info", tokenizer],
    ["export", tokenizer, "--out", out + "/export"],
):
    assert main(words) == 0, words
    assert loaded() == ["torch"], (words, loaded())
import vistok
vistok.load(out + "/export")
assert loaded() == ["torch"], loaded()
"""


def test_no_command_imports_more_than_it_needs(tokenizers, photos, tmp_path):
    command = [sys.executable, "-c", IMPORTS, tokenizers / "titok", photos, tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_console_script_gives_the_exit_status(tmp_path):
    script = Path(sysconfig.get_path("scripts")) / "vistok"
    run = subprocess.run([script, "encode", "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("vistok encode: error: ")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, cwd=tmp_path).returncode == 0
