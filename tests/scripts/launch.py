"""Dry runs of the recipes, as argument lists, and what of them differs from the original recipe."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.conftest import REPO, ok, run
from training.contract import contract

RECIPES = REPO / "scripts"
GOLDEN = REPO / "tests" / "golden"


def recipes(folder: str) -> list[str]:
    """The names of a folder's recipes."""
    return sorted(path.stem for path in (RECIPES / folder).glob("InfiR2_*.sh"))


SCRIPTS = recipes("CPT")
FINE_TUNING = [*recipes("SFT"), *recipes("RL")]
ORIGINALS = [Path(path).stem for path in json.loads((GOLDEN / "original_argv.json").read_text())]
PLACES = {
    "OMP_NUM_THREADS": "2",  # else as many as this machine has cores
    "DATA_PATH": "/data/cpt_text_document",
    "TOKENIZER_MODEL": "/models/qwen",
    "INIT_CHECKPOINT": "/models/qwen_torch_dist",
    "DATA_DIR": "/data/train.jsonl",
    "EVAL_DATA": "/data/aime-2024.jsonl",
    "HF_CHECKPOINT": "/models/qwen_hf",
    "REF_LOAD": "/models/qwen_torch_dist",
    "PYTHON": "python3",
}


def recipe(script: str) -> Path:
    """The file of a recipe: InfiR2_SFT_... lies in scripts/SFT."""
    return RECIPES / script.split("_")[1] / f"{script}.sh"


def tracker(root: Path, iteration: int | str, *steps: int | str) -> Path:
    """A checkpoint root whose tracker names `iteration`, with directories for it and for `steps`."""
    for step in (iteration, *steps):
        (root / (step if step == "release" else f"iter_{step:07d}")).mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


def dry_run(script: str, *flags: object, out: Path, **env: str):
    """The finished process of `SCRIPT --dry-run` with every path but OUT_DIR fixed."""
    flags = (*flags, "--dry-run")
    return run("bash", recipe(script), *flags, env={**PLACES, "OUT_DIR": str(out), **env}, cwd=out.parent)


def command(script: str, *flags: object, out: Path, **env: str) -> list[str]:
    """The words of the command that a launch would run, OUT_DIR and the repository under fixed names."""
    text = ok(dry_run(script, *flags, out=out, **env)).stdout.replace("\\\n", "")
    text = re.sub(r"^\S*/ray ", "ray ", text)
    return [word.replace(str(out), "/out").replace(str(REPO), "/repo") for word in shlex.split(text)]


def program_arguments(words: list[str]) -> list[str]:
    """What pretrain_gpt.py or train.py itself is given."""
    return words[
        next(n for n, word in enumerate(words) if re.search(r"(pretrain_gpt|train|train_async)\.py$", word)) + 1 :
    ]


def lines(words: list[str]) -> list[str]:
    """One line per flag with its values, one per word before the first flag and for the program."""
    result: list[str] = []
    for word in words:
        value = result and result[-1].startswith("--") and not word.startswith("--") and not word.endswith(".py")
        if value:
            result[-1] += f" {word!r}" if " " in word or not word else f" {word}"
        else:
            result.append(word)
    return result


def golden(commands: Iterable[tuple[str, list[str]]]) -> str:
    """Named commands as a golden file: the first whole, the others as their differences from it."""
    text, first = "", []
    for name, words in commands:
        now = lines(words)
        text += f"## {name}\n"
        diff = list(difflib.unified_diff(first, now, lineterm="", n=0))[2:]  # without the file names
        text += "".join(f"{line}\n" for line in (diff if first else now) if not line.startswith("@@")) + "\n"
        first = first or now
    return text


def check_golden(file: str, found: str) -> None:
    """Compare with a golden file. After a wanted change: UPDATE_GOLDEN=1 bash scripts/test.sh -k golden, and review the
    diff.
    """
    path = GOLDEN / file
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(found)
    assert found == path.read_text()


# ---------------------------------------------------------------- against the original

Differences = dict[str, tuple[str | None, str | None]]


def values(program: str, argv: list[str]) -> dict[str, str]:
    """Flag -> its values as text; a repeated flag counts once, the last."""
    return {piece[0]: " ".join(piece[1:]) for piece in contract.split(contract.load(program), argv)}


def generic(value: str) -> str:
    """Paths are the user's: only whether there is one can differ."""
    return re.sub(r"(^|(?<= ))(/|<CWD>)\S*", "PATH", value)


def found_differences(program: str, original: list[str], ours: list[str]) -> Differences:
    """Flag -> (original, ours) where they differ. Both are whole commands."""
    theirs, mine = (
        {flag: generic(value) for flag, value in values(program, program_arguments(words)).items()}
        for words in (original, ours)
    )
    return {
        flag: (theirs.get(flag), mine.get(flag))
        for flag in sorted(theirs.keys() | mine.keys())
        if theirs.get(flag) != mine.get(flag)
    }


def named(entries: list[dict], name: str) -> Iterator[dict]:
    """The differences that are recorded for a script."""
    return (entry for entry in entries if name in entry.get("scripts", [name]))


def named_differences(entries: list[dict], name: str) -> Differences:
    """The same in the form of found_differences."""
    return {entry["flag"]: (entry["original"], entry["ours"]) for entry in named(entries, name)}


def original_command(script: str) -> list[str]:
    """The words of the command that the original script of this name runs."""
    recorded = json.loads((GOLDEN / "original_argv.json").read_text())
    folder = script.split("_")[1]
    (found,) = recorded[f"scripts/{folder}/{script}.sh"]["commands"]
    return found["argv"]


def difference_table(entries: list[dict]) -> str:
    """The differences as the documents show them."""
    rows = ["| flag | original | ours | why | evidence |", "|---|---|---|---|---|"]
    for entry in entries:
        cells = [
            "absent" if entry[key] is None else f"`{entry[key]}`" if entry[key] else "set"
            for key in ("original", "ours")
        ]
        where = entry.get("scripts")
        only = "" if where is None else " (" + ", ".join(re.sub("InfiR2_[A-Z]+_FP8_", "", s) for s in where) + ")"
        rows.append(f"| `{entry['flag']}`{only} | {cells[0]} | {cells[1]} | {entry['why']} | {entry['evidence']} |")
    return "\n".join(rows) + "\n"
