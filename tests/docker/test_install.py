"""docker/install.sh: each step recorded under a PATH of stand-ins, and what can run without Docker run for real."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPO, ok, run
from tests.docker.versions import DOCKER, read

VERSIONS = read()
# Records its words, and answers the questions that install.sh asks Python.
PYTHON = r"""#!/usr/bin/env bash
printf '%q ' python3 "$@" >>"$LOG"
printf '[%s]\n' "MAX_JOBS=${MAX_JOBS-}" >>"$LOG"
case "$*" in
  *'version("sglang")'*) printf '%s\n' "${SGLANG:-none}" ;;
  *torch.version.cuda*) printf '%s\n' "${CUDA:-None}" ;;
  *find_spec*) exec REAL "$@" ;;
esac
"""


@dataclass
class Image:
    """A machine that is as bare as the base image: a copy of docker/, directories, a python3 that records."""

    root: Path
    versions: dict[str, str]

    def install(self, *words: object, **env: str) -> subprocess.CompletedProcess:
        places = {name: str(self.root / name.lower()) for name in ("CONTEXT", "BUILD", "WHEELS", "TARGET", "LOG")}
        places |= {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "GIT_CONFIG_GLOBAL": str(self.root / "gitconfig")}
        return run("bash", self.root / "docker" / "install.sh", *words, env={**places, **env})

    @property
    def log(self) -> list[list[str]]:
        """The commands of python3, its environment last, and of make."""
        path = self.root / "log"
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def image(tmp_path) -> Image:
    root = tmp_path / "it's an image"
    shutil.copytree(DOCKER, root / "docker")
    (root / "bin").mkdir()
    (root / "bin" / "python3").write_text(PYTHON.replace("REAL", shlex.quote(sys.executable)))
    (root / "bin" / "make").write_text('#!/usr/bin/env bash\nprintf "%q " make "$@" >>"$LOG"\necho >>"$LOG"\n')
    for program in (root / "bin").iterdir():
        program.chmod(0o755)
    (root / "wheels").mkdir()
    return Image(root, VERSIONS)


def git(folder: Path, *words: object) -> str:
    command = ("git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@example.org", *words)
    return ok(run(*command)).stdout.strip()


def repository(folder: Path, files: dict[str, str]) -> str:
    """Make one with one commit; its id."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    return commit(folder, files)


