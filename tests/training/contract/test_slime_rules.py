"""slime: every rule and inert flag fires where it should, and the checkpoint of the engines is compared."""

from __future__ import annotations

import json
import re
import shlex
import struct
import sys
from pathlib import Path

import pytest

from tests.conftest import PUBLISHED, REPO, hf_config, ok, run, whole_block_splits
from tests.tools import models
from tests.training.contract import test_rules
from training.contract import check, contract, fp8_scales, inert, rules, slime_inert, slime_rules
from training.contract.hf_model import ModelError
from training.contract.setup import SlimeSetup

PROGRAM = contract.load("slime")
CHECK = REPO / "training" / "contract" / "check.py"
CAST = REPO / "tools" / "bf16_cast_fp8.py"

MODEL = (
    "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 4 --group-query-attention"
    " --num-query-groups 4 --swiglu --add-qkv-bias --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6"
    " --position-embedding-type rope --rotary-base 1000000 --max-position-embeddings 128 --attention-dropout 0.0"
    " --hidden-dropout 0.0 --transformer-impl transformer_engine --bf16 --vocab-size 2048"
)
RUN = "--hf-checkpoint hf --ref-load ref --load out --save out --save-interval 10 --lr 1e-6"
RL = shlex.split(
    f"{MODEL} {RUN} --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate --prompt-data p.jsonl --input-key prompt"
    " --label-key label --apply-chat-template --rm-type deepscaler --num-rollout 100 --rollout-batch-size 16"
    " --n-samples-per-prompt 4 --global-batch-size 64 --rollout-max-response-len 64 --use-dynamic-batch-size"
    " --max-tokens-per-gpu 512 --rollout-num-gpus-per-engine 4 --tensor-model-parallel-size 2 --sequence-parallel"
)
SFT = shlex.split(
    f"{MODEL} {RUN} --actor-num-nodes 1 --actor-num-gpus-per-node 8 --prompt-data p.parquet --input-key messages"
    " --rollout-function-path slime.rollout.sft_rollout.generate_rollout --num-epoch 5 --rollout-batch-size 64"
    " --global-batch-size 64 --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns"
    " --debug-train-only --use-dynamic-batch-size --max-tokens-per-gpu 512 --tensor-model-parallel-size 2"
    " --sequence-parallel --lr-warmup-fraction 0.05"
)
EVAL = "--eval-interval 10 --eval-prompt-data aime a.jsonl"
ENGINES = "-colocate --rollout-num-gpus 8"
FILTER = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"

ONE_GPU = ["--rollout-num-gpus-per-engine", "1"]

