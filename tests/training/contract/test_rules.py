"""Every rule and every inert flag fires on a command line that breaks it, and on none that does not."""

from __future__ import annotations

import shlex

import pytest

from training.contract import contract, inert, rules
from training.contract.setup import Setup

PROGRAM = contract.load("pretrain_gpt")
BASE = shlex.split(
    "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 4 --group-query-attention"
    " --num-query-groups 4 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 8"
    " --lr 1e-3 --train-iters 100 --transformer-impl transformer_engine --bf16 --swiglu --disable-bias-linear"
    " --position-embedding-type rope --tokenizer-type HuggingFaceTokenizer --tokenizer-model t"
    " --data-path d --split 90,5,5"
)
FP8 = "--fp8-format e4m3 --fp8-recipe blockwise"
SAMPLES = "-train-iters --train-samples 100"
WANDB = "--wandb-project p"

# Rule -> flags added to BASE; "-name" at the start removes that flag from BASE.
CASES: dict[str, str] = {
    **{
        f"--{name} required": f"-{name}"
        for name in "num-layers hidden-size num-attention-heads max-position-embeddings seq-length lr".split()
    },
    "--micro-batch-size required": "-micro-batch-size",
    **{
        f"--{name} positive": f"--{name} 0"
        for name in (
            "micro-batch-size global-batch-size tensor-model-parallel-size pipeline-model-parallel-size"
            " context-parallel-size num-layers hidden-size num-attention-heads num-query-groups seq-length"
            " ffn-hidden-size make-vocab-size-divisible-by"
        ).split()
    },
    "training_length": "-train-iters",
    "world_size_divisible": "--tensor-model-parallel-size 3",
    "--attention-backend needs --spec local for the backend 'local'": "--attention-backend local",
    "hierarchical_product": "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 3",
    "--cp-comm-type needs --hierarchical-context-parallel-sizes for a2a+p2p": "--cp-comm-type a2a+p2p",
    "batch_divisible": "--global-batch-size 9",
    "heads_per_rank": "--num-attention-heads 6 --num-query-groups 6 --kv-channels 128 --tensor-model-parallel-size 4",
    "groups_per_rank": "--num-query-groups 2 --tensor-model-parallel-size 4",
    "heads_per_group": "--num-query-groups 3",
    "ffn_per_rank": "--ffn-hidden-size 1023 --tensor-model-parallel-size 2",
    "hidden_per_head": "--hidden-size 510",
    "layers_per_stage": "--pipeline-model-parallel-size 8",
    "uneven_middle_stages": "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2",
    "one_virtual_pipeline_setting": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
        " --num-virtual-stages-per-pipeline-rank 2"
    ),
    "layers_per_virtual_stage": "--pipeline-model-parallel-size 1 --num-layers-per-virtual-pipeline-stage 3",
    "interleaving_needs_pipeline": "--num-virtual-stages-per-pipeline-rank 2",
    "--overlap-param-gather needs --use-distributed-optimizer": "--overlap-param-gather --overlap-grad-reduce",
    "--overlap-param-gather needs --overlap-grad-reduce": "--overlap-param-gather --use-distributed-optimizer",
    "--overlap-param-gather-with-optimizer-step needs --use-distributed-optimizer": (
        "--overlap-param-gather-with-optimizer-step"
    ),
    "--overlap-param-gather-with-optimizer-step needs --overlap-param-gather": (
        "--overlap-param-gather-with-optimizer-step --use-distributed-optimizer"
    ),
    "--overlap-param-gather-with-optimizer-step with a distributed checkpoint format": (
        "--overlap-param-gather-with-optimizer-step"
    ),
    "--use-torch-fsdp2 with --use-distributed-optimizer": "--use-torch-fsdp2 --use-distributed-optimizer",
    "--use-megatron-fsdp needs --ckpt-format fsdp_dtensor": "--use-megatron-fsdp",
    "sequence_parallel_alone": "--sequence-parallel",
    "sequence_per_rank": "--seq-length 126 --tensor-model-parallel-size 4 --sequence-parallel",
    "--tp-comm-overlap needs --sequence-parallel (and tensor parallelism)": "--tp-comm-overlap",
    "--expert-model-parallel-size needs --num-experts": "--expert-model-parallel-size 2",
    "--moe-ffn-hidden-size needs --num-experts": "--moe-ffn-hidden-size 64",
    "--defer-embedding-wgrad-compute needs --pipeline-model-parallel-size > 1": "--defer-embedding-wgrad-compute",
    "--defer-embedding-wgrad-compute with --no-gradient-accumulation-fusion": (
        "--defer-embedding-wgrad-compute --no-gradient-accumulation-fusion"
    ),
    "--context-parallel-size needs --transformer-impl transformer_engine": (
        "--context-parallel-size 2 --transformer-impl local"
    ),
    "--ddp-num-buckets with --ddp-bucket-size": "--ddp-num-buckets 2 --ddp-bucket-size 100",
    "bucket_count": "--ddp-num-buckets 0",
    "--bf16 with --fp16": "--fp16",
    "--fp8-param-gather needs --use-distributed-optimizer": f"{FP8} --fp8-param-gather",
    "--fp8-param-gather needs --fp8-format": "--fp8-param-gather",
    "--first-last-layers-bf16 with --fp8-recipe delayed": (
        "--first-last-layers-bf16 --fp8-format hybrid --fp8-recipe delayed"
    ),
    "bf16_layers_at_start": f"{FP8} --first-last-layers-bf16 --num-layers-at-start-in-bf16 5",
    "bf16_layers_at_end": f"{FP8} --first-last-layers-bf16 --num-layers-at-end-in-bf16 5",
    "--reuse-grad-buf-for-mxfp8-param-ag needs --fp8-param-gather": "--reuse-grad-buf-for-mxfp8-param-ag",
    "--fp8-format needs --transformer-impl transformer_engine": f"{FP8} --transformer-impl local",
    "fp8_multiples_of_16": f"{FP8} --ffn-hidden-size 1000",
    "--accumulate-allreduce-grads-in-fp32 with --main-grads-dtype bf16": (
        "--accumulate-allreduce-grads-in-fp32 --main-grads-dtype bf16"
    ),
    "--fp16-lm-cross-entropy needs --fp16": "--fp16-lm-cross-entropy",
    "--fp32-residual-connection needs --bf16 or --fp16": "-bf16 --fp32-residual-connection",
    "blocks_uncut": f"{FP8} --kv-channels 64 --tensor-model-parallel-size 4",
    "--num-layers with --encoder-num-layers": "--encoder-num-layers 4",
    "--seq-length with --encoder-seq-length": "--encoder-seq-length 128",
    "sequence_per_context_rank": "--seq-length 126 --context-parallel-size 2",
    "positions_cover_sequence": "--max-position-embeddings 64",
    "--squared-relu with --swiglu": "--squared-relu",
    "--squared-relu needs --no-bias-gelu-fusion (or --disable-bias-linear)": (
        "-swiglu -disable-bias-linear --squared-relu"
    ),
    "--position-embedding-type needs --transformer-impl transformer_engine for 'relative'": (
        "--position-embedding-type relative --transformer-impl local"
    ),
    "--position-embedding-type needs --mrope-section for 'mrope'": "--position-embedding-type mrope",
    "--no-position-embedding needs --position-embedding-type rope": (
        "--no-position-embedding --position-embedding-type learned_absolute"
    ),
    "rope_type": "--rope-type yarn",
    "--transformer-impl needs --no-persist-layer-norm for the 'local' implementation": "--transformer-impl local",
    "--train-iters with --train-samples": "--train-samples 100",
    "--train-iters with --lr-decay-samples": "--lr-decay-samples 100",
    "--train-iters with --lr-warmup-samples": "--lr-warmup-samples 10",
    "--train-iters with --rampup-batch-size": "--rampup-batch-size 2 2 100",
    "--lr-warmup-fraction with --lr-warmup-iters": "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
    "--train-samples with --lr-decay-iters": f"{SAMPLES} --lr-decay-iters 10",
    "--train-samples with --lr-warmup-iters": f"{SAMPLES} --lr-warmup-iters 10",
    "--lr-warmup-fraction with --lr-warmup-samples": f"{SAMPLES} --lr-warmup-fraction 0.1 --lr-warmup-samples 10",
    "min_lr_below_lr": "--min-lr 1",
    "min_lr_not_negative": "--min-lr -0.1",
    "warmup_starts_below_lr": "--lr-warmup-init 1",
    "decay_length": "--lr-decay-iters 0",
    "warmup_before_decay_ends": "--lr-warmup-iters 100",
    "wsd_decay_length": "--lr-decay-style WSD",
    "wsd_decay_after_warmup": "--lr-decay-style WSD --lr-wsd-decay-iters 60 --lr-warmup-iters 50",
    "--override-opt_param-scheduler with --use-checkpoint-opt_param-scheduler": (
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler"
    ),
    "--weight-decay-incr-style needs no --start-weight-decay or --end-weight-decay while it is 'constant'": (
        "--start-weight-decay 0.1 --end-weight-decay 0.2"
    ),
    "--weight-decay-incr-style needs --start-weight-decay and --end-weight-decay unless it is 'constant'": (
        "--weight-decay-incr-style linear"
    ),
    "weight_decay_grows": "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
    "seed_positive": "--seed 0",
    "--use-precision-aware-optimizer needs --optimizer adam": "--use-precision-aware-optimizer --optimizer sgd",
    "--use-precision-aware-optimizer needs --use-distributed-optimizer": "--use-precision-aware-optimizer",
    "--main-grads-dtype needs --use-precision-aware-optimizer unless it is fp32": "--main-grads-dtype bf16",
    "--main-params-dtype needs --use-precision-aware-optimizer unless it is fp32": "--main-params-dtype fp16",
    "--exp-avg-dtype needs --use-precision-aware-optimizer unless it is fp32": "--exp-avg-dtype bf16",
    "--exp-avg-sq-dtype needs --use-precision-aware-optimizer unless it is fp32": "--exp-avg-sq-dtype bf16",
    "--optimizer-cpu-offload needs --use-precision-aware-optimizer": "--optimizer-cpu-offload",
    "--optimizer-cpu-offload needs --fp8-recipe delayed beside --fp8-param-gather": (
        f"{FP8} --optimizer-cpu-offload --use-precision-aware-optimizer --use-distributed-optimizer --fp8-param-gather"
    ),
    "--disable-gloo-process-groups needs a distributed --ckpt-format beside --use-distributed-optimizer": (
        "--disable-gloo-process-groups --use-distributed-optimizer --ckpt-format torch"
    ),
    "--distribute-saved-activations needs --tensor-model-parallel-size > 1": "--distribute-saved-activations",
    "--distribute-saved-activations needs --recompute-granularity full": "--distribute-saved-activations",
    "--distribute-saved-activations with --sequence-parallel": (
        "--distribute-saved-activations --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full"
        " --recompute-method uniform --recompute-num-layers 1"
    ),
    "--recompute-method with selective recomputation": "--recompute-activations --recompute-method uniform",
    "--recompute-granularity needs --recompute-method uniform or block for 'full'": (
        "--recompute-granularity full --recompute-num-layers 1"
    ),
    "--recompute-granularity needs --recompute-num-layers for 'full'": (
        "--recompute-granularity full --recompute-method uniform"
    ),
    "--recompute-num-layers with selective recomputation": "--recompute-activations --recompute-num-layers 1",
    "recompute_modules": "--recompute-activations --recompute-modules everything",
    "recompute_layernorm_in_fp8": f"{FP8} --recompute-activations --recompute-modules layernorm",
    "--enable-cuda-graph with --external-cuda-graph": "--enable-cuda-graph --external-cuda-graph",
    "--enable-cuda-graph with activation recomputation": "--enable-cuda-graph --recompute-activations",
    "--external-cuda-graph with --recompute-granularity full": (
        "--external-cuda-graph --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "--external-cuda-graph with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True": "--external-cuda-graph",
    "--delay-wgrad-compute needs Transformer Engine >= 2.7.0 beside --overlap-grad-reduce, the pin is 2.4.0": (
        "--delay-wgrad-compute --overlap-grad-reduce"
    ),
    "--deterministic-mode with --use-flash-attn": "--deterministic-mode --use-flash-attn",
    "--deterministic-mode with --cross-entropy-loss-fusion": "--deterministic-mode --cross-entropy-loss-fusion",
    "--deterministic-mode needs NCCL_ALGO set to Tree, Ring, CollnetDirect, CollnetChain or ^NVLS": (
        "--deterministic-mode"
    ),
    "--deterministic-mode needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0": "--deterministic-mode",
    "attention_environment": "--attention-backend flash",
    "--save needs --save-interval": "--save x",
    "save_interval": "--save x --save-interval 0",
    "retain_interval": "--save x --save-interval 10 --save-retain-interval 15",
    "--async-save needs --ckpt-format torch_dist": "--async-save --ckpt-format torch",
    "--ckpt-format needs --use-torch-fsdp2 for torch_dcp": "--ckpt-format torch_dcp",
    "--ckpt-format needs --use-megatron-fsdp for fsdp_dtensor": "--ckpt-format fsdp_dtensor",
    "--use-legacy-models needs --ckpt-format torch": "--use-legacy-models",
    "--load-main-params-from-ckpt needs --no-load-optim": "--load-main-params-from-ckpt",
    "--ckpt-convert-format needs --ckpt-convert-save and --load": "--ckpt-convert-format torch_dist",
    "--non-persistent-ckpt-type needs --non-persistent-local-ckpt-dir for 'local'": "--non-persistent-ckpt-type local",
    "non_persistent_type": "--non-persistent-ckpt-type in_memory",
    "--replication needs --replication-jump and --non-persistent-ckpt-type local": "--replication",
    "--wandb-project needs --wandb-exp-name": WANDB,
    "--wandb-project needs --wandb-save-dir (or --save)": f"{WANDB} --wandb-exp-name e",
    "--log-progress needs --save": "--log-progress",
    "manual_gc_interval": "--manual-gc --manual-gc-interval -1",
    "profile_window": "--profile --use-pytorch-profiler --profile-step-start 10 --profile-step-end 10",
    "load_is_a_root": "--load x/iter_0000100",
    "resume_keeps_schedule": "--save x --save-interval 10 --load x --no-load-optim",
    "step_of_a_resumed_run": "--save x --save-interval 10 --load x --ckpt-step 5",
    "load_differs_from_save": "--save x --save-interval 10 --load y",
    "--data-path with --data-args-path": "--data-args-path file",
    "one_data_source": "--mock-data",
    "--per-split-data-args-path with --train-data-path, --valid-data-path or --test-data-path": (
        "-data-path -split --per-split-data-args-path file --train-data-path a"
    ),
    "--split with data paths per split": "-data-path --train-data-path a",
    "split_given": "-split",
    "split_shape": "--split 1,2,3,4",
    "data_weights": "--data-path 0.5 a b c",
    "builder_threads": "--num-dataset-builder-threads 0",
    "--multiple-validation-sets needs --full-validation": "--multiple-validation-sets",
    **{
        f"--tokenizer-type needs --{need} for {kind}": f"-tokenizer-model --tokenizer-type {kind}"
        for need, kinds in {
            "vocab-file": "BertWordPieceLowerCase BertWordPieceCase GPT2BPETokenizer",
            "tokenizer-model": (
                "SentencePieceTokenizer GPTSentencePieceTokenizer HuggingFaceTokenizer Llama2Tokenizer TikTokenizer"
                " MultimodalTokenizer SFTTokenizer"
            ),
            "vocab-size": "NullTokenizer NullMultimodalTokenizer",
        }.items()
        for kind in kinds.split()
    },
}
ENVIRONMENT = {
    "--external-cuda-graph with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True": {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
    },
    "attention_environment": {"NVTE_FLASH_ATTN": "0"},
}
ALL = {rule.name: rule for rule in [*rules.REQUIRED, *rules.RULES]}


