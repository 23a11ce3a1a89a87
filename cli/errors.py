"""The one kind of error that a command shows as a single line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """Something the user can put right; shown as ``vistok: error: ...`` with exit status 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ``ValueError`` and ``TypeError`` of a step that handles the user's input into a :class:`CommandError`.

    Only such steps are wrapped: elsewhere these errors are mistakes of ours, and keep their traceback.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
