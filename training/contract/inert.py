"""Flags that pretrain_gpt accepts at the pin although they are deprecated or change nothing.

A recipe that carries them teaches its reader something false, so ours must not.  `check` reports each use
with the reason and the line of Megatron-LM core_v0.14.0 behind it.  Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from training.contract.contract import Contract, Problem, flag_of, split
from training.contract.rules import ARGUMENTS, GLOBALS, OPTIMIZER, SCHEDULER, TOKENIZER, TRAINING, located
from training.contract.setup import Setup


class Inert(NamedTuple):
    """Flags without effect: always, or where `when` holds.  `removed`: upstream stops on them."""

    flags: tuple[str, ...]
    reason: str
    source: str
    when: Callable[[Setup], bool] = lambda s: True
    removed: bool = False


def _fp8_recipe_off(*recipes: str) -> Callable[[Setup], bool]:
    return lambda s: not s.fp8 or s.fp8_recipe not in recipes


TABLE: tuple[Inert, ...] = (
    # no longer accepted
    Inert(("--batch-size",), "was removed, use --micro-batch-size", f"{ARGUMENTS}:399", removed=True),
    Inert(("--warmup",), "was removed, use --lr-warmup-fraction", f"{ARGUMENTS}:402", removed=True),
    Inert(
        ("--model-parallel-size",),
        "was removed, use --tensor-model-parallel-size",
        f"{ARGUMENTS}:405",
        removed=True,
    ),
    Inert(
        ("--checkpoint-activations",),
        "was removed, use --recompute-activations",
        f"{ARGUMENTS}:411",
        removed=True,
    ),
    # deprecated, accepted without effect
    Inert(("--use-mcore-models",), "is deprecated, Megatron core is the default", f"{ARGUMENTS}:2005"),
    Inert(("--use-dist-ckpt",), "is deprecated, --ckpt-format decides", f"{ARGUMENTS}:1030"),
    Inert(("--dist-ckpt-format",), "is deprecated, --ckpt-format decides", f"{ARGUMENTS}:1033"),
    Inert(("--ckpt-fully-parallel-save",), "is deprecated, it is the default", f"{ARGUMENTS}:1018"),
    Inert(("--no-async-tensor-model-parallel-allreduce",), "is deprecated and ignored", f"{ARGUMENTS}:1989"),
    Inert(("--fp8-interval",), "is deprecated and ignored", f"{ARGUMENTS}:1233"),
    Inert(
        ("--use-rotary-position-embeddings",),
        "is deprecated, use --position-embedding-type rope",
        f"{ARGUMENTS}:1448",
    ),
    Inert(("--no-position-embedding",), "is deprecated, use --position-embedding-type", f"{ARGUMENTS}:1472"),
    Inert(
        ("--moe-layer-recompute",),
        "is deprecated, use --recompute-granularity selective --recompute-modules moe",
        f"{ARGUMENTS}:2808",
    ),
    # read by the legacy models only
    Inert(
        ("--use-flash-attn",),
        "is read by the legacy models only, --attention-backend decides",
        "megatron/legacy/model/transformer.py:541",
        lambda s: not s.use_legacy_models,
    ),
    Inert(
        ("--rotary-seq-len-interpolation-factor",),
        "is read by the legacy models only, the GPT model is built without it",
        "pretrain_gpt.py:158",
        lambda s: not s.use_legacy_models,
    ),
    Inert(
        ("--no-bias-gelu-fusion",),
        "has no effect on SwiGLU",
        f"{ARGUMENTS}:1174",
        lambda s: s.swiglu,
    ),
    # replaced by another setting
    Inert(
        ("--vocab-size",),
        "is ignored with a tokenizer that has its own length, --make-vocab-size-divisible-by pads it",
        f"{TOKENIZER}:110",
        lambda s: s.tokenizer_type not in ("NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer"),
    ),
    Inert(
        ("--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis", "--loss-scale"),
        "scales the loss under --fp16 only",
        "megatron/core/optimizer/__init__.py:415",
        lambda s: not s.fp16,
    ),
    Inert(
        ("--num-query-groups",),
        "is ignored without --group-query-attention",
        f"{ARGUMENTS}:1186",
        lambda s: not s.group_query_attention,
    ),
    Inert(
        ("--use-precision-aware-optimizer",),
        "changes nothing with FP32 states and an FP8 recipe other than delayed",
        f"{OPTIMIZER}:199",
        lambda s: (
            s.fp8_recipe != "delayed"
            and not s.optimizer_cpu_offload
            and {s.main_params_dtype, s.main_grads_dtype, s.exp_avg_dtype, s.exp_avg_sq_dtype} == {"fp32"}
        ),
    ),
    # parts of something that is off
    Inert(
        ("--fp8-recipe", "--no-fp8-wgrad", "--first-last-layers-bf16"),
        "is ignored without --fp8-format",
        "megatron/core/fp8_utils.py:499",
        lambda s: not s.fp8,
    ),
    Inert(
        ("--fp8-margin", "--fp8-amax-history-len", "--fp8-amax-compute-algo"),
        "is read with --fp8-recipe delayed only",
        "megatron/core/fp8_utils.py:433",
        _fp8_recipe_off("delayed"),
    ),
    Inert(
        ("--no-fp8-wgrad",),
        "is read with --fp8-recipe delayed only",
        "megatron/core/fp8_utils.py:436",
        lambda s: bool(s.fp8) and s.fp8_recipe != "delayed",
    ),
    Inert(
        ("--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16"),
        "is ignored without --first-last-layers-bf16",
        "megatron/core/fp8_utils.py:487",
        lambda s: not s.first_last_layers_bf16,
    ),
    Inert(
        ("--lr-wsd-decay-iters", "--lr-wsd-decay-samples", "--lr-wsd-decay-style"),
        "is read with --lr-decay-style WSD only",
        f"{SCHEDULER}:155",
        lambda s: s.lr_decay_style != "WSD",
    ),
    Inert(
        ("--profile-step-start", "--profile-step-end", "--profile-ranks", "--use-pytorch-profiler"),
        "is ignored without --profile",
        f"{TRAINING}:2016",
        lambda s: not s.profile,
    ),
    Inert(
        ("--memory-snapshot-path",),
        "is ignored without --record-memory-history",
        f"{TRAINING}:1502",
        lambda s: not s.record_memory_history,
    ),
    Inert(
        ("--recompute-modules",),
        "is read with --recompute-granularity selective only",
        "megatron/core/transformer/transformer_config.py:867",
        lambda s: s.recompute != "selective",
    ),
    Inert(
        ("--recompute-method", "--recompute-num-layers"),
        "is ignored without --recompute-granularity full",
        "megatron/core/transformer/transformer_config.py:825",
        lambda s: s.recompute is None,
    ),
    Inert(
        ("--save-interval", "--save-retain-interval", "--async-save", "--no-save-optim", "--no-save-rng"),
        "is ignored without --save",
        f"{ARGUMENTS}:777",
        lambda s: s.save is None,
    ),
    Inert(
        ("--no-load-optim", "--no-load-rng", "--ckpt-step", "--exit-on-missing-checkpoint", "--finetune"),
        "is ignored without --load or --pretrained-checkpoint",
        f"{TRAINING}:1119",
        lambda s: s.load is None and s.pretrained_checkpoint is None,
    ),
    Inert(
        ("--wandb-exp-name", "--wandb-save-dir"),
        "is ignored without --wandb-project",
        f"{GLOBALS}:189",
        lambda s: not s.wandb_project,
    ),
    Inert(
        (
            "--log-timers-to-tensorboard",
            "--log-validation-ppl-to-tensorboard",
            "--log-memory-to-tensorboard",
            "--log-world-size-to-tensorboard",
            "--tensorboard-queue-size",
            "--tensorboard-log-interval",
        ),
        "is ignored without --tensorboard-dir",
        f"{GLOBALS}:171",
        lambda s: not s.tensorboard_dir,
    ),
    Inert(
        ("--replication-jump",),
        "is ignored without --replication",
        f"{ARGUMENTS}:1076",
        lambda s: not s.replication,
    ),
)

# Option groups of other Megatron programs: BERT retrieval, vision, retrieval models.
FOREIGN_GROUPS = {"biencoder": "retrieval models", "vision": "vision models", "retro": "Retro models"}
FOREIGN_EXEMPT = {"retro_project_dir", "retro_add_retriever"}  # switch Retro on inside pretrain_gpt


def check(
    contract: Contract,
    argv: Sequence[str],
    setup: Setup,
    strict: bool = False,
    table: Iterable[Inert] = TABLE,
) -> list[Problem]:
    """Deprecated and inert flags in argv, each once.

    They are warnings (a user may pass any flag through), errors with `strict` (a recipe may not), and so is a flag
    given twice with the same value. A removed flag is always an error.
    """
    level = "error" if strict else "warning"
    given = [(flag_of(piece), _values(piece)) for piece in split(contract, argv)]
    names = {flag for flag, _ in given}
    problems = []
    for entry in table:
        for flag in entry.flags:
            if flag in names and entry.when(setup):
                rank = "error" if entry.removed else level
                problems.append(Problem(rank, flag, entry.reason, located(entry.source)))
    for flag in dict.fromkeys(flag for flag, _ in given):
        option = contract.option_strings.get(flag)
        if option is None:
            continue
        if option["group"] in FOREIGN_GROUPS and option["dest"] not in FOREIGN_EXEMPT:
            reason = f"belongs to {FOREIGN_GROUPS[option['group']]}, a GPT run ignores it"
            problems.append(Problem(level, flag, reason, contract.source))
        values = [value for name, value in given if name == flag]
        # Not a warning: a launcher that is given a flag has put its value into its own arrays, too.
        if strict and option["action"] != "append" and len(values) > len({tuple(value) for value in values}):
            problems.append(Problem(level, flag, "is given twice with the same value", contract.source))
    return problems


def _values(piece: Sequence[str]) -> list[str]:
    head, equals, value = piece[0].partition("=")
    return [value, *piece[1:]] if equals else list(piece[1:])
