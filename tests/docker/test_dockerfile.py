"""docker/Dockerfile, parsed: what it takes from the context is there, and nothing floats."""

from __future__ import annotations

import re

import pytest
from docker.utils.build import exclude_paths

from tests.conftest import REPO, ok, run
from tests.docker.dockerfile import COMMANDS, Command, arguments, stages
from tests.docker.versions import DOCKER, read

VERSIONS = read()
# The code that a change of the recipe touches.
CODE = ("scripts", "eval", "tools", "training/contract", "training/embedded")


def mounts(command: Command) -> list[dict[str, str]]:
    flags = [flag.removeprefix("--mount=") for flag in command.flags if flag.startswith("--mount=")]
    return [dict(part.split("=", 1) for part in flag.split(",")) for flag in flags]


@pytest.fixture(scope="module")
def context() -> set[str]:
    """What Docker sends of the repository, after .dockerignore."""
    lines = (REPO / ".dockerignore").read_text().splitlines()
    return exclude_paths(str(REPO), [line for line in lines if line and not line.startswith("#")])


def test_sources_are_in_the_documented_context(context):
    sources = {source for command in COMMANDS for source in command.sources}
    bound = {mount["source"] for command in COMMANDS for mount in mounts(command) if "from" not in mount}
    assert {"docker", "scripts", "training/contract"} <= sources and len(bound) == 3
    assert sources | bound <= context
    for name in sources:
        assert (REPO / name).is_file() or any(other.startswith(f"{name}/") for other in context), f"{name}: empty"


def test_all_code_of_the_recipe_travels(context):
    tracked = ok(run("git", "-C", REPO, "ls-files", "--", *CODE, "docker")).stdout.splitlines()
    copied = {source for command in COMMANDS for source in command.sources}
    assert tracked and set(tracked) <= context
    assert {*CODE, "docker"} <= copied


def test_what_does_not_travel(tmp_path):
    paths = ("exp/run/x.pt", ".git/config", ".venv/bin/python", "data/a.jsonl", "models/m/config.json", "tests/test.py")
    paths += ("training/slime/.git", "tools/__pycache__/a.pyc", "training/Megatron-LM/megatron/core/helpers_cpp.so")
    paths += ("training/TransformerEngine/build/cmake/x", "scripts/models/qwen.sh", "tools/data/rows.py", "a/exp/kept")
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    lines = [line for line in (REPO / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    sent = {path for path in exclude_paths(str(tmp_path), lines) if (tmp_path / path).is_file()}
    assert sent == {"scripts/models/qwen.sh", "tools/data/rows.py", "a/exp/kept"}


@pytest.mark.parametrize(
    ("asked", "tag"),
    [
        (None, f"v{VERSIONS['SGLANG_VERSION']}"),
        ("latest", f"v{VERSIONS['SGLANG_VERSION']}"),  # what the documented command passes with nothing set
        ("v0.5.4", "v0.5.4"),
    ],
)
def test_base_image(asked, tag):
    """The substitutions in its ARG lines mean in a Dockerfile what they mean in Bash."""
    defaults = arguments(stages()[""])
    script = "".join(f': "${{{name}={default}}}"; ' for name, default in defaults.items()) + 'printf %s "$SGLANG_IMAGE"'
    said = ok(run("bash", "-c", script, env={"SGLANG_VERSION": asked} if asked else {})).stdout
    assert said == f"lmsysorg/sglang:{tag}"
    assert stages()["base"][0].words[0] == "${SGLANG_IMAGE}"
    digest = "lmsysorg/sglang@sha256:" + "0" * 64
    assert ok(run("bash", "-c", script, env={"SGLANG_IMAGE": digest})).stdout == digest


def test_defaults_are_the_pins():
    assert arguments(stages()["runtime"])["MEGATRON_COMMIT"] == VERSIONS["MEGATRON_TAG"]
    tags = set(re.findall(r"v(\d+\.\d+\.\d+[\w.]*)", " ".join(arguments(stages()[""]).values())))
    assert tags == {VERSIONS["SGLANG_VERSION"]}


def test_code_changes_compile_nothing():
    """The stage that compiles takes two files, and no stage starts from one that has the code."""
    taken = [source for command in stages()["wheels"] for source in command.sources]
    assert taken == ["docker/versions.env", "docker/install.sh"]
    assert stages()["wheels"][0].words[0] == "base" and len(stages()["base"]) == 1
    runtime = stages()["runtime"]
    order = [command.text if command.name == "RUN" else command.words[0] for command in runtime]
    assert order.index("bash docker/install.sh engines") < min(order.index(name) for name in CODE)
    assert order.index("bash docker/selftest.sh --no-import") > max(order.index(name) for name in (*CODE, "docker"))


def test_every_step_exists_and_every_wheel_is_built():
    steps = [
        step for command in COMMANDS if command.name == "RUN" for step in re.findall(r"install\.sh (.+)$", command.text)
    ]
    usage = ok(run("bash", DOCKER / "install.sh", "--help")).stdout
    wheels = re.search(r"^  wheel NAME +compile into \S+: (.*)$", usage, re.MULTILINE)[1].split()
    assert sorted(step.split()[1] for step in steps if step.startswith("wheel ")) == sorted(wheels)
    assert [step for step in steps if not step.startswith("wheel ")] == ["base", "packages", "engines"]


def test_proxies_stay_out_of_the_image():
    """They are predefined build arguments, in the environment of RUN and nowhere else."""
    assert "proxy" not in ((DOCKER / "Dockerfile").read_text() + (DOCKER / "install.sh").read_text()).lower()
    assert [command.text for command in COMMANDS if command.name == "ENV"] == ["PYTHON=python3"]
