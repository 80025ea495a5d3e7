"""Flags that slime accepts at the pin although they are deprecated or change nothing.

As inert.py for pretrain_gpt, whose table is the first part here, without the entries that slime makes untrue.  Not
listed: --bf16, which slime forces, because it says what is true; --max-position-embeddings, which slime overwrites,
because the files of scripts/models serve both programs.  Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from training.contract import inert
from training.contract.contract import load
from training.contract.inert import Inert
from training.contract.setup import SlimeSetup
from training.contract.slime_rules import ARGUMENTS, BACKEND, ENGINES, GRADES, SAMPLES

# First flags of the entries of inert.TABLE that do not hold for slime.
NOT_SLIMES = {
    "--vocab-size",  # slime believes it
    "--profile-step-start",  # slime's profiler needs --use-pytorch-profiler only
    "--save-interval",  # without --save an error
    "--no-load-optim",  # an error, and --ckpt-step acts on --ref-load
    "--wandb-exp-name",  # always without effect
    "--log-timers-to-tensorboard",  # always without effect
}


def _on_megatron(entry: Inert) -> Inert:
    return entry._replace(when=lambda s: entry.when(s.megatron))


def _flags(chosen: Callable[[dict], bool]) -> tuple[str, ...]:
    """Every flag of the options that are chosen."""
    return tuple(flag for option in load("slime").options if chosen(option) for flag in option["options"])


def _no_metrics(s: SlimeSetup) -> bool:
    return not (s.use_tensorboard or s.use_wandb)


SGLANG = _flags(
    lambda option: option["origin"] == "sglang" and option["dest"] not in ("sglang_router_ip", "sglang_router_port")
)

TABLE: tuple[Inert, ...] = (
    *(_on_megatron(entry) for entry in inert.TABLE if entry.flags[0] not in NOT_SLIMES),
    # replaced by slime
    Inert(("--seq-length",), "is overwritten, sequences have their own lengths", f"{BACKEND}/arguments.py:13"),
    Inert(("--use-distributed-optimizer",), "is always on", f"{BACKEND}/arguments.py:9"),
    Inert(
        ("--train-iters", "--train-samples", "--lr-decay-samples", "--lr-warmup-samples", "--rampup-batch-size"),
        "is not read, --num-rollout or --num-epoch is the length of the run",
        f"{BACKEND}/model.py:46",
    ),
    Inert(
        ("--profile", "--profile-ranks"),
        "is not read, --use-pytorch-profiler alone profiles rank 0",
        f"{BACKEND}/actor.py:118",
    ),
    Inert(
        _flags(lambda option: option["group"] == "data and dataloader" and option["dest"] != "seq_length"),
        "is not read, --prompt-data is the data",
        "slime/ray/rollout_data_source.py:33",
    ),
    Inert(
        (
            *("--exit-signal-handler", "--exit-interval", "--exit-duration-in-mins", "--eval-iters", "--log-interval"),
            *("--log-throughput", "--log-params-norm", "--log-num-zeros-in-grad", "--timing-log-level", "--skip-train"),
            *("--check-for-spiky-loss", "--empty-unused-memory-level", "--rerun-mode"),
        ),
        "belongs to Megatron's training loop, slime has its own",
        "train.py:34",
    ),
    Inert(
        (
            *("--log-timers-to-tensorboard", "--log-validation-ppl-to-tensorboard", "--log-memory-to-tensorboard"),
            *("--log-world-size-to-tensorboard", "--tensorboard-queue-size", "--tensorboard-log-interval"),
            *("--wandb-exp-name", "--wandb-save-dir"),
        ),
        "belongs to Megatron's loggers, slime has its own",
        f"{BACKEND}/initialize.py:52",
    ),
    Inert(
        ("--use-checkpoint-args", "--ckpt-convert-format", "--ckpt-convert-save"),
        "is not read, slime has its own start-up",
        f"{BACKEND}/initialize.py:52",
    ),
    # read nowhere
    Inert(("--eps-clip-c",), "is not read, the loss is called without it", f"{BACKEND}/loss.py:419"),
    Inert(
        ("--log-probs-max-tokens-per-gpu",), "is not read, --max-tokens-per-gpu serves both", f"{BACKEND}/data.py:262"
    ),
    Inert(("--rollout-max-context-len",), "is not read, the model's context is the limit", f"{ARGUMENTS}:159"),
    Inert(("--eval-min-new-tokens",), "is not read", f"{ARGUMENTS}:550"),
    Inert(("--http-proxy",), "is not read", f"{ARGUMENTS}:847"),
    Inert(("--min-batch-collection-ratio",), "is not read", f"{ARGUMENTS}:917"),
    Inert(
        ("--update-weights-interval",),
        "is read by train_async.py only",
        "train_async.py:55",
        lambda s: s.entrypoint == "train.py" and not s.keep_old_actor,
    ),
    # replaced by another setting
    Inert(
        ("--num-epoch",), "is ignored beside --num-rollout", f"{ARGUMENTS}:1214", lambda s: s.num_rollout is not None
    ),
    Inert(
        ("--micro-batch-size",),
        "is ignored with --use-dynamic-batch-size",
        f"{BACKEND}/data.py:250",
        lambda s: s.use_dynamic_batch_size,
    ),
    Inert(
        ("--rollout-num-gpus",),
        "is ignored with --colocate, engines take the trainer's GPUs",
        f"{ARGUMENTS}:1173",
        lambda s: s.colocate and not s.train_only,
    ),
    Inert(("--rm-type",), "is ignored beside --custom-rm-path", f"{GRADES}:30", lambda s: s.custom_rm_path is not None),
    Inert(
        ("--tensorboard-dir",),
        "is the profiler's folder, metrics go to TENSORBOARD_DIR or to tensorboard_log/PROJECT/EXPERIMENT",
        "slime/utils/tensorboard_utils.py:40",
        lambda s: s.use_tensorboard and not s.use_pytorch_profiler,
    ),
    # a term of weight 0
    Inert(
        ("--use-kl-loss",),
        "loads a reference model and runs it at each step for a term of weight 0, give --kl-loss-coef or leave it out",
        f"{BACKEND}/loss.py:455",
        lambda s: s.use_kl_loss and s.kl_loss_coef == 0,
    ),
    Inert(
        ("--kl-coef",),
        "loads a reference model and runs it at each step, but does not change the returns of grpo and gspo",
        "slime/utils/ppo_utils.py:130",
        lambda s: s.kl_coef != 0 and s.advantage_estimator in ("grpo", "gspo"),
    ),
    # parts of something that is off
    Inert(
        ("--kl-loss-coef",), "is ignored without --use-kl-loss", f"{BACKEND}/loss.py:445", lambda s: not s.use_kl_loss
    ),
    Inert(
        ("--kl-loss-type", "--ref-update-interval"),
        "is ignored without a reference model (--use-kl-loss or --kl-coef)",
        f"{BACKEND}/actor.py:293",
        lambda s: not s.reference,
    ),
    Inert(
        ("--tis-clip", "--tis-clip-low"),
        "is ignored without --use-tis",
        f"{BACKEND}/loss.py:422",
        lambda s: not s.use_tis,
    ),
    Inert(
        (
            *("--value-clip", "--lambd", "--critic-load", "--critic-save", "--critic-lr", "--critic-num-nodes"),
            *("--critic-num-gpus-per-node", "--num-critic-only-steps"),
        ),
        "is read with --advantage-estimator ppo only",
        f"{ARGUMENTS}:1147",
        lambda s: not s.critic,
    ),
    Inert(
        ("--gamma",),
        "is read with --advantage-estimator ppo or reinforce_plus_plus only",
        f"{BACKEND}/loss.py:266",
        lambda s: s.advantage_estimator not in ("ppo", "reinforce_plus_plus"),
    ),
    Inert(
        ("--max-tokens-per-gpu",),
        "is ignored without --use-dynamic-batch-size",
        f"{BACKEND}/data.py:250",
        lambda s: not s.use_dynamic_batch_size,
    ),
    Inert(
        ("--save-retain-interval", "--no-save-optim", "--no-save-rng"),
        "is ignored without --save",
        "train.py:52",
        lambda s: s.save is None,
    ),
    Inert(
        ("--profile-step-start", "--profile-step-end"),
        "is ignored without --use-pytorch-profiler",
        f"{BACKEND}/actor.py:118",
        lambda s: not s.use_pytorch_profiler,
    ),
    Inert(
        ("--tb-project-name", "--tb-experiment-name"),
        "is ignored without --use-tensorboard",
        "slime/utils/tensorboard_utils.py:27",
        lambda s: not s.use_tensorboard,
    ),
    Inert(
        (
            *("--wandb-project", "--wandb-group", "--wandb-mode", "--wandb-dir", "--wandb-key", "--wandb-host"),
            *("--wandb-team", "--wandb-run-id", "--disable-wandb-random-suffix"),
        ),
        "is ignored without --use-wandb",
        "slime/utils/wandb_utils.py:18",
        lambda s: not s.use_wandb,
    ),
    Inert(
        ("--wandb-always-use-train-step",),
        "is ignored without --use-wandb or --use-tensorboard",
        f"{BACKEND}/data.py:121",
        _no_metrics,
    ),
    Inert(
        (
            *("--eval-prompt-data", "--eval-input-key", "--eval-label-key", "--eval-tool-key", "--eval-temperature"),
            *("--eval-top-p", "--eval-top-k", "--eval-max-response-len", "--n-samples-per-eval-prompt"),
            *("--eval-function-path", "--eval-reward-key"),
        ),
        "is ignored without --eval-interval",
        "train.py:36",
        lambda s: s.eval_interval is None,
    ),
    Inert(
        ("--rm-url",),
        "is read with --rm-type remote_rm only",
        f"{GRADES}:24",
        lambda s: s.rm_type not in ("remote_rm", "boxed_remote_rm") and s.custom_rm_path is None,
    ),
    Inert(
        ("--custom-loss-function-path",),
        "is read with --loss-type custom_loss only",
        f"{BACKEND}/loss.py:640",
        lambda s: s.loss_type != "custom_loss",
    ),
    Inert(
        ("--loss-mask-type",),
        "is read by sft_rollout only",
        f"{SAMPLES}:32",
        lambda s: s.generates,
    ),
    Inert(
        ("--rollout-external-engine-addrs",),
        "is ignored without --rollout-external",
        f"{ENGINES}:286",
        lambda s: not s.rollout_external,
    ),
    Inert(
        ("--rollout-health-check-interval", "--rollout-health-check-timeout", "--rollout-health-check-first-wait"),
        "is ignored without --use-fault-tolerance",
        f"{ENGINES}:65",
        lambda s: not s.use_fault_tolerance,
    ),
    # supervised fine-tuning
    Inert(
        (
            *("--advantage-estimator", "--eps-clip", "--eps-clip-high", "--entropy-coef", "--use-tis", "--use-kl-loss"),
            *("--kl-coef", "--normalize-advantages", "--disable-grpo-std-normalization"),
            *("--disable-rewards-normalization", "--use-rollout-entropy"),
        ),
        "is no part of the SFT loss",
        f"{BACKEND}/loss.py:537",
        lambda s: s.sft,
    ),
    Inert(
        (
            *("--rollout-top-p", "--rollout-top-k", "--rollout-max-response-len", "--rollout-stop"),
            *("--rollout-stop-token-ids", "--rollout-skip-special-tokens", "--over-sampling-batch-size"),
            *("--dynamic-sampling-filter-path", "--partial-rollout", "--custom-generate-function-path"),
            *("--rm-type", "--rm-url", "--custom-rm-path", "--group-rm"),
        ),
        "is not read by sft_rollout, which generates nothing",
        f"{SAMPLES}:34",
        lambda s: s.reads_samples,
    ),
    # no engines
    Inert(
        (
            *("--rollout-num-gpus", "--rollout-num-gpus-per-engine", "--use-fault-tolerance", "--rollout-external"),
            *("--update-weight-buffer-size",),
            *SGLANG,
        ),
        "configures engines, and none is started",
        f"{ENGINES}:238",
        lambda s: s.train_only,
    ),
    Inert(
        ("--colocate", "--offload"),
        "moves the trainer to and fro for engines that are not started",
        f"{ENGINES}:238",
        lambda s: s.train_only,
    ),
    Inert(
        ("--eval-interval",),
        "is ignored, evaluation needs engines and none is started",
        f"{ENGINES}:100",
        lambda s: s.train_only,
    ),
)
