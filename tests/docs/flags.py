"""Which flags the documents may name: those of the pinned parsers, of our own programs, of named programs of others."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

from tests.conftest import REPO, ok, run
from tests.docs.pages import blocks, files, prose
from training.contract import contract

FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
SCRIPT = re.compile(r"(?<![\w/-])((?:\w[\w.-]*/)+[\w.{},*-]+\.(?:sh|py))")

# What the documents show of programs whose parsers are not recorded. A line must name the program.
OTHERS = {
    "apptainer": "nv bind pwd",
    "docker": "build run file build-arg no-cache gpus rm shm-size network target pull tag ulimit format",
    "enroot": "output",
    "evalscope": "eval-type repeats",
    "git": "init recursive check",
    "pip": "index-url",
    "ray": "address",
    "sbatch": "gres time",
    "srun": "gpus-per-node container-image container-mounts container-workdir",
    "tensorboard": "host logdir",
}
# Flags that documents name because they do not exist; where.
ABSENT = {
    "docs/DIFFERENCES.md": (
        "--rdzv-endpoint --enable-length-penalty --max-response-length --length-penalty-buffer "
        "--length-penalty-factor --direct-update-fp8-weight"
    ).split(),
}


@functools.cache
def of_contract(name: str) -> frozenset[str]:
    """Option strings of a pinned program: pretrain_gpt, slime, sglang-server or sglang-router."""
    file = contract.FILES.get(name, f"{name}.json")
    options = json.loads((contract.FOLDER / file).read_text())["options"]
    return frozenset(text for option in options for text in option["options"])


@functools.cache
def of_script(path: Path) -> frozenset[str]:
    """Flags of one of our programs: of the text of --help, or of the argparse calls."""
    if path.suffix == ".sh":
        program = path.read_text().startswith("#!")  # and not sourced
        return frozenset(FLAG.findall(ok(run("bash", path, "--help", cwd=REPO)).stdout) if program else ())
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    adding = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"]
    words = [word.value for node in adding for word in node.args if isinstance(word, ast.Constant)]
    return frozenset(word for word in words if str(word).startswith("--")) | {"--help"}


# Programs that pass flags on, by the beginning of their paths: to a pinned program, or to one of our modules.
PASSED_ON = {
    "scripts/CPT/InfiR2": "pretrain_gpt",
    "scripts/quickstart.sh": "pretrain_gpt",
    "benchmarks/fp8_gap.py": "pretrain_gpt",
    "scripts/SFT/InfiR2": "slime",
    "scripts/RL/InfiR2": "slime",
    "benchmarks/fp8_rollout.py": "slime",
    "eval/": "sglang-server",
    "scripts/SFT/prepare_data.sh": "tools/prepare_data.py",
    "scripts/RL/prepare_data.sh": "tools/prepare_data.py",
    "tools/": "tools/checkpoint/cli.py",
}


def of_program(name: str) -> set[str]:
    """Flags of the program at a path of the repository, those that it passes on included."""
    targets = [target for start, target in PASSED_ON.items() if name.startswith(start)]
    passed = (of_script(REPO / target) if "/" in target else of_contract(target) for target in targets)
    return set(of_script(REPO / name)).union(*passed)


@functools.cache
def ours() -> frozenset[str]:
    """Every flag of every program of the repository, and of the pinned ones."""
    scripts = files("scripts/*.sh", *(f"{folder}/*.py" for folder in ("benchmarks", "docs", "tools", "training")))
    scripts += files("eval/*.sh", "eval/*.py", "docker/*.sh", "docker/*.py")
    pinned = ("pretrain_gpt", "slime", "sglang-server", "sglang-router")
    return frozenset().union(*(of_script(path) for path in scripts), *(of_contract(name) for name in pinned))


def unknown(line: str) -> list[str]:
    """Flags of one line that it may not name: it may name those of its programs; without a program of ours, of any."""
    others = (flags for name, flags in OTHERS.items() if re.search(rf"\b{name}\b", line, re.IGNORECASE))
    allowed = {f"--{flag}" for flags in others for flag in flags.split()}
    named = [name for name in SCRIPT.findall(line) if (REPO / name).is_file()]
    allowed |= set().union(*map(of_program, named)) if named else ours()
    return [flag for flag in FLAG.findall(line) if flag not in allowed]


def of_page(text: str) -> list[str]:
    """The lines of a page to check: a command with all its lines, a sentence with its neighbours, a row of a table."""
    lines = [line for block in blocks(text) for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()]
    for paragraph in re.split(r"\n\s*\n", prose(text)):
        if paragraph.lstrip().startswith("|"):
            lines += paragraph.splitlines()
        else:
            lines += re.split(r"(?<=[.:;])\s+|\n(?=[-*] )", paragraph)
    return [line for line in lines if FLAG.search(line)]
