"""docker/versions.env against everything else that names a version, and every key against its users."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import REPO, ok, run
from tests.docker.versions import DOCKER, read

VERSIONS = read()
SUBMODULES = {"MEGATRON": "Megatron-LM", "SLIME": "slime", "TRANSFORMER_ENGINE": "TransformerEngine"}


def test_bash_reads_the_same_values():
    said = ok(run("bash", "-c", 'set -a; source "$0"; env -0', DOCKER / "versions.env")).stdout
    seen = dict(entry.split("=", 1) for entry in said.split("\0") if entry)
    assert {key: seen[key] for key in VERSIONS} == VERSIONS


def test_every_block_says_where_it_comes_from():
    blocks = (DOCKER / "versions.env").read_text().strip().split("\n\n")
    assert all(block.startswith("# ") for block in blocks) and len(VERSIONS) > 30


def test_every_key_is_used():
    users = (DOCKER / "install.sh").read_text() + (DOCKER / "selftest.py").read_text()
    for key in VERSIONS:
        prefix, suffix = key.rsplit("_", 1)
        by_prefix = suffix in ("URL", "COMMIT", "FILES") and f"obtain {prefix} " in users
        assert by_prefix or re.search(rf"\b{key}\b", users), f"{key}: nobody reads it"


@pytest.mark.parametrize("prefix", SUBMODULES)
def test_submodules(prefix):
    path = f"training/{SUBMODULES[prefix]}"
    link = ok(run("git", "-C", REPO, "ls-files", "-s", "--", path)).stdout.split()
    assert link[:2] == ["160000", VERSIONS[f"{prefix}_COMMIT"]]
    get = ("git", "config", "--file", REPO / ".gitmodules", f"submodule.{path}.url")
    assert ok(run(*get)).stdout.strip() == VERSIONS[f"{prefix}_URL"]


@pytest.mark.parametrize("prefix", SUBMODULES)
def test_checksum_of_a_checkout(prefix):
    """Where the submodule is there, whole and at its commit."""
    path = REPO / "training" / SUBMODULES[prefix]
    fill = f"git submodule update --init --recursive training/{path.name}"
    if not (path / ".git").exists():
        pytest.skip(f"training/{path.name} is empty; {fill}")
    states = ok(run("git", "-C", path, "submodule", "status", "--recursive")).stdout
    if re.search(r"^[-+U]", states, re.MULTILINE):
        pytest.skip(f"training/{path.name}: submodules of its own are missing; {fill}")
    assert ok(run("git", "-C", path, "rev-parse", "HEAD")).stdout.strip() == VERSIONS[f"{prefix}_COMMIT"]
    assert ok(run("bash", DOCKER / "install.sh", "checksum", path)).stdout.strip() == VERSIONS[f"{prefix}_FILES"]


def test_contract():
    def pin(name: str, key: str = "pin") -> str:
        return json.loads((REPO / "training" / "contract" / f"{name}.json").read_text())[key]

    assert pin("megatron-core_v0.14.0") == f"{VERSIONS['MEGATRON_TAG']} {VERSIONS['MEGATRON_COMMIT']}"
    assert pin("slime-8359c9a") == VERSIONS["SLIME_COMMIT"]
    assert pin("slime-8359c9a", "sglang_version_used") == pin("sglang-server") == VERSIONS["SGLANG_VERSION"]
    assert pin("sglang-router") == VERSIONS["SGLANG_ROUTER_VERSION"]


def test_requirements():
    """What both have is the same: the image's Python runs the launchers, the tools and the evaluation, too."""
    text = "".join((REPO / name).read_text() for name in ("requirements.txt", "requirements-dev.txt"))
    pins = {
        name.lower().replace("-", "_"): found for name, found in re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", text, re.M)
    }
    pins["megatron"] = pins["megatron_core"]
    both = {key: pins[name] for key in VERSIONS if (name := key.removesuffix("_VERSION").lower()) in pins}
    assert {"RAY_VERSION", "NUMPY_VERSION", "EVALSCOPE_VERSION", "MEGATRON_VERSION", "SGLANG_ROUTER_VERSION"} <= set(
        both
    )
    assert both == {key: VERSIONS[key] for key in both}
    assert VERSIONS["EVALSCOPE_VERSION"] in (REPO / "eval" / "evalscope.sh").read_text()


def test_table_of_the_readme():
    """Every version and commit, once."""
    text = (DOCKER / "README.md").read_text()
    table = text.split("<!-- versions:begin -->")[1].split("<!-- versions:end -->")[0]
    rows = re.findall(r"`(\w+)=([^`]+)`", table)
    assert sorted(rows) == sorted(item for item in VERSIONS.items() if not item[0].endswith(("_URL", "_FILES")))


def test_readme_names_no_other_commit():
    text = (DOCKER / "README.md").read_text()
    known = {value[:length] for value in VERSIONS.values() for length in (7, 9, 40)}
    assert set(re.findall(r"`([0-9a-f]{7,40})`", text)) - known == set()
