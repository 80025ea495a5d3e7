"""Combinations of slime arguments that the pinned slime rejects, or runs to no good end, checked before any job.

Upstream finds them in assertions of its own (slime 8359c9a), in Megatron's validation of the namespace that slime
makes of the flags, in SGLang, and in Ray actors after minutes of start-up.  The first are rows and functions here,
with the line they mirror; Megatron's are those of rules.py, all but NOT_SLIMES.  Rules with source "recipe" are ours:
what upstream runs silently and this recipe must not.

`check(SlimeSetup.of(args, ...))` returns the problems, for dense GPT models trained with the Megatron backend.
Standard library only.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePath

from training.contract import rules
from training.contract.contract import Problem
from training.contract.rules import RECIPE, SCHEDULER, Rule, located
from training.contract.setup import SFT_ROLLOUT, SGLANG_ROLLOUT, TRACKER, SlimeSetup

ARGUMENTS = "slime/utils/arguments.py"
BACKEND = "slime/backends/megatron_utils"
PLACEMENT = "slime/ray/placement_group.py"
ENGINES = "slime/ray/rollout.py"
DATA = "slime/utils/data.py"
GENERATE = "slime/rollout/sglang_rollout.py"
SAMPLES = "slime/rollout/sft_rollout.py"
GRADES = "slime/rollout/rm_hub/__init__.py"

RULES: list[Rule] = []
REQUIRED: list[Rule] = []  # without these nothing can be computed; the others wait until they hold

rule = partial(rules.rule, table=RULES)
needs = partial(rules.needs, table=RULES)
clash = partial(rules.clash, table=RULES)

# Rules of rules.py that do not hold for slime, and why.
NOT_SLIMES = {
    # slime computes the length of the run from its rollouts, after Megatron's validation
    "training_length": "--num-rollout or --num-epoch",
    "warmup_before_decay_ends": "warmup_ends_before_decay and warmup_is_a_part below",
    "decay_length": "positive, below",
    "wsd_decay_length": "wsd_decay_given below",
    # slime sets both to 4096 and pads each micro batch to 128 tokens
    "sequence_per_context_rank": "context_parallel_size below",
    "sequence_per_rank": "tokens_per_rank below",
    # slime has its own setup, training loop, loggers and data
    "--ddp-num-buckets with --ddp-bucket-size": "not read",
    "bucket_count": "not read",
    "seed_positive": "any seed is accepted",
    "--ckpt-convert-format needs --ckpt-convert-save and --load": "not read",
    "--wandb-project needs --wandb-exp-name": "slime's W&B run needs --wandb-group",
    "--wandb-project needs --wandb-save-dir (or --save)": "slime's W&B run needs --wandb-group",
    "--log-progress needs --save": "not read",
    "manual_gc_interval": "the same, with slime's line, below",
    "profile_window": "profile_window below",
    "split_given": "not read",
    "split_shape": "not read",
    "data_weights": "not read",
    "--split with data paths per split": "not read",
    "--multiple-validation-sets needs --full-validation": "not read",
    # a run starts from --ref-load, and resumes by --start-rollout-id
    "load_is_a_root": "checkpoint_root below",
    "resume_keeps_schedule": "--no-load-optim below",
    "step_of_a_resumed_run": "--ckpt-step below",
    "load_differs_from_save": "load_is_save below",
}
# Functions of the pinned slime by the flags that take them: all that the modules offer for the purpose.
FUNCTIONS = {
    ("--rollout-function-path", "--eval-function-path"): (
        SGLANG_ROLLOUT,
        SFT_ROLLOUT,
        "slime.rollout.sleep_rollout.sleep",
    ),
    ("--dynamic-sampling-filter-path",): (
        "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
    ),
    ("--custom-generate-function-path",): ("slime.rollout.sglang_rollout.generate",),
    ("--buffer-filter-path",): ("slime.ray.rollout_data_source.pop_first",),
    ("--custom-rm-path",): ("slime.rollout.rm_hub.remote_rm",),
    ("--custom-reward-post-process-path",): (),
    ("--custom-loss-function-path",): tuple(
        f"slime.backends.megatron_utils.loss.{name}_loss_function" for name in ("policy", "value", "sft")
    ),
    ("--rollout-data-postprocess-path",): (),
    ("--custom-megatron-init-path",): (),
    ("--custom-megatron-before-log-prob-hook-path",): (),
    ("--custom-megatron-before-train-step-hook-path",): (),
}
REWARDS = ("remote_rm", "deepscaler", "dapo", "math", "f1")  # rm_hub/__init__.py:43
DAPO_KEYS = ("score", "acc")  # numbers in the dictionary that "dapo" returns, math_dapo_utils.py:287


# ------------------------------------------------------------------------------------------- required

for _flag, _source in (
    ("--actor-num-nodes", f"{ARGUMENTS}:1043"),
    ("--actor-num-gpus-per-node", f"{ARGUMENTS}:1043"),
    ("--rollout-batch-size", f"{ARGUMENTS}:1195"),
    ("--n-samples-per-prompt", f"{ARGUMENTS}:1195"),
    ("--num-steps-per-rollout", f"{ARGUMENTS}:1186"),
    ("--num-rollout", f"{PLACEMENT}:183"),
    ("--num-epoch", f"{PLACEMENT}:183"),
    ("--save-interval", f"{rules.ARGUMENTS}:779"),
    ("--eval-interval", "train.py:78"),
    ("--max-tokens-per-gpu", f"{BACKEND}/data.py:262"),
    ("--rollout-num-gpus-per-engine", f"{ENGINES}:58"),
    ("--num-gpus-per-node", f"{ENGINES}:58"),
    ("--rollout-max-response-len", f"{GENERATE}:122"),
    ("--lr-decay-iters", f"{SCHEDULER}:73"),
    ("--sglang-data-parallel-size", "slime/backends/sglang_utils/arguments.py:118"),
):
    rules.positive(rules.dest_of(_flag), _flag, _source, table=REQUIRED)


@rule("--num-rollout", f"{ARGUMENTS}:1222", table=REQUIRED)
def run_length(s: SlimeSetup) -> str | None:
    given = s.num_rollout is not None or s.num_epoch is not None
    return None if given else "is missing; give --num-rollout or --num-epoch"


@rule("--global-batch-size", f"{ARGUMENTS}:1195", table=REQUIRED)
def batch_size(s: SlimeSetup) -> str | None:
    if s.global_batch is None:
        return "is missing; give it or --num-steps-per-rollout"
    return None if s.global_batch else f"must be at least 1, {s.samples} samples of a rollout make it {s.global_batch}"


# --------------------------------------------------------------------------------- slime's validation


@rule("--ref-load", f"{ARGUMENTS}:1084")
def reference_exists(s: SlimeSetup) -> str | None:
    """os.path.exists(None) is a TypeError there; a path is looked for by the launcher, on the right machine."""
    flag = "--use-kl-loss" if s.use_kl_loss else "--kl-coef"
    return f"is missing, {flag} needs a reference model" if s.reference and s.ref_load is None else None


needs(
    "--eval-interval",
    "--eval-prompt-data",
    f"{ARGUMENTS}:1108",
    when=lambda s: s.eval_interval is not None,
    given=lambda s: s.eval_prompt_data is not None,
)


@rule("--eval-prompt-data", f"{ARGUMENTS}:1112")
def eval_pairs(s: SlimeSetup) -> str | None:
    words = s.eval_prompt_data or []
    if s.eval_interval is None or len(words) == 1 or len(words) % 2 == 0:
        return None
    return f"expected pairs of name and path, found {len(words)} words"


@rule("--eval-prompt-data", f"{ARGUMENTS}:1109", level="warning")
def eval_name(s: SlimeSetup) -> str | None:
    lone = s.eval_interval is not None and len(s.eval_prompt_data or ()) == 1
    return "expected pairs of name and path, the one word is taken for the path of 'aime'" if lone else None


needs(
    "--save-interval",
    "--save",
    f"{ARGUMENTS}:1115",
    when=lambda s: s.save_interval is not None,
    given=lambda s: s.save is not None,
)
clash("--kl-coef", "--kl-loss-coef", f"{ARGUMENTS}:1117", both=lambda s: s.kl_coef != 0 and s.kl_loss_coef != 0)
needs(
    "--advantage-estimator",
    "--normalize-advantages for reinforce_plus_plus and reinforce_plus_plus_baseline",
    f"{ARGUMENTS}:1120",
    when=lambda s: s.advantage_estimator.startswith("reinforce_plus_plus"),
    given=lambda s: s.normalize_advantages,
)
needs(
    "--use-dynamic-batch-size",
    "--max-tokens-per-gpu",
    f"{ARGUMENTS}:1126",
    given=lambda s: s.max_tokens_per_gpu is not None,
)
clash(
    "--debug-rollout-only",
    "--debug-train-only or --load-debug-rollout-data",
    f"{ARGUMENTS}:1166",
    both=lambda s: s.debug_rollout_only and s.train_only,
)


@rule("--global-batch-size", f"{ARGUMENTS}:1188")
def batch_is_steps(s: SlimeSetup) -> str | None:
    if s.num_steps_per_rollout is None or s.global_batch_size in (None, s.global_batch):
        return None
    return (
        f"expected {s.samples} samples / --num-steps-per-rollout {s.num_steps_per_rollout} = {s.global_batch}, "
        f"found {s.global_batch_size}"
    )


@rule("--global-batch-size", f"{ARGUMENTS}:1195")
def samples_divisible(s: SlimeSetup) -> str | None:
    if s.samples % s.global_batch == 0:
        return None
    return (
        f"{s.global_batch} does not divide --rollout-batch-size {s.rollout_batch_size} x "
        f"--n-samples-per-prompt {s.n_samples_per_prompt} = {s.samples}"
    )


@rule("--over-sampling-batch-size", f"{ARGUMENTS}:1207")
def over_sampling(s: SlimeSetup) -> str | None:
    size = s.over_sampling_batch_size
    if size is None or size >= s.rollout_batch_size:
        return None
    return f"{size} is less than --rollout-batch-size {s.rollout_batch_size}"


clash(
    "--num-epoch",
    "--disable-rollout-global-dataset",
    f"{ARGUMENTS}:1216",
    both=lambda s: s.num_epoch is not None and s.num_rollout is None and not s.rollout_global_dataset,
)
needs(
    "--sglang-data-parallel-size",
    "--sglang-enable-dp-attention",
    "slime/backends/sglang_utils/arguments.py:125",
    when=lambda s: s.sglang_data_parallel_size > 1,
    given=lambda s: s.sglang_enable_dp_attention,
)
needs(
    "--use-hf-config-for-megatron",
    "a mapper for the model type, and slime registers none",
    f"{BACKEND}/config_mapping/registry.py:30",
    given=lambda s: False,
)
clash(
    "--colocate",
    "train_async.py",
    "train_async.py:9",
    both=lambda s: s.colocate and s.entrypoint == "train_async.py",
)


# --------------------------------------------------------------- GPUs: trainer, engines, Ray placement


@rule("--expert-tensor-parallel-size", "megatron/core/parallel_state.py:703")
def expert_world(s: SlimeSetup) -> str | None:
    ranks = s.expert_tensor_parallel_size or s.tp
    product = ranks * s.expert_model_parallel_size * s.pp
    if product > 0 and s.world_size % product == 0:
        return None
    return (
        f"world size {s.world_size} is not a multiple of expert tensor {ranks} x expert "
        f"{s.expert_model_parallel_size} x pipeline {s.pp} parallel = {product}"
    )


needs(
    "--expert-model-parallel-size",
    "--sequence-parallel beside tensor parallelism",
    f"{rules.PARALLEL}:388",
    when=lambda s: s.expert_model_parallel_size > 1 and s.tp > 1,
    given=lambda s: s.sequence_split,
)


@rule("--context-parallel-size", f"{rules.ARGUMENTS}:758")
def context_parallel_size(s: SlimeSetup) -> str | None:
    """The sequence length that slime gives Megatron is a placeholder, but Megatron cuts it all the same."""
    length = s.megatron.seq_length
    if s.cp == 1 or length % (2 * s.cp) == 0:
        return None
    return f"2 x {s.cp} does not divide {length}, slime's --seq-length"


@rule("--sequence-parallel", f"{BACKEND}/data.py:64")
def tokens_per_rank(s: SlimeSetup) -> str | None:
    if not s.sequence_split or rules.BLOCK % s.tp == 0:
        return None
    return f"micro batches are padded to {rules.BLOCK} tokens, which {s.tp} tensor parallel ranks cannot share out"


@rule("--balance-data", "slime/utils/seqlen_balancing.py:102")
def groups_per_rank(s: SlimeSetup) -> str | None:
    """Ranks get whole groups of a prompt's samples."""
    if not s.balance_data or s.rollout_batch_size % s.dp == 0:
        return None
    return f"--rollout-batch-size {s.rollout_batch_size} is not a multiple of data parallel size {s.dp}"


