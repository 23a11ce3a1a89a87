"""The ``vistok`` command.

This file imports neither torch nor a command before it knows that one will run, so help, version and typing errors come
at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .errors import CommandError

COMMANDS = {
    "encode": "images to a token file",
    "decode": "a token file to images",
    "reconstruct": "images beside their reconstructions, with PSNR and bits per pixel",
    "evaluate": "a tokenizer's numbers on a dataset, with a report; also: evaluate images, compare, tokbench",
    "info": "what a tokenizer is: parameters, tokens, codebooks, bits",
    "export": "a training run to a folder that everything else loads",
    "convert": "a released checkpoint of another project to such a folder",
    "models": "the published tokenizers that are known by name",
}
SUBCOMMANDS = {"evaluate": ("images", "compare", "tokbench")}
TRAINING = {
    "fit": "train a tokenizer from YAML",
    "validate": "measure a training checkpoint on validation data",
    "test": "measure a training checkpoint on test data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``vistok``; those of the process if ``None``.

    Returns:
        The exit status: 0 if all went well, 1 if some images could not be read, 2 if the command could not be carried
        out as given, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print(_help(), file=sys.stderr)
        return 2
    if argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"vistok {__version__}")
        return 0
    name = argv[0]
    if name in TRAINING:
        from ..training.cli import main as train

        train(argv)
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *TRAINING], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join([*COMMANDS, *TRAINING])}"
        return _fail("vistok", f"unknown command {name!r}; {hint}")
    if argv[1:] and argv[1] in SUBCOMMANDS.get(name, ()):
        return _run(f"{name} {argv[1]}", argv[2:])
    if argv[1:] and not os.path.exists(argv[1]):
        close = difflib.get_close_matches(argv[1], SUBCOMMANDS.get(name, ()), n=1)
        if close:
            return _fail("vistok", f"there is neither a file nor a command {argv[1]!r}; did you mean {close[0]!r}?")
    return _run(name, argv[1:])


def _run(name: str, argv: list[str]) -> int:
    from .parser import parse_command

    prog = f"vistok {name}"
    function = getattr(import_module(f".{name.split()[0]}", __package__), name.replace(" ", "_"))
    try:
        arguments = parse_command(function, prog, argv)
    except ValueError as error:
        return _fail(prog, f"{error} (see {prog} --help)")
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    try:
        return 1 if function(**arguments) else 0
    except CommandError as error:
        return _fail("vistok", str(error), error.status)
    except BrokenPipeError:
        # The reader of our output has gone (`vistok info T | head`): say nothing, and nothing at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail("vistok", f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        return _fail("vistok", "interrupted", status=130)


def _fail(prog: str, message: str, status: int = 2) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _help() -> str:
    lines = ["usage: vistok COMMAND ...", "", "Discrete visual tokenizers: train them, ship them, use them.", ""]
    lines += [f"  {name:<12} {text}" for name, text in (COMMANDS | TRAINING).items()]
    lines += ["", "vistok COMMAND --help tells what a command takes; vistok --version tells the version."]
    return "\n".join(lines)