# Rule -> flags added to a base, RL unless the text begins with "SFT"; "-name" removes that flag from it.
# {name} is a directory that `directories` makes.
CASES: dict[str, str] = {
    **{
        f"--{name} positive": f"--{name} 0"
        for name in (
            "actor-num-nodes actor-num-gpus-per-node rollout-batch-size n-samples-per-prompt num-steps-per-rollout"
            " num-rollout save-interval max-tokens-per-gpu rollout-num-gpus-per-engine num-gpus-per-node"
            " rollout-max-response-len lr-decay-iters sglang-data-parallel-size"
        ).split()
    },
    "--num-epoch positive": "SFT --num-epoch 0",
    "--eval-interval positive": "--eval-interval 0 --eval-prompt-data aime a.jsonl",
    "run_length": "-num-rollout",
    "batch_size": "-global-batch-size",
    # slime's validation
    "reference_exists": "-ref-load --use-kl-loss --kl-loss-coef 0.1",
    "--eval-interval needs --eval-prompt-data": "--eval-interval 10",
    "eval_pairs": f"{EVAL} gpqa",
    "eval_name": "--eval-interval 10 --eval-prompt-data a.jsonl",
    "--save-interval needs --save": "-save",
    "--kl-coef with --kl-loss-coef": "--kl-coef 0.1 --use-kl-loss --kl-loss-coef 0.1",
    "--advantage-estimator needs --normalize-advantages for reinforce_plus_plus and reinforce_plus_plus_baseline": (
        "--advantage-estimator reinforce_plus_plus"
    ),
    "--use-dynamic-batch-size needs --max-tokens-per-gpu": "-max-tokens-per-gpu",
    "--debug-rollout-only with --debug-train-only or --load-debug-rollout-data": (
        "--debug-rollout-only --load-debug-rollout-data x"
    ),
    "batch_is_steps": "--num-steps-per-rollout 2",
    "samples_divisible": "--global-batch-size 48",
    "over_sampling": "--over-sampling-batch-size 8",
    "--num-epoch with --disable-rollout-global-dataset": "SFT --disable-rollout-global-dataset",
    "--sglang-data-parallel-size needs --sglang-enable-dp-attention": "--sglang-data-parallel-size 2",
    "--use-hf-config-for-megatron needs a mapper for the model type, and slime registers none": (
        "--use-hf-config-for-megatron"
    ),
    "--colocate with train_async.py": "train_async.py",
    # GPUs
    "expert_world": "--expert-tensor-parallel-size 3",
    "--expert-model-parallel-size needs --sequence-parallel beside tensor parallelism": (
        "-sequence-parallel --expert-model-parallel-size 2 --num-experts 4"
    ),
    "context_parallel_size": "-tensor-model-parallel-size -sequence-parallel --actor-num-gpus-per-node 6"
    " --num-gpus-per-node 6 --rollout-num-gpus-per-engine 2 --context-parallel-size 3",
    "tokens_per_rank": "--tensor-model-parallel-size 3",
    "groups_per_rank": "--balance-data --rollout-batch-size 2 --n-samples-per-prompt 32",
    "engines_have_gpus": "-colocate",
    "whole_engines": "-colocate --rollout-num-gpus 6",
    "engines_on_nodes": "--actor-num-nodes 3 --rollout-num-gpus-per-engine 3",
    "nodes_of_engines": "--num-gpus-per-node 4",
    "engine_heads": "--rollout-num-gpus-per-engine 8",
    "engine_ffn": "--ffn-hidden-size 1022",
    "--sglang-pipeline-parallel-size with slime unless it is 1: an engine is given --rollout-num-gpus-per-engine GPUs"
    " for tensor parallelism alone": "--sglang-pipeline-parallel-size 2",
    "--rollout-external needs --rollout-external-engine-addrs": "--rollout-external",
    "--use-routing-replay needs a Megatron-LM with slime's patches, the pinned one has none": "--use-routing-replay",
    # training steps
    "no_overlap": "--overlap-grad-reduce",
    "manual_gc_interval": "--manual-gc --manual-gc-interval -1",
    "warmup_ends_before_decay": "--lr-warmup-iters 100",
    "warmup_is_a_part": "--lr-warmup-fraction 1.0",
    "one_warmup": "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
    "wsd_decay_given": "--lr-decay-style WSD",
    "--loss-type needs --custom-loss-function-path for custom_loss": "--loss-type custom_loss",
    "temperature": "--rollout-temperature 0",
    "tis_range": "--use-tis --tis-clip-low 2.0",
    "--use-tis needs a rollout function that records log-probabilities, sft_rollout does not": (
        "--use-tis --rollout-function-path slime.rollout.sft_rollout.generate_rollout"
    ),
    "longest_response_fits": "--rollout-max-response-len 513",
    # data, rollouts, rewards
    "tokenizer_given": "-hf-checkpoint",
    "ffn_given": "-ffn-hidden-size",
    "prompt_data": "--prompt-data p.json",
    "eval_data": f"{EVAL} gpqa /data/gpqa",
    "--rollout-function-path with --disable-rollout-global-dataset": "--disable-rollout-global-dataset",
    "--tokenizer-model needs --tokenizer-type": "--tokenizer-model t",
    "prompt_length": "--rollout-max-prompt-len 100",
    "reward_given": "-rm-type",
    "reward_known": "--rm-type maths",
    "--rm-type needs --rm-url for remote_rm": "--rm-type boxed_remote_rm",
    "reward_key": "--rm-type dapo",
    "label_key": "-label-key",
    "--group-rm with --eval-interval": f"--group-rm {EVAL}",
    "group_of_one": "--n-samples-per-prompt 1 --global-batch-size 16",
    "filter_of_one": f"--n-samples-per-prompt 1 --global-batch-size 16 --dynamic-sampling-filter-path {FILTER}",
    "eval_temperature": f"{EVAL} --rollout-temperature 1.1",
    **{f"{flag} exists": f"{flag} slime.rollout.no_such.function" for flags in slime_rules.FUNCTIONS for flag in flags},
    # supervised fine-tuning
    "--n-samples-per-prompt with sft_rollout unless it is 1": "SFT --n-samples-per-prompt 2",
    "--eval-interval with sft_rollout, which cannot evaluate (nor can --debug-train-only, which leaves it out)": (
        f"SFT -debug-train-only {EVAL}"
    ),
    "--apply-chat-template with sft_rollout, which applies it to the messages itself": "SFT --apply-chat-template",
    "--rollout-function-path needs --loss-type sft_loss for sft_rollout, whose rewards are all 0": "SFT -loss-type",
    "--loss-type needs --rollout-function-path slime.rollout.sft_rollout.generate_rollout for sft_loss": (
        "SFT -rollout-function-path"
    ),
    "--loss-type needs --debug-train-only for sft_loss, or SGLang engines are started for nothing": (
        "SFT -debug-train-only"
    ),
    "--loss-type needs --disable-compute-advantages-and-returns for sft_loss, or each step runs a forward pass for"
    " nothing": "SFT -disable-compute-advantages-and-returns",
    "--loss-type needs --calculate-per-token-loss for sft_loss, or a short answer weighs as much as a long one": (
        "SFT -calculate-per-token-loss"
    ),
    "--disable-compute-advantages-and-returns with --loss-type policy_loss": (
        "--disable-compute-advantages-and-returns"
    ),
    "nothing_to_train_on": "--debug-train-only",
    # start, resume, checkpoints
    "load_is_save": "--load other",
    "saves": "-save -save-interval",
    "starts_from_something": "-ref-load",
    "checkpoint_root": "--ref-load ref/iter_0000100",
    "reference_has_tracker": "--ref-load {bare}",
    "tracker_is_a_rollout": "--load {first} --save {first}",
    "resume_point": "--load {seventh} --save {seventh}",
    "data_position": "--load {dataless} --save {dataless} --start-rollout-id 8",
    "--finetune with --load, the directory of the run itself: every resume would lose the optimizer and the schedule": (
        "--finetune"
    ),
    "--no-load-optim with --load, the directory of the run itself: every resume would lose the optimizer and the"
    " schedule": "--no-load-optim",
    "--ckpt-step with --load, the directory of the run itself: every resume would go back to this step": (
        "--ckpt-step 5"
    ),
    "first_save": "--save-interval 1",
    "last_save": "--save-interval 30",
    "async_save": "--async-save",
    "async_resume": f"train_async.py {ENGINES}",
    "vocabulary_given": "-vocab-size",
    # metrics, profiling
    "--use-tensorboard needs --tb-project-name (or TENSORBOARD_DIR)": "--use-tensorboard",
    "--tensorboard-dir needs --use-tensorboard and --tb-project-name, slime logs nothing to it": "--tensorboard-dir t",
    "--use-wandb needs --wandb-group": "--use-wandb",
    "secret": "--use-wandb --wandb-group g --wandb-key k",
    "--use-pytorch-profiler needs --tensorboard-dir for its traces": "--use-pytorch-profiler",
    "profile_window": "--use-pytorch-profiler --tensorboard-dir t --profile-step-start 3 --profile-step-end 3",
    "profiling": "--use-pytorch-profiler --tensorboard-dir t",
    "memory_history": "--record-memory-history",
    "snapshot_name": "--record-memory-history --memory-snapshot-path /tmp/x.pickle",
}
ALL = {entry.name: entry for entry in [*slime_rules.REQUIRED, *slime_rules.RULES]}