@rule("--rollout-num-gpus", f"{PLACEMENT}:91")
def engines_have_gpus(s: SlimeSetup) -> str | None:
    if s.train_only or s.engine_gpus:
        return None
    return "is missing or 0; give it, --colocate (engines on the trainer's GPUs) or --debug-train-only (no engines)"


@rule("--rollout-num-gpus-per-engine", f"{ENGINES}:242")
def whole_engines(s: SlimeSetup) -> str | None:
    """What is left over stays idle, and without a single engine each request waits for ever."""
    total, each = s.engine_gpus, s.rollout_num_gpus_per_engine
    if not total or total % each == 0:
        return None
    return f"{total} GPUs are not whole engines of {each}"


@rule("--rollout-num-gpus-per-engine", "slime/backends/sglang_utils/sglang_engine.py:16")
def engines_on_nodes(s: SlimeSetup) -> str | None:
    """Engines take their GPUs by number on the node, whole engines one after the other."""
    each, node, total = s.rollout_num_gpus_per_engine, s.num_gpus_per_node, s.engine_gpus or 0
    if s.train_only or each % node == 0 or (each < node and (total <= node or node % each == 0)):
        return None
    return f"{each} GPUs of an engine and --num-gpus-per-node {node} must divide one another"


@rule("--num-gpus-per-node", "slime/backends/sglang_utils/sglang_engine.py:19")
def nodes_of_engines(s: SlimeSetup) -> str | None:
    """With too few, or with too many on more than one node, engines take each other's GPUs."""
    node, trainers = s.num_gpus_per_node, s.actor_num_gpus_per_node
    if s.train_only or not s.colocate or node == trainers or (node > trainers and s.actor_num_nodes == 1):
        return None
    return f"expected --actor-num-gpus-per-node {trainers} with --colocate, found {node}"


