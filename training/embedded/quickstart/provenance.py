"""Where the numbers of the quickstart's report come from: machine, packages, commit, commands and time."""

from __future__ import annotations

import os
import platform
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from training.embedded.quickstart import md
from training.embedded.quickstart.runs import Quickstart, ReportError

PACKAGES = ("torch", "numpy", "megatron-core", "transformers", "tokenizers", "ray", "evalscope", "matplotlib")


@dataclass(frozen=True)
class Attempt:
    """One time that scripts/quickstart.sh worked on a stage: a line of stages.tsv."""

    stage: str
    seconds: int
    commit: str
    command: str


def read_attempts(folder: Path) -> list[Attempt]:
    """Those that the quickstart recorded; none where it was made without. Raises ReportError for a broken line."""
    file = folder / "stages.tsv"
    found = []
    for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
        fields = line.split("\t", 3)
        if len(fields) != 4 or not fields[1].isdigit():
            raise ReportError(f"{file}:{number}: expected stage, seconds, commit and command, found '{line[:80]}'")
        found.append(Attempt(fields[0], int(fields[1]), *fields[2:]))
    return found


def environment(run: Quickstart) -> list[tuple[str, str]]:
    """What this machine is, as (name, value)."""
    device = re.search(r"^model: ([\d,]+ parameters) on (\S+?),", run.fp8.log, re.MULTILINE)
    return [
        ("system", f"{_distribution()}, {platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{os.cpu_count()} CPUs, {_processor()}"),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"),
        ("threads", os.environ.get("OMP_NUM_THREADS") or "one for each CPU: OMP_NUM_THREADS is not set"),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("model", f"{device[1]}, on {device[2]}" if device else "not in the log of pre-training"),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
    ]


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0] if names else platform.processor() or "of unknown make"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def section(run: Quickstart) -> str:
    """Markdown: environment, commands, time and files."""
    attempts = read_attempts(run.folder)
    commits = list(dict.fromkeys(one.commit for one in attempts)) or ["not recorded"]
    rows = [*environment(run), ("commit", ", then ".join(commits))]
    return "\n".join(
        [
            "## Environment\n",
            md.table(["what", "this run"], [[name, md.plain(value)] for name, value in rows]),
            "\n## Reproduce\n",
            _reproduce(run.folder, attempts),
            "\n## Time\n",
            f"{_times(attempts)}\n",
        ]
    )


def _reproduce(folder: Path, attempts: list[Attempt]) -> str:
    commands = list(dict.fromkeys((one.commit, one.command) for one in attempts))
    if not commands:
        return "The commands of this run were not recorded: it was made without `stages.tsv`."
    lines = []
    for number, (commit, command) in enumerate(commands):
        if commit != "unknown" and (number == 0 or commit != commands[number - 1][0]):
            lines.append(f"git checkout {commit.removesuffix('-dirty')}")
        lines.append(f"OUT_DIR=exp/repeat {command}")
    stages = " ".join(dict.fromkeys(f"`{one.stage}`" for one in attempts if one.command == commands[-1][1]))
    said = [md.block(lines)]
    if any(commit.endswith("-dirty") for commit, _ in commands):
        said.append("Files differed from that commit (`-dirty`).")
    if len(commands) > 1:
        said.append(f"Stages ran under different commands; the last made: {stages}.")
    said += [
        "On the same machine, with the same seed and number of threads, training ends with the same bytes. One stage\n"
        "and what follows it, again and in place; the commands of all stages:",
        md.block(
            [
                f"OUT_DIR={shlex.quote(str(folder))} bash scripts/quickstart.sh --from rl_stage1 --again",
                "bash scripts/quickstart.sh --dry-run",
            ]
        ),
    ]
    return "\n\n".join(said)


def _times(attempts: list[Attempt]) -> str:
    if not attempts:
        return "Not recorded."
    spent: dict[str, int] = {}
    for one in attempts:
        spent[one.stage] = spent.get(one.stage, 0) + one.seconds
    rows = [[name, _clock(seconds)] for name, seconds in spent.items()]
    table = md.table(["stage", "minutes:seconds"], [*rows, ["together", _clock(sum(spent.values()))]], numbers=1)
    return f"{table}\n\nInterrupted attempts count as far as they got; those that were killed outright do not."


def _clock(seconds: int) -> str:
    return f"{seconds // 60}:{seconds % 60:02d}"
