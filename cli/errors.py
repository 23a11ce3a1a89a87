"""The kinds of errors that a command shows as a single line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """Something the user can put right; shown as ``vistok: error: ...`` with an exit status of :attr:`status`."""

    status = 2


class Interrupted(CommandError):
    """Ctrl-C or a scheduler's SIGTERM, and how to go on."""

    status = 130


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ``ValueError`` and ``TypeError`` of a step that handles the user's input into a :class:`CommandError`.

    Only such steps are wrapped: elsewhere these errors are mistakes of ours, and keep their traceback.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