@rule("--rollout-num-gpus-per-engine", "sglang srt/models/qwen2.py")
def engine_heads(s: SlimeSetup) -> str | None:
    """Key and value heads are repeated where there are fewer than GPUs."""
    ranks, heads, groups = s.engine_attention_ranks, s.num_attention_heads, s.query_groups
    if s.train_only or ranks == 1:
        return None
    if heads % ranks:
        return f"{heads} attention heads are not a multiple of {ranks}"
    if groups % ranks and ranks % groups:
        return f"{groups} key and value heads and {ranks} must divide one another"
    return None


@rule("--rollout-num-gpus-per-engine", "sglang srt/layers/linear.py")
def engine_ffn(s: SlimeSetup) -> str | None:
    ranks, ffn = s.rollout_num_gpus_per_engine, s.ffn
    return f"FFN width {ffn} is not a multiple of {ranks}" if not s.train_only and ffn % ranks else None


clash(
    "--sglang-pipeline-parallel-size",
    "slime unless it is 1: an engine is given --rollout-num-gpus-per-engine GPUs for tensor parallelism alone",
    "slime/backends/sglang_utils/arguments.py:119",
    both=lambda s: s.sglang_pipeline_parallel_size > 1,
)
needs(
    "--rollout-external",
    "--rollout-external-engine-addrs",
    f"{ENGINES}:303",
    given=lambda s: s.rollout_external_engine_addrs,
)
needs(
    "--use-routing-replay",
    "a Megatron-LM with slime's patches, the pinned one has none",
    f"{BACKEND}/actor.py:378",
    given=lambda s: False,
)