# Megatron's rules that hold for slime, but that nothing breaks: slime sets what they ask for, or refuses before them.
KEPT_BY_SLIME = {
    "--global-batch-size positive",
    "--micro-batch-size required",
    "--max-position-embeddings required",
    "--seq-length required",
    "--lr required",
    "--seq-length positive",
    "--overlap-param-gather needs --use-distributed-optimizer",
    "--overlap-param-gather-with-optimizer-step needs --use-distributed-optimizer",
    "--fp8-param-gather needs --use-distributed-optimizer",
    "--use-precision-aware-optimizer needs --use-distributed-optimizer",
    "--fp32-residual-connection needs --bf16 or --fp16",
    "positions_cover_sequence",
    "--load-main-params-from-ckpt needs --no-load-optim",
}


def command(change: str, base: list[str] | None = None) -> list[str]:
    """A base with the leading -names removed and the rest added."""
    words = shlex.split(change)
    base = base or (SFT if words[:1] == ["SFT"] else RL)
    words = words[1:] if words[:1] == ["SFT"] else words
    entrypoint = [words.pop(0)] if words and words[0].endswith(".py") else []
    removed = set()
    while words and words[0].startswith("-") and not words[0].startswith("--"):
        removed.add("-" + words.pop(0))
    kept = [piece for piece in contract.split(PROGRAM, base) if contract.flag_of(piece) not in removed]
    return [*entrypoint, *(word for piece in kept for word in piece), *words]


