"""A command line out of a function: positional parameters become arguments, keyword-only ones become options.

Types come from the hints and help from the Google-style docstring, so a command is written once, as a function that
Python code can call too.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

Size = tuple[int, int] | None  # an option of this type is typed as "256" or "256,128"
Lengths = tuple[int, ...] | None  # "32" or "1,8,32,256"


def parse_size(text: str) -> tuple[int, int]:
    """``"256"`` or ``"256,128"`` (height, width) as ``(H, W)``.

    Raises:
        ValueError: for anything else.
    """
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"expected one number or height,width. Got value: {text}")
    return int(sides[0]), int(sides[-1])


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"32"`` or ``"1,8,32,256"`` as numbers, in their order.

    Raises:
        ValueError: for anything else, zero or a number that stands there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"expected one number or different numbers with commas between. Got value: {text}")
    return tuple(map(int, parts))


_TYPED = ((Size, parse_size), (Lengths, parse_lengths))  # options that come as text


def parse_command(function: Callable[..., int], prog: str, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of one command, by parameter name.

    Args:
        function: its parameters are the arguments.
        prog: how the command is called.
        argv: the words after it.

    Raises:
        ValueError: of one line, naming the option and what it accepts.
        SystemExit: after ``--help``.
    """
    try:
        arguments = vars(_parser(function, prog).parse_args(list(argv)))
    except argparse.ArgumentError as error:
        raise ValueError(_one_line(str(error), function)) from error
    for name, hint in get_type_hints(function).items():
        parse = next((parse for kind, parse in _TYPED if kind == hint), None)
        if parse is not None and arguments[name] is not None:
            try:
                arguments[name] = parse(arguments[name])
            except ValueError as error:
                raise ValueError(f"--{name.replace('_', '-')}: {error}") from error
    return arguments


def _parser(function: Callable[..., int], prog: str) -> ArgumentParser:
    documentation = parse_docstring(inspect.getdoc(function))
    helps = {item.arg_name: item.description.replace("\n", " ") for item in documentation.params}
    hints = get_type_hints(function)
    parser = ArgumentParser(
        prog=prog,
        description=documentation.description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for name, parameter in inspect.signature(function).parameters.items():
        hint, text = hints[name], helps[name]
        option = "--" + name.replace("_", "-")
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            several: dict[str, Any] = {"nargs": "+", "type": str} if get_origin(hint) is list else {"type": hint}
            parser.add_argument(name, metavar=name.upper(), help=text, **several)
        elif hint is bool:
            parser.add_argument(option, action="store_true", help=text)
        elif parameter.default is inspect.Parameter.empty:
            parser.add_argument(option, type=hint, required=True, help=text)
        else:
            kind = str if any(hint == typed for typed, _ in _TYPED) else _without_none(hint)
            parser.add_argument(option, type=kind, default=parameter.default, help=text)
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Help without the types, which say nothing to somebody who types words; defaults where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.default not in (None, "", False, argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if shown else text


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``: nobody types None, and messages should not speak of it."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if get_origin(hint) in (Union, UnionType) and len(kinds) == 1 else hint


def _one_line(message: str, function: Callable[..., int]) -> str:
    """jsonargparse's message of several lines, with arguments as they are typed."""
    wanted = re.fullmatch(r"the following arguments are required: (.*)", message)
    if wanted:
        parameters = inspect.signature(function).parameters
        options = {name for name, found in parameters.items() if found.kind is inspect.Parameter.KEYWORD_ONLY}
        names = [name.strip() for name in wanted[1].split(",")]
        typed = ("--" + name.replace("_", "-") if name in options else name.upper() for name in names)
        return f"the following arguments are required: {', '.join(typed)}"
    if re.match(r"unrecognized arguments: [^-].*\.tar", message):
        message += "; put quotes around a pattern such as 'val-{000..003}.tar', or the shell takes it apart"
    text = re.sub(r'Parser key "(\w+)":', lambda match: f"--{match.group(1).replace('_', '-')}:", message)
    text = re.sub(r"Expected a <class '([\w.]+)'>", r"expected \1", text)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", text)
    return re.sub(r"\s+", " ", text).strip()
