"""docker/selftest.sh, in the project's environment and in environments made up of installed distributions."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import ok, run
from tests.docker.versions import DOCKER, read
from tools.checkpoint.block_fp8 import round_to_blocks

VERSIONS = read()
GEMM_ERROR = runpy.run_path(str(DOCKER / "selftest.py"))["GEMM_ERROR"]
# What the project's own environment has of the image.
HERE = ("sglang-router", "ray", "numpy", "evalscope", "accelerate", "matplotlib", "numba", "tensorboard")


def selftest(
    *words: object, path: Path | None = None, docker: Path = DOCKER, **env: str
) -> subprocess.CompletedProcess:
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return run("bash", docker / "selftest.sh", *words, env=env)


def rows(result: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """component: [expected, found, result]."""
    lines = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    assert lines[0] == ["component", "expected", "found", "result"]
    return {line[0]: line[1:] for line in lines[1:]}


def install(site: Path, name: str, version: str, modules: dict[str, str] | None = None) -> None:
    """A distribution as pip leaves it, with the given source files."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, source in (modules or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(source)


def test_what_the_project_has_is_what_the_image_has():
    """For real, imports included; and it says what it cannot tell here."""
    found = rows(ok(selftest("--only", *HERE, "fp8-gemm")))
    assert {name: found[name] for name in HERE} == {
        name: [version := VERSIONS[f"{name.upper().replace('-', '_')}_VERSION"], version, "ok"] for name in HERE
    }
    assert found["fp8-gemm"][2].startswith("skipped: no GPU") or found["fp8-gemm"][2] == "ok"


def test_what_is_missing_is_one_line():
    """The project's environment is not the image."""
    result = selftest("--no-import")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and "slime: expected 0.1.0, found none (not installed)" in result.stderr
    assert set(HERE) < set(rows(result)) and len(rows(result)) == 24


def test_no_import(tmp_path):
    install(tmp_path, "wandb", VERSIONS["WANDB_VERSION"], {"wandb.py": "raise OSError('broken')"})
    assert (
        rows(ok(selftest("--no-import", "--only", "wandb", path=tmp_path)))["wandb"][2]
        == "skipped: import, by --no-import"
    )
    result = selftest("--only", "wandb", path=tmp_path)
    assert result.returncode == 1 and "(import wandb: OSError: broken)" in result.stderr


def test_components_that_need_a_gpu_are_not_imported_without_one(tmp_path):
    install(tmp_path, "apex", VERSIONS["APEX_VERSION"], {"apex.py": "raise OSError('libcuda.so.1')"})
    result = ok(selftest("--only", "apex", path=tmp_path, CUDA_VISIBLE_DEVICES=""))
    assert rows(result)["apex"][2] == "skipped: import, no GPU"


def test_another_version(tmp_path):
    install(tmp_path, "wandb", "0.30.0")
    result = selftest("--only", "wandb", path=tmp_path)
    assert result.returncode == 1 and "wandb: expected 0.22.2, found 0.30.0 (another version)" in result.stderr


# ---------------------------------------------------------------- the guard of TransformerEngine

ENGINE = {"transformer_engine/__init__.py": ""}


def guard(*sites: Path) -> subprocess.CompletedProcess:
    path = ":".join(map(str, sites))
    return run("bash", DOCKER / "selftest.sh", "--no-import", "--only", "transformer-engine", env={"PYTHONPATH": path})


def test_the_pinned_transformer_engine(tmp_path):
    install(tmp_path, "transformer_engine", "2.4.0", ENGINE)
    assert rows(ok(guard(tmp_path)))["transformer-engine"][:2] == ["2.4.0", "2.4.0"]


@pytest.mark.parametrize("version", ["2.5.0", "2.3.0", "2.4.0+abcdef1", "2.4.1"])
def test_another_transformer_engine(tmp_path, version):
    install(tmp_path, "transformer_engine", version, ENGINE)
    result = guard(tmp_path)
    assert result.returncode == 1 and f"expected 2.4.0, found {version} (another version)" in result.stderr


@pytest.mark.parametrize("name", ["transformer_engine_torch", "transformer-engine-cu12", "transformer_engine_jax"])
def test_parts_of_a_release_beside_it(tmp_path, name):
    """TransformerEngine would load their libraries instead of its own."""
    install(tmp_path, "transformer_engine", "2.4.0", ENGINE)
    install(tmp_path, name, "2.4.0")
    result = guard(tmp_path)
    assert result.returncode == 1 and f"({name.replace('_', '-')} from PyPI beside it)" in result.stderr


def test_a_second_one_behind_it(tmp_path):
    install(tmp_path / "first", "transformer_engine", "2.4.0", ENGINE)
    install(tmp_path / "second", "transformer_engine", "2.8.0", ENGINE)
    result = guard(tmp_path / "first", tmp_path / "second")
    assert result.returncode == 1 and "found 2.4.0, 2.8.0 (another version)" in result.stderr


def test_a_source_tree_in_front_of_it(tmp_path):
    install(tmp_path / "site", "transformer_engine", "2.4.0", ENGINE)
    (tmp_path / "tree" / "transformer_engine").mkdir(parents=True)
    (tmp_path / "tree" / "transformer_engine" / "__init__.py").write_text("")
    result = guard(tmp_path / "tree", tmp_path / "site")
    assert result.returncode == 1 and "(2 copies: " in result.stderr


# ---------------------------------------------------------------- one file of versions


def test_it_reads_the_file_beside_it(tmp_path):
    shutil.copytree(DOCKER, tmp_path / "it's a copy")
    path = tmp_path / "it's a copy" / "versions.env"
    path.write_text(path.read_text().replace(f"NUMPY_VERSION={VERSIONS['NUMPY_VERSION']}", "NUMPY_VERSION=1.0"))
    result = selftest("--no-import", "--only", "numpy", docker=path.parent)
    assert result.returncode == 1 and f"numpy: expected 1.0, found {VERSIONS['NUMPY_VERSION']}" in result.stderr


def test_cuda(tmp_path):
    (tmp_path / "torch.py").write_text("class version: cuda = '12.6'\nclass cuda:\n  is_available = lambda: False\n")
    result = selftest("--only", "cuda", path=tmp_path)
    assert result.returncode == 1 and "cuda: expected >= 12.9, found 12.6" in result.stderr
    (tmp_path / "torch.py").write_text("class version: cuda = '12.10'\nclass cuda:\n  is_available = lambda: False\n")
    assert rows(ok(selftest("--only", "cuda", path=tmp_path)))["cuda"][2] == "ok"


@pytest.mark.parametrize("pow2", [True, False])
def test_the_bounds_of_the_gemm_are_those_of_the_arithmetic(pow2):
    """By the project's own rounding, without a GPU: E4M3 is inside, BF16 and a product that is half wrong outside."""
    low, high = GEMM_ERROR
    torch.manual_seed(0)
    inputs, weight = torch.randn(128, 512), torch.randn(256, 512) * 0.023
    exact = inputs @ weight.t()

    def error(left: torch.Tensor, right: torch.Tensor) -> float:
        return float(((left @ right.t()).bfloat16().float() - exact).norm() / exact.norm())

    rounded = round_to_blocks(inputs, (1, 128), pow2=pow2), round_to_blocks(weight, (128, 128), pow2=pow2)
    assert low < error(*rounded) < high
    assert error(inputs.bfloat16().float(), weight.bfloat16().float()) < low
    wrong = rounded[1].clone()
    wrong[:128] *= 2  # as with the scale of another block
    assert error(rounded[0], wrong) > high
