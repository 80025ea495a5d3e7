"""What runs in eval/isolate.sh has no network, writes nothing but its copy, and leaves no links behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.eval.conftest import NAMESPACES

pytestmark = pytest.mark.skipif(
    subprocess.run(NAMESPACES, capture_output=True).returncode != 0, reason="user namespaces are off on this machine"
)


@pytest.fixture
def folder():
    """Where the user nobody can get to, as root grades as nobody."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    (path / "run" / "reviews").mkdir(parents=True)
    (path / "run" / "reviews" / "a").write_text("before")
    yield path
    shutil.rmtree(path)


def isolated(folder: Path, code: str, **env: str) -> subprocess.CompletedProcess:
    words = ["bash", str(REPO / "eval" / "isolate.sh"), str(folder / "run"), "bash", "-c", code]
    given = {"PATH": os.environ["PATH"], "ISOLATION": "namespaces", "SECRET": "x", **env}
    return subprocess.run(words, env=given, capture_output=True, text=True)


def test_what_it_writes_comes_back_without_links(folder):
    result = isolated(folder, f"cd {folder}/run/reviews && cat a && echo after >a && ln -s /etc/passwd link")
    assert (result.returncode, result.stdout) == (0, "before"), result.stderr
    assert (folder / "run" / "reviews" / "a").read_text() == "after\n"
    assert not (folder / "run" / "reviews" / "link").is_symlink()


def test_a_failure_changes_nothing(folder):
    assert isolated(folder, f"echo after >{folder}/run/reviews/a; exit 3").returncode == 3
    assert (folder / "run" / "reviews" / "a").read_text() == "before"


def test_nothing_else_can_be_written(folder):
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    for place in (folder / "open", "/tmp", "/var/tmp"):
        result = isolated(folder, f"echo x >{place}/written")
        assert result.returncode != 0 and "Read-only file system" in result.stderr, (place, result.stderr)
    assert list((folder / "open").iterdir()) == []


def test_no_network_no_secrets_no_other_processes(folder):
    code = "grep -c : /proc/net/dev; echo ${SECRET-none}; ls -d /proc/[0-9]* | wc -l; grep NoNewPrivs /proc/self/status"
    devices, secret, processes, privileges = isolated(folder, code).stdout.splitlines()
    assert (devices, secret) == ("1", "none") and int(processes) < 10
    assert privileges.split()[1] == "1"


def test_the_limit_of_time(folder):
    result = isolated(folder, "sleep 60", GRADE_TIMEOUT="1")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: GRADE_TIMEOUT: grading took more than 1 s"