def commit(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def upstream(image) -> Image:
    """The image with upstreams of our own in the place of github.com, and versions.env with their commits.

    TransformerEngine has a submodule; Megatron-LM has a second, newer commit.
    """
    hub = image.root / "hub"
    (image.root / "gitconfig").write_text(
        f'[url "file://{hub}/"]\n  insteadOf = https://github.com/\n'
        '[protocol "file"]\n  allow = always\n[uploadpack]\n  allowAnySHA1InWant = true\n'
    )
    frontend = repository(hub / "NVIDIA" / "cudnn-frontend.git", {"cudnn.h": "frontend"})
    engine = hub / "NVIDIA" / "TransformerEngine.git"
    modules = (
        '[submodule "f"]\n  path = 3rdparty/cudnn-frontend\n  url = https://github.com/NVIDIA/cudnn-frontend.git\n'
    )
    repository(engine, {"setup.py": "engine", ".gitmodules": modules})
    git(engine, "update-index", "--add", "--cacheinfo", f"160000,{frontend},3rdparty/cudnn-frontend")
    (engine / "3rdparty" / "cudnn-frontend").mkdir(parents=True)
    git(engine, "commit", "--quiet", "--message", "submodule")
    megatron = hub / "NVIDIA" / "Megatron-LM.git"
    changes = {
        "MEGATRON_COMMIT": repository(megatron, {"pretrain_gpt.py": "pinned"}),
        "TRANSFORMER_ENGINE_COMMIT": git(engine, "rev-parse", "HEAD"),
        "SLIME_COMMIT": repository(hub / "THUDM" / "slime.git", {"train.py": "slime"}),
    }
    commit(megatron, {"pretrain_gpt.py": "newer"})
    for prefix, folder in (("MEGATRON", megatron), ("TRANSFORMER_ENGINE", engine)):
        checkout = image.root / "pristine" / folder.name.removesuffix(".git")
        ok(image_git(image, "clone", "--quiet", folder, checkout))
        ok(image_git(image, "-C", checkout, "checkout", "--quiet", changes[f"{prefix}_COMMIT"]))
        ok(image_git(image, "-C", checkout, "submodule", "--quiet", "update", "--init"))
        changes[f"{prefix}_FILES"] = ok(image.install("checksum", checkout)).stdout.strip()
    text = (image.root / "docker" / "versions.env").read_text()
    for key, value in changes.items():
        text = re.sub(rf"^{key}=.*$", f"{key}={value}", text, flags=re.MULTILINE)
    (image.root / "docker" / "versions.env").write_text(text)
    image.versions = {**VERSIONS, **changes}
    return image


def image_git(image: Image, *words: object) -> subprocess.CompletedProcess:
    return run("git", *words, env={"GIT_CONFIG_GLOBAL": str(image.root / "gitconfig")})


# ---------------------------------------------------------------- what each step runs


PIP_WHEEL = "python3 -m pip wheel --verbose --no-deps --no-build-isolation --no-cache-dir --wheel-dir"


@pytest.mark.parametrize(
    ("name", "env", "source"),
    [
        ("flash-attn", "FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=90", "flash-attn==2.7.4.post1"),
        ("flash-attn-3", "FLASH_ATTENTION_FORCE_BUILD=TRUE", "BUILD/flash-attention/hopper"),
        ("apex", "APEX_CPP_EXT=1 APEX_CUDA_EXT=1", "BUILD/apex"),
        ("grouped-gemm", "", "BUILD/grouped_gemm"),
        ("mbridge", "", "BUILD/mbridge"),
        (
            "transformer-engine",
            "NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 NVTE_NO_LOCAL_VERSION=1",
            "BUILD/TransformerEngine",
        ),
    ],
)
def test_what_a_wheel_is_built_with(image, name, env, source):
    result = ok(image.install("--dry-run", "wheel", name))
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    wheel = next(words for words in commands if "wheel" in words)
    source = source.replace("BUILD", str(image.root / "build"))
    expected = ["env", "TORCH_CUDA_ARCH_LIST=9.0;9.0a", *env.split(), *PIP_WHEEL.split()]
    assert wheel == [*expected, str(image.root / "wheels"), source]
    prefix = name.upper().replace("-", "_")
    fetches = [words for words in commands if "fetch" in words]
    if f"{prefix}_COMMIT" in VERSIONS:
        assert fetches[0][-2:] == [VERSIONS[f"{prefix}_URL"], VERSIONS[f"{prefix}_COMMIT"]]
    else:
        assert fetches == []
    assert image.log == [] and not (image.root / "build").exists()


def test_max_jobs_reaches_the_compilers(image):
    ok(image.install("wheel", "flash-attn", MAX_JOBS="3"))
    assert image.log[-1][-1] == "[MAX_JOBS=3]"


def test_packages(image):
    """One resolution with sglang in it, then the wheels as they are."""
    for name in ("flash_attn-1-py3-none-any.whl", "apex-1-py3-none-any.whl"):
        (image.root / "wheels" / name).write_text("")
    site = image.root / "site"
    site.mkdir()
    (site / "flash_attn_interface.py").write_text("raise RuntimeError('imported')\n")
    ok(image.install("packages", PYTHONPATH=str(site)))
    first, second = (words for words in image.log if "install" in words)
    asked = {word for word in first if "==" in word}
    assert {f"sglang=={VERSIONS['SGLANG_VERSION']}", f"ray[default]=={VERSIONS['RAY_VERSION']}"} <= asked
    assert all(word.split("==")[1] in VERSIONS.values() for word in asked) and len(asked) > 12
    assert "--no-deps" not in first and "--upgrade" not in first and "--force-reinstall" not in first
    wheels = sorted(str(path) for path in (image.root / "wheels").iterdir())
    assert second[:6] == "python3 -m pip install --no-cache-dir --no-deps".split() and second[6:-1] == wheels
    copied = site / "flash_attn_3" / "flash_attn_interface.py"
    assert copied.read_text() == (site / "flash_attn_interface.py").read_text()


# ---------------------------------------------------------------- where sources come from


def mount(image: Image, name: str) -> Path:
    """The pristine checkout as the build context has it: without .git."""
    shutil.copytree(image.root / "pristine" / name, image.root / "context" / name)
    for path in (image.root / "context" / name).rglob(".git"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return image.root / "context" / name


def megatron_built(image: Image) -> None:
    """What `pip install --editable` leaves, as the python3 here only records."""
    path = image.root / "target" / "training" / "Megatron-LM" / "megatron" / "core" / "datasets"
    path.mkdir(parents=True, exist_ok=True)
    (path / "helpers_cpp.so").write_text("")


def test_without_submodules_the_pinned_commits_are_cloned(upstream):
    (upstream.root / "context" / "Megatron-LM").mkdir(parents=True)  # as git leaves it, empty
    result = upstream.install("engines")
    assert "was not compiled" in result.stderr and result.returncode == 1
    training = upstream.root / "target" / "training"
    assert git(training / "Megatron-LM", "rev-parse", "HEAD") == upstream.versions["MEGATRON_COMMIT"]
    assert git(training / "slime", "rev-parse", "HEAD") == upstream.versions["SLIME_COMMIT"]
    assert (training / "Megatron-LM" / "pretrain_gpt.py").read_text() == "pinned"
    install = next(words for words in upstream.log if "install" in words)
    editable = ["--editable", str(training / "Megatron-LM"), "--editable", str(training / "slime")]
    assert install[:-1] == [*"python3 -m pip install --no-cache-dir --no-deps".split(), *editable]


def test_a_submodule_at_the_pin_is_taken_without_a_network(upstream):
    """Without what a build on the host has left there, which is of another Python."""
    mounted = mount(upstream, "TransformerEngine")
    left = {".git", "__pycache__/x.pyc", "transformer_engine.so", "build/cmake/x", "x.egg-info/PKG-INFO"}
    for name in left:
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text("")
    shutil.rmtree(upstream.root / "hub")
    result = ok(upstream.install("wheel", "transformer-engine"))
    assert "from the submodule" in result.stderr and "warning" not in result.stderr
    taken = upstream.root / "build" / "TransformerEngine"
    files = {str(path.relative_to(taken)) for path in taken.rglob("*") if path.is_file()}
    assert files == {"setup.py", ".gitmodules", "3rdparty/cudnn-frontend/cudnn.h"}
    assert upstream.log[-1][-2] == str(taken)


@pytest.mark.parametrize("damage", ["changed", "added", "removed", "half"])
def test_a_submodule_that_is_not_the_pin_is_left_alone(upstream, damage):
    mounted = mount(upstream, "TransformerEngine")
    if damage == "changed":
        (mounted / "setup.py").write_text("changed")
    elif damage == "added":
        (mounted / "more.py").write_text("")
    elif damage == "removed":
        (mounted / "setup.py").unlink()
    else:
        (mounted / "3rdparty" / "cudnn-frontend" / "cudnn.h").unlink()
    result = ok(upstream.install("wheel", "transformer-engine"))
    assert "warning: training/TransformerEngine: its files are not those of" in result.stderr
    taken = upstream.root / "build" / "TransformerEngine"
    assert git(taken, "rev-parse", "HEAD") == upstream.versions["TRANSFORMER_ENGINE_COMMIT"]
    assert (taken / "setup.py").read_text() == "engine"
    assert (taken / "3rdparty" / "cudnn-frontend" / "cudnn.h").read_text() == "frontend"


@pytest.mark.parametrize("asked", ["", "main", VERSIONS["MEGATRON_TAG"]])
def test_what_the_documented_command_passes_means_the_pin(upstream, asked):
    megatron_built(upstream)
    ok(upstream.install("engines", MEGATRON_COMMIT=asked, SLIME_SGLANG_PATCH="0"))
    assert (upstream.root / "target/training/Megatron-LM/pretrain_gpt.py").read_text() == "pinned"


def test_nothing_is_left_to_compile_at_the_start_of_a_run(upstream):
    megatron_built(upstream)
    ok(upstream.install("engines", SLIME_SGLANG_PATCH="0"))
    datasets = upstream.root / "target/training/Megatron-LM/megatron/core/datasets"
    assert upstream.log[-1] == ["make", "--directory", str(datasets)]


def test_another_commit_of_megatron_wins_over_the_submodule(upstream):
    megatron_built(upstream)
    mount(upstream, "Megatron-LM")
    newer = git(upstream.root / "hub" / "NVIDIA" / "Megatron-LM.git", "rev-parse", "HEAD")
    ok(upstream.install("engines", MEGATRON_COMMIT=newer, SLIME_SGLANG_PATCH="0"))
    assert (upstream.root / "target/training/Megatron-LM/pretrain_gpt.py").read_text() == "newer"


def test_a_commit_that_is_nowhere(upstream):
    result = upstream.install("engines", MEGATRON_COMMIT="0" * 40)
    assert (
        result.returncode == 1 and f"error: Megatron-LM: {VERSIONS['MEGATRON_URL']} has no {'0' * 40}" in result.stderr
    )


# ---------------------------------------------------------------- the base image


def test_base_image(image):
    ok(image.install("base", SGLANG=VERSIONS["SGLANG_VERSION"], CUDA="12.9"))
    ok(image.install("base", SGLANG=VERSIONS["SGLANG_VERSION"], CUDA="13.0"))


@pytest.mark.parametrize(
    ("sglang", "cuda", "said"),
    [
        ("0.5.4", "12.9", "expected a base image with sglang 0.5.3.post1, found 0.5.4"),
        ("none", "12.9", "expected a base image with sglang 0.5.3.post1, found none"),
        ("0.5.3.post1", "12.6", "expected a base image with CUDA 12.9 or newer, for block FP8, found 12.6"),
        ("0.5.3.post1", "None", "expected a base image with CUDA 12.9 or newer, for block FP8, found None"),
    ],
)
def test_another_base_image_stops_before_anything_is_compiled(image, sglang, cuda, said):
    result = image.install("base", SGLANG=sglang, CUDA=cuda)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and said in result.stderr


# ---------------------------------------------------------------- slime's patch of SGLang

PATCH = "docker/patch/latest/sglang.patch"
DIFF = "--- a/python/sglang/server.py\n+++ b/python/sglang/server.py\n@@ -1 +1 @@\n-before\n+after\n"


@pytest.fixture
def sglang(upstream) -> Path:
    """Its sources as in the base image, and a slime whose patch fits them."""
    megatron_built(upstream)
    root = upstream.root / "sgl-workspace" / "sglang"
    repository(root, {"python/sglang/__init__.py": "", "python/sglang/server.py": "before\n"})
    head = commit(upstream.root / "hub" / "THUDM" / "slime.git", {PATCH: DIFF})
    path = upstream.root / "docker" / "versions.env"
    path.write_text(re.sub(r"^SLIME_COMMIT=.*$", f"SLIME_COMMIT={head}", path.read_text(), flags=re.MULTILINE))
    return root


@pytest.mark.parametrize(("setting", "text"), [({}, "after\n"), ({"SLIME_SGLANG_PATCH": "0"}, "before\n")])
def test_the_patch_is_applied_unless_told_otherwise(upstream, sglang, setting, text):
    ok(upstream.install("engines", PYTHONPATH=str(sglang / "python"), **setting))
    assert (sglang / "python/sglang/server.py").read_text() == text


def test_no_sglang_to_patch(upstream):
    megatron_built(upstream)
    result = upstream.install("engines")
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "error: sglang: not installed"


def test_a_patch_that_does_not_fit_stops_the_build(upstream, sglang):
    (sglang / "python/sglang/server.py").write_text("something else\n")
    result = upstream.install("engines", PYTHONPATH=str(sglang / "python"))
    assert result.returncode == 1 and f"{PATCH}: does not apply to {sglang}" in result.stderr.splitlines()[-1]
    assert (sglang / "python/sglang/server.py").read_text() == "something else\n"


def test_slimes_patch_fits_the_pinned_sglang(tmp_path):
    """Where slime's submodule is there and the package index has the release: the patch names its very files."""
    patch = REPO / "training" / "slime" / PATCH
    if not patch.exists():
        pytest.skip("training/slime is empty; git submodule update --init training/slime")
    asked = (f"sglang=={VERSIONS['SGLANG_VERSION']}", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12")
    found = run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", tmp_path, *asked)
    if found.returncode:
        pytest.skip(f"the package index serves no such sglang: {found.stderr.strip().splitlines()[-1]}")
    zipfile.ZipFile(next(tmp_path.glob("sglang-*.whl"))).extractall(tmp_path / "python")
    ok(run("git", "apply", "--check", patch, cwd=tmp_path))
    text = patch.read_text()
    blobs = re.findall(r"^diff --git a/(\S+) .*\nindex (\w+)\.\.", text, re.MULTILINE)
    assert len(blobs) == 11
    for path, blob in blobs:
        assert ok(run("git", "hash-object", tmp_path / path)).stdout.startswith(blob)


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected a step, found ''"),
        (("everything",), "expected a step, found 'everything'"),
        (("wheel",), "wheel: expected one of"),
        (("wheel", "torch"), "found 'torch'"),
        (("checksum", "/nowhere"), "checksum: expected a directory, found '/nowhere'"),
    ],
)
def test_wrong_calls(image, words, said):
    result = image.install(*words)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and said in result.stderr