def setup(argv: list[str], env: dict[str, str] | None = None) -> SlimeSetup:
    entrypoint, argv = check.split_entrypoint("slime", argv)
    args, _, problems = contract.parse(PROGRAM, argv)
    assert problems == [], problems
    return SlimeSetup.of(args, env or {}, entrypoint)


def checkpoint(folder: Path, tracker: str, data: str | None = None) -> Path:
    (folder / "rollout").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    if data is not None:
        (folder / "rollout" / f"global_dataset_state_dict_{data}.pt").touch()
    return folder


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("runs")
    (root / "bare").mkdir()
    checkpoint(root / "first", "0", "0")
    checkpoint(root / "seventh", "7\n", "7")
    checkpoint(root / "dataless", "7", "6")
    checkpoint(root / "converted", "release")
    return {path.name: str(path) for path in root.iterdir()}


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("base", [RL, SFT], ids=["RL", "SFT"])
def test_the_bases_break_nothing(base):
    assert slime_rules.check(setup(base)) == []
    assert inert.check(PROGRAM, base, setup(base), True, slime_inert.TABLE) == []


def test_every_rule_has_a_case_and_a_name_of_its_own():
    assert CASES.keys() == ALL.keys()
    assert len(ALL) == len(slime_rules.REQUIRED) + len(slime_rules.RULES)


@pytest.mark.parametrize("name", CASES)
def test_the_rule_fires(name, directories):
    entry, case = ALL[name], setup(command(CASES[name].format(**directories)))
    message = entry.broken(case)
    assert message is not None
    problem = next(p for p in slime_rules.check(case) if p.flag == entry.flag and p.message == message)
    assert problem.level == entry.level and "\n" not in str(problem)
    assert re.search(r"\[(recipe|slime (slime/|train)|Megatron-LM megatron/|sglang srt/).*\]$", str(problem))


def test_the_rules_that_are_not_slimes_exist():
    known = {entry.name for entry in [*rules.REQUIRED, *rules.RULES]}
    assert known >= slime_rules.NOT_SLIMES.keys() | KEPT_BY_SLIME
    assert not slime_rules.NOT_SLIMES.keys() & KEPT_BY_SLIME


@pytest.mark.parametrize("name", [name for name in test_rules.CASES if name not in slime_rules.NOT_SLIMES])
def test_megatrons_rule_fires_on_what_slime_gives_it(name):
    """The cases of pretrain_gpt in a slime command line that has pretrain_gpt's flags as well."""
    gone = "-save -save-interval -load -vocab-size -sequence-parallel -tensor-model-parallel-size"
    slimes = command(f"{gone} --rollout-batch-size 2", RL)  # 8 samples: 100 steps, as there
    case = setup(command(test_rules.CASES[name], [*slimes, *test_rules.BASE]), test_rules.ENVIRONMENT.get(name, {}))
    entry = test_rules.ALL[name]
    found = [(problem.flag, problem.source) for problem in slime_rules.check(case)]
    assert ((entry.flag, rules.located(entry.source)) in found) == (name not in KEPT_BY_SLIME)


# ---------------------------------------------------------------- flags without effect


