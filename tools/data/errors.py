"""The one exception of this package, and how a value is shown in it."""

from __future__ import annotations

from typing import Any

from tools.checkpoint.errors import CheckpointError

_LONGEST = 40  # characters of a text


class DataError(CheckpointError):
    """Data cannot be used as asked. One line: file and line or flag, what was expected, what was found.

    A CheckpointError because tools.checkpoint.cli ends a command with that.
    """


class _Missing:
    """A key that is not there, as opposed to one whose value is null."""

    def __bool__(self) -> bool:
        return False


MISSING = _Missing()


def shown(value: Any) -> str:
    """A value of a row in an error message: JSON's words, and at most 40 characters of a text."""
    if value is MISSING:
        return "nothing"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[: _LONGEST - 3] + "...")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, (int, float)):
        return str(value)
    return f"a {type(value).__name__}"
