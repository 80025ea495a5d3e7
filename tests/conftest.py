"""What several test modules share: real checkpoints, a small real corpus, and running the project's own programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]

# A shell that starts the tests in the background ignores Ctrl-C for them and for every program that they start; nohup
# ignores hang-ups.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Two workers share the files; the longest first, that none is left alone with one in the end.
LONGEST = (
    *("test_quickstart.py", "test_launchers_slime.py", "test_ray.py", "test_slurm.py", "test_eval_scripts.py"),
    *("test_fp8_rollout.py", "test_pretrain_gpt.py", "test_train.py", "test_models.py", "test_docs.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


# The published models that there are recipes for, by the name of their file in scripts/models.
PUBLISHED = sorted(path.stem for path in (REPO / "tests" / "fixtures" / "hf").glob("*.json"))


def hf_config(model: str) -> dict[str, Any]:
    """The config.json of a published model: hf_config("qwen2.5-7B")."""
    return json.loads((REPO / "tests" / "fixtures" / "hf" / f"{model}.json").read_text())


def whole_block_splits(model: str) -> list[int]:
    """How many GPUs can share a published model's FP8 weights: each has whole heads and whole 128-blocks."""
    config = hf_config(model)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    widths = (heads * head_dim, groups * head_dim, config["intermediate_size"])
    return [
        parts
        for parts in range(1, heads + 1)
        if heads % parts == groups % parts == 0 and not any(width % (parts * 128) for width in widths)
    ]


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command with this Python as PYTHON and no launcher variable of the caller's shell."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")
    clean = {name: os.environ[name] for name in kept if name in os.environ}
    clean |= {"PYTHON": sys.executable, **(env or {})}
    return subprocess.run([str(word) for word in command], env=clean, cwd=cwd, capture_output=True, text=True)


def ok(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """The result of a command that must have succeeded."""
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def megatron_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Directory of a checkpoint in tests/fixtures, by name (tests/fixtures/README.md)."""
    root = tmp_path_factory.mktemp("fixtures")

    def unpack(name: str) -> Path:
        if not (root / name).exists():
            stem = "te_style" if name.startswith("te_style") else name  # two checkpoints with the same weights
            with tarfile.open(REPO / "tests" / "fixtures" / f"{stem}.tar.xz") as archive:
                archive.extractall(root, filter="data")
        return root / name

    return unpack


def model_args(model: str) -> list[str]:
    """The words of MODEL_ARGS in a file of scripts/models."""
    show = 'source "$0"; printf "%s\\n" "${MODEL_ARGS[@]}"'
    return ok(run("bash", "-c", show, MODELS / f"{model}.sh")).stdout.split()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with corpus.jsonl (real text, 500 documents), tokenizer/ and text_text_document.{bin,idx}.

    Made by the quickstart's own programs; its name has a space and a quote, so everything that uses it proves that
    such paths work.
    """
    folder = tmp_path_factory.mktemp("data") / "it's real data"
    folder.mkdir()
    quickstart = REPO / "training" / "embedded" / "quickstart"
    ok(run(sys.executable, quickstart / "corpus.py", "--output", folder / "all.jsonl"))
    with (folder / "all.jsonl").open() as lines, (folder / "corpus.jsonl").open("w") as kept:
        kept.writelines(line for number, line in enumerate(lines) if number < 500)
    ok(
        run(
            *(sys.executable, quickstart / "tokenizer.py", "--input", folder / "corpus.jsonl"),
            *("--output-dir", folder / "tokenizer", "--", *model_args("qwen2.5-tiny"), "--attention-dropout", "0.0"),
        )
    )
    ok(
        run(
            *("bash", REPO / "scripts" / "CPT" / "prepare_data.sh", "--engine", "embedded"),
            *("--input", folder / "corpus.jsonl", "--output-prefix", folder / "text"),
            *("--tokenizer", folder / "tokenizer"),
        )
    )
    return folder


@pytest.fixture(scope="session")
def tiny_stages(tiny_data, tmp_path_factory) -> Path:
    """What RL starts from, laid out as the quickstart does: arithmetic/, a run sft_stage2/ and its Hugging Face forms
    sft_stage2_hf/, sft_stage2_fp8/ (float32 scales) and pow2/. The run is one step of pre-training.
    """
    folder = tmp_path_factory.mktemp("it's prepared")
    data = (REPO / "training" / "embedded" / "quickstart" / "arithmetic.py", "--output-dir", folder / "arithmetic")
    ok(run(sys.executable, *data, "--pretrain", 10, "--stage1", 96, "--stage2", 64, "--rl", 64))
    env = {"OUT_DIR": str(folder / "sft_stage2"), "TOKENIZER_MODEL": str(tiny_data / "tokenizer")}
    flags = "--train-iters 1 --lr-warmup-iters 0 --lr-wsd-decay-iters 1 --eval-iters 1 --from-scratch".split()
    recipe = REPO / "scripts" / "CPT" / "InfiR2_CPT_FP8_tiny.sh"
    ok(run("bash", recipe, *flags, "--data-path", tiny_data / "text_text_document", env=env))
    convert = (REPO / "tools" / "convert_torch_dist_to_hf.py", "--input-dir", folder / "sft_stage2" / "checkpoints")
    hf = folder / "sft_stage2_hf"
    ok(run(sys.executable, *convert, "--output-dir", hf, "--origin-hf-dir", tiny_data / "tokenizer"))
    cast = (sys.executable, REPO / "tools" / "bf16_cast_fp8.py", "--input-bf16-hf-path", hf, "--output-fp8-hf-path")
    ok(run(*cast, folder / "sft_stage2_fp8", "--force-pow-2-scale", "False"))
    ok(run(*cast, folder / "pow2", "--force-pow-2-scale", "True"))
    return folder


MODELS = REPO / "scripts" / "models"
