"""What a contributor is given: hooks that run the project's own checks, and a form for reports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO

FORMS = REPO / ".github" / "ISSUE_TEMPLATE"


# ---------------------------------------------------------------- pre-commit


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with our hooks and what they call; its environment is the one of these tests."""
    root = tmp_path_factory.mktemp("it's a project")
    for name in (".pre-commit-config.yaml", "pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(REPO / name, root)
    shutil.copytree(REPO / "scripts", root / "scripts")
    (root / ".venv").mkdir()
    (root / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    venv = "source scripts/lib/cli.sh; REPO=$PWD; source scripts/lib/venv.sh"
    stamp = f'{venv}; stamp_venv requirements-dev.txt; echo "$CHECKSUM" >"$STAMP"'
    for words in (["bash", "-c", stamp], ["git", "init", "-q"], ["git", "add", "."]):
        subprocess.run(words, cwd=root, check=True)
    return root


def pre_commit(project: Path, *words: str) -> subprocess.CompletedProcess:
    env = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    env["PRE_COMMIT_HOME"] = str(project / ".git" / "pre-commit")
    return subprocess.run(
        [sys.executable, "-m", "pre_commit", *words], cwd=project, env=env, capture_output=True, text=True
    )


def test_the_hooks_are_the_projects_own():
    config = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())
    assert [entry["repo"] for entry in config["repos"]] == ["local"]  # nothing to download
    entries = {hook["id"]: hook["entry"] for hook in config["repos"][0]["hooks"]}
    assert entries["lint"] == "bash scripts/test.sh --lint"


def test_good_files_pass(project):
    result = pre_commit(project, "run", "--files", "scripts/list.sh", "pyproject.toml", ".pre-commit-config.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ruff, shellcheck, hadolint" in result.stdout and "Skipped" in result.stdout  # no weights


@pytest.mark.parametrize(
    ("name", "text", "hook", "said"),
    [
        ("bad.py", "import os\n", "lint", "F401"),
        ("bad.sh", "#!/usr/bin/env bash\necho $1\n", "lint", "SC2086"),
        ("bad.md", "a line \n", "blanks", "bad.md:1"),
        ("open.md", "no newline", "newline", "open.md"),
        ("merge.md", "<<<<<<< HEAD\n", "conflict", "merge.md:1"),
        ("model.safetensors", "x\n", "weights", "model.safetensors"),
    ],
)
def test_a_bad_file_is_named(project, name, text, hook, said):
    (project / name).write_text(text)
    subprocess.run(["git", "add", name], cwd=project, check=True)
    try:
        result = pre_commit(project, "run", hook, "--files", name)
    finally:
        subprocess.run(["git", "rm", "-qf", name], cwd=project, check=True)
    assert result.returncode == 1 and said in result.stdout, result.stdout + result.stderr


def test_no_tracked_file_is_bad():
    """The hooks that take no time, on everything."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    weights = next(hook["files"] for hook in hooks if hook["id"] == "weights")
    for name in filter(None, tracked.split("\0")):
        assert not re.search(weights, name), name
        path = REPO / name
        if path.is_file() and path.suffix != ".xz":
            text = path.read_text()
            assert not re.search(r"[ \t]$", text, re.MULTILINE) and text[-1:] in ("\n", ""), name


# ---------------------------------------------------------------- issue forms

# docs.github.com: syntax for GitHub's form schema.
FIELDS = {
    "markdown": {"value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
    "input": {"label", "description", "placeholder", "value"},
    "dropdown": {"label", "description", "multiple", "options", "default"},
    "checkboxes": {"label", "description", "options"},
}


def test_the_form_is_one_that_github_takes():
    form = yaml.safe_load((FORMS / "bug.yml").read_text())
    assert form.keys() == {"name", "description", "body"}
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    for item in form["body"]:
        assert item.keys() <= {"type", "id", "attributes", "validations"}
        attributes = item["attributes"]
        assert attributes.keys() <= FIELDS[item["type"]]
        assert ("value" if item["type"] == "markdown" else "label") in attributes
        assert all(isinstance(value, (str, list)) for value in attributes.values())
        assert item.get("validations", {"required": True}) == {"required": True}
        assert re.fullmatch(r"[A-Za-z0-9_-]+", item["id"])
        if item["type"] == "dropdown":
            options = attributes["options"]
            assert len(set(options)) == len(options) and not {"none", "None"} & set(options)
    ids = [item["id"] for item in form["body"]]
    labels = [item["attributes"]["label"] for item in form["body"]]
    assert len(set(ids)) == len(ids) and len(set(labels)) == len(labels)
    required = {item["id"] for item in form["body"] if "validations" in item}
    assert {"command", "dry-run", "commit", "engine", "gpu"} <= required and "header" in ids


def test_other_places_are_named():
    config = yaml.safe_load((FORMS / "config.yml").read_text())
    assert config.keys() == {"blank_issues_enabled", "contact_links"}
    modules = (REPO / ".gitmodules").read_text()
    for link in config["contact_links"]:
        assert link.keys() == {"name", "url", "about"}
        assert f"url = {link['url'].removesuffix('/issues')}.git\n" in modules
