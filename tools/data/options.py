"""The command line of the data tools: what is wrong with it is one line, too."""

from __future__ import annotations

import argparse

from tools.checkpoint import cli
from tools.data.errors import DataError


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser as all tools have it, which raises DataError instead of printing its usage."""
    options = cli.parser(doc)
    options.error = _raise  # type: ignore[method-assign]
    return options


def _raise(message: str) -> None:
    raise DataError(f"{message}; see --help")
