"""The one exception of this package."""

from __future__ import annotations

import errno
import os
import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked. One line: the file or key, what was expected, what was found."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike | None = None) -> CheckpointError:
        """The same as an OSError says, with the file it happened to."""
        # of two names the second is the one that is written
        name = next((name for name in (error.filename2, error.filename, path) if name is not None), None)
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            reason = "the disk is full"
        return cls(f"{os.fspath(name) if name is not None else 'output'}: {reason}")


def shown(value: Any) -> str:
    """`value` in an error, cut short: a few shared lists can stand for a text larger than any memory."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of very many digits
        return f"a {type(value).__name__}"