# ------------------------------------------------------------------------------------- training steps


@rule("--overlap-grad-reduce", f"{BACKEND}/model.py:517")
def no_overlap(s: SlimeSetup) -> str | None:
    """The assertion wants a field empty that the first rollout fills."""
    return "fails at the second rollout: no_sync_func is set by then" if s.overlap_grad_reduce else None


@rule("--manual-gc-interval", f"{BACKEND}/model.py:539")
def manual_gc_interval(s: SlimeSetup) -> str | None:
    every = s.manual_gc_interval
    return f"must not be negative, found {every}" if s.manual_gc and every < 0 else None


@rule("--lr-warmup-iters", f"{SCHEDULER}:74")
def warmup_ends_before_decay(s: SlimeSetup) -> str | None:
    """In optimizer steps, slime/backends/megatron_utils/model.py:46."""
    length = s.steps if s.lr_decay_iters is None else s.lr_decay_iters
    if s.lr_warmup_fraction is not None or length is None or s.lr_warmup_iters < length:
        return None
    return f"{s.lr_warmup_iters} must be less than the {length} steps of the schedule"


@rule("--lr-warmup-fraction", f"{SCHEDULER}:74")
def warmup_is_a_part(s: SlimeSetup) -> str | None:
    fraction = s.lr_warmup_fraction
    return f"must be less than 1, found {fraction}" if fraction is not None and fraction >= 1 else None


@rule("--lr-warmup-iters", RECIPE)
def one_warmup(s: SlimeSetup) -> str | None:
    """Megatron's check of it waits for --train-iters, which slime sets later: model.py:54 takes the fraction."""
    both = s.lr_warmup_fraction is not None and s.lr_warmup_iters
    return "is ignored beside --lr-warmup-fraction; give one of them" if both else None


@rule("--lr-wsd-decay-iters", f"{SCHEDULER}:78")
def wsd_decay_given(s: SlimeSetup) -> str | None:
    missing = s.lr_decay_style == "WSD" and s.lr_wsd_decay_iters is None
    return "is required by --lr-decay-style WSD" if missing else None


needs(
    "--loss-type",
    "--custom-loss-function-path for custom_loss",
    f"{BACKEND}/loss.py:641",
    when=lambda s: s.loss_type == "custom_loss",
    given=lambda s: s.custom_loss_function_path is not None,
)


@rule("--rollout-temperature", f"{BACKEND}/loss.py:57")
def temperature(s: SlimeSetup) -> str | None:
    """The trainer divides its logits by it, also in SFT."""
    value = s.rollout_temperature
    if s.sft and value != 1.0:
        return f"{value} would temper the SFT loss; leave it at 1.0"
    return None if value > 0 else f"must be positive, the trainer divides its logits by it, found {value}"


@rule("--tis-clip-low", RECIPE)
def tis_range(s: SlimeSetup) -> str | None:
    """loss.py:429: torch.clamp makes every ratio the maximum then. Two limits of 1 switch the weights off."""
    if not s.use_tis or s.tis_clip_low < s.tis_clip or s.tis_clip_low == s.tis_clip == 1.0:
        return None
    return f"{s.tis_clip_low} is not below --tis-clip {s.tis_clip} (both 1: no weights)"


needs(
    "--use-tis",
    "a rollout function that records log-probabilities, sft_rollout does not",
    f"{BACKEND}/loss.py:424",
    when=lambda s: s.use_tis and not s.sft,
    given=lambda s: not s.reads_samples,
)


