"""What --help of every program promises: it reads well, and names every variable that the program reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.conftest import REPO

FOLDERS = ("scripts", "eval", "docker", "tools", "benchmarks", "training/embedded", "training/contract", "tests")
SHELL = sorted(
    path for folder in FOLDERS for path in (REPO / folder).rglob("*.sh") if path.read_text().startswith("#!")
)
PYTHON = sorted(
    path
    for folder in FOLDERS[:-1]
    for path in (REPO / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
WIDTH = 120


def help_of(path: Path) -> list[str]:
    """The lines that it prints on standard output, the place of this checkout replaced by a short one."""
    command = ["bash", path]
    if path.suffix == ".py":
        module = path.parent == REPO / "eval"
        command = [sys.executable, "-m", f"eval.{path.stem}"] if module else [sys.executable, path]
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"COLUMNS": "100", "PYTHON": "python3"}
    result = subprocess.run([*command, "--help"], env=env, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == "", result
    return result.stdout.replace(str(REPO), "/infir2").splitlines()


@pytest.mark.parametrize("path", [*SHELL, *PYTHON], ids=lambda path: str(path.relative_to(REPO)))
def test_help_reads_well(path):
    lines = help_of(path)
    assert len(lines) >= 3
    assert [line for line in lines if line != line.rstrip() or len(line) > WIDTH or "\t" in line] == []
    if path.suffix == ".sh":
        assert lines[0].startswith(f"usage: bash {path.relative_to(REPO)}")
    elif lines[0].startswith("usage: "):  # argparse: no option without a word about it
        options = "\n".join(lines).partition("\noptions:\n")[2]
        bare = re.findall(r"^  (-[^\n]*?\S)(?=\n  -|\n\n|\n?\Z)", options, re.MULTILINE)
        assert [line for line in bare if not re.search(r"\S  +\S", line)] == []


# ---------------------------------------------------------------- variables

# Read with a default, and not for the user to set.
INTERNAL = {
    "STAGE PREVIOUS": "one recipe sets them for the one that it sources",
    "MAX_RESPONSE MAX_TOKENS TEMPERATURE NUM_ROLLOUT NUM_EPOCH LR MIN_LR GLOBAL_BATCH_SIZE": "numbers of a recipe; "
    "flags of the engine change them",
    "STEP NAMED_STEP TRACKER STOPPED UNIT LOCK_FD OWN_RAY CLIENT SLEEPER TEE SERVER_PID EXTRA_ARGS": "state",
    "VENV_NAME": "eval/setup_strict.sh sets it",
    "UID HOME PWD HOSTNAME BASH_SOURCE BASH RANDOM SECONDS TMPDIR": "the shell's",
    "CUDA_VISIBLE_DEVICES": "CUDA's",
    "SLURM_JOB_ID": "Slurm's",
    "TERM": "the terminal's",
    "PYTHONPATH NO_PROXY": "theirs is kept",
}
EXEMPT = {name for names in INTERNAL for name in names.split()}
READ = re.compile(r"\$\{([A-Z][A-Z0-9_]*):?[-=]")
SOURCED = re.compile(r'^\s*source "(.+)"$', re.MULTILINE)
FUNCTION = re.compile(r"^(\w+)\(\) (?:\{ ([^\n]*)\}$|\{\n(.*?)^\})", re.MULTILINE | re.DOTALL)


def sources(path: Path, seen: dict[Path, str]) -> dict[Path, str]:
    """The text of a script and of all that it sources."""
    if path not in seen and path.exists():
        seen[path] = re.sub(r"^\s*#.*", "", path.read_text(), flags=re.MULTILINE)
        for target in SOURCED.findall(seen[path]):
            target = re.sub(r"^\$\{?REPO\}?", str(REPO), target)
            target = re.sub(r'^\$\(dirname "?\$\{BASH_SOURCE\[0\]\}"?\)|^\$HERE', str(path.parent), target)
            sources(Path(os.path.normpath(target)), seen)
    return seen


def _called(code: str, names: Iterable[str]) -> set[str]:
    """The functions that code names, wholly or by their beginning ("stage_${name}")."""
    words, starts = set(re.findall(r"\w+", code)), tuple(re.findall(r'"(\w+_)\$', code))
    return {name for name in names if name in words or (starts and name.startswith(starts))}


def variables(path: Path) -> set[str]:
    """Those that it reads with a default, in functions that it can reach."""
    texts = sources(path, {})
    bodies = {name: one or more for text in texts.values() for name, one, more in FUNCTION.findall(text)}
    reached, code = set(), "\n".join(FUNCTION.sub("", text) for text in texts.values())
    while calls := (_called(code, bodies) - reached - {"usage"}):
        reached |= calls
        code += "\n".join(bodies[name] for name in calls)
    return set(READ.findall(code)) - EXEMPT


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(REPO)))
def test_help_names_every_variable(path):
    words = set(re.findall(r"\w+", "\n".join(help_of(path))))
    unused = set()
    if path.parent.name == "eval" and "livecode" not in path.name:
        unused = {"ALLOW_CODE_EXECUTION", "GRADERS"}  # of code
    elif path.name.endswith("_decay.sh"):
        unused = {"INIT_CHECKPOINT"}  # it starts from --load
    assert sorted(variables(path) - words - unused) == []


def test_the_search_for_variables_finds_them():
    found = variables(REPO / "scripts" / "RL" / "InfiR2_RL_FP8_7B_stage2_4node.sh")
    assert {"TP", "CP", "KL_LOSS_COEF", "PRECISION", "WANDB_MODE", "OUT_DIR", "RAY_TEMP_DIR", "PYTHON"} <= found
    assert "DATA_PATH" not in found and "INIT_CHECKPOINT" not in found
    assert variables(REPO / "scripts" / "CPT" / "prepare_data.sh") >= {"TOKENIZER_MODEL", "WORKERS", "PYTHON"}
    assert variables(REPO / "scripts" / "quickstart.sh") >= {"SEED", "SFT_FLAGS", "RL_FLAGS", "TORCH_INDEX_URL"}
    assert variables(REPO / "scripts" / "ray_stop.sh") >= {"GRACE_S", "RAY_TEMP_DIR"}
