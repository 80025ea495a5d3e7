"""The contract itself: parsing like the pinned program, the model's config.json, and the command line of check.py."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import REPO, model_args, ok, run
from tests.training.contract.test_rules import BASE
from tests.training.contract.test_slime_rules import RL
from training.contract import check, contract

PROGRAM = contract.load("pretrain_gpt")
CHECK = REPO / "training" / "contract" / "check.py"
DUMP = REPO / "training" / "contract" / "dump_flags.py"


def messages(argv: list[str], **options) -> list[str]:
    return [str(problem) for problem in check.problems_of("pretrain_gpt", argv, **options)]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lerning-rate", "1"], "error: --lerning-rate: Megatron-LM does not know this flag"),
        (["--num-layer", "4"], "did you mean --num-layers?"),
        (["--lr", "fast"], "error: --lr: expected a number, found 'fast'"),
        (["--num-layers", "4.5"], "error: --num-layers: expected an integer, found '4.5'"),
        (["--num-layers"], "error: --num-layers: expected one value, found nothing"),
        (["--num-layers", "4", "5"], "error: --num-layers: expected one value, found '4' '5'"),
        (["--bf16", "yes"], "error: --bf16: expected no value, found 'yes'"),
        (["--fp8-recipe", "blocks"], "error: --fp8-recipe: expected one of "),
        (["stray"], "'stray'"),
    ],
)
def test_what_argparse_refuses_is_one_line(extra, message):
    found = messages([*BASE, *extra]) if extra != ["stray"] else messages([*extra, *BASE])
    assert len(found) == 1 and message in found[0] and "\n" not in found[0]


def test_all_problems_are_reported_at_once():
    found = messages([*BASE, "--lerning-rate", "1", "--lr", "fast", "--bf16", "yes"])
    assert [line.split(": ")[1] for line in found] == ["--lerning-rate", "--lr", "--bf16"]


def test_the_last_value_counts_and_equals_signs_work():
    args, seen, problems = contract.parse(PROGRAM, ["--lr", "1", "--lr=2", "--data-path", "0.5", "a b", "-1", "c"])
    assert problems == [] and args.lr == 2.0 and args.data_path == ["0.5", "a b", "-1", "c"]
    assert seen["lr"] == "--lr"


def test_slime_knows_megatrons_and_sglangs_flags():
    assert check.problems_of("slime", [*RL, "--sglang-mem-fraction-static", "0.5"]) == []
    unknown, missing = map(str, check.problems_of("slime", ["--rollout-batch", "8"]))
    assert "did you mean --rollout-batch-size?" in unknown and "is required and missing" in missing


CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
}
QWEN = [
    *BASE,
    *"--normalization RMSNorm --norm-epsilon 1e-6 --add-qkv-bias --rotary-base 1000000".split(),
    *"--attention-dropout 0.0 --hidden-dropout 0.0".split(),
]


def with_config(tmp_path, change: dict, argv: list[str] = QWEN) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    return messages(argv, hf_config=str(tmp_path))


def test_the_config_that_fits(tmp_path):
    assert with_config(tmp_path, {}) == []
    newer = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    assert with_config(tmp_path, newer) == []


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"num_hidden_layers": 5}, "--num-layers"),
        ({"hidden_size": 1024, "head_dim": 128}, "--hidden-size"),
        ({"intermediate_size": 2048}, "--ffn-hidden-size"),
        ({"num_attention_heads": 8, "head_dim": 128}, "--num-attention-heads"),
        ({"num_key_value_heads": 2}, "--num-query-groups"),
        ({"rope_theta": 10000.0}, "--rotary-base"),
        ({"rms_norm_eps": 1e-5}, "--norm-epsilon"),
        ({"tie_word_embeddings": False}, "--untie-embeddings-and-output-weights"),
        ({"attention_dropout": 0.1}, "--attention-dropout"),
    ],
)
def test_every_difference_from_the_config_is_named(tmp_path, change, flag):
    found = with_config(tmp_path, change)
    assert len(found) == 1 and found[0].startswith(f"error: {flag}: "), found


def test_the_rotary_base_of_the_original_is_caught(tmp_path):
    """10000, Megatron's default, where Qwen2.5 has 1e6."""
    without = [word for word in QWEN if word not in ("--rotary-base", "1000000")]
    (found,) = with_config(tmp_path, {}, without)
    assert "--rotary-base" in found and "1000000" in found and "10000 " in found.replace(",", " ") + " "


def test_embedding_rows_are_compared(tiny_data):
    argv = [
        *model_args("qwen2.5-tiny"),
        *"--seq-length 128 --micro-batch-size 1 --lr 1 --train-iters 1 --bf16 --attention-dropout 0.0".split(),
        *"--hidden-dropout 0.0 --tokenizer-type HuggingFaceTokenizer".split(),
        *("--tokenizer-model", str(tiny_data / "tokenizer"), "--make-vocab-size-divisible-by"),
    ]
    assert messages([*argv, "128"], hf_config=str(tiny_data / "tokenizer")) == []
    (found,) = messages([*argv, "1000"], hf_config=str(tiny_data / "tokenizer"))
    assert found.startswith("error: --make-vocab-size-divisible-by: ") and "3000" in found and "2048" in found


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "llama"}'])
def test_a_config_that_is_not_one(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    found = messages(QWEN, hf_config=str(tmp_path))[0]
    assert found.startswith("error: ") and str(tmp_path) in found


# ---------------------------------------------------------------- the programs


def test_exit_status_of_check():
    assert run(sys.executable, CHECK, "--program", "pretrain_gpt", "--", *BASE).returncode == 0
    failed = run(sys.executable, CHECK, "--program", "pretrain_gpt", "--", *BASE, "--lr", "x")
    assert failed.returncode == 1 and failed.stderr.startswith("error: --lr: expected a number, found 'x'")
    assert run(sys.executable, CHECK, "--program", "other", "--").returncode == 2


def test_check_needs_no_package_and_is_quick(tmp_path):
    """-S -I: without site-packages, as on a login node."""
    ok(run(sys.executable, "-S", "-I", CHECK, "--program", "slime", "--", *RL, cwd=tmp_path))


def test_padded_vocab_is_printed(tiny_data):
    model = ["--tokenizer-model", tiny_data / "tokenizer", "--make-vocab-size-divisible-by", "1000"]
    result = ok(run(sys.executable, CHECK, "--program", "pretrain_gpt", "--padded-vocab", "--", *BASE, *model))
    assert result.stdout == "3000\n"


def test_dump_flags_names_the_submodule_that_is_not_there(tmp_path):
    import shutil

    (tmp_path / "training").mkdir()
    shutil.copytree(REPO / "training" / "contract", tmp_path / "training" / "contract")
    result = run(sys.executable, tmp_path / "training" / "contract" / "dump_flags.py", "--check")
    assert result.returncode == 1 and "training/Megatron-LM: not initialised" in result.stderr


def test_dump_flags_describes_a_parser_as_recorded():
    """Our record, replayed as a parser and described again, is the record: nothing is lost on the way."""
    import argparse

    from training.contract import dump_flags

    recorded = json.loads((REPO / "training" / "contract" / "sglang-server.json").read_text())
    parser = argparse.ArgumentParser(allow_abbrev=False)
    dump_flags.replay(parser, dump_flags.recorded_calls())
    assert dump_flags.describe(parser) == [{**row, "group": "options"} for row in recorded["options"]]