@rule("--max-tokens-per-gpu", RECIPE, level="warning")
def longest_response_fits(s: SlimeSetup) -> str | None:
    """slime/utils/data.py:108: a longer sample is a micro batch of its own, of any size."""
    if not s.generates or not s.use_dynamic_batch_size or s.max_tokens_per_gpu is None:
        return None
    most = s.max_tokens_per_gpu * s.cp
    if s.rollout_max_response_len <= most:
        return None
    return f"{most} tokens on {s.cp} context parallel GPUs cannot hold a response of {s.rollout_max_response_len}"


# --------------------------------------------------------------------------- data, rollouts, rewards


def _unreadable(path: str) -> str | None:
    return None if path.endswith((".jsonl", ".parquet")) else f"expected a .jsonl or .parquet file, found {path}"


@rule("--hf-checkpoint", "slime/ray/rollout_data_source.py:26")
def tokenizer_given(s: SlimeSetup) -> str | None:
    return "is missing, tokenizer and model configuration are read from it" if s.hf_checkpoint is None else None


@rule("--ffn-hidden-size", f"{ARGUMENTS}:1233")
def ffn_given(s: SlimeSetup) -> str | None:
    """Compared with config.json before Megatron computes a default."""
    missing = s.hf_checkpoint is not None and s.ffn_hidden_size is None
    return "is missing; slime compares it with the intermediate_size of --hf-checkpoint" if missing else None


@rule("--prompt-data", f"{DATA}:22")
def prompt_data(s: SlimeSetup) -> str | None:
    if not s.rollout_global_dataset:
        return None
    return "is missing" if s.prompt_data is None else _unreadable(s.prompt_data)


@rule("--eval-prompt-data", f"{DATA}:22")
def eval_data(s: SlimeSetup) -> str | None:
    if s.eval_interval is None or s.train_only or not s.generates:
        return None
    words = s.eval_prompt_data or []
    paths = words if len(words) == 1 else words[1::2]
    return next((message for path in paths if (message := _unreadable(path))), None)


clash(
    "--rollout-function-path",
    "--disable-rollout-global-dataset",
    f"{GENERATE}:321",
    both=lambda s: s.rollout_function_path in (SFT_ROLLOUT, SGLANG_ROLLOUT) and not s.rollout_global_dataset,
)
needs(
    "--tokenizer-model",
    "--tokenizer-type",
    f"{rules.TOKENIZER}:106",
    when=lambda s: s.tokenizer_model is not None,
    given=lambda s: s.tokenizer_type is not None,
)


@rule("--rollout-max-prompt-len", RECIPE, level="warning")
def prompt_length(s: SlimeSetup) -> str | None:
    """slime/utils/data.py:76: len() of what the prompt is by then."""
    if s.rollout_max_prompt_len is None:
        return None
    unit = "messages" if s.reads_samples else "characters"
    return f"slime counts {unit} of a prompt, not tokens; check the data before the run instead"


@rule("--rm-type", f"{GRADES}:37")
def reward_given(s: SlimeSetup) -> str | None:
    missing = s.generates and s.rm_type is None and s.custom_rm_path is None
    return "is missing; give it or --custom-rm-path" if missing else None


@rule("--rm-type", f"{GRADES}:54")
def reward_known(s: SlimeSetup) -> str | None:
    if not s.generates or s.custom_rm_path is not None or _reward(s) in (None, *REWARDS):
        return None
    return f"expected one of {', '.join(REWARDS)}, or one of them after boxed_; found {s.rm_type!r}"


needs(
    "--rm-type",
    "--rm-url for remote_rm",
    f"{GRADES}:24",
    when=lambda s: s.generates and _reward(s) == "remote_rm",
    given=lambda s: s.rm_url is not None,
)


@rule("--reward-key", "slime/utils/types.py:46")
def reward_key(s: SlimeSetup) -> str | None:
    """A dictionary needs a key, a number has none."""
    key, kind = s.reward_key, _reward(s)
    if not s.generates or s.custom_rm_path is not None or kind not in REWARDS or kind == "remote_rm":
        return None
    if kind == "dapo":
        return None if key in DAPO_KEYS else f"expected {' or '.join(DAPO_KEYS)} for --rm-type dapo, found {key!r}"
    return f"{key!r} is wrong for --rm-type {s.rm_type}, whose reward is a number" if key else None


@rule("--label-key", RECIPE)
def label_key(s: SlimeSetup) -> str | None:
    """The label is None without it, and every reward 0."""
    graded = s.generates and s.custom_rm_path is None and _reward(s) in REWARDS and _reward(s) != "remote_rm"
    return f"is missing, --rm-type {s.rm_type} compares answers with it" if graded and s.label_key is None else None


def _reward(s: SlimeSetup) -> str | None:
    return s.rm_type and s.rm_type.removeprefix("boxed_")


clash(
    "--group-rm",
    "--eval-interval",
    f"{GENERATE}:402",
    both=lambda s: s.group_rm and s.eval_interval is not None and s.generates and not s.train_only,
)


