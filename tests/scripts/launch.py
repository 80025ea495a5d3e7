"""Dry runs of the CPT recipes, as argument lists."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.conftest import REPO, ok, run

RECIPES = REPO / "scripts" / "CPT"
SIZES = ("7B", "1.5B", "tiny")
SCRIPTS = [f"InfiR2_CPT_FP8_{size}{stage}" for size in SIZES for stage in ("", "_decay")]
PLACES = {
    "DATA_PATH": "/data/cpt_text_document",
    "TOKENIZER_MODEL": "/models/qwen",
    "INIT_CHECKPOINT": "/models/qwen_torch_dist",
    "PYTHON": "python3",
}


def tracker(root: Path, iteration: int | str, *steps: int | str) -> Path:
    """A checkpoint root whose tracker names `iteration`, with directories for it and for `steps`."""
    for step in (iteration, *steps):
        (root / (step if step == "release" else f"iter_{step:07d}")).mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


def dry_run(script: str, *flags: object, out: Path, **env: str):
    """The finished process of `SCRIPT --dry-run` with every path but OUT_DIR fixed."""
    flags = (*flags, "--dry-run")
    return run("bash", RECIPES / f"{script}.sh", *flags, env={**PLACES, "OUT_DIR": str(out), **env}, cwd=out.parent)


def command(script: str, *flags: object, out: Path, **env: str) -> list[str]:
    """The words of the command that a launch would run, OUT_DIR and the repository under fixed names."""
    text = ok(dry_run(script, *flags, out=out, **env)).stdout.replace("\\\n", "")
    return [word.replace(str(out), "/out").replace(str(REPO), "/repo") for word in shlex.split(text)]


def program_arguments(words: list[str]) -> list[str]:
    """What pretrain_gpt.py itself is given."""
    return words[next(n for n, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1 :]
