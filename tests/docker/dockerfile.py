"""docker/Dockerfile, parsed."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass

from dockerfile_parse import DockerfileParser

from tests.docker.versions import DOCKER


@dataclass(frozen=True)
class Command:
    name: str
    flags: list[str]
    words: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def sources(self) -> list[str]:
        """What a COPY takes."""
        return self.words[:-1] if self.name == "COPY" else []


def parse() -> list[Command]:
    with (DOCKER / "Dockerfile").open("rb") as file:
        rows = DockerfileParser(fileobj=file).structure
    commands = []
    for row in rows:
        if row["instruction"] != "COMMENT":
            words = shlex.split(row["value"])
            flags = [word for word in words if word.startswith("--") and row["instruction"] in ("RUN", "COPY", "FROM")]
            count = next((n for n, word in enumerate(words) if not word.startswith("--")), len(words))
            commands.append(Command(row["instruction"].upper(), flags[:count], words[count:]))
    return commands


COMMANDS = parse()


def stages() -> dict[str, list[Command]]:
    """The commands of each stage, by its name; what stands before the first FROM under ''."""
    found, name = defaultdict(list), ""
    for command in COMMANDS:
        if command.name == "FROM":
            assert len(command.words) == 3 and command.words[1] == "AS"
            name = command.words[2]
        found[name].append(command)
    return found


def arguments(commands: list[Command]) -> dict[str, str | None]:
    """ARG names and defaults."""
    words = [word for command in commands if command.name == "ARG" for word in command.words]
    return {name: default if equals else None for name, equals, default in (word.partition("=") for word in words)}
