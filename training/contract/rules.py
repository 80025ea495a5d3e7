"""Combinations of pretrain_gpt arguments that the pinned Megatron-LM rejects, checked before any launch.

Upstream finds these in assertions spread over argument validation, the model and optimizer configurations,
the scheduler, the checkpoint code and the tokenizer: on every GPU, after minutes of start-up, often without
a message.  Here each is a row or a small function with the line it mirrors (paths inside Megatron-LM at
core_v0.14.0), for dense GPT models.  Rules with source "recipe" are ours: what upstream runs silently and
this recipe must not.

`check(Setup(args, ...))` returns the problems.  Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import NamedTuple

from training.contract.contract import Problem
from training.contract.setup import Setup

ARGUMENTS = "megatron/training/arguments.py"
TRANSFORMER = "megatron/core/transformer/transformer_config.py"
PARALLEL = "megatron/core/model_parallel_config.py"
OPTIMIZER = "megatron/core/optimizer/optimizer_config.py"
SCHEDULER = "megatron/core/optimizer_param_scheduler.py"
MICROBATCHES = "megatron/core/num_microbatches_calculator.py"
TRAINING = "megatron/training/training.py"
CHECKPOINTING = "megatron/training/checkpointing.py"
INITIALIZE = "megatron/training/initialize.py"
GLOBALS = "megatron/training/global_vars.py"
TOKENIZER = "megatron/training/tokenizer/tokenizer.py"
DATASETS = "megatron/core/datasets/blended_megatron_dataset_config.py"
RECIPE = "recipe"
PROJECTS = {"megatron/": "Megatron-LM", "pretrain_gpt.py": "Megatron-LM", "slime/": "slime", "train": "slime"}

BLOCK = 128  # edge of a weight block that shares one scale, --fp8-recipe blockwise


Condition = Callable[[Setup], object]


class Rule(NamedTuple):
    """One rejected combination.  `broken` returns what is wrong in words, or None."""

    name: str
    flag: str
    source: str
    broken: Callable[[Setup], str | None]
    level: str = "error"


RULES: list[Rule] = []  # in the order of upstream
REQUIRED: list[Rule] = []  # without these upstream computes nothing; the others wait until they hold


def rule(flag: str, source: str, level: str = "error", table: list[Rule] = RULES) -> Callable:
    """Enter a function into the table under its own name."""

    def enter(function: Callable[[Setup], str | None]) -> Callable[[Setup], str | None]:
        table.append(Rule(function.__name__, flag, source, function, level))
        return function

    return enter


def dest_of(flag: str) -> str:
    return flag[2:].replace("-", "_")


def needs(
    flag: str,
    what: str,
    source: str,
    when: Condition | None = None,
    given: Condition | None = None,
    table: list[Rule] = RULES,
) -> None:
    """Enter the rule "`flag` needs `what`": broken where `when` holds and `given` does not.

    By default `when` is that the flag is set, and `what` is a flag and `given` that this one is set.
    """
    when = when or (lambda s: getattr(s, dest_of(flag)))
    given = given or (lambda s: getattr(s, dest_of(what)))

    def broken(s: Setup) -> str | None:
        return f"needs {what}" if when(s) and not given(s) else None

    table.append(Rule(f"{flag} needs {what}", flag, source, broken))


def clash(flag: str, other: str, source: str, both: Condition | None = None, table: list[Rule] = RULES) -> None:
    """Enter the rule "`flag` cannot be combined with `other`": broken where `both` (default: set) hold."""
    both = both or (lambda s: getattr(s, dest_of(flag)) and getattr(s, dest_of(other)))

    def broken(s: Setup) -> str | None:
        return f"cannot be combined with {other}" if both(s) else None

    table.append(Rule(f"{flag} with {other}", flag, source, broken))


# ------------------------------------------------------------------------------------------- required


def _required(dest: str, flag: str, source: str, *others: str) -> None:
    def broken(s: Setup) -> str | None:
        present = [getattr(s, name) is not None for name in (dest, *others)]
        return None if any(present) else "is required and missing"

    REQUIRED.append(Rule(f"{flag} required", flag, source, broken))


def positive(dest: str, flag: str, source: str, table: list[Rule] = REQUIRED) -> None:
    def broken(s: Setup) -> str | None:
        value = getattr(s, dest)
        return f"must be at least 1, found {value}" if value is not None and value < 1 else None

    table.append(Rule(f"{flag} positive", flag, source, broken))


_required("micro_batch_size", "--micro-batch-size", f"{ARGUMENTS}:456")
_required("num_layers", "--num-layers", f"{ARGUMENTS}:731", "encoder_num_layers")
_required("hidden_size", "--hidden-size", f"{ARGUMENTS}:1140")
_required("num_attention_heads", "--num-attention-heads", f"{ARGUMENTS}:1140")
_required("max_position_embeddings", "--max-position-embeddings", f"{ARGUMENTS}:1140")
_required("seq_length", "--seq-length", f"{ARGUMENTS}:766", "encoder_seq_length")
_required("lr", "--lr", f"{SCHEDULER}:62")
positive("micro_batch_size", "--micro-batch-size", f"{ARGUMENTS}:457")
positive("global_batch_size", "--global-batch-size", f"{ARGUMENTS}:463")
positive("tensor_model_parallel_size", "--tensor-model-parallel-size", f"{ARGUMENTS}:361")
positive("pipeline_model_parallel_size", "--pipeline-model-parallel-size", f"{ARGUMENTS}:361")
positive("context_parallel_size", "--context-parallel-size", f"{ARGUMENTS}:361")
for _name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "seq_length"):
    positive(_name, "--" + _name.replace("_", "-"), f"{ARGUMENTS}:734")
positive("ffn_hidden_size", "--ffn-hidden-size", f"{ARGUMENTS}:741")
positive("make_vocab_size_divisible_by", "--make-vocab-size-divisible-by", f"{TOKENIZER}:120")


@rule("--train-iters", f"{TRAINING}:1011", table=REQUIRED)
def training_length(s: Setup) -> str | None:
    return None if s.train_iters or s.train_samples else "is required and missing (or 0)"


# --------------------------------------------------------------------------------------- parallelism


@rule("--tensor-model-parallel-size", f"{ARGUMENTS}:361")
def world_size_divisible(s: Setup) -> str | None:
    model = s.tp * s.pp * s.cp
    if s.world_size is None or s.world_size % model == 0:
        return None
    return (
        f"world size {s.world_size} is not a multiple of tensor {s.tp} x pipeline {s.pp} x context {s.cp} "
        f"parallel = {model}"
    )


needs(
    "--attention-backend",
    "--spec local for the backend 'local'",
    f"{ARGUMENTS}:366",
    when=lambda s: s.attention_backend == "local",
    given=lambda s: (s.spec or [""])[0] == "local",
)


@rule("--hierarchical-context-parallel-sizes", f"{ARGUMENTS}:390")
def hierarchical_product(s: Setup) -> str | None:
    sizes = s.hierarchical_context_parallel_sizes
    if not sizes or math.prod(sizes) == s.cp:
        return None
    return f"product of {sizes} is {math.prod(sizes)}, expected --context-parallel-size {s.cp}"


needs(
    "--cp-comm-type",
    "--hierarchical-context-parallel-sizes for a2a+p2p",
    f"{ARGUMENTS}:392",
    when=lambda s: "a2a+p2p" in s.cp_comm_type,
    given=lambda s: s.hierarchical_context_parallel_sizes is not None,
)


@rule("--global-batch-size", f"{MICROBATCHES}:340")
def batch_divisible(s: Setup) -> str | None:
    step = s.micro_batch_size * s.dp
    if s.global_batch % step == 0 or s.decrease_batch_size_if_needed:
        return None
    return f"{s.global_batch} is not a multiple of micro batch {s.micro_batch_size} x data parallel {s.dp} = {step}"


@rule("--num-attention-heads", f"{TRANSFORMER}:681")
def heads_per_rank(s: Setup) -> str | None:
    heads = s.num_attention_heads
    return f"{heads} is not a multiple of tensor parallel size {s.tp}" if heads % s.tp else None


@rule("--num-query-groups", f"{TRANSFORMER}:696")
def groups_per_rank(s: Setup) -> str | None:
    groups = s.query_groups
    return f"{groups} is not a multiple of tensor parallel size {s.tp}" if groups % s.tp else None


@rule("--num-query-groups", "megatron/core/transformer/attention.py:135")
def heads_per_group(s: Setup) -> str | None:
    heads, groups = s.num_attention_heads, s.query_groups
    return f"{heads} attention heads are not a multiple of {groups} groups" if heads % groups else None


@rule("--ffn-hidden-size", "megatron/core/tensor_parallel/layers.py:823")
def ffn_per_rank(s: Setup) -> str | None:
    return f"{s.ffn} is not a multiple of tensor parallel size {s.tp}" if s.ffn % s.tp else None


@rule("--hidden-size", f"{ARGUMENTS}:754")
def hidden_per_head(s: Setup) -> str | None:
    hidden, heads = s.hidden_size, s.num_attention_heads
    if s.kv_channels is not None or hidden % heads == 0:
        return None
    return f"{hidden} is not a multiple of {heads} attention heads, and --kv-channels is not given"


def _uneven(s: Setup) -> bool:
    return not (s.decoder_first_pipeline_num_layers is s.decoder_last_pipeline_num_layers is None)


@rule("--num-layers", f"{ARGUMENTS}:533")
def layers_per_stage(s: Setup) -> str | None:
    if _uneven(s) or s.pipeline_model_parallel_layout is not None or s.split_layers % s.pp == 0:
        return None
    return f"{s.split_layers} layers are not a multiple of pipeline parallel size {s.pp}"


@rule("--decoder-first-pipeline-num-layers", f"{TRANSFORMER}:1052")
def uneven_middle_stages(s: Setup) -> str | None:
    if not _uneven(s):
        return None
    ends = [s.decoder_first_pipeline_num_layers, s.decoder_last_pipeline_num_layers]
    given = [count for count in ends if count is not None]
    layers, stages = s.layers - sum(given), s.pp - len(given)
    if min(given) <= 0:
        return f"a pipeline stage needs at least one layer, found {min(given)}"
    if stages > 0 and layers % stages:
        return f"{layers} layers left for {stages} middle pipeline stages do not divide"
    return None


@rule("--num-layers-per-virtual-pipeline-stage", f"{ARGUMENTS}:466")
def one_virtual_pipeline_setting(s: Setup) -> str | None:
    settings = {
        "--num-layers-per-virtual-pipeline-stage": s.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": s.num_virtual_stages_per_pipeline_rank,
        "--pipeline-model-parallel-layout": s.pipeline_model_parallel_layout,
    }
    given = [flag for flag, value in settings.items() if value is not None]
    return f"only one of {', '.join(given)} can be given" if len(given) > 1 else None


@rule("--num-layers-per-virtual-pipeline-stage", f"{ARGUMENTS}:510")
def layers_per_virtual_stage(s: Setup) -> str | None:
    per_virtual = s.num_layers_per_virtual_pipeline_stage
    if not per_virtual or s.split_layers // s.pp % per_virtual == 0:
        return None
    return f"{s.split_layers // s.pp} layers per pipeline stage are not a multiple of {per_virtual}"


@rule("--num-layers-per-virtual-pipeline-stage", f"{ARGUMENTS}:538")
def interleaving_needs_pipeline(s: Setup) -> str | None:
    least = 2 if s.overlap_p2p_comm else 3
    if s.virtual_stages is None or s.pp >= least:
        return None
    return f"interleaved pipelining needs --pipeline-model-parallel-size >= {least}, found {s.pp}"


needs(
    "--overlap-param-gather",
    "--use-distributed-optimizer",
    f"{ARGUMENTS}:560",
    given=lambda s: s.use_distributed_optimizer or s.use_megatron_fsdp,
)
needs("--overlap-param-gather", "--overlap-grad-reduce", f"{ARGUMENTS}:562")
needs("--overlap-param-gather-with-optimizer-step", "--use-distributed-optimizer", f"{ARGUMENTS}:596")
needs("--overlap-param-gather-with-optimizer-step", "--overlap-param-gather", f"{ARGUMENTS}:598")
clash(
    "--overlap-param-gather-with-optimizer-step",
    "a distributed checkpoint format",
    f"{ARGUMENTS}:602",
    lambda s: s.overlap_param_gather_with_optimizer_step and s.dist_checkpoint,
)
clash("--use-torch-fsdp2", "--use-distributed-optimizer", f"{ARGUMENTS}:574")
needs(
    "--use-megatron-fsdp",
    "--ckpt-format fsdp_dtensor",
    f"{ARGUMENTS}:638",
    given=lambda s: s.ckpt_format == "fsdp_dtensor",
)


@rule("--sequence-parallel", f"{ARGUMENTS}:838", level="warning")
def sequence_parallel_alone(s: Setup) -> str | None:
    alone = s.sequence_parallel and s.tp == 1
    return "is switched off without tensor parallelism" if alone else None


@rule("--sequence-parallel", "megatron/core/tensor_parallel/mappings.py:144")
def sequence_per_rank(s: Setup) -> str | None:
    if not s.sequence_split or s.seq // s.cp % s.tp == 0:
        return None
    return f"{s.seq // s.cp} tokens of a sequence are not a multiple of tensor parallel size {s.tp}"


needs(
    "--tp-comm-overlap",
    "--sequence-parallel (and tensor parallelism)",
    f"{ARGUMENTS}:845",
    given=lambda s: s.sequence_split,
)
needs(
    "--expert-model-parallel-size",
    "--num-experts",
    f"{ARGUMENTS}:952",
    when=lambda s: s.expert_model_parallel_size > 1,
)
needs(
    "--moe-ffn-hidden-size",
    "--num-experts",
    f"{TRANSFORMER}:750",
    when=lambda s: s.moe_ffn_hidden_size is not None,
)
needs(
    "--defer-embedding-wgrad-compute",
    "--pipeline-model-parallel-size > 1",
    f"{PARALLEL}:373",
    given=lambda s: s.pp > 1,
)
clash(
    "--defer-embedding-wgrad-compute",
    "--no-gradient-accumulation-fusion",
    f"{PARALLEL}:378",
    lambda s: s.defer_embedding_wgrad_compute and not s.gradient_accumulation_fusion,
)
needs(
    "--context-parallel-size",
    "--transformer-impl transformer_engine",
    "megatron/core/transformer/dot_product_attention.py:52",
    when=lambda s: s.cp > 1,
    given=lambda s: s.transformer_impl == "transformer_engine",
)
clash(
    "--ddp-num-buckets",
    "--ddp-bucket-size",
    f"{TRAINING}:930",
    lambda s: s.ddp_num_buckets is not None and s.ddp_bucket_size is not None,
)


@rule("--ddp-num-buckets", f"{TRAINING}:932")
def bucket_count(s: Setup) -> str | None:
    count = s.ddp_num_buckets
    return f"must be at least 1, found {count}" if count is not None and count < 1 else None


# ------------------------------------------------------------------------------------------ precision

clash("--bf16", "--fp16", f"{ARGUMENTS}:644")
needs(
    "--fp8-param-gather",
    "--use-distributed-optimizer",
    f"{ARGUMENTS}:616",
    given=lambda s: s.use_distributed_optimizer or s.use_torch_fsdp2 or s.use_megatron_fsdp,
)
needs("--fp8-param-gather", "--fp8-format", f"{TRANSFORMER}:733", given=lambda s: s.fp8)
clash(
    "--first-last-layers-bf16",
    "--fp8-recipe delayed",
    f"{TRANSFORMER}:704",
    lambda s: s.fp8 and s.first_last_layers_bf16 and s.fp8_recipe == "delayed",
)


@rule("--num-layers-at-start-in-bf16", f"{TRANSFORMER}:714")
def bf16_layers_at_start(s: Setup) -> str | None:
    count, most = s.num_layers_at_start_in_bf16, s.layers // s.pp
    if not (s.fp8 and s.first_last_layers_bf16) or 0 <= count <= most:
        return None
    return f"must be between 0 and {most} layers of a pipeline stage, found {count}"


@rule("--num-layers-at-end-in-bf16", f"{TRANSFORMER}:724")
def bf16_layers_at_end(s: Setup) -> str | None:
    count, most = s.num_layers_at_end_in_bf16, s.layers // s.pp
    if not (s.fp8 and s.first_last_layers_bf16) or 0 <= count <= most:
        return None
    return f"must be between 0 and {most} layers of a pipeline stage, found {count}"


needs(
    "--reuse-grad-buf-for-mxfp8-param-ag",
    "--fp8-param-gather",
    "megatron/core/distributed/distributed_data_parallel_config.py:143",
)
needs(
    "--fp8-format",
    "--transformer-impl transformer_engine",
    "megatron/core/fp8_utils.py:443",
    when=lambda s: s.fp8,
    given=lambda s: s.transformer_impl == "transformer_engine",
)


@rule("--fp8-format", "TransformerEngine transformer_engine/pytorch/utils.py:422")
def fp8_multiples_of_16(s: Setup) -> str | None:
    """FP8 matrix products need every contracted dimension to be a multiple of 16; each is contracted once."""
    if not s.fp8:
        return None
    tokens = s.seq // s.cp * s.micro_batch_size
    sizes = {"hidden size": s.hidden_size, **s.local_matrices, "tokens of a micro batch": tokens}
    bad = [f"{name} {size}" for name, size in sizes.items() if size % 16]
    return f"FP8 needs multiples of 16 on every rank, found {', '.join(bad)}" if bad else None


clash(
    "--accumulate-allreduce-grads-in-fp32",
    "--main-grads-dtype bf16",
    f"{ARGUMENTS}:659",
    lambda s: s.bf16 and s.accumulate_allreduce_grads_in_fp32 and s.main_grads_dtype != "fp32",
)
needs("--fp16-lm-cross-entropy", "--fp16", f"{ARGUMENTS}:785")
needs("--fp32-residual-connection", "--bf16 or --fp16", f"{ARGUMENTS}:787", given=lambda s: s.fp16 or s.bf16)


@rule("--fp8-recipe", RECIPE)
def blocks_uncut(s: Setup) -> str | None:
    """A 128 x 128 block must lie on one rank: else its scale, and so the result, depends on the TP size."""
    if not s.fp8 or s.fp8_recipe != "blockwise" or s.tp == 1:
        return None
    bad = [f"{name} {size}" for name, size in s.local_matrices.items() if size % BLOCK]
    if not bad:
        return None
    return f"tensor parallel size {s.tp} cuts {BLOCK}-blocks: {', '.join(bad)} per rank"


# ---------------------------------------------------------------------------------------------- model

clash(
    "--num-layers",
    "--encoder-num-layers",
    f"{ARGUMENTS}:727",
    lambda s: s.num_layers is not None and s.encoder_num_layers is not None,
)
clash(
    "--seq-length",
    "--encoder-seq-length",
    f"{ARGUMENTS}:763",
    lambda s: s.seq_length is not None and s.encoder_seq_length is not None,
)


@rule("--seq-length", f"{ARGUMENTS}:758")
def sequence_per_context_rank(s: Setup) -> str | None:
    if s.cp == 1 or s.seq % (2 * s.cp) == 0:
        return None
    return f"{s.seq} is not a multiple of 2 x context parallel size = {2 * s.cp}"


@rule("--max-position-embeddings", f"{ARGUMENTS}:770")
def positions_cover_sequence(s: Setup) -> str | None:
    most = s.max_position_embeddings
    return f"{most} is less than --seq-length {s.seq}" if most < s.seq else None


clash("--squared-relu", "--swiglu", f"{ARGUMENTS}:1178")
needs(
    "--squared-relu",
    "--no-bias-gelu-fusion (or --disable-bias-linear)",
    f"{TRANSFORMER}:1124",
    when=lambda s: s.squared_relu and not s.swiglu,
    given=lambda s: not s.bias_gelu_fusion or not s.add_bias_linear,
)
needs(
    "--position-embedding-type",
    "--transformer-impl transformer_engine for 'relative'",
    f"{ARGUMENTS}:928",
    when=lambda s: s.position_embedding_type == "relative",
    given=lambda s: s.transformer_impl == "transformer_engine",
)
needs(
    "--position-embedding-type",
    "--mrope-section for 'mrope'",
    f"{ARGUMENTS}:934",
    when=lambda s: s.position_embedding_type == "mrope",
    given=lambda s: s.mrope_section is not None,
)
needs(
    "--no-position-embedding",
    "--position-embedding-type rope",
    f"{ARGUMENTS}:924",
    when=lambda s: not s.add_position_embedding,
    given=lambda s: s.rope,
)


@rule("--rope-type", f"{ARGUMENTS}:1192")
def rope_type(s: Setup) -> str | None:
    if s.rope_type in (None, "rope") or s.multi_latent_attention:
        return None
    return f"must be 'rope' without multi-latent attention, found {s.rope_type!r}"


# The local layers fall back to torch's norm where Apex is absent, which the project never installs.
needs(
    "--transformer-impl",
    "--no-persist-layer-norm for the 'local' implementation",
    "megatron/core/transformer/torch_norm.py:30",
    when=lambda s: s.transformer_impl == "local",
    given=lambda s: s.no_persist_layer_norm,
)

# --------------------------------------------------------------------------- learning rate and length

clash(
    "--train-iters",
    "--train-samples",
    f"{ARGUMENTS}:699",
    lambda s: s.train_iters and s.train_samples is not None,
)
clash(
    "--train-iters",
    "--lr-decay-samples",
    f"{ARGUMENTS}:701",
    lambda s: s.train_iters and s.lr_decay_samples is not None,
)
clash(
    "--train-iters",
    "--lr-warmup-samples",
    f"{ARGUMENTS}:703",
    lambda s: s.train_iters and s.lr_warmup_samples != 0,
)
clash(
    "--train-iters",
    "--rampup-batch-size",
    f"{ARGUMENTS}:705",
    lambda s: s.train_iters and s.rampup_batch_size is not None,
)
clash(
    "--lr-warmup-fraction",
    "--lr-warmup-iters",
    f"{ARGUMENTS}:708",
    lambda s: s.train_iters and s.lr_warmup_fraction is not None and s.lr_warmup_iters != 0,
)
clash(
    "--train-samples",
    "--lr-decay-iters",
    f"{ARGUMENTS}:717",
    lambda s: s.train_samples and s.lr_decay_iters is not None,
)
clash(
    "--train-samples",
    "--lr-warmup-iters",
    f"{ARGUMENTS}:719",
    lambda s: s.train_samples and s.lr_warmup_iters != 0,
)
clash(
    "--lr-warmup-fraction",
    "--lr-warmup-samples",
    f"{ARGUMENTS}:722",
    lambda s: s.train_samples and None is not s.lr_warmup_fraction and s.lr_warmup_samples,
)


@rule("--min-lr", f"{ARGUMENTS}:776")
def min_lr_below_lr(s: Setup) -> str | None:
    low, high = s.min_lr, s.lr
    return f"{low} is greater than --lr {high}" if low > high else None


@rule("--min-lr", f"{SCHEDULER}:64")
def min_lr_not_negative(s: Setup) -> str | None:
    return f"must not be negative, found {s.min_lr}" if s.min_lr < 0 else None


@rule("--lr-warmup-init", f"{SCHEDULER}:66")
def warmup_starts_below_lr(s: Setup) -> str | None:
    low, high = s.lr_warmup_init, s.lr
    return f"{low} is greater than --lr {high}" if low > high else None


@rule("--lr-decay-iters", f"{SCHEDULER}:73")
def decay_length(s: Setup) -> str | None:
    if not s.train_iters or s.decay_iters > 0:
        return None
    return f"must be at least 1, found {s.decay_iters}"


@rule("--lr-warmup-iters", f"{SCHEDULER}:74")
def warmup_before_decay_ends(s: Setup) -> str | None:
    if not s.train_iters or s.warmup_iters < s.decay_iters:
        return None
    return f"{s.warmup_iters} must be less than --lr-decay-iters {s.decay_iters} (default: --train-iters)"


@rule("--lr-wsd-decay-iters", f"{SCHEDULER}:78")
def wsd_decay_length(s: Setup) -> str | None:
    if s.lr_decay_style != "WSD":
        return None
    flag = "lr_wsd_decay_iters" if s.train_iters else "lr_wsd_decay_samples"
    return "is required by --lr-decay-style WSD" if getattr(s, flag) is None else None


@rule("--lr-wsd-decay-iters", RECIPE, level="warning")
def wsd_decay_after_warmup(s: Setup) -> str | None:
    """Upstream does not compare the two: the rate then jumps at the end of the warm-up."""
    decay = s.lr_wsd_decay_iters
    if s.lr_decay_style != "WSD" or not s.train_iters or decay is None:
        return None
    if s.warmup_iters <= s.decay_iters - decay:
        return None
    return f"the decay of {decay} iterations starts inside the warm-up of {s.warmup_iters}"


clash("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler", f"{SCHEDULER}:90")
needs(
    "--weight-decay-incr-style",
    "no --start-weight-decay or --end-weight-decay while it is 'constant'",
    f"{ARGUMENTS}:796",
    when=lambda s: s.weight_decay_incr_style == "constant",
    given=lambda s: s.start_weight_decay is s.end_weight_decay is None,
)
needs(
    "--weight-decay-incr-style",
    "--start-weight-decay and --end-weight-decay unless it is 'constant'",
    f"{ARGUMENTS}:801",
    when=lambda s: s.weight_decay_incr_style != "constant",
    given=lambda s: None not in (s.start_weight_decay, s.end_weight_decay),
)


@rule("--end-weight-decay", f"{SCHEDULER}:83")
def weight_decay_grows(s: Setup) -> str | None:
    start, end = s.start_weight_decay, s.end_weight_decay
    if start is None or end is None or 0 <= start <= end:
        return None
    return f"expected 0 <= --start-weight-decay <= --end-weight-decay, found {start} and {end}"


@rule("--seed", f"{INITIALIZE}:407")
def seed_positive(s: Setup) -> str | None:
    return None if s.seed > 0 else f"must be a positive integer, found {s.seed}"


# ------------------------------------------------------------------------------------------ optimizer

needs(
    "--use-precision-aware-optimizer",
    "--optimizer adam",
    f"{OPTIMIZER}:220",
    given=lambda s: s.optimizer == "adam",
)
needs("--use-precision-aware-optimizer", "--use-distributed-optimizer", f"{OPTIMIZER}:223")
for _line, _state in ((258, "main_grads"), (261, "main_params"), (264, "exp_avg"), (267, "exp_avg_sq")):
    needs(
        f"--{_state.replace('_', '-')}-dtype",
        "--use-precision-aware-optimizer unless it is fp32",
        f"{OPTIMIZER}:{_line}",
        when=lambda s, dest=f"{_state}_dtype": getattr(s, dest) != "fp32",
        given=lambda s: s.use_precision_aware_optimizer,
    )
needs("--optimizer-cpu-offload", "--use-precision-aware-optimizer", f"{ARGUMENTS}:1062")
needs(
    "--optimizer-cpu-offload",
    "--fp8-recipe delayed beside --fp8-param-gather",
    f"{ARGUMENTS}:1066",
    when=lambda s: s.optimizer_cpu_offload and s.fp8_param_gather,
    given=lambda s: s.fp8_recipe == "delayed",
)
needs(
    "--disable-gloo-process-groups",
    "a distributed --ckpt-format beside --use-distributed-optimizer",
    f"{ARGUMENTS}:1014",
    when=lambda s: not s.enable_gloo_process_groups and s.use_distributed_optimizer,
    given=lambda s: s.dist_checkpoint,
)

# --------------------------------------------------------------------------- memory, kernels, debugging

needs(
    "--distribute-saved-activations",
    "--tensor-model-parallel-size > 1",
    f"{ARGUMENTS}:814",
    given=lambda s: s.tp > 1,
)
needs(
    "--distribute-saved-activations",
    "--recompute-granularity full",
    f"{ARGUMENTS}:817",
    given=lambda s: s.recompute == "full",
)
clash(
    "--distribute-saved-activations",
    "--sequence-parallel",
    f"{TRANSFORMER}:858",
    lambda s: s.recompute and s.distribute_saved_activations and s.sequence_split,
)
clash(
    "--recompute-method",
    "selective recomputation",
    f"{ARGUMENTS}:829",
    lambda s: s.recompute == "selective" and s.recompute_method is not None,
)
needs(
    "--recompute-granularity",
    "--recompute-method uniform or block for 'full'",
    f"{TRANSFORMER}:837",
    when=lambda s: s.recompute == "full",
    given=lambda s: s.recompute_method is not None,
)
needs(
    "--recompute-granularity",
    "--recompute-num-layers for 'full'",
    f"{TRANSFORMER}:843",
    when=lambda s: s.recompute == "full",
    given=lambda s: s.recompute_num_layers is not None,
)
clash(
    "--recompute-num-layers",
    "selective recomputation",
    f"{TRANSFORMER}:851",
    lambda s: s.recompute == "selective" and s.recompute_num_layers is not None,
)
RECOMPUTE_MODULES = {"core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"}


@rule("--recompute-modules", f"{TRANSFORMER}:879")
def recompute_modules(s: Setup) -> str | None:
    unknown = set(s.recompute_modules or ()) - RECOMPUTE_MODULES
    if s.recompute != "selective" or not unknown:
        return None
    return f"expected some of {', '.join(sorted(RECOMPUTE_MODULES))}, found {', '.join(sorted(unknown))}"


@rule("--recompute-modules", f"{TRANSFORMER}:920")
def recompute_layernorm_in_fp8(s: Setup) -> str | None:
    if s.recompute != "selective" or not s.fp8 or "layernorm" not in (s.recompute_modules or ()):
        return None
    return "layernorm under FP8 needs Transformer Engine >= 2.6.0, the pin is 2.4.0"


clash("--enable-cuda-graph", "--external-cuda-graph", f"{ARGUMENTS}:1102")
clash(
    "--enable-cuda-graph",
    "activation recomputation",
    f"{TRANSFORMER}:1271",
    lambda s: s.enable_cuda_graph and s.recompute,
)
clash(
    "--external-cuda-graph",
    "--recompute-granularity full",
    f"{ARGUMENTS}:1114",
    lambda s: s.external_cuda_graph and s.recompute == "full",
)
clash(
    "--external-cuda-graph",
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    f"{ARGUMENTS}:1110",
    lambda s: s.external_cuda_graph and "expandable_segments:True" in s.env.get("PYTORCH_CUDA_ALLOC_CONF", ""),
)
needs(
    "--delay-wgrad-compute",
    "Transformer Engine >= 2.7.0 beside --overlap-grad-reduce, the pin is 2.4.0",
    f"{ARGUMENTS}:1084",
    when=lambda s: s.delay_wgrad_compute and s.overlap_grad_reduce,
    given=lambda s: False,
)
clash("--deterministic-mode", "--use-flash-attn", f"{ARGUMENTS}:988")
clash("--deterministic-mode", "--cross-entropy-loss-fusion", f"{ARGUMENTS}:989")
needs(
    "--deterministic-mode",
    "NCCL_ALGO set to Tree, Ring, CollnetDirect, CollnetChain or ^NVLS",
    f"{ARGUMENTS}:992",
    given=lambda s: s.env.get("NCCL_ALGO") in ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
)
needs(
    "--deterministic-mode",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0",
    "megatron/core/extensions/transformer_engine.py:901",
    when=lambda s: s.deterministic_mode and s.transformer_impl == "transformer_engine",
    given=lambda s: s.env.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0",
)

# What _set_attention_backend accepts: backend -> values of NVTE_{FLASH,FUSED,UNFUSED}_ATTN, where set.
ATTENTION_ENV = {"local": "000", "flash": "100", "fused": "010", "unfused": "001", "auto": "111"}


@rule("--attention-backend", "megatron/core/models/common/language_module/language_module.py:95")
def attention_environment(s: Setup) -> str | None:
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    for name, wanted in zip(names, ATTENTION_ENV[s.attention_backend], strict=True):
        found = s.env.get(name)
        if found not in (None, wanted):
            return f"'{s.attention_backend}' expects {name} unset or {wanted}, found {found}; unset it"
    return None


# ------------------------------------------------------------------------------- checkpoints, logging

needs(
    "--save",
    "--save-interval",
    f"{ARGUMENTS}:778",
    when=lambda s: s.save is not None,
    given=lambda s: s.save_interval is not None,
)


@rule("--save-interval", f"{ARGUMENTS}:779")
def save_interval(s: Setup) -> str | None:
    every = s.save_interval
    if s.save is None or every is None or every > 0:
        return None
    return f"must be at least 1, found {every}"


@rule("--save-retain-interval", f"{ARGUMENTS}:782")
def retain_interval(s: Setup) -> str | None:
    every, retain = s.save_interval, s.save_retain_interval
    if s.save is None or retain is None or not every or (retain > 0 and retain % every == 0):
        return None
    return f"{retain} is not a positive multiple of --save-interval {every}"


needs(
    "--async-save",
    "--ckpt-format torch_dist",
    f"{CHECKPOINTING}:474",
    given=lambda s: s.ckpt_format == "torch_dist",
)
needs(
    "--ckpt-format",
    "--use-torch-fsdp2 for torch_dcp",
    f"{ARGUMENTS}:970",
    when=lambda s: s.ckpt_format == "torch_dcp",
    given=lambda s: s.use_torch_fsdp2,
)
needs(
    "--ckpt-format",
    "--use-megatron-fsdp for fsdp_dtensor",
    f"{ARGUMENTS}:978",
    when=lambda s: s.ckpt_format == "fsdp_dtensor",
    given=lambda s: s.use_megatron_fsdp,
)
needs(
    "--use-legacy-models",
    "--ckpt-format torch",
    f"{ARGUMENTS}:354",
    given=lambda s: s.ckpt_format == "torch",
)
needs("--load-main-params-from-ckpt", "--no-load-optim", f"{ARGUMENTS}:1037")
needs(
    "--ckpt-convert-format",
    "--ckpt-convert-save and --load",
    f"{INITIALIZE}:69",
    when=lambda s: s.ckpt_convert_format is not None,
    given=lambda s: s.ckpt_convert_save is not None and s.load is not None,
)
needs(
    "--non-persistent-ckpt-type",
    "--non-persistent-local-ckpt-dir for 'local'",
    f"{ARGUMENTS}:1072",
    when=lambda s: s.non_persistent_ckpt_type == "local",
    given=lambda s: s.non_persistent_local_ckpt_dir is not None,
)


@rule("--non-persistent-ckpt-type", f"{ARGUMENTS}:337")
def non_persistent_type(s: Setup) -> str | None:
    kind = s.non_persistent_ckpt_type
    return None if kind in (None, "global", "local") else f"expected global or local, found {kind!r}"


needs(
    "--replication",
    "--replication-jump and --non-persistent-ckpt-type local",
    f"{ARGUMENTS}:1074",
    given=lambda s: s.replication_jump is not None and s.non_persistent_ckpt_type == "local",
)
needs("--wandb-project", "--wandb-exp-name", f"{GLOBALS}:191")
needs(
    "--wandb-project",
    "--wandb-save-dir (or --save)",
    f"{GLOBALS}:198",
    when=lambda s: s.wandb_project and s.wandb_exp_name,
    given=lambda s: s.wandb_save_dir or s.save,
)
needs("--log-progress", "--save", f"{TRAINING}:435", given=lambda s: s.save is not None)


@rule("--manual-gc-interval", f"{TRAINING}:1963")
def manual_gc_interval(s: Setup) -> str | None:
    every = s.manual_gc_interval
    return f"must not be negative, found {every}" if s.manual_gc and every < 0 else None


@rule("--profile-step-end", f"{TRAINING}:2024")
def profile_window(s: Setup) -> str | None:
    start, end = s.profile_step_start, s.profile_step_end
    if not (s.profile and s.use_pytorch_profiler) or end > start:
        return None
    return f"{end} must be greater than --profile-step-start {start}"


@rule("--load", RECIPE)
def load_is_a_root(s: Setup) -> str | None:
    """checkpointing.py:1063: no tracker file is found inside iter_XXXXXXX and random weights are trained."""
    for flag, path in (("--load", s.load), ("--pretrained-checkpoint", s.pretrained_checkpoint)):
        if path and re.fullmatch(r"iter_\d{7}|release", PurePath(path).name):
            return (
                f"{flag} {path} names one iteration, expected the checkpoint root above it "
                "(and --ckpt-step for the iteration)"
            )
    return None


@rule("--no-load-optim", RECIPE)
def resume_keeps_schedule(s: Setup) -> str | None:
    """checkpointing.py:1621 skips the scheduler too: a resume repeats the warm-up and shifts the decay."""
    resumes = s.load is not None and s.load == s.save and not s.finetune
    if not resumes or not s.no_load_optim:
        return None
    return "a resume would lose the optimizer and restart the LR schedule"


@rule("--ckpt-step", RECIPE)
def step_of_a_resumed_run(s: Setup) -> str | None:
    """checkpointing.py:1042: the step beats the tracker, so every restart would go back to it."""
    # With --pretrained-checkpoint it names the step to start from, once: the launcher drops both after the first save.
    if s.ckpt_step is None or s.pretrained_checkpoint is not None:
        return None
    if s.load is not None and s.load == s.save:
        return "cannot be combined with equal --load and --save: every restart would go back to this step"
    return None


@rule("--load", RECIPE, level="warning")
def load_differs_from_save(s: Setup) -> str | None:
    if s.load is None or s.save is None or s.load == s.save or s.ckpt_step is not None or s.finetune:
        return None
    return "differs from --save, so the same command never resumes; start a run with --pretrained-checkpoint"


# ------------------------------------------------------------------------------------ data, tokenizer

clash(
    "--data-path",
    "--data-args-path",
    f"{ARGUMENTS}:444",
    lambda s: s.data_path is not None and s.data_args_path is not None,
)


def _split_paths(s: Setup) -> bool:
    return any((s.train_data_path, s.valid_data_path, s.test_data_path))


@rule("--data-path", f"{ARGUMENTS}:981")
def one_data_source(s: Setup) -> str | None:
    sources = {
        "--mock-data": s.mock_data,
        "--data-path": s.data_path,
        "--train-data-path, --valid-data-path, --test-data-path": _split_paths(s),
    }
    given = [flag for flag, value in sources.items() if value]
    return f"expected one data source, found {' and '.join(given)}" if len(given) > 1 else None


clash(
    "--per-split-data-args-path",
    "--train-data-path, --valid-data-path or --test-data-path",
    f"{ARGUMENTS}:451",
    lambda s: s.per_split_data_args_path is not None and _split_paths(s),
)
clash(
    "--split",
    "data paths per split",
    f"{DATASETS}:84",
    lambda s: s.split is not None and (_split_paths(s) or s.per_split_data_args_path),
)


@rule("--split", f"{ARGUMENTS}:436", level="warning")
def split_given(s: Setup) -> str | None:
    missing = s.data_path is not None and s.split is None
    return "is missing beside --data-path: the legacy default 969, 30, 1 is used" if missing else None


@rule("--split", f"{DATASETS}:135")
def split_shape(s: Setup) -> str | None:
    if s.split is None:
        return None
    parts = re.findall(r"[.0-9]+", s.split)
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if 0 < len(weights) <= 3 and sum(weights) > 0:
        return None
    return f"expected up to three weights like 90,5,5, found {s.split!r}"


@rule("--data-path", "megatron/core/datasets/utils.py:86")
def data_weights(s: Setup) -> str | None:
    """An even number of items is read as weight, prefix pairs if the first is a number."""
    blend = s.data_path or []
    if len(blend) % 2:
        return None
    numbers = [bool(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", item)) for item in blend[::2]]
    if all(numbers) or not any(numbers):
        return None
    return f"expected prefixes or weight and prefix pairs, found both: {' '.join(blend)}"


@rule("--num-dataset-builder-threads", f"{ARGUMENTS}:681")
def builder_threads(s: Setup) -> str | None:
    count = s.num_dataset_builder_threads
    return None if count > 0 else f"must be at least 1, found {count}"


needs("--multiple-validation-sets", "--full-validation", f"{TRAINING}:2635")

# tokenizer type -> (what build_tokenizer reads, line that asserts or dereferences it)
TOKENIZER_NEEDS = {
    "BertWordPieceLowerCase": ("vocab_file", 31),
    "BertWordPieceCase": ("vocab_file", 36),
    "GPT2BPETokenizer": ("vocab_file", 41),
    "SentencePieceTokenizer": ("tokenizer_model", 45),
    "GPTSentencePieceTokenizer": ("tokenizer_model", 50),
    "HuggingFaceTokenizer": ("tokenizer_model", 53),
    "Llama2Tokenizer": ("tokenizer_model", 55),
    "TikTokenizer": ("tokenizer_model", 58),
    "NullTokenizer": ("vocab_size", 67),
    "MultimodalTokenizer": ("tokenizer_model", 86),
    "SFTTokenizer": ("tokenizer_model", 98),
    "NullMultimodalTokenizer": ("vocab_size", 103),
}
for _type, (_name, _line) in TOKENIZER_NEEDS.items():
    needs(
        "--tokenizer-type",
        f"--{_name.replace('_', '-')} for {_type}",
        f"{TOKENIZER}:{_line}",
        when=lambda s, name=_type: (s.tokenizer_type or "GPT2BPETokenizer") == name,
        given=lambda s, name=_name: getattr(s, name) is not None,
    )


# ------------------------------------------------------------------------------------------------ run


def check(setup: Setup) -> list[Problem]:
    """Every broken rule of a pretrain_gpt command line, in the order of the table."""
    if setup.args.yaml_cfg is not None or setup.args.use_checkpoint_args:
        flag = "--yaml-cfg" if setup.args.yaml_cfg is not None else "--use-checkpoint-args"
        return [Problem("warning", flag, "takes arguments from a file, combinations are not checked", RECIPE)]
    return incomplete(setup) or list(apply(RULES, setup))


def incomplete(setup: Setup) -> list[Problem]:
    """What is missing or not positive, so that nothing can be computed from the arguments."""
    return list(apply(REQUIRED, setup))


def apply(table: Iterable[Rule], setup: Setup) -> Iterator[Problem]:
    """The broken ones of some rules, as problems."""
    for entry in table:
        message = entry.broken(setup)
        if message:
            yield Problem(entry.level, entry.flag, message, located(entry.source))


def located(source: str) -> str:
    """`source` with the project that the path lies in before it; as it is where it is no such path."""
    project = next((name for start, name in PROJECTS.items() if source.startswith(start)), None)
    return f"{project} {source}" if project else source