@rule("--n-samples-per-prompt", RECIPE)
def group_of_one(s: SlimeSetup) -> str | None:
    """slime/ray/rollout.py:175 subtracts the mean of the group."""
    alone = s.generates and not s.sft and s.n_samples_per_prompt == 1 and s.rewards_normalization
    if not alone or s.advantage_estimator not in ("grpo", "gspo", "reinforce_plus_plus_baseline"):
        return None
    return f"must be at least 2: with one sample per prompt every {s.advantage_estimator} advantage is 0"


@rule("--dynamic-sampling-filter-path", "slime/rollout/filter_hub/dynamic_sampling_filters.py:12")
def filter_of_one(s: SlimeSetup) -> str | None:
    """The deviation of one number is NaN, so that no group is ever kept."""
    (path,) = FUNCTIONS[("--dynamic-sampling-filter-path",)]
    endless = s.generates and s.dynamic_sampling_filter_path == path and s.n_samples_per_prompt == 1
    return "keeps no group of one sample, the rollout would never end" if endless else None


@rule("--eval-temperature", RECIPE, level="warning")
def eval_temperature(s: SlimeSetup) -> str | None:
    """sglang_rollout.py:441."""
    evaluates = s.generates and s.eval_interval is not None and not s.train_only
    if not evaluates or s.eval_temperature is not None or s.rollout_temperature == 1.0:
        return None
    return f"is missing, evaluation samples at --rollout-temperature {s.rollout_temperature}"


def _functions() -> None:
    """One rule per flag that names a function: MODULE.FUNCTION, and there if the module is slime's."""

    def broken(s: SlimeSetup, flag: str, known: tuple[str, ...]) -> str | None:
        path = getattr(s, rules.dest_of(flag))
        if path is None or path in known:
            return None
        if not re.fullmatch(r"\w+(\.\w+)+", path):
            return f"expected MODULE.FUNCTION, found {path!r}"
        if not path.startswith("slime."):
            return None  # the user's own
        offers = f"; it has {', '.join(known)}" if known else ""
        return f"slime has no function for it at {path}{offers}"

    for flags, known in FUNCTIONS.items():
        for flag in flags:
            source = "slime/utils/misc.py:4"
            RULES.append(Rule(f"{flag} exists", flag, source, partial(broken, flag=flag, known=known)))


_functions()


# ------------------------------------------------------------------------------- supervised fine-tuning

clash(
    "--n-samples-per-prompt",
    "sft_rollout unless it is 1",
    f"{SAMPLES}:37",
    both=lambda s: s.reads_samples and s.n_samples_per_prompt != 1,
)
clash(
    "--eval-interval",
    "sft_rollout, which cannot evaluate (nor can --debug-train-only, which leaves it out)",
    f"{SAMPLES}:24",
    both=lambda s: (
        s.eval_interval is not None
        and not s.train_only
        and (s.eval_function_path or s.rollout_function_path) == SFT_ROLLOUT
    ),
)
clash(
    "--apply-chat-template",
    "sft_rollout, which applies it to the messages itself",
    f"{SAMPLES}:39",
    both=lambda s: s.apply_chat_template and s.reads_samples,
)
needs(
    "--rollout-function-path",
    "--loss-type sft_loss for sft_rollout, whose rewards are all 0",
    RECIPE,
    when=lambda s: s.reads_samples,
    given=lambda s: s.loss_type != "policy_loss",
)
needs(
    "--loss-type",
    f"--rollout-function-path {SFT_ROLLOUT} for sft_loss",
    RECIPE,
    when=lambda s: s.sft,
    given=lambda s: s.rollout_function_path != SGLANG_ROLLOUT,  # it would train on its own samples
)
needs(
    "--loss-type",
    "--debug-train-only for sft_loss, or SGLang engines are started for nothing",
    RECIPE,
    when=lambda s: s.sft and s.reads_samples,
    given=lambda s: s.train_only,
)
needs(
    "--loss-type",
    "--disable-compute-advantages-and-returns for sft_loss, or each step runs a forward pass for nothing",
    RECIPE,
    when=lambda s: s.sft,
    given=lambda s: not s.compute_advantages_and_returns,
)
needs(
    "--loss-type",
    "--calculate-per-token-loss for sft_loss, or a short answer weighs as much as a long one",
    RECIPE,
    when=lambda s: s.sft,
    given=lambda s: s.calculate_per_token_loss,
)
clash(
    "--disable-compute-advantages-and-returns",
    "--loss-type policy_loss",
    f"{BACKEND}/loss.py:379",
    both=lambda s: not s.compute_advantages_and_returns and s.loss_type == "policy_loss",
)


@rule("--debug-train-only", RECIPE)
def nothing_to_train_on(s: SlimeSetup) -> str | None:
    stuck = s.debug_train_only and s.rollout_function_path == SGLANG_ROLLOUT and s.load_debug_rollout_data is None
    return "starts no engines, but sglang_rollout generates with them" if stuck else None


# --------------------------------------------------------------------------- start, resume, checkpoints