@pytest.mark.parametrize(
    ("entry", "flag"),
    [(entry, flag) for entry in slime_inert.TABLE for flag in entry.flags if not flag.startswith("--sglang-")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_inert_flag_is_named(entry, flag):
    """In one of a few plain contexts, and its value where it takes one is accepted."""
    contexts = (
        *("", "SFT", "-group-query-attention", test_rules.FP8, "-use-dynamic-batch-size", "-save -save-interval"),
        *("--custom-rm-path mine.reward", "--use-tensorboard --tb-project-name p", "--kl-coef 0.5"),
    )
    value = {"--kl-coef": "0.5", "--loss-mask-type": "qwen"}.get(flag, test_rules.value_of(flag, PROGRAM))
    for context in contexts:
        argv = command(f"{context} {flag} {value}")
        found = inert.check(PROGRAM, argv, setup(argv), table=slime_inert.TABLE)
        if (flag, entry.reason) in [(problem.flag, problem.message) for problem in found]:
            return
    pytest.fail(f"{flag}: nothing says that it {entry.reason}")


def test_the_engines_flags_are_inert_without_engines():
    argv = command("SFT --sglang-mem-fraction-static 0.5 --sglang-router-ip 127.0.0.1 --rollout-num-gpus-per-engine 2")
    found = inert.check(PROGRAM, argv, setup(argv), True, slime_inert.TABLE)
    assert [(p.level, p.flag) for p in found] == [
        ("error", "--rollout-num-gpus-per-engine"),
        ("error", "--sglang-mem-fraction-static"),
    ]


def test_the_reference_forward_for_a_term_of_weight_0_is_named():
    for coefficient, names in (("0.00", ["--use-kl-loss"]), ("0.001", [])):
        argv = command(f"--use-kl-loss --kl-loss-coef {coefficient}")
        found = inert.check(PROGRAM, argv, setup(argv), table=slime_inert.TABLE)
        assert [problem.flag for problem in found] == names


# ---------------------------------------------------------------- start and resume


def problems(argv: list[str], **options) -> list[str]:
    return [str(problem) for problem in check.problems_of("slime", argv, **options)]


def test_a_resume_names_the_next_rollout(directories):
    resumed = f"--load {directories['seventh']} --save {directories['seventh']}/"
    assert problems(command(f"{resumed} --start-rollout-id 8")) == []
    (missing,) = problems(command(resumed))
    assert "--start-rollout-id: expected 8" in missing and "ends with rollout 7; is missing" in missing
    (other,) = problems(command(f"{resumed} --start-rollout-id 7"))
    assert "expected 8" in other and other.startswith("error: ") and "found 7" in other


def test_a_start_needs_no_rollout_id():
    assert problems(command("--start-rollout-id 0")) == []
    (found,) = problems(command("--start-rollout-id 8"))
    assert "--start-rollout-id: expected 0 or none" in found


def test_a_converted_checkpoint_is_no_run(directories):
    (found,) = problems(command("--load {converted} --save {converted}".format(**directories)))
    assert found.startswith("error: --load: ") and "--ref-load" in found


def test_the_cluster_must_hold_trainer_and_engines():
    apart = command("-colocate --rollout-num-gpus 8")
    assert problems(apart, world_size=16) == []
    (found,) = problems(apart, world_size=8)
    assert "reserves 16 GPUs, the cluster has 8" in found
    assert problems(RL, world_size=8) == problems(SFT, world_size=8) == []


def test_the_world_is_in_the_flags():
    """Data parallel size 4 of 8 GPUs with tensor parallel 2: a batch of 6 cannot be shared out."""
    argv = command("--rollout-batch-size 6 --n-samples-per-prompt 2 --global-batch-size 6")
    assert [p.split(": ")[1] for p in problems(argv)] == ["--global-batch-size"]


# ---------------------------------------------------------------- the checkpoint of the engines

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
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def with_config(tmp_path, change: dict, argv: list[str] = RL) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    return problems(argv, hf_config=str(tmp_path))


def test_the_config_that_fits(tmp_path):
    for argv in (RL, SFT):
        assert with_config(tmp_path, {}, argv) == []
        assert with_config(tmp_path, {"quantization_config": FP8}, argv) == []


def test_both_spellings_of_the_rotary_base(tmp_path):
    """transformers 4, which slime needs, reads 10000 where the key is in the place of transformers 5."""
    newer = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    (warning,) = with_config(tmp_path, newer)
    assert warning.startswith("warning: --rotary-base: ") and "transformers 5" in warning
    newer["rope_parameters"]["rope_theta"] = 10000.0
    (error,) = with_config(tmp_path, newer)
    assert error.startswith("error: --rotary-base: expected 10000.0")
    assert with_config(tmp_path, newer, command("--rotary-base 10000")) == []


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
        ({"vocab_size": 2304}, "--vocab-size"),
        ({"max_position_embeddings": 64}, "--rollout-max-response-len"),
        ({"quantization_config": {**FP8, "quant_method": "gptq"}}, "--hf-checkpoint"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "--hf-checkpoint"),
        ({"quantization_config": {key: FP8[key] for key in FP8 if key != "fmt"}}, "--hf-checkpoint"),
        ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "--hf-checkpoint"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 128]}}, "--hf-checkpoint"),
    ],
)
def test_every_difference_from_the_config_is_named(tmp_path, change, flag):
    found = with_config(tmp_path, change)
    assert len(found) == 1 and found[0].startswith(f"error: {flag}: ") and str(tmp_path) in found[0], found


