"""The command line of the launchers: help, dry runs, environment, errors in one line."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.conftest import REPO, ok, run
from tests.scripts.launch import PLACES, SCRIPTS, command, dry_run, program_arguments, recipe
from tests.scripts.test_state import error

FULL = "InfiR2_CPT_FP8_7B"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "a 'quoted' run"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, tmp_path):
    result = ok(run("bash", recipe(script), "--help", cwd=tmp_path))
    assert result.stdout.startswith("usage: bash scripts/CPT/") and result.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("engine", ["megatron", "embedded"])
def test_dry_run_writes_nothing_and_can_be_pasted(script, engine, tmp_path):
    out = tmp_path / "out $HOME 'x' \"y\""
    result = ok(dry_run(script, "--engine", engine, "--load", "/stable/iter_0000100", out=out, DATA_PATH="/data/a b"))
    assert list(tmp_path.iterdir()) == []
    pasted = subprocess.run(
        ["bash", "-c", f"env() {{ printf '%s\\n' \"$@\"; }}\n{result.stdout}"],
        capture_output=True,
        text=True,
        check=True,
    )
    words = pasted.stdout.splitlines()
    assert f"{out}/checkpoints" in words and "/data/a b" in words


def test_four_nodes(out):
    words = command(FULL, "--nnodes", 4, "--rdzv_endpoint", "node0:29400", out=out)
    launcher = words[words.index("torchrun") :]
    assert launcher[:11] == [
        *("torchrun", "--nnodes", "4", "--nproc_per_node", "8", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", "node0:29400", "--rdzv_id", FULL),
    ]
    header = dry_run(FULL, "--nnodes=4", "--rdzv_endpoint=node0:29400", out=out).stderr
    assert "4.2M per step (128 x 32768), 167.8B in 40000 iterations" in header


def test_the_header_says_what_will_run(out):
    header = ok(dry_run(FULL, "--from-scratch", out=out)).stderr
    for text in (
        "engine     megatron, ",
        "model      qwen2.5-7B, TP 4, CP 1",
        "precision  fp8 (E4M3, 128-blocks, pow2 scales)",
        "warm-up 1-5000 (21.0B), stable 5001-35000 (125.8B), decay 35001-40000 (21.0B)",
        "state      fresh (random weights)",
    ):
        assert text in header


def test_passed_flags_come_last_and_reach_the_header(out):
    result = ok(dry_run(FULL, "--train-iters", 100, "--lr-warmup-iters=10", "--lr-wsd-decay-iters", 20, out=out))
    assert "warm-up 1-10 (41.9M), stable 11-80 (293.6M), decay 81-100 (83.9M)" in result.stderr
    argv = program_arguments(command(FULL, "--train-iters", 100, "--lr-warmup-iters=10", "--eod-mask-loss", out=out))
    assert argv[-4:] == ["--train-iters", "100", "--lr-warmup-iters=10", "--eod-mask-loss"]
    assert "twice" not in result.stderr


@pytest.mark.parametrize(
    ("env", "present", "absent"),
    [
        ({"PRECISION": "bf16"}, ["--bf16"], ["--fp8-format"]),
        (
            {"FP8_SCALE_FORMAT": "fp32"},
            ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1"],
            ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0"],
        ),
        ({"PROFILE": "1"}, ["--profile", "--record-memory-history"], []),
        ({}, ["WANDB_MODE=offline", "--wandb-project"], ["--profile"]),
        ({"WANDB_PROJECT": ""}, [], ["--wandb-project", "WANDB_MODE=offline"]),
        ({"WANDB_MODE": "online"}, ["WANDB_MODE=online"], []),
        ({"DATA_PATH": "0.7 /a 0.3 /b"}, ["0.7", "/a", "0.3", "/b"], []),
        ({"DATA_CACHE_PATH": "/cache dir"}, ["/cache dir"], []),
        ({"TP": "2"}, [], []),
        ({"CP": "2"}, [], []),
        ({"TP": "1"}, [], ["--sequence-parallel"]),
        ({"GPUS_PER_NODE": "4"}, [], []),
    ],
)
def test_environment(out, env, present, absent):
    words = command(FULL, out=out, **env)
    assert [word for word in present if word not in words] == []
    assert [word for word in absent if word in words] == []
    for name, flag in (
        ("TP", "--tensor-model-parallel-size"),
        ("CP", "--context-parallel-size"),
        ("GPUS_PER_NODE", "--nproc_per_node"),
    ):
        if name in env:
            assert words[words.index(flag) + 1] == env[name]


# ---------------------------------------------------------------- one clear line


# A size that is wrong for several reasons gets a line for each.
SEVERAL = [["--tensor-model-parallel-size"], ["--num-attention-heads"], ["--num-query-groups"]]


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (["--optimzer", "adam"], {}, "--optimzer: "),
        (["--lr", "abc"], {}, "--lr: "),
        (["--lr-decay-style", "wsd"], {}, "--lr-decay-style: "),
        (["--tensor-model-parallel-size", "3"], {"GPUS_PER_NODE": "6"}, "cuts 128-blocks"),
        (["--num-attention-heads", "26"], {}, "--num-attention-heads: 26 is not a multiple of tensor parallel size 4"),
        (["--num-query-groups", "2"], {}, "--num-query-groups"),
        (["--global-batch-size", "100"], {"TP": "1"}, "--global-batch-size"),
        (["--ffn-hidden-size", "18945"], {"TP": "1"}, "FFN rows 18945"),
        (["--engine", "other"], {}, "ENGINE: expected one of megatron embedded, found 'other'"),
        (["--nnodes", "two"], {}, "NNODES: expected an integer > 0, found 'two'"),
        (["--nnodes", "4"], {}, "--rdzv_endpoint: expected HOST:PORT of the first node"),
        (["--nnodes"], {}, "--nnodes: expected a value"),
        (["--load"], {}, "--load: expected a value"),
        (["--train-iters", "0"], {}, "TRAIN_ITERS: expected an integer > 0"),
        ([], {"PRECISION": "fp4"}, "PRECISION: expected one of fp8 bf16, found 'fp4'"),
        ([], {"FP8_SCALE_FORMAT": "e8m0"}, "FP8_SCALE_FORMAT: expected one of pow2 fp32"),
        ([], {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE: expected an integer > 0"),
    ],
)
def test_what_is_wrong_on_any_machine_stops_a_dry_run(out, flags, env, message):
    found = error(FULL, "--from-scratch", *flags, out=out, **env)
    assert message in found
    assert flags[:1] in SEVERAL or "\n" not in found
    assert not out.exists()


def test_tensor_parallelism_that_cuts_blocks_of_128(out):
    """At TP 8 a rank of the 7B would hold half of a key/value head, 64 rows: every other scale would be shared."""
    found = error(FULL, "--from-scratch", out=out, TP="8")
    assert "tensor parallel size 8 cuts 128-blocks: query rows 448, key and value rows 64, FFN rows 2368" in found
    assert "--num-attention-heads: 28 is not a multiple of tensor parallel size 8" in found


def test_real_launch_names_what_this_machine_lacks(out, tmp_path):
    env = {**PLACES, "OUT_DIR": str(out)}
    for engine, message in (
        ("megatron", "training/Megatron-LM: "),
        ("embedded", "DATA_PATH: /data/cpt_text_document.bin"),
    ):
        result = run("bash", recipe(FULL), "--from-scratch", "--engine", engine, env=env)
        assert result.returncode == 1 and not out.exists()
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0]


def test_a_tokenizer_directory_without_a_tokenizer(out, tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"text.{suffix}").touch()
    (tmp_path / "empty").mkdir()
    env = {**PLACES, "OUT_DIR": str(out), "DATA_PATH": str(tmp_path / "text")}
    for path, message in (("nowhere", "directory nowhere not found"), (tmp_path / "empty", "holds no tokenizer")):
        words = ["bash", recipe(FULL), "--from-scratch", "--engine", "embedded"]
        result = run(*words, env={**env, "TOKENIZER_MODEL": str(path)})
        assert result.returncode == 1 and "error: TOKENIZER_MODEL: " in result.stderr
        assert message in result.stderr and not out.exists()


def test_the_models_config_is_compared(out, tmp_path):
    """A rotary base of 10000 for a model of 1e6, or the reverse, trains without a complaint from the engine."""
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    (model / "config.json").write_text(json.dumps(config))
    env = {"TOKENIZER_MODEL": str(model)}
    ok(dry_run(FULL, "--from-scratch", out=out, **env))
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    found = error(FULL, "--from-scratch", out=out, **env)
    assert "--rotary-base" in found and "10000" in found and "1000000" in found


# ---------------------------------------------------------------- a submodule that is not as it should be


@pytest.fixture
def checkout(tmp_path):
    """A copy of the repository's scripts and contract with a Megatron-LM submodule of our own making."""
    root = tmp_path / "checkout"
    (root / "training").mkdir(parents=True)
    for part in ("scripts", "training/contract"):
        subprocess.run(["cp", "-r", REPO / part, root / part], check=True)
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    inner = root / "training" / "Megatron-LM"
    (inner / "tools").mkdir(parents=True)
    (inner / "pretrain_gpt.py").write_text("print('hello')\n")
    sub = ["git", "-C", str(inner), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in ([*sub, "init", "-q"], [*sub, "add", "."], [*sub, "commit", "-qm", "one"]):
        subprocess.run(words, check=True)
    head = subprocess.run([*sub, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([*git, "init", "-q"], check=True)
    entry = f"160000,{head},training/Megatron-LM"
    subprocess.run([*git, "update-index", "--add", "--cacheinfo", entry], check=True)
    return root


def launch(root, out) -> str:
    env = {**PLACES, "OUT_DIR": str(out)}
    result = run("bash", root / "scripts/CPT/InfiR2_CPT_FP8_7B.sh", "--from-scratch", env=env)
    assert result.returncode == 1 and not out.exists()
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def test_submodule_right_wrong_half_and_missing(checkout, out):
    inner = checkout / "training" / "Megatron-LM"
    assert "Megatron-LM" not in launch(checkout, out)  # the next thing that lacks: GPUs
    (inner / "more").write_text("x")
    git = ["git", "-C", str(inner), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in ([*git, "add", "."], [*git, "commit", "-qm", "two"]):
        subprocess.run(words, check=True)
    found = launch(checkout, out)
    assert "training/Megatron-LM: at commit" in found and "git submodule update --init" in found
    (inner / "pretrain_gpt.py").unlink()
    assert "training/Megatron-LM: half initialised, pretrain_gpt.py is not there" in launch(checkout, out)
    subprocess.run(["rm", "-rf", str(inner)], check=True)
    inner.mkdir()
    assert "training/Megatron-LM: not initialised; run: git submodule update --init" in launch(checkout, out)


def test_gitlinks_are_the_pins():
    entries = subprocess.run(["git", "-C", str(REPO), "ls-files", "-s", "training"], capture_output=True, text=True)
    links = dict(reversed(line.split()[1::2]) for line in entries.stdout.splitlines() if line.startswith("160000"))
    assert links == {
        "training/Megatron-LM": "23e00ed0963c35382dfe8a5a94fb3cda4d21e133",
        "training/slime": "8359c9a41c64900dc742f757228318026f88713a",
        "training/TransformerEngine": "3cd6870ceb809f173a31e3cac5034e56cf879156",
    }


def test_the_error_line_of_output_that_is_no_text(tmp_path):
    """Models write what they like; grep takes broken characters for a binary file, unless told otherwise."""
    (tmp_path / "output").write_bytes(b"\xe2\x96\nValueError: no \xff model\nat the end\n")
    script = 'source "$1"; error_line <"$2"'
    command = ("bash", "-c", script, "-", REPO / "scripts/lib/launch.sh", tmp_path / "output")
    shown = subprocess.run(command, env=os.environ | {"LC_ALL": "C.UTF-8"}, capture_output=True, check=True)
    assert (shown.stdout, shown.stderr) == (b"ValueError: no \xff model\n", b"")