def command(change: str) -> list[str]:
    """BASE with the leading -names removed and the rest added."""
    words = shlex.split(change)
    removed = set()
    while words and words[0].startswith("-") and not words[0].startswith("--"):
        removed.add("-" + words.pop(0))
    kept = [piece for piece in contract.split(PROGRAM, BASE) if contract.flag_of(piece) not in removed]
    return [word for piece in kept for word in piece] + words


def setup(name: str, change: str) -> Setup:
    """The case of a rule, where it needs one on 8 GPUs or in its environment."""
    args, _, problems = contract.parse(PROGRAM, command(change))
    assert problems == [], problems
    return Setup(args, 8 if name == "world_size_divisible" else None, ENVIRONMENT.get(name, {}))


def test_the_base_breaks_nothing():
    assert rules.check(setup("", "")) == []


def test_every_rule_has_a_case():
    assert CASES.keys() == ALL.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_rule_fires(name):
    rule = ALL[name]
    case = setup(name, CASES[name])
    found, message = rules.check(case), rule.broken(case)
    assert message is not None
    problem = next(problem for problem in found if problem.flag == rule.flag and problem.message == message)
    assert problem.level == rule.level and "\n" not in str(problem)
    assert str(problem).startswith(f"{rule.level}: {rule.flag}: ")