def test_embedding_rows_after_padding(tmp_path):
    """1.5B: 151936 rows are no multiple of 128 x 2."""
    argv = command("SFT --vocab-size 2176")
    (found,) = with_config(tmp_path, {"vocab_size": 2176}, argv)
    assert (
        found.startswith("error: --make-vocab-size-divisible-by: ") and "2304 rows, expected vocab_size 2176" in found
    )
    divisor = re.search(r"(\d+) gives it", found).group(1)
    assert with_config(tmp_path, {"vocab_size": 2176}, [*argv, "--make-vocab-size-divisible-by", divisor]) == []
    assert with_config(tmp_path, {"vocab_size": 2176}, [*argv, "--padded-vocab-size", "2176"]) == []
    (found,) = with_config(tmp_path, {"vocab_size": 2176}, [*argv, "--padded-vocab-size", "2048"])
    assert found.startswith("error: --padded-vocab-size: expected vocab_size 2176, found 2048")


@pytest.mark.parametrize(
    ("change", "widths"),
    [
        ("--ffn-hidden-size 1280", "gate_proj and up_proj rows and down_proj columns 320"),
        ("--kv-channels 64", "q_proj rows and o_proj columns 64, k_proj and v_proj rows 64"),
    ],
)
def test_engines_cut_no_block(tmp_path, change, widths):
    argv = command(change)
    same = {"intermediate_size": 1280} if "ffn" in change else {"head_dim": 64}
    assert with_config(tmp_path, same, argv) == []
    (found,) = with_config(tmp_path, {**same, "quantization_config": FP8}, argv)
    assert found.startswith("error: --rollout-num-gpus-per-engine: 4 GPUs cut 128-blocks: ") and widths in found
    assert with_config(tmp_path, {**same, "quantization_config": FP8}, [*argv, *ONE_GPU]) == []


