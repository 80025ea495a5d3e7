"""Megatron's command line on one device: which flags act here, which have nothing to act on, which are refused.

The parser is the pinned one, rebuilt from the recorded contract (training/contract). Every flag of it falls into one of
three groups. HONOURED flags do here what they do there. INERT flags are accepted, because a recipe is one list of
flags for both engines, and named once at start. Everything else is refused by name: silently ignoring a flag that
changes the training would make a rehearsal worthless.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from training.contract import contract
from training.embedded.errors import TrainingError

MODEL = """
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels
    max_position_embeddings position_embedding_type rotary_base normalization norm_epsilon swiglu add_bias_linear
    add_qkv_bias untie_embeddings_and_output_weights init_method_std make_vocab_size_divisible_by
    attention_dropout hidden_dropout tensor_model_parallel_size seed bf16 fp8 fp8_recipe
    """.split()

OPTIMIZATION = """
    global_batch_size micro_batch_size
    optimizer lr min_lr lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_fraction lr_warmup_init
    lr_wsd_decay_style lr_wsd_decay_iters weight_decay start_weight_decay end_weight_decay weight_decay_incr_style
    adam_beta1 adam_beta2 adam_eps clip_grad override_opt_param_scheduler use_checkpoint_opt_param_scheduler
    """.split()

PRETRAINING = """
    seq_length data_path data_args_path train_data_path valid_data_path test_data_path split data_cache_path
    mmap_bin_files eod_mask_loss tokenizer_type tokenizer_model dataloader_type
    train_iters eval_interval eval_iters skip_train
    save load pretrained_checkpoint ckpt_step ckpt_format save_interval save_retain_interval finetune
    no_load_optim no_load_rng no_save_optim no_save_rng exit_on_missing_checkpoint
    exit_signal_handler exit_interval exit_duration_in_mins
    log_interval tensorboard_dir tensorboard_log_interval log_throughput log_params_norm log_num_zeros_in_grad
    wandb_project wandb_exp_name wandb_save_dir
    """.split()

INERT = {
    "one device: there is nothing to split, overlap or wait for": """
        pipeline_model_parallel_size context_parallel_size use_distributed_optimizer sequence_parallel
        overlap_grad_reduce overlap_param_gather distributed_timeout_minutes distributed_backend fp8_param_gather
        ckpt_fully_parallel_save async_save tp_comm_overlap num_distributed_optimizer_instances
        """.split(),
    "chooses a kernel or a memory plan, not a result": """
        deprecated_use_mcore_models transformer_impl attention_backend use_flash_attn
        recompute_granularity recompute_method recompute_num_layers recompute_activations
        gradient_accumulation_fusion masked_softmax_fusion bias_swiglu_fusion bias_dropout_fusion bias_gelu_fusion
        apply_rope_fusion no_persist_layer_norm
        cross_entropy_loss_fusion use_precision_aware_optimizer use_cpu_initialization
        accumulate_allreduce_grads_in_fp32 attention_softmax_in_fp32
        """.split(),
    "samples are read in this process, and causal attention needs no mask": """
        num_workers create_attention_mask_in_dataloader
        """.split(),
    "times phases that are not separate here": "log_timers_to_tensorboard timing_log_level".split(),
    "profiles CUDA": """
        profile use_pytorch_profiler profile_step_start profile_step_end profile_ranks record_memory_history
        memory_snapshot_path
        """.split(),
}

POSITIVE = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings
    seq_length micro_batch_size global_batch_size train_iters
    """.split()

# A dense Qwen2 with AdamW is what this engine is: (dest, accepted values, what that means in words).
Only = tuple[str, tuple[Any, ...], str]
ONLY: tuple[Only, ...] = (
    ("normalization", ("RMSNorm",), "--normalization RMSNorm"),
    ("position_embedding_type", ("rope",), "--position-embedding-type rope"),
    ("swiglu", (True,), "--swiglu"),
    ("add_bias_linear", (False,), "--disable-bias-linear"),
    ("add_qkv_bias", (True,), "--add-qkv-bias"),
    ("hidden_dropout", (0.0,), "--hidden-dropout 0.0"),
    ("optimizer", ("adam",), "--optimizer adam"),
    ("bf16", (True,), "--bf16"),
    ("fp8", (None, "e4m3"), "--fp8-format e4m3"),
    ("ckpt_format", ("torch_dist",), "--ckpt-format torch_dist"),
)


@dataclass(frozen=True)
class Program:
    """What one of the two entrypoints does of its upstream's flags, by dest."""

    name: str  # of the contract
    upstream: str  # for messages
    honoured: frozenset[str]
    inert: dict[str, list[str]]  # reason -> flags
    only: tuple[Only, ...]
    required: tuple[str, ...]


