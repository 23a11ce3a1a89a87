"""Modules that remember how they were built.

A :class:`Configurable` module keeps its constructor arguments as plain data (``class_path`` and ``init_args``, the
form that YAML files use), so a checkpoint can say what it is without pickling a single object, and
:func:`build` can make the same module again. Only classes of Vistok's own rooms are ever built: a ``class_path``
that names anything else is refused before an import happens.
"""

from __future__ import annotations

import functools
import inspect
import re
from importlib import import_module
from typing import Any

from torch import nn

PACKAGE = __package__.split(".")[0]
BUILDABLE_ROOMS = ("encoders", "quantizers", "decoders", "regularizers", "tokenizers")
_CLASS_PATH = re.compile(rf"{PACKAGE}\.({'|'.join(BUILDABLE_ROOMS)})\.([a-z][a-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")


def to_plain(value: Any) -> Any:
    """Turn a constructor argument into JSON-able data.

    Raises:
        TypeError: if the value is neither plain data nor a :class:`Configurable` module.
    """
    if isinstance(value, Configurable):
        return value.config
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"constructor arguments must be numbers, strings, lists, dicts or Configurable modules, so that a checkpoint "
        f"can store them; got {type(value).__name__}: {value!r}"
    )


class Configurable(nn.Module):
    """An ``nn.Module`` whose constructor arguments are kept, as plain data, in :attr:`config`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original = cls.__init__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def remembering_init(self: Configurable, *args: Any, **kwargs: Any) -> None:
            config = None
            if type(self) is cls or "_init_config" not in self.__dict__:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                arguments = {name: value for i, (name, value) in enumerate(bound.arguments.items()) if i > 0}
                config = {"class_path": class_path(type(self)), "init_args": to_plain(arguments)}
                self.__dict__["_init_config"] = config
            original(self, *args, **kwargs)

        cls.__init__ = remembering_init

    @property
    def config(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": {...}}``, every default written out."""
        return self.__dict__["_init_config"]


def class_path(cls: type) -> str:
    """The import path of a class, as YAML and config.json name it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve_class(path: str) -> type[Configurable]:
    """Find one of Vistok's own component classes.

    Args:
        path: ``vistok.<room>.<file>.<Class>`` with room one of :data:`BUILDABLE_ROOMS`.

    Raises:
        ValueError: if the path lies outside those rooms or names no component. Nothing is imported in that case.
    """
    match = _CLASS_PATH.fullmatch(path) if isinstance(path, str) else None
    if match is None:
        raise ValueError(
            f"class_path {path!r} is not a Vistok component; accepted: "
            f"{PACKAGE}.({'|'.join(BUILDABLE_ROOMS)}).<file>.<Class>"
        )
    room, file, name = match.groups()
    try:
        module = import_module(f"{PACKAGE}.{room}.{file}")
    except ModuleNotFoundError as error:
        raise ValueError(f"class_path {path!r}: there is no file {room}/{file}.py in this version") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Configurable) and cls.__module__ == module.__name__):
        raise ValueError(f"class_path {path!r}: {room}/{file}.py defines no component {name!r}")
    return cls


def build(config: Any) -> Any:
    """Build the module that a plain ``{"class_path", "init_args"}`` tree describes; other data passes through.

    Raises:
        ValueError: for a class outside Vistok, or arguments that its constructor does not take.
    """
    if isinstance(config, list):
        return [build(item) for item in config]
    if not isinstance(config, dict):
        return config
    if "class_path" not in config:
        return {key: build(value) for key, value in config.items()}
    cls = resolve_class(config["class_path"])
    arguments = {key: build(value) for key, value in config.get("init_args", {}).items()}
    accepted = list(inspect.signature(cls).parameters)
    unknown = sorted(set(arguments) - set(accepted))
    if unknown:
        raise ValueError(f"{config['class_path']} does not take {unknown}; it takes {accepted}")
    return cls(**arguments)