# ---------------------------------------------------------------- flags without effect


def value_of(flag: str, program: contract.Contract = PROGRAM) -> str:
    """A value that the option accepts."""
    option = program.option_strings[flag]
    if option["action"] not in ("store", "append") or option["nargs"] in ("*", "?"):
        return ""
    if option["choices"]:
        return str(option["choices"][0])
    return {"int": "1", "float": "0.5"}.get(option["type"], "x")


def fires(entry: inert.Inert, flag: str) -> bool:
    """Whether some plain context makes the flag inert."""
    for context in ("", "-group-query-attention", "-data-path -split --mock-data", FP8):
        argv = command(f"{context} {flag} {value_of(flag)}")
        args, _, _ = contract.parse(PROGRAM, argv)
        reasons = [p.message for p in inert.check(PROGRAM, argv, Setup(args, None, {})) if p.flag == flag]
        if entry.reason in reasons:
            return True
    return False


@pytest.mark.parametrize(
    ("entry", "flag"),
    [(entry, flag) for entry in inert.TABLE for flag in entry.flags],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_inert_flag_is_named(entry, flag):
    assert flag in PROGRAM.option_strings
    assert fires(entry, flag)


def test_strict_makes_errors_of_them_and_of_repetitions():
    argv = command("--use-mcore-models --lr 1e-3")
    args, _, _ = contract.parse(PROGRAM, argv)
    levels = {strict: inert.check(PROGRAM, argv, Setup(args, None, {}), strict) for strict in (False, True)}
    assert [(p.level, p.flag) for p in levels[False]] == [("warning", "--use-mcore-models")]
    assert [(p.level, p.flag) for p in levels[True]] == [("error", "--use-mcore-models"), ("error", "--lr")]


def test_flags_of_other_programs_are_named():
    argv = command("--biencoder-projection-dim 3")
    args, _, _ = contract.parse(PROGRAM, argv)
    (problem,) = inert.check(PROGRAM, argv, Setup(args, None, {}))
    assert "a GPT run ignores it" in problem.message
