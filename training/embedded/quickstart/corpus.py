#!/usr/bin/env python3
"""Collect real English and mathematics text from this Python installation: no download.

    python training/embedded/quickstart/corpus.py --output corpus.jsonl

Sources are the language reference that CPython carries for help() and the docstrings of the installed mathematics
packages, read with `ast`: nothing is imported or run. Every line is {"text": ..., "source": ...}, the input format of
scripts/CPT/prepare_data.sh. Documents are unique and in the order of their hashes, so that any split of the file holds
every source; with the pinned packages the file is the same on every machine with the same Python.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

# Package -> licence of its documentation strings.
PACKAGES = {
    "mpmath": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
}
SHORTEST = 200  # characters; shorter docstrings are one-line summaries without sentences


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a module and of everything it defines; none if it does not parse."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken test inputs
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text


def package_files(package: str) -> list[Path]:
    """The Python files of an installed package, without its tests, in a fixed order."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package}: not installed; install requirements.txt first")
    root = Path(spec.origin).parent
    return sorted(f for f in root.rglob("*.py") if "tests" not in f.relative_to(root).parts)


def collect() -> dict[str, dict[str, str]]:
    """Unique documents: hash -> {"text", "source"}."""
    documents: dict[str, dict[str, str]] = {}

    def add(text: str, source: str) -> None:
        documents.setdefault(hashlib.sha256(text.encode()).hexdigest(), {"text": text, "source": source})

    for name in sorted(topics):
        add(topics[name], "cpython")
    files = [(package, file) for package in PACKAGES for file in package_files(package)]
    for package, file in tqdm(
        files, desc="reading docstrings", unit="file", disable=not sys.stderr.isatty(), leave=False
    ):
        for text in docstrings(file):
            add(text, package)
    return documents


def main() -> None:
    """Write the corpus and print what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    output = parser.parse_args().output
    documents = collect()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for key in sorted(documents):
            file.write(json.dumps(documents[key], ensure_ascii=False) + "\n")
    os.replace(partial, output)
    licences = {"cpython": "PSF-2.0", **PACKAGES}
    for source, licence in sorted(licences.items()):
        texts = [d["text"] for d in documents.values() if d["source"] == source]
        print(f"{source:10} {licence:13} {len(texts):6,} documents {sum(map(len, texts)):10,} characters")
    print(f"{output}: {len(documents):,} documents, {sum(len(d['text']) for d in documents.values()):,} characters")


if __name__ == "__main__":
    main()
