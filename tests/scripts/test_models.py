"""Every published model that there are recipes for: its files agree with its config.json, on one node and on two, and
its shapes go through the stages, a model with fewer layers and tokens in place of the whole.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import PUBLISHED, REPO, hf_config, ok, run, whole_block_splits
from tests.scripts.launch import FINE_TUNING, SCRIPTS, command, dry_run, program_arguments, recipe
from tests.tools import models
from tools.checkpoint.qwen2_layout import Qwen2Shape
from training.contract import check

TOKENS = 151665  # len(tokenizer) of Qwen2.5
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def model_of(script: str) -> str:
    """InfiR2_CPT_FP8_7B_decay is a recipe of qwen2.5-7B."""
    return f"qwen2.5-{script.split('_')[3]}"


def test_every_model_file_has_its_config():
    files = {path.stem for path in (REPO / "scripts" / "models").glob("*.sh")}
    assert files - set(PUBLISHED) == {"qwen2.5-tiny"}  # whose config.json the quickstart makes from the model file
    assert {model_of(script) for script in (*SCRIPTS, *FINE_TUNING)} == files


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """config.json of each model beside a tokenizer of Qwen2.5's length; in MODEL-FP8 the config of a cast one."""
    root = tmp_path_factory.mktemp("it's models")
    tokenizer = json.dumps({"model": {"vocab": {str(number): number for number in range(TOKENS)}}})
    for model in PUBLISHED:
        for name, more in ((model, {}), (f"{model}-FP8", {"quantization_config": FP8})):
            (root / name).mkdir()
            (root / name / "config.json").write_text(json.dumps(hf_config(model) | more))
            (root / name / "tokenizer.json").write_text(tokenizer)
    return root


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("script", [script for script in (*SCRIPTS, *FINE_TUNING) if model_of(script) in PUBLISHED])
def test_the_recipe_fits_the_model(script, nodes, hub, tmp_path):
    """Sizes, rotary base, ties, embedding rows, blocks: by the checks that a launch makes."""
    folder = hub / model_of(script)
    several = ["--rdzv_endpoint", "node0:29400"] if "_CPT_" in script and nodes > 1 else []
    load = ["--load", "/stable/iter_0000100"] if script.endswith("_decay") else []
    flags = ["--nnodes", nodes, *several, *load]
    env = {"TOKENIZER_MODEL": str(folder), "HF_CHECKPOINT": str(folder)}
    said = ok(dry_run(script, *flags, out=tmp_path / "out", **env)).stderr
    assert f"model      {model_of(script)}, " in said
    warned = set(re.findall(r"^warning: (--[\w-]+)", said, re.MULTILINE))
    assert warned == ({"--scale-format"} if "_RL_" in script else set()), said  # this one is not quantised
    if "_RL_" in script:
        argv = program_arguments(command(script, *flags, out=tmp_path / "out", **env))
        cast = check.problems_of("slime", argv, hf_config=f"{folder}-FP8", world_size=8 * nodes, strict=True)
        heads = hf_config(model_of(script))["hidden_size"] // hf_config(model_of(script))["num_attention_heads"]
        assert [problem.flag for problem in cast] == (["--num-query-groups"] if heads % 128 else [])


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_trainer_is_split_in_whole_blocks(model, hub, tmp_path):
    """The TP sizes that FP8 allows follow from the config, and the model's rows are those of the HF weights at each."""
    argv = program_arguments(
        command(f"InfiR2_CPT_FP8_{model.removeprefix('qwen2.5-')}", "--from-scratch", out=tmp_path / "out")
    )
    argv = [str(hub / model) if word == "/models/qwen" else word for word in argv]
    passed = []
    for parts in range(1, 9):
        words = [*argv, "--tensor-model-parallel-size", str(parts), *(["--sequence-parallel"] if parts > 1 else [])]
        problems = check.problems_of("pretrain_gpt", words, hf_config=str(hub / model))
        if not [problem for problem in problems if problem.level == "error"]:
            passed.append(parts)
    assert passed == whole_block_splits(model)


# ---------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def small(tiny_data, tmp_path_factory) -> Path:
    """Qwen2.5-0.5B, its widths, heads and tie, with two layers and the tokens of a small tokenizer: random weights in
    hf/, as torch_dist in start/.
    """
    folder = tmp_path_factory.mktemp("it's small")
    tokens = json.loads((tiny_data / "tokenizer" / "config.json").read_text())
    tokens = {key: value for key, value in tokens.items() if key.endswith("_token_id") or key == "vocab_size"}
    config = hf_config("qwen2.5-0.5B") | {"num_hidden_layers": 2} | tokens
    models.save(folder / "hf", Qwen2Shape.from_hf_config(config), config=config)
    for file in (tiny_data / "tokenizer").iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder / "hf")
    tool("convert_hf_to_torch_dist", "--input-dir", folder / "hf", "--output-dir", folder / "start")
    return folder