def test_heads_that_are_no_blocks(tmp_path):
    """The trainer's blocks of linear_qkv are then not those of q_proj, k_proj and v_proj."""
    fp8 = shlex.split("--fp8-format e4m3 --fp8-recipe blockwise")
    argv = [*command("-tensor-model-parallel-size -sequence-parallel --kv-channels 64"), *ONE_GPU]
    change = {"head_dim": 64, "quantization_config": FP8}
    assert with_config(tmp_path, change, argv) == []
    (found,) = with_config(tmp_path, change, [*argv, *fp8])
    assert found.startswith("warning: --num-query-groups: a group has 64 query rows, 64 key rows, 64 value rows")
    assert with_config(tmp_path, {"head_dim": 64}, [*argv, *fp8]) == []  # engines in BF16


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_models_of_the_recipe(tmp_path, model):
    """The real model files, at scale: 4 nodes, the largest TP x CP 2, every size of engine that cuts no block."""
    file, sizes = REPO / "scripts" / "models" / f"{model}.sh", whole_block_splits(model)
    show = 'source "$0"; printf "%s\\n" "${MODEL_ARGS[@]}" "${VOCAB_ARGS[@]}"'
    words = ok(run("bash", "-c", show, file)).stdout.split()
    words += shlex.split(
        f"{RUN} --actor-num-nodes 4 --actor-num-gpus-per-node 8 --colocate --prompt-data p.jsonl --input-key prompt"
        " --label-key label --apply-chat-template --rollout-shuffle --rm-type deepscaler --num-rollout 10240"
        " --save-interval 20 --rollout-batch-size 128 --n-samples-per-prompt 16 --global-batch-size 2048 --balance-data"
        f" --over-sampling-batch-size 384 --dynamic-sampling-filter-path {FILTER} --rollout-max-response-len 8192"
        " --use-dynamic-batch-size --max-tokens-per-gpu 8192 --advantage-estimator grpo --eps-clip 0.2"
        " --eps-clip-high 0.28 --use-tis --eval-interval 20 --eval-prompt-data aime aime.jsonl --eval-top-p 0.7"
        " --sglang-mem-fraction-static 0.5 --attention-dropout 0.0 --hidden-dropout 0.0 --bf16 --fp8-format e4m3"
        " --fp8-recipe blockwise --fp8-param-gather --transformer-impl transformer_engine --attention-backend flash"
        f" --context-parallel-size 2 --tensor-model-parallel-size {max(sizes)} --use-tensorboard --tb-project-name p"
    )
    words += ["--sequence-parallel"] if max(sizes) > 1 else []
    config = hf_config(model)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    for size in (1, 2, 4, 8):
        argv = [*words, "--rollout-num-gpus-per-engine", str(size)]
        found = problems(argv, hf_config=str(tmp_path), strict=True, world_size=32)
        warned = {"--num-query-groups"} if head_dim % 128 else set()
        cut = set() if size in sizes else {"--rollout-num-gpus-per-engine"}
        assert {line.split(": ")[1] for line in found} == warned | cut


# ---------------------------------------------------------------- FP8 scales


@pytest.fixture(scope="module")
def casts(tmp_path_factory) -> dict[str, Path]:
    """A real model, and what the cast tool makes of it with both kinds of scales, in several files."""
    root = tmp_path_factory.mktemp("it's FP8")
    made = {"bf16": models.save(root / "bf16", models.BLOCKS, shard_bytes=400_000)}
    for name, pow2 in (("pow2", "True"), ("fp32", "False")):
        made[name] = root / name
        ok(run(sys.executable, CAST, *cast_options(made["bf16"], made[name]), "--force-pow-2-scale", pow2))
    return made


def cast_options(source: Path, target: Path) -> list[object]:
    return ["--input-bf16-hf-path", source, "--output-fp8-hf-path", target]


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose headers and elements went through `change(header, elements)`."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    for file in source.glob("*.safetensors"):
        content = file.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header, elements = change(json.loads(content[8 : 8 + length]), content[8 + length :])
        text = json.dumps(header).encode()
        (target / file.name).write_bytes(struct.pack("<Q", len(text)) + text + elements)
    return target


def without_metadata(header: dict, elements: bytes) -> tuple[dict, bytes]:
    return {**header, "__metadata__": {"format": "pt"}}, elements


def half_scales(header: dict, elements: bytes) -> tuple[dict, bytes]:
    """As the original cast tool wrote them."""
    header, parts, position = without_metadata(header, elements)[0], [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        part = elements[slice(*entry["data_offsets"])]
        if name.endswith("_scale_inv"):
            values = struct.unpack(f"<{len(part) // 4}f", part)
            entry["dtype"], part = "F16", struct.pack(f"<{len(values)}e", *values)
        entry["data_offsets"] = [position, position + len(part)]
        position += len(part)
        parts.append(part)
    return header, b"".join(parts)


@pytest.mark.parametrize("change", [None, without_metadata, half_scales])
def test_the_scale_format_is_read(casts, tmp_path, change):
    for name in ("pow2", "fp32"):
        folder = rewritten(casts[name], tmp_path / name, change) if change else casts[name]
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert fp8_scales.scale_format(folder) == fp8_scales.scale_format(folder / "config.json") == name
    assert fp8_scales.scale_format(casts["bf16"]) == "bf16"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 4), "safetensors header"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 64), "safetensors header"),
        (lambda folder: [file.unlink() for file in folder.glob("*.safetensors")], "no *.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}'), "awq"),
    ],
)
def test_a_checkpoint_whose_scales_cannot_be_told(casts, tmp_path, damage, words):
    folder = rewritten(casts["pow2"], tmp_path / "damaged", without_metadata)
    for number, file in enumerate(sorted(folder.glob("*.safetensors")), 1):
        if number > 2:
            file.unlink()
        else:
            file.rename(folder / f"model-0000{number}-of-00002.safetensors")
    damage(folder)
    with pytest.raises(ModelError, match=re.escape(words)) as found:
        fp8_scales.scale_format(folder)
    assert str(folder) in str(found.value) and "\n" not in str(found.value)


