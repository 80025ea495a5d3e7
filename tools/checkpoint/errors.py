"""The one exception of this package."""

from __future__ import annotations

import errno
import os


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked. One line: the file or key, what was expected, what was found."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike | None = None) -> CheckpointError:
        """The same as an OSError says, with the file it happened to."""
        name = error.filename if error.filename is not None else path
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            reason = "the disk is full"
        return cls(f"{os.fspath(name) if name is not None else 'output'}: {reason}")