@rule("--load", RECIPE)
def load_is_save(s: SlimeSetup) -> str | None:
    """arguments.py:1094 looks in --load only: the same command would start from --ref-load again and overwrite."""
    if s.save is None or s.debug_rollout_only:
        return None
    if s.load is None:
        return f"is missing, expected the directory of --save, {s.save}: or the same command never resumes"
    if os.path.normpath(s.load) == os.path.normpath(s.save):
        return None
    return f"expected the directory of --save, {s.save}, found {s.load}: the same command would never resume"


@rule("--save", RECIPE, level="warning")
def saves(s: SlimeSetup) -> str | None:
    return "is missing, nothing of the run is kept" if s.save is None and not s.debug_rollout_only else None


@rule("--ref-load", f"{BACKEND}/model.py:105")
def starts_from_something(s: SlimeSetup) -> str | None:
    if s.tracker is not None or s.ref_load or s.pretrained_checkpoint or s.debug_rollout_only:
        return None
    return "is missing, and --load has no checkpoint to go on from"


@rule("--load", RECIPE)
def checkpoint_root(s: SlimeSetup) -> str | None:
    """No tracker file is found there, and random weights are trained: Megatron's checkpointing.py:1063."""
    for flag, path in (("--load", s.load), ("--ref-load", s.ref_load)):
        if path and re.fullmatch(r"iter_\d{7}|release", PurePath(path).name):
            return (
                f"{flag} {path} names one iteration, expected the checkpoint root above it "
                "(and --ref-ckpt-step for the iteration)"
            )
    return None


@rule("--ref-load", RECIPE)
def reference_has_tracker(s: SlimeSetup) -> str | None:
    """The same, where the directory can be seen from here."""
    if s.ref_load is None or not Path(s.ref_load).is_dir() or (Path(s.ref_load) / TRACKER).exists():
        return None
    return f"{s.ref_load} has no {TRACKER}: Megatron would start from random weights"


@rule("--load", f"{rules.CHECKPOINTING}:287")
def tracker_is_a_rollout(s: SlimeSetup) -> str | None:
    text = s.tracker
    if text is None or (text.isdecimal() and int(text) > 0):
        return None
    where = f"{Path(s.load) / TRACKER}"
    if text == "release":
        return f"{where} says release: pass a converted checkpoint as --ref-load, and --load for this run's own"
    if text.isdecimal():
        return f"{where} says 0, which Megatron refuses to load: a run saved at its first rollout"
    return f"{where}: expected the number of a rollout, found {text[:40]!r}"


@rule("--start-rollout-id", f"{PLACEMENT}:176")
def resume_point(s: SlimeSetup) -> str | None:
    text, found = s.tracker, s.start_rollout_id
    if text is None:
        # slime/utils/arguments.py:1105 makes it 0 without a word
        return f"expected 0 or none, {s.load} has no checkpoint, found {found}" if found else None
    if not text.isdecimal() or found == int(text) + 1:
        return None
    missing = "is missing: slime would subtract 1 from it before it is known" if found is None else f"found {found}"
    return f"expected {int(text) + 1}, {s.load} ends with rollout {text}; {missing}"


@rule("--load", RECIPE, level="warning")
def data_position(s: SlimeSetup) -> str | None:
    """slime/ray/rollout_data_source.py:104 goes on at the first sample without it."""
    if s.tracker is None or not s.tracker.isdecimal() or not s.rollout_global_dataset:
        return None
    path = Path(s.load) / "rollout" / f"global_dataset_state_dict_{s.tracker}.pt"
    return None if path.exists() else f"{path} is missing: the data would start over from its first sample"


# A start from --ref-load gets all three from slime; beside a checkpoint of the run itself each is a loss.
for _flag, _loss in (
    ("--finetune", "lose the optimizer and the schedule"),
    ("--no-load-optim", "lose the optimizer and the schedule"),
    ("--ckpt-step", "go back to this step"),
):
    clash(
        _flag,
        f"--load, the directory of the run itself: every resume would {_loss}",
        RECIPE,
        both=lambda s, flag=_flag: s.load is not None and getattr(s, rules.dest_of(flag)),
    )


@rule("--save-interval", RECIPE)
def first_save(s: SlimeSetup) -> str | None:
    """train.py:52 saves rollout 0, and Megatron's checkpointing.py:287 refuses a tracker that says 0."""
    return (
        "must be at least 2: a run that ends after its first rollout cannot be resumed"
        if s.save_interval == 1
        else None
    )


@rule("--save-interval", RECIPE)
def last_save(s: SlimeSetup) -> str | None:
    """train.py:52; with --num-epoch every epoch ends with a save."""
    if s.save_interval is None or s.num_rollout is None or s.num_rollout % s.save_interval == 0:
        return None
    return f"{s.save_interval} does not divide --num-rollout {s.num_rollout}: the last rollouts are never saved"


@rule("--async-save", RECIPE)
def async_save(s: SlimeSetup) -> str | None:
    """Megatron's training loop calls maybe_finalize_async_save, which writes the tracker; slime's does not."""
    return "is never finished by slime: no tracker file is written" if s.async_save else None