PRETRAIN = Program(
    name="pretrain_gpt",
    upstream="Megatron-LM",
    honoured=frozenset([*MODEL, *OPTIMIZATION, *PRETRAINING]),
    inert=INERT,
    only=(
        *ONLY,
        ("tokenizer_type", ("HuggingFaceTokenizer",), "--tokenizer-type HuggingFaceTokenizer"),
        ("dataloader_type", (None, "single"), "--dataloader-type single"),
    ),
    required=(
        *("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "seq_length"),
        *("micro_batch_size", "train_iters", "lr", "tokenizer_model"),
    ),
)


def parse(argv: Sequence[str], tell: Callable[[str], None] = print) -> argparse.Namespace:
    """Parse a pretrain_gpt.py command line. Raises TrainingError with one line per problem."""
    args, errors, inert = accept(PRETRAIN, argv)
    errors += at_least_one(args, POSITIVE)
    if not errors:
        _set_defaults(args)
        errors += _check(args)
    finish(errors, inert, tell)
    return args


def accept(program: Program, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], dict[str, list[str]]]:
    """The parsed arguments, what is wrong with them, and the flags without effect here by reason."""
    accepted = contract.load(program.name)
    args, seen, problems = contract.parse(accepted, argv)
    errors = [str(problem) for problem in problems if problem.level == "error"]
    reasons = {dest: reason for reason, dests in program.inert.items() for dest in dests}
    inert: dict[str, list[str]] = {}
    for dest, flag in seen.items():
        if dest in reasons:
            inert.setdefault(reasons[dest], []).append(flag)
        elif dest not in program.honoured:
            errors.append(
                f"error: {flag}: the embedded engine does not do this; run it on {program.upstream} (--engine megatron)"
            )
    flags = {option["dest"]: option["options"][0] for option in accepted.options}
    errors += [
        f"error: {flags[dest]}: expected a value, found none"
        for dest in program.required
        if getattr(args, dest) is None
    ]
    for dest, values, words in program.only:
        if getattr(args, dest) not in values:
            found = f"{flags[dest]} = {getattr(args, dest)}"
            errors.append(f"error: {flags[dest]}: the embedded engine trains only with {words}, found {found}")
    if args.fp8 and args.fp8_recipe != "blockwise":
        errors.append(f"error: --fp8-recipe: the embedded engine emulates only blockwise, found {args.fp8_recipe}")
    return args, errors, inert


def acting(program: Program) -> str:
    """The flags that act here, for --help."""
    flags = [
        text
        for option in contract.load(program.name).options
        for text in option["options"][:1]
        if option["dest"] in program.honoured
    ]
    heading = f"Flags of {program.upstream} that act here; others have no effect, which is said, or are refused:"
    return f"\n{heading}\n{textwrap.fill(' '.join(sorted(flags)), 118, break_on_hyphens=False)}"


def finish(errors: Sequence[str], inert: dict[str, list[str]], tell: Callable[[str], None]) -> None:
    """Raise TrainingError if there are errors, else tell which flags act on nothing here."""
    if errors:
        raise TrainingError("\n".join(dict.fromkeys(errors)))
    for reason, names in inert.items():
        tell(f"no effect on the embedded engine ({reason}): {' '.join(sorted(names))}")


def set_model_defaults(args: argparse.Namespace) -> None:
    """The model sizes that validate_args computes (megatron/training/arguments.py at the pin)."""
    if args.ffn_hidden_size is None:  # :739, the SwiGLU branch
        args.ffn_hidden_size = int((4 * args.hidden_size * 2 / 3) / 64) * 64
    if args.kv_channels is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads


def _set_defaults(args: argparse.Namespace) -> None:
    set_model_defaults(args)
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size
    if args.split is None:
        args.split = "969, 30, 1"


def at_least_one(args: argparse.Namespace, dests: Iterable[str]) -> list[str]:
    """An error for each that is set and below 1."""
    return [
        f"error: --{dest.replace('_', '-')}: expected at least 1, found {getattr(args, dest)}"
        for dest in dests
        if getattr(args, dest) is not None and getattr(args, dest) < 1
    ]


def check_model(args: argparse.Namespace) -> list[str]:
    """Values of the model, the schedule and the checkpoints that would otherwise fail somewhere inside a library."""
    errors = []
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % groups:
        errors.append(
            f"error: --num-query-groups: expected a divisor of the {args.num_attention_heads} attention heads, "
            f"found {groups}"
        )
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        errors.append("error: --lr-wsd-decay-iters: expected a value, since --lr-decay-style is WSD, found none")
    if args.min_lr > args.lr:
        errors.append(f"error: --min-lr: expected at most --lr {args.lr}, found {args.min_lr}")
    if args.save is not None and not args.save_interval:
        errors.append("error: --save-interval: expected a positive number, since --save is given, found none")
    return errors


def check_warmup(args: argparse.Namespace) -> list[str]:
    """The warm-up against the schedule, once the number of iterations is known."""
    length = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters < length:
        return []
    return [
        f"error: --lr-warmup-iters: expected fewer than the {length} iterations of the schedule, "
        f"found {args.lr_warmup_iters}"
    ]


def _check(args: argparse.Namespace) -> list[str]:
    errors = []
    if args.global_batch_size % args.micro_batch_size:
        errors.append(
            f"error: --global-batch-size: expected a multiple of --micro-batch-size {args.micro_batch_size}, "
            f"found {args.global_batch_size}"
        )
    if args.seq_length > args.max_position_embeddings:
        errors.append(
            f"error: --seq-length: expected at most --max-position-embeddings {args.max_position_embeddings}, "
            f"found {args.seq_length}"
        )
    return errors + check_model(args) + check_warmup(args)
