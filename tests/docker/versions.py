"""docker/versions.env, as its users read it."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.conftest import REPO

DOCKER = REPO / "docker"


def read(path: Path = DOCKER / "versions.env") -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(path.read_text(), comments=True))