@rule("train_async.py", RECIPE)
def async_resume(s: SlimeSetup) -> str | None:
    """train_async.py:35 draws the next rollout before the position in the data is saved."""
    skips = s.entrypoint == "train_async.py" and s.save is not None and s.rollout_global_dataset
    return "skips a rollout of data at each resume; use train.py" if skips else None


@rule("--vocab-size", f"{BACKEND}/actor.py:98")
def vocabulary_given(s: SlimeSetup) -> str | None:
    """update_weight_utils.py:143 sends param[:vocab_size], and the engines expect all rows of config.json."""
    missing = not s.train_only and s.vocab_size is None
    return (
        "is missing: the weight sync would cut the embedding to the tokenizer's words without added tokens"
        if missing
        else None
    )


# ---------------------------------------------------------------------------------- metrics, profiling

needs(
    "--use-tensorboard",
    "--tb-project-name (or TENSORBOARD_DIR)",
    "slime/utils/tensorboard_utils.py:35",
    given=lambda s: s.tb_project_name is not None or s.env.get("TENSORBOARD_DIR"),
)
needs(
    "--tensorboard-dir",
    "--use-tensorboard and --tb-project-name, slime logs nothing to it",
    RECIPE,
    when=lambda s: s.tensorboard_dir,
    given=lambda s: s.use_tensorboard or s.use_pytorch_profiler,
)
needs(
    "--use-wandb",
    "--wandb-group",
    "slime/utils/wandb_utils.py:40",
    given=lambda s: s.wandb_group is not None or not s.wandb_random_suffix,
)


@rule("--wandb-key", RECIPE, level="warning")
def secret(s: SlimeSetup) -> str | None:
    shown = s.wandb_key is not None
    return "is shown to all users of the machine and stored with the job; set WANDB_API_KEY" if shown else None


needs(
    "--use-pytorch-profiler",
    "--tensorboard-dir for its traces",
    f"{BACKEND}/actor.py:126",
    given=lambda s: s.tensorboard_dir,
)


@rule("--profile-step-end", f"{BACKEND}/actor.py:123")
def profile_window(s: SlimeSetup) -> str | None:
    start, end = s.profile_step_start, s.profile_step_end
    if not s.use_pytorch_profiler or end > start:
        return None
    return f"{end} must be greater than --profile-step-start {start}"


@rule("--use-pytorch-profiler", RECIPE, level="warning")
def profiling(s: SlimeSetup) -> str | None:
    return "records stacks, shapes and memory of rank 0: to look for lost time only" if s.use_pytorch_profiler else None


@rule("--record-memory-history", RECIPE, level="warning")
def memory_history(s: SlimeSetup) -> str | None:
    return "records a stack at each allocation: to look for lost memory only" if s.record_memory_history else None


@rule("--memory-snapshot-path", f"{BACKEND}/model_provider.py:91")
def snapshot_name(s: SlimeSetup) -> str | None:
    """It becomes oom_rank-N_PATH."""
    path = s.memory_snapshot_path
    if not s.record_memory_history or "/" not in path:
        return None
    return f"expected a file name, slime puts a prefix before it, found {path}"


# ------------------------------------------------------------------------------------------------ run


def check(setup: SlimeSetup) -> list[Problem]:
    """Every broken rule of a slime command line: slime's, then Megatron's, in the order of the tables."""
    if setup.train_backend != "megatron":
        reason = "combinations are checked for the megatron backend only"
        return [Problem("warning", "--train-backend", reason, RECIPE)]
    if setup.yaml_cfg is not None:
        return [Problem("warning", "--yaml-cfg", "takes arguments from a file, combinations are not checked", RECIPE)]
    return incomplete(setup) or [*rules.apply(RULES, setup), *_megatrons(setup)]


def incomplete(setup: SlimeSetup) -> list[Problem]:
    """What is missing or not positive, so that nothing can be computed from the arguments."""
    found = list(rules.apply(REQUIRED, setup))
    if found:
        return found
    return list(rules.apply((entry for entry in rules.REQUIRED if entry.name not in NOT_SLIMES), setup.megatron))


def fits(setup: SlimeSetup, gpus: int) -> list[Problem]:
    """Whether a Ray cluster of so many GPUs can hold the run."""
    if setup.cluster_gpus <= gpus:
        return []
    message = f"the run reserves {setup.cluster_gpus} GPUs, the cluster has {gpus}: Ray would wait for ever"
    return [Problem("error", "--actor-num-nodes", message, located(f"{PLACEMENT}:43"))]


def _megatrons(setup: SlimeSetup) -> Iterator[Problem]:
    """Megatron's rules on the namespace that slime makes, the schedule's with the length that slime computes."""
    validated = setup.megatron
    args = copy.copy(validated.args)
    args.train_iters = setup.steps or args.lr_decay_iters
    scheduled = dataclasses.replace(validated, args=args)
    for entry in rules.RULES:
        if entry.name in NOT_SLIMES:
            continue
        of_schedule = entry.source.startswith(SCHEDULER) or entry.name == "wsd_decay_after_warmup"
        yield from rules.apply([entry], scheduled if of_schedule else validated)
