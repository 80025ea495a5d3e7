"""slime's command line: what is accepted, what follows from it, and one line for everything that is wrong with it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.scripts.launch import FINE_TUNING, ORIGINALS, command, original_command, program_arguments
from tests.training.embedded import tiny
from tests.training.embedded.tiny import without
from tools.checkpoint import torch_dist
from training.contract import contract
from training.embedded import arguments, train_arguments
from training.embedded.errors import TrainingError

HERE = Path("/nowhere")
OPTIONS = {option["dest"]: option for option in contract.load("slime").options}


def parse(*flags: object, kind: Sequence[object] = tiny.RL):
    return train_arguments.parse(tiny.argv(HERE, *flags, kind=kind), tell=lambda line: None)


def refusal(argv: list[str]) -> list[str]:
    """The lines of an error."""
    with pytest.raises(TrainingError) as error:
        train_arguments.parse(argv, tell=lambda line: None)
    lines = str(error.value).splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return lines


# ---------------------------------------------------------------- the recipes


@pytest.mark.parametrize("script", FINE_TUNING)
def test_every_recipe_is_accepted(script, tmp_path):
    (tmp_path / "out").mkdir()
    words = command(script, "--engine", "embedded", out=tmp_path / "out", KL_LOSS_COEF="0.001")
    told: list[str] = []
    args = train_arguments.parse(program_arguments(words), tell=told.append)
    assert train_arguments.is_sft(args) is ("SFT" in script)
    assert any("one device" in line and "--actor-num-nodes" in line for line in told)


@pytest.mark.parametrize("script", [name for name in FINE_TUNING if name in ORIGINALS])
def test_the_originals_need_their_named_changes_and_no_other(script):
    """max_position_embeddings is a placeholder in slime (set_default_megatron_args) and the model's here; slime, too,
    reads no directory of data; a KL term of coefficient 0 is the one thing that is refused.
    """
    argv = program_arguments(original_command(script))
    assert refusal(argv) == ["error: --max-position-embeddings: expected a value, found none"]
    argv += ["--max-position-embeddings", "32768"]
    (line,) = refusal(argv)
    if "SFT" in script:
        assert line.startswith("error: --prompt-data: expected a .jsonl or .parquet file, found /path/to/stage")
        argv += ["--prompt-data", "/path/to/data.jsonl"]
    else:
        assert line.startswith("error: --use-kl-loss: expected a --kl-loss-coef other than 0")
        argv = without(argv, "--use-kl-loss")
    args = train_arguments.parse(argv, tell=lambda line: None)
    assert args.global_batch_size == (64 if "SFT" in script else 2048) == train_arguments.samples_per_rollout(args)
    assert args.num_query_groups == (2 if "1.5B" in script else 4) and args.rotary_base == (
        10000 if "1.5B" in script else 1000000
    )
    if "RL" in script:
        stage2 = "stage2" in script
        assert args.over_sampling_batch_size == 384 and args.use_tis and args.tis_clip == 2.0
        assert args.eval_temperature == args.rollout_temperature == (1.1 if stage2 else 1.0)
        assert args.eval_top_p == 0.7 and args.eval_top_k == -1
        assert args.eval_prompt_data[0] == "aime" and args.eval_input_key == "prompt" and args.eval_label_key == "label"


# ---------------------------------------------------------------- the three groups of flags


def test_a_flag_is_in_one_group_and_slime_knows_it():
    inert = [dest for dests in train_arguments.INERT.values() for dest in dests]
    assert len(inert) == len(set(inert)) and not set(inert) & train_arguments.TRAIN.honoured
    known = OPTIONS.keys() | {option["dest"] for option in contract.load("pretrain_gpt").options}
    assert set(inert) <= known and train_arguments.TRAIN.honoured <= OPTIONS.keys()
    assert {dest for dest, _, _ in train_arguments.TRAIN.only} <= train_arguments.TRAIN.honoured | set(inert)
    assert set(train_arguments.TRAIN.required) <= train_arguments.TRAIN.honoured


def test_every_honoured_flag_is_read_somewhere():
    """By an attribute, or by its name in a text: one that nothing reads would be ignored silently."""
    listed = {"FINE_TUNING", "MODEL", "OPTIMIZATION", "PRETRAINING", "INERT", "POSITIVE"}
    read: set[str] = set()
    for path in (REPO / "training" / "embedded").glob("*.py"):
        tree = ast.parse(path.read_text())
        lists = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in listed]
        skipped = {id(node) for entry in lists for node in ast.walk(entry)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                read.add(node.value)
    for kind in ("rollout", "eval"):  # RolloutManager._sampling
        read |= {f"{kind}_{name}" for name in ("temperature", "top_p", "top_k", "max_response_len")}
    nothing_to_do = {
        "log_probs_max_tokens_per_gpu",  # slime sets it and never reads it
        "wandb_random_suffix",  # nothing here appends one
    }
    assert train_arguments.TRAIN.honoured - read == nothing_to_do


def test_an_inert_flag_of_pre_training_is_no_error():
    pieces = contract.split(contract.load("pretrain_gpt"), program_arguments(original_command("InfiR2_CPT_FP8_7B")))
    known = {option["dest"] for option in contract.load("pretrain_gpt").options}
    assert {dest for dests in arguments.INERT.values() for dest in dests} <= known | OPTIONS.keys()
    assert ["--use-mcore-models"] in pieces
    argv = tiny.words(*tiny.MODEL, "--use-mcore-models", "--no-persist-layer-norm")
    with pytest.raises(TrainingError) as error:
        arguments.parse(argv)
    assert "mcore" not in str(error.value) and "persist" not in str(error.value)


def test_inert_flags_are_named_once_by_reason():
    told: list[str] = []
    flags = ["--colocate", "--balance-data", "--colocate", "--sglang-mem-fraction-static", "0.5", "--use-flash-attn"]
    train_arguments.parse(tiny.argv(HERE, *flags, "--tensorboard-dir", "/traces"), tell=told.append)
    text = "\n".join(told)
    assert len(told) == 4 and text.count("--colocate") == 1
    assert "no effect on the embedded engine (one device: there is nothing to place, offload or balance)" in text
    assert "no effect on the embedded engine (the rollout engine here is not SGLang): --sglang-mem-fraction" in text
    assert "(profiles CUDA): --tensorboard-dir" in text and "--use-flash-attn" in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--partial-rollout"],
        ["--rollout-max-prompt-len", "100"],
        ["--rollout-stop", "text"],
        ["--use-rollout-logprobs"],
        ["--normalize-advantages"],
        ["--custom-rm-path", "a.b"],
        ["--save-debug-rollout-data", "x"],
        ["--pretrained-checkpoint", "x"],
        ["--train-iters", "5"],
        ["--seq-length", "128"],
    ],
    ids=lambda flags: flags[0],
)
def test_what_the_engine_does_not_do_is_refused_by_name(flags):
    (line,) = refusal(tiny.argv(HERE, *flags))
    flag = flags[0]
    if OPTIONS.get(flag[2:].replace("-", "_")):
        assert line == f"error: {flag}: the embedded engine does not do this; run it on slime (--engine megatron)"
    else:
        assert line.startswith(f"error: {flag}: slime does not know this flag")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train-backend", "fsdp"], "--train-backend megatron"),
        (
            ["--rollout-function-path", "my.rollout"],
            f"{train_arguments.SFT_ROLLOUT} or {train_arguments.RL_ROLLOUT}",
        ),
        (["--loss-type", "custom_loss"], "--loss-type sft_loss or policy_loss"),
        (["--loss-mask-type", "distill_qwen"], "--loss-mask-type qwen"),
        (["--advantage-estimator", "gspo"], "--advantage-estimator grpo"),
        (["--dynamic-sampling-filter-path", "my.filter"], train_arguments.NONZERO_STD),
        (["--kl-coef", "0.1"], "--kl-coef 0 (a KL term is --use-kl-loss)"),
        (["--disable-rewards-normalization"], "normalised rewards"),
        (["--optimizer", "sgd"], "--optimizer adam"),
        (["--normalization", "LayerNorm"], "--normalization RMSNorm"),
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.0"),
        (["--fp8-format", "hybrid", "--fp8-recipe", "blockwise"], "--fp8-format e4m3"),
        (["--ckpt-format", "torch"], "--ckpt-format torch_dist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_only_what_the_recipes_use_is_accepted(flags, words):
    line = refusal(tiny.argv(HERE, *flags))[0]
    assert line.startswith(f"error: {flags[0]}: the embedded engine trains only with {words}, found {flags[0]} = ")


@pytest.mark.parametrize("dest", [dest for dest in train_arguments.TRAIN.required if dest != "lr"])  # it has a default
def test_required_flags(dest):
    flag = OPTIONS[dest]["options"][0]
    assert f"error: {flag}: expected a value, found none" in refusal(without(tiny.argv(HERE), flag))


def test_all_problems_are_told_at_once():
    lines = refusal([*without(tiny.argv(HERE), "--ref-load"), "--partial-rollout", "--optimizer", "sgd", "--nonsense"])
    assert len(lines) == 4 and {line.split(":")[1] for line in lines} == {
        " --ref-load",
        " --partial-rollout",
        " --optimizer",
        " --nonsense",
    }


# ---------------------------------------------------------------- derived values


def test_what_slime_sets_itself():
    args = parse()
    assert args.bf16 and args.position_embedding_type == "rope" and not args.finetune
    assert args.kv_channels == 64 and args.ffn_hidden_size == 256
    assert args.over_sampling_batch_size == args.rollout_batch_size == 4
    assert (args.eps_clip, args.eps_clip_high) == (0.2, 0.2)
    assert args.n_samples_per_prompt == 1 and args.grpo_std_normalization is False


def test_what_is_given_is_kept():
    args = parse(
        *("--eps-clip-high", 0.28, "--n-samples-per-prompt", 8, "--over-sampling-batch-size", 9),
        *("--global-batch-size", 32, "--kv-channels", 32),
    )
    assert (args.eps_clip, args.eps_clip_high) == (0.2, 0.28)
    assert args.grpo_std_normalization and args.over_sampling_batch_size == 9 and args.kv_channels == 32
    assert not parse("--n-samples-per-prompt", 8, "--disable-grpo-std-normalization").grpo_std_normalization


def test_steps_per_rollout_give_the_batch_size():
    eight = ["--n-samples-per-prompt", 8]
    argv = without(tiny.argv(HERE, *eight, "--num-steps-per-rollout", 4), "--global-batch-size")
    assert train_arguments.parse(argv, tell=lambda line: None).global_batch_size == 8
    assert parse(*eight, "--num-steps-per-rollout", 4, "--global-batch-size", 8).global_batch_size == 8
    assert refusal(tiny.argv(HERE, *eight, "--num-steps-per-rollout", 2, "--global-batch-size", 8)) == [
        "error: --num-steps-per-rollout: expected 4, as --global-batch-size 8 cuts the 32 samples of a rollout, found 2"
    ]
    argv = without(tiny.argv(HERE, "--num-steps-per-rollout", 100), "--global-batch-size")
    assert refusal(argv)[0].startswith("error: --num-steps-per-rollout: expected 4")


def test_evaluation_follows_the_rollout_where_nothing_is_said():
    sampling = [
        *("--rollout-temperature", 0.8, "--rollout-top-p", 0.9, "--rollout-top-k", 20),
        *("--rollout-max-response-len", 77),
    ]
    args = parse(*sampling)
    found = [getattr(args, f"eval_{name}") for name in ("temperature", "top_p", "top_k", "max_response_len")]
    assert found == [0.8, 0.9, 20, 77] and (args.eval_input_key, args.eval_label_key) == ("prompt", "label")
    own = [
        *("--eval-temperature", 0, "--eval-top-p", 0.5, "--eval-top-k", 3, "--eval-max-response-len", 9),
        *("--eval-input-key", "question", "--eval-label-key", "answer"),
    ]
    args = parse(*sampling, *own)
    found = [getattr(args, f"eval_{name}") for name in ("temperature", "top_p", "top_k", "max_response_len")]
    assert found == [0.0, 0.5, 3, 9] and (args.eval_input_key, args.eval_label_key) == ("question", "answer")


def test_one_evaluation_file_is_aime():
    assert parse("--eval-prompt-data", "/a.jsonl").eval_prompt_data == ["aime", "/a.jsonl"]
    two = ["x", "/a.jsonl", "y", "/b.jsonl"]
    assert parse("--eval-prompt-data", *two).eval_prompt_data == two


def test_the_length_of_a_run():
    args = parse("--n-samples-per-prompt", 8, "--global-batch-size", 16)
    assert train_arguments.set_length(args, 3) is None
    assert (args.num_rollout, args.train_iters) == (4, 4 * 32 // 16)
    argv = without(tiny.argv(HERE, "--num-epoch", 5, kind=tiny.SFT), "--num-rollout")
    args = train_arguments.parse(argv, tell=lambda line: None)
    assert train_arguments.set_length(args, 3) == 3 and (args.num_rollout, args.train_iters) == (15, 15)
    args = parse("--num-epoch", 5)  # as in slime, --num-rollout wins
    assert train_arguments.set_length(args, 3) is None and args.num_rollout == 4


# ---------------------------------------------------------------- one line for everything that is wrong


@pytest.mark.parametrize("dest", train_arguments.POSITIVE)
def test_counts_are_positive(dest):
    flag = OPTIONS[dest]["options"][0]
    for value in (0, -1):
        assert f"error: {flag}: expected at least 1, found {value}" in refusal(tiny.argv(HERE, flag, value))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--prompt-data", "/data/train"],
            "error: --prompt-data: expected a .jsonl or .parquet file, found /data/train",
        ),
        (
            ["--use-kl-loss", "--kl-loss-coef", "0"],
            "error: --use-kl-loss: expected a --kl-loss-coef other than 0: the term would cost a forward pass of the "
            "reference model and change nothing",
        ),
        (
            ["--global-batch-size", "3"],
            "error: --global-batch-size: expected a divisor of the 4 samples of a rollout, found 3",
        ),
        (
            ["--over-sampling-batch-size", "3"],
            "error: --over-sampling-batch-size: expected at least --rollout-batch-size 4, found 3",
        ),
        (
            ["--num-query-groups", "3", "--num-attention-heads", "4"],
            "error: --num-query-groups: expected a divisor of the 4 attention heads, found 3",
        ),
        (["--min-lr", "0.1"], "error: --min-lr: expected at most --lr 0.001, found 0.1"),
        (
            ["--save", "/out"],
            "error: --save-interval: expected a positive number, since --save is given, found none",
        ),
        (
            ["--save", "/out", "--save-interval", "1"],
            "error: --save-interval: expected at least 2, found 1: one after rollout 0 is none that Megatron loads, as "
            "its tracker would name iteration 0",
        ),
        (
            ["--lr-decay-style", "WSD"],
            "error: --lr-wsd-decay-iters: expected a value, since --lr-decay-style is WSD, found none",
        ),
        (["--rollout-temperature", "0"], "error: --rollout-temperature: expected a positive number, found 0.0"),
        (["--rollout-top-p", "0"], "error: --rollout-top-p: expected more than 0 and at most 1, found 0.0"),
        (["--eval-temperature", "-1"], "error: --eval-temperature: expected at least 0, found -1.0"),
        (["--eval-top-p", "1.5"], "error: --eval-top-p: expected more than 0 and at most 1, found 1.5"),
        (
            ["--eval-interval", "2"],
            "error: --eval-prompt-data: expected NAME FILE pairs, since --eval-interval is given, found none",
        ),
        (["--eval-prompt-data", "a", "b", "c"], "error: --eval-prompt-data: expected NAME FILE pairs, found a b c"),
        (
            ["--rm-type", "f1"],
            "error: --rm-type: expected one of deepscaler, math, dapo, or boxed_ and one of them, found 'f1'",
        ),
        (
            ["--debug-train-only"],
            f"error: --rollout-function-path: expected {train_arguments.SFT_ROLLOUT} with the flags of SFT, found "
            f"{train_arguments.RL_ROLLOUT}",
        ),
        (
            ["--loss-type", "sft_loss"],
            f"error: --rollout-function-path: expected {train_arguments.SFT_ROLLOUT} with the flags of SFT, found "
            f"{train_arguments.RL_ROLLOUT}",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_each(flags, line):
    assert refusal(tiny.argv(HERE, *flags)) == [line]


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("--num-rollout", "error: --num-rollout: expected it or --num-epoch, found neither"),
        ("--global-batch-size", "error: --global-batch-size: expected a value, found none"),
        (
            "--max-tokens-per-gpu",
            "error: --max-tokens-per-gpu: expected a value, since --use-dynamic-batch-size is given",
        ),
        ("--label-key", "error: --label-key: expected the key of the right answer, found none"),
        (
            "--rm-type",
            "error: --rm-type: expected one of deepscaler, math, dapo, or boxed_ and one of them, found ''",
        ),
    ],
)
def test_one_line_for_what_is_missing(gone, line):
    assert refusal(without(tiny.argv(HERE), gone)) == [line]


def test_micro_batches_of_a_fixed_size_divide_the_batch():
    argv = without(tiny.argv(HERE, "--micro-batch-size", 3), "--use-dynamic-batch-size", "--max-tokens-per-gpu")
    assert refusal(argv) == ["error: --micro-batch-size: expected a divisor of --global-batch-size 4, found 3"]


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--loss-type sft_loss", ["--loss-type", "policy_loss"]),
        ("--calculate-per-token-loss", None),
        ("--disable-compute-advantages-and-returns", None),
        ("--debug-train-only", None),
        ("--n-samples-per-prompt 1", ["--n-samples-per-prompt", 2]),
    ],
)
def test_sft_needs_its_flags(flag, change):
    argv = tiny.argv(HERE, *(change or []), kind=tiny.SFT)
    argv = argv if change else without(argv, flag)
    assert refusal(argv) == [f"error: {flag}: expected with {train_arguments.SFT_ROLLOUT}, not found"]


def test_an_epoch_is_at_least_one_rollout():
    args = train_arguments.parse(
        without(tiny.argv(HERE, "--num-epoch", 2, kind=tiny.SFT), "--num-rollout"), tell=lambda line: None
    )
    with pytest.raises(TrainingError) as error:
        train_arguments.set_length(args, 0)
    assert str(error.value) == (
        "error: --prompt-data: expected at least --rollout-batch-size 4 samples, found fewer in /nowhere/data.jsonl"
    )


def test_an_epoch_that_is_saved_is_two_rollouts():
    flags = ["--num-epoch", 2, "--save", "/out", "--save-interval", 5]
    argv = without(tiny.argv(HERE, *flags, kind=tiny.SFT), "--num-rollout")
    with pytest.raises(TrainingError) as error:
        train_arguments.set_length(train_arguments.parse(argv, tell=lambda line: None), 1)
    assert str(error.value).startswith(
        "error: --num-epoch: expected data of at least two rollouts, found one in /nowhere/data.jsonl: an epoch ends "
    )
    assert train_arguments.set_length(train_arguments.parse(argv, tell=lambda line: None), 2) == 2
    assert train_arguments.set_length(train_arguments.parse(without(argv, "--save"), tell=lambda line: None), 1) == 1


def test_a_warm_up_is_shorter_than_the_run():
    args = parse("--lr-warmup-iters", 4)
    with pytest.raises(TrainingError) as error:
        train_arguments.set_length(args, 1)
    assert str(error.value) == (
        "error: --lr-warmup-iters: expected fewer than the 4 iterations of the schedule, found 4"
    )


# ---------------------------------------------------------------- where a run starts


def started(root: Path, tracker: int | str | None, *flags: object):
    (root / "out").mkdir()
    if tracker is not None:
        torch_dist.write_tracker(root / "out", tracker)
    args = parse("--load", root / "out", "--ref-ckpt-step", 7, *flags)
    train_arguments.choose_start(args)
    return args


@pytest.mark.parametrize("flags", [[], ["--start-rollout-id", 3]])
def test_without_a_tracker_weights_come_from_the_previous_stage(tmp_path, flags):
    args = started(tmp_path, None, *flags)
    assert (args.load, args.ckpt_step, args.finetune, args.start_rollout_id) == ("/nowhere/start", 7, True, 0)
    args = parse()
    train_arguments.choose_start(args)
    assert (args.load, args.finetune, args.start_rollout_id) == ("/nowhere/start", True, 0)


def test_with_a_tracker_the_run_goes_on(tmp_path):
    args = started(tmp_path, 5, "--start-rollout-id", 6)
    assert (args.load, args.ckpt_step, args.finetune, args.start_rollout_id) == (str(tmp_path / "out"), None, False, 6)


@pytest.mark.parametrize("start", [None, 0, 5, 7])
def test_another_start_than_the_trackers_is_refused(tmp_path, start):
    with pytest.raises(TrainingError) as error:
        started(tmp_path, 5, *([] if start is None else ["--start-rollout-id", start]))
    assert str(error.value) == (
        f"error: --start-rollout-id: expected 6, one more than the tracker in {tmp_path}/out says, found {start}"
    )


def test_a_converted_checkpoint_is_no_run(tmp_path):
    with pytest.raises(TrainingError) as error:
        started(tmp_path, "release", "--start-rollout-id", 1)
    assert str(error.value) == (
        f"error: --load: expected a run's own checkpoints, found a converted one ('release') in {tmp_path}/out; "
        "name it with --ref-load"
    )


# ---------------------------------------------------------------- the other program's


@pytest.mark.parametrize("dest", arguments.POSITIVE)
def test_counts_of_pre_training_are_positive(dest):
    flag = OPTIONS[dest]["options"][0]
    with pytest.raises(TrainingError) as error:
        arguments.parse(
            tiny.words(
                *(*tiny.MODEL, "--position-embedding-type", "rope", "--micro-batch-size", 1, "--seq-length", 8),
                *("--train-iters", 2, "--lr", 1, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "x"),
                *(flag, 0),
            ),
            tell=lambda line: None,
        )
    assert f"error: {flag}: expected at least 1, found 0" in str(error.value).splitlines()
