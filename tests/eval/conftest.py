"""Local data and servers for the evaluation scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.eval import samples

SERVER = Path(__file__).with_name("openai_server.py")
BENCHMARKS = tuple(samples.TRUTH)
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "true"]


@dataclass
class Scripted:
    """A running openai_server.py."""

    url: str
    log: Path
    process: subprocess.Popen

    def requests(self) -> list[dict]:
        """Without those of probe.py."""
        rows = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [row for row in rows if row["body"].get("max_tokens") != 1]


@pytest.fixture
def scripted(tmp_path_factory) -> Iterator[Callable[..., Scripted]]:
    """Starts servers with scripted answers."""
    started: list[Scripted] = []

    def start(behaviour: str = "good", name: str = "tiny") -> Scripted:
        place = tmp_path_factory.mktemp("server")
        words = ["--ready", place / "ready", "--log", place / "requests", "--behaviour", behaviour, "--name", name]
        process = subprocess.Popen([sys.executable, str(SERVER), *map(str, words)])
        deadline = time.monotonic() + 30
        while not (place / "ready").exists() or not (place / "ready").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        started.append(Scripted((place / "ready").read_text(), place / "requests", process))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@dataclass
class Evaluation:
    """One script in one directory."""

    benchmark: str
    out: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return ["bash", str(REPO / "eval" / f"{self.benchmark}_eval.sh")]

    def environment(self, **more: object) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        given = {"PYTHON": sys.executable, "OUT_DIR": self.out, "GENERATED_NUM": 8, **self.env, **more}
        return kept | {name: str(value) for name, value in given.items()}

    def run(self, *flags: object, **more: object) -> subprocess.CompletedProcess:
        words = [*self.command, *map(str, flags)]
        return subprocess.run(words, env=self.environment(**more), capture_output=True, text=True, cwd="/")

    def start(self, *flags: object, **more: object) -> subprocess.Popen:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "shown").open("w") as shown:
            words = [*self.command, *map(str, flags)]
            return subprocess.Popen(words, env=self.environment(**more), stdout=shown, stderr=shown, cwd="/")

    def shown(self) -> str:
        return (self.out / "shown").read_text()

    def summary(self) -> dict:
        (one,) = json.loads((self.out / "summary.json").read_text())["runs"]
        return one


def assert_quoted(requests: list[dict], name: str) -> None:
    """docs/EVAL.md quotes one of these requests; [...] stands for what it leaves out."""
    text = (REPO / "docs" / "EVAL.md").read_text()
    (quote,) = re.findall(rf"<!-- prompt: {re.escape(name)} -->\n````text\n(.*?)\n````", text, re.DOTALL)
    pattern = r"\n.*\n".join(re.escape(part) for part in quote.split("\n[...]\n"))
    bodies = [request["body"]["messages"] for request in requests]
    sent = {"\n".join(f"[{one['role']}]\n{one['content']}" for one in messages).rstrip() for messages in bodies}
    assert any(re.fullmatch(pattern, one, re.DOTALL) for one in sent), "\n\n".join(sent)


@pytest.fixture(scope="session")
def local_data(tmp_path_factory) -> Path:
    return samples.build(tmp_path_factory.mktemp("it's eval data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    from tests.eval import tiny_model

    return tiny_model.build(tmp_path_factory.mktemp("models") / "it's tiny")


def processes_with(text: str) -> list[int]:
    """Whose command line or environment holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            seen = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if text.encode() in seen and state not in "ZX":
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
