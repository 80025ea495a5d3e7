"""The result of a check, kept so that resuming a run does not tokenise its data again.

One result per file. It stands while the data file, the tokenizer, the rules and this package are what they were: the
data by its path, size and time of change, the others by their content. Anything else, a damaged cache included, means
checking again. What failed is never kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.data.check import Counts, Rules
from tools.data.errors import DataError
from tools.data.writer import whole

_TOKENIZER = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def cached(cache: Path | None, path: Path, rules: Rules, scan: Callable[[Path, Rules], Counts]) -> Counts:
    """`scan(path, rules)`, or what the file `cache` holds of the same. Raises DataError as `scan` does."""
    if cache is None:
        return scan(path, rules)
    key = _key(path, rules)
    try:
        kept = json.loads(cache.read_text())
        if kept["key"] == key:
            return Counts(**kept["counts"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    counts = scan(path, rules)
    with whole(cache) as file:
        file.write(json.dumps({"key": key, "counts": counts.as_json()}).encode())
    return counts


def _key(path: Path, rules: Rules) -> dict[str, Any]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise DataError.of(error, path) from None
    return {
        "file": [os.path.realpath(path), state.st_size, state.st_mtime_ns],
        "name": str(path),  # stands in warnings
        "rules": {name: str(value) for name, value in asdict(rules).items()},
        "tokenizer": _digest(_tokenizer_files(rules.tokenizer)) if rules.tokenizer else None,
        "program": _digest(sorted(Path(__file__).parent.glob("*.py"))),
        "packages": [_version(name) for name in ("transformers", "tokenizers", "pyarrow")],
    }


def _tokenizer_files(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        for file in sorted(directory.iterdir()):
            if file.suffix in _TOKENIZER and not file.name.endswith(".index.json") and file.is_file():
                yield file


def _digest(files: Any) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