def test_files_that_contradict_each_other(casts, tmp_path):
    folder = rewritten(casts["pow2"], tmp_path / "mixed", lambda header, elements: (header, elements))
    name = sorted(folder.glob("*.safetensors"))[0].name
    (folder / name).write_bytes((casts["fp32"] / name).read_bytes())
    with pytest.raises(ModelError, match="different FP8 scales"):
        fp8_scales.scale_format(folder)


SHAPE = shlex.split(
    f"--num-layers {models.BLOCKS.layers} --hidden-size {models.BLOCKS.hidden} --ffn-hidden-size {models.BLOCKS.ffn}"
    f" --num-attention-heads {models.BLOCKS.heads} --num-query-groups {models.BLOCKS.groups} --vocab-size"
    f" {models.BLOCKS.vocab_rows} --make-vocab-size-divisible-by 150"
)
CAST_RL = [*command("-sequence-parallel -tensor-model-parallel-size --rollout-max-response-len 32"), *SHAPE, *ONE_GPU]
CAST_SFT = [*command("SFT -sequence-parallel -tensor-model-parallel-size"), *SHAPE]


def test_a_mismatch_comes_with_the_command_that_removes_it(casts, tmp_path):
    folder = tmp_path / "a model"
    rewritten(casts["pow2"], folder, lambda header, elements: (header, elements))
    options = {"hf_config": str(folder), "scale_format": "fp32"}
    (found,) = problems(CAST_RL, **options)
    assert found.startswith("error: --scale-format: ") and "has pow2 scales, expected fp32" in found
    words = shlex.split(re.search(r"python (tools/.*) \[recipe\]", found).group(1))
    words = [str(casts["bf16"]) if word == "THE_BF16_MODEL" else word for word in words]
    ok(run(sys.executable, *words, cwd=REPO))
    assert problems(CAST_RL, **options) == []


def test_only_fp8_engines_have_scales(casts):
    (found,) = problems(CAST_RL, hf_config=str(casts["bf16"]), scale_format="fp32")
    assert found.startswith("warning: --scale-format: ") and "is not quantised" in found
    assert problems(CAST_SFT, hf_config=str(casts["pow2"]), scale_format="fp32") == []


def test_slime_syncs_fp32_scales_only(casts):
    assert problems(CAST_RL, hf_config=str(casts["fp32"]), scale_format="fp32") == []
    (found,) = problems(CAST_RL, hf_config=str(casts["pow2"]), scale_format="pow2")
    assert found.startswith("warning: --scale-format: ") and "slime slime/utils/fp8_kernel.py:55" in found


# ---------------------------------------------------------------- the program


def test_the_scale_format_is_printed(casts):
    for name, folder in casts.items():
        result = ok(
            run(sys.executable, "-S", CHECK, "--program", "slime", "--hf-config", folder, "--print-scale-format")
        )
        assert result.stdout == f"{name}\n" and result.stderr == ""
    empty = run(sys.executable, CHECK, "--program", "slime", "--hf-config", "/nowhere", "--print-scale-format")
    assert empty.returncode == 1 and empty.stdout == "" and empty.stderr.startswith("error: --hf-config: /nowhere")
    unnamed = run(sys.executable, CHECK, "--program", "slime", "--scale-format", "fp32", "--", *RL)
    assert unnamed.returncode == 2 and "need --hf-config" in unnamed.stderr


def test_rows_of_the_embedding_are_printed():
    result = ok(run(sys.executable, "-S", CHECK, "--program", "slime", "--padded-vocab", "--", *SFT))
    assert result.stdout == "2048\n" and result.stderr == ""


def test_an_entrypoint_may_come_first():
    assert problems(["train.py", *RL]) == problems(["/engines/slime/train.py", *RL]) == []
    assert [line.split(": ")[1] for line in problems(["train_async.py", *RL])] == ["--colocate", "train_async.py"]