def tool(name: str, *words: object) -> None:
    ok(run(sys.executable, REPO / "tools" / f"{name}.py", *words))


def launch(script: str, folder: Path, *flags: object, **env: object) -> str:
    """What a finished run of a recipe on the embedded engine printed."""
    scale = ["--engine", "embedded", "--num-layers", 2, "--make-vocab-size-divisible-by", 128]
    env = {"OUT_DIR": folder / script, "WANDB_PROJECT": "", **env}
    result = ok(run("bash", recipe(script), *scale, *flags, env={key: str(value) for key, value in env.items()}))
    assert re.search(r"^done: (iteration|rollout) (\d+) of \2,", result.stderr, re.MULTILINE), result.stderr
    return result.stdout


def test_pre_training_decay_and_conversion(small, tiny_data):
    """By the recipe's own files from Hugging Face weights, and back, cast to FP8."""
    env = {
        "INIT_CHECKPOINT": small / "start",
        "TOKENIZER_MODEL": small / "hf",
        "DATA_PATH": tiny_data / "text_text_document",
    }
    flags = ["--seq-length", 128, "--global-batch-size", 2, "--micro-batch-size", 2, "--lr-warmup-iters", 1]
    flags += ["--lr-wsd-decay-iters", 1, "--eval-iters", 1, "--save-interval", 2]
    said = launch("InfiR2_CPT_FP8_0.5B", small, *flags, "--train-iters", 3, **env)
    assert "FP8 rounding: 14 of 15 linear layers" in said
    full, decayed = (small / name / "checkpoints" for name in ("InfiR2_CPT_FP8_0.5B", "InfiR2_CPT_FP8_0.5B_decay"))
    launch("InfiR2_CPT_FP8_0.5B_decay", small, *flags, "--load", full / "iter_0000002", **env)
    tool("verify_checkpoint", full, decayed)  # the decay of the full run, from the same step

    back = ["--input-dir", full, "--origin-hf-dir", small / "hf"]
    tool("convert_torch_dist_to_hf", *back, "--output-dir", small / "out")
    tool("verify_checkpoint", full, small / "out")
    cast = ["--input-bf16-hf-path", small / "out", "--output-fp8-hf-path", small / "out_fp8"]
    cut = run(sys.executable, REPO / "tools" / "bf16_cast_fp8.py", *cast, "--check-tp", 2)
    assert cut.returncode != 0 and "448 per rank are 3.5 blocks" in cut.stderr and not (small / "out_fp8").exists()
    tool("bf16_cast_fp8", *cast, "--check-tp", 1)
    tool("verify_checkpoint", small / "out", small / "out_fp8")


def test_fine_tuning_and_reinforcement_learning(small):
    """RL from the weights of SFT, rollouts in FP8. The second stages: their files are those of the first and more."""
    arithmetic = REPO / "training" / "embedded" / "quickstart" / "arithmetic.py"
    rows = ["--pretrain", 1, "--stage1", 16, "--stage2", 16, "--rl", 16]
    ok(run(sys.executable, arithmetic, "--output-dir", small / "data", *rows))
    cast = ["--input-bf16-hf-path", small / "hf", "--output-fp8-hf-path", small / "hf_fp8"]
    tool("bf16_cast_fp8", *cast, "--force-pow-2-scale", "False")
    flags = ["--vocab-size", 2048, "--num-rollout", 2, "--save-interval", 2, "--rollout-batch-size", 4]
    rl = ["--n-samples-per-prompt", 2, "--over-sampling-batch-size", 4, "--rollout-max-response-len", 4]
    ray = {"RAY_TEMP_DIR": tempfile.mkdtemp(dir="/tmp"), "EVAL_DATA": "", "DYNAMIC_SAMPLING": "0"}
    before = small / "start"
    try:
        for script, data, model, more in (
            ("InfiR2_SFT_FP8_0.5B_stage2", "sft_stage2.jsonl", "hf", ["--global-batch-size", 4]),
            ("InfiR2_RL_FP8_0.5B_stage2", "rl.jsonl", "hf_fp8", [*rl, "--global-batch-size", 8]),
        ):
            files = {"REF_LOAD": before, "HF_CHECKPOINT": small / model, "DATA_DIR": small / "data" / data}
            said = launch(script, small, *flags, *more, **files, **ray)
            assert "FP8 rounding: 14 of 15 linear layers" in said
            before = small / script
    finally:
        run("bash", REPO / "scripts" / "ray_stop.sh", env={"RAY_TEMP_DIR": str(ray["RAY_TEMP_DIR"])})
        shutil.rmtree(ray["RAY_TEMP_DIR"])
