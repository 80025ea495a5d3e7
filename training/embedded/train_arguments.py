"""slime's command line on one device: SFT and RL as the recipes call train.py, and nothing else.

See arguments.py for the three groups of flags. The derived values follow slime_validate_args and
set_default_megatron_args (slime/utils/arguments.py and slime/backends/megatron_utils/arguments.py at 8359c9a).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.checkpoint import torch_dist
from training.embedded import arguments, rewards

SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"
RL_ROLLOUT = "slime.rollout.sglang_rollout.generate_rollout"
NONZERO_STD = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"

FINE_TUNING = """
    hf_checkpoint vocab_size prompt_data input_key label_key metadata_key apply_chat_template loss_mask_type
    rollout_function_path rollout_shuffle rollout_seed rollout_batch_size num_rollout num_epoch start_rollout_id
    n_samples_per_prompt over_sampling_batch_size dynamic_sampling_filter_path num_steps_per_rollout rm_type
    rollout_temperature rollout_top_p rollout_top_k rollout_max_response_len
    rollout_stop_token_ids rollout_skip_special_tokens
    eval_interval eval_prompt_data eval_input_key eval_label_key n_samples_per_eval_prompt eval_temperature eval_top_p
    eval_top_k eval_max_response_len
    loss_type calculate_per_token_loss compute_advantages_and_returns debug_train_only
    advantage_estimator rewards_normalization grpo_std_normalization
    eps_clip eps_clip_high use_tis tis_clip tis_clip_low entropy_coef
    use_kl_loss kl_loss_coef kl_loss_type kl_coef ref_load ref_ckpt_step
    use_dynamic_batch_size max_tokens_per_gpu context_parallel_size log_probs_max_tokens_per_gpu
    sglang_max_running_requests save load save_interval save_retain_interval no_save_optim no_save_rng ckpt_format
    use_tensorboard tb_project_name tb_experiment_name
    use_wandb wandb_mode wandb_project wandb_group wandb_dir wandb_team wandb_random_suffix
    wandb_always_use_train_step
    """.split()

POSITIVE = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings
    rollout_batch_size n_samples_per_prompt global_batch_size micro_batch_size num_steps_per_rollout
    over_sampling_batch_size num_rollout num_epoch max_tokens_per_gpu context_parallel_size rollout_max_response_len
    eval_max_response_len n_samples_per_eval_prompt eval_interval
    """.split()

INERT = {
    # Of a context parallel group only the tokens of its micro batches are left here.
    **{why: [dest for dest in inert if dest != "context_parallel_size"] for why, inert in arguments.INERT.items()},
    "one device: there is nothing to place, offload or balance": """
        actor_num_nodes actor_num_gpus_per_node num_gpus_per_node colocate offload balance_data rollout_num_gpus
        rollout_num_gpus_per_engine expert_model_parallel_size expert_tensor_parallel_size update_weight_buffer_size
        train_backend model_name use_fault_tolerance
        """.split(),
    "the rollout engine here is not SGLang": """
        sglang_mem_fraction_static sglang_server_concurrency sglang_router_ip sglang_router_port
        sglang_router_request_timeout_secs sglang_log_level use_distributed_post http_proxy
        """.split(),
    # slime's --tensorboard-dir is where its profiler writes; metrics go where --use-tensorboard says.
    "profiles CUDA": [*arguments.INERT["profiles CUDA"], "tensorboard_dir"],
}

ROLLOUT_0 = "one after rollout 0 is none that Megatron loads, as its tracker would name iteration 0"

TRAIN = arguments.Program(
    name="slime",
    upstream="slime",
    honoured=frozenset([*arguments.MODEL, *arguments.OPTIMIZATION, *FINE_TUNING, "use_rotary_position_embeddings"]),
    inert=INERT,
    only=(
        *(only for only in arguments.ONLY if only[0] not in ("bf16", "position_embedding_type")),
        ("train_backend", ("megatron",), "--train-backend megatron"),
        ("rollout_function_path", (SFT_ROLLOUT, RL_ROLLOUT), f"{SFT_ROLLOUT} or {RL_ROLLOUT}"),
        ("loss_type", ("sft_loss", "policy_loss"), "--loss-type sft_loss or policy_loss"),
        ("loss_mask_type", ("qwen",), "--loss-mask-type qwen"),
        ("advantage_estimator", ("grpo",), "--advantage-estimator grpo"),
        ("dynamic_sampling_filter_path", (None, NONZERO_STD), NONZERO_STD),
        ("kl_coef", (0.0,), "--kl-coef 0 (a KL term is --use-kl-loss)"),
        ("rewards_normalization", (True,), "normalised rewards"),
    ),
    required=(
        *("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "lr"),
        *("hf_checkpoint", "ref_load", "prompt_data", "rollout_batch_size"),
    ),
)


def is_sft(args: argparse.Namespace) -> bool:
    """Whether this is supervised fine-tuning; reinforcement learning otherwise."""
    return args.rollout_function_path == SFT_ROLLOUT


def parse(argv: Sequence[str], tell: Callable[[str], None] = print) -> argparse.Namespace:
    """Parse a train.py command line. Raises TrainingError with one line per problem."""
    args, errors, inert = arguments.accept(TRAIN, argv)
    errors += arguments.at_least_one(args, POSITIVE) + _check_sampling(args)
    if not errors:
        _set_defaults(args)
        errors += _check(args)
    arguments.finish(errors, inert, tell)
    return args


def _set_defaults(args: argparse.Namespace) -> None:
    args.bf16, args.finetune = True, False
    args.pretrained_checkpoint = args.ckpt_step = None
    args.no_load_optim = args.no_load_rng = args.exit_on_missing_checkpoint = False
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    arguments.set_model_defaults(args)
    if args.num_steps_per_rollout is not None and args.global_batch_size is None:
        args.global_batch_size = max(1, samples_per_rollout(args) // args.num_steps_per_rollout)
    if args.eps_clip_high is None:
        args.eps_clip_high = args.eps_clip
    if args.n_samples_per_prompt == 1:
        args.grpo_std_normalization = False
    if args.over_sampling_batch_size is None:
        args.over_sampling_batch_size = args.rollout_batch_size
    for name in ("temperature", "top_p", "top_k", "max_response_len"):
        if getattr(args, f"eval_{name}") is None:
            setattr(args, f"eval_{name}", getattr(args, f"rollout_{name}"))
    for name in ("input_key", "label_key"):
        if getattr(args, f"eval_{name}") is None:
            setattr(args, f"eval_{name}", getattr(args, name))
    if args.eval_prompt_data is not None and len(args.eval_prompt_data) == 1:
        args.eval_prompt_data = ["aime", *args.eval_prompt_data]


def samples_per_rollout(args: argparse.Namespace) -> int:
    """Samples that one rollout gives to the trainer."""
    return args.rollout_batch_size * args.n_samples_per_prompt


def set_length(args: argparse.Namespace, rollouts_per_epoch: int) -> int | None:
    """Set num_rollout and train_iters. Returns the rollouts of an epoch if the length is given in epochs, else None.

    Raises arguments.TrainingError where the data is less than a rollout, or than two (create_rollout_manager,
    slime/ray/placement_group.py, and get_optimizer_param_scheduler, slime/backends/megatron_utils/model.py).
    """
    epochs = args.num_epoch if args.num_rollout is None else None
    if epochs is not None:
        args.num_rollout = epochs * rollouts_per_epoch
        if not args.num_rollout:
            raise arguments.TrainingError(
                f"error: --prompt-data: expected at least --rollout-batch-size {args.rollout_batch_size} samples, "
                f"found fewer in {args.prompt_data}"
            )
        if rollouts_per_epoch == 1 and args.save is not None:
            raise arguments.TrainingError(
                f"error: --num-epoch: expected data of at least two rollouts, found one in {args.prompt_data}: an "
                f"epoch ends with a checkpoint, and {ROLLOUT_0}"
            )
    args.train_iters = args.num_rollout * samples_per_rollout(args) // args.global_batch_size
    errors = arguments.check_warmup(args)
    if errors:
        raise arguments.TrainingError("\n".join(errors))
    return None if epochs is None else rollouts_per_epoch


def choose_start(args: argparse.Namespace) -> None:
    """What to load and the first rollout, as slime decides it (slime/utils/arguments.py:1094).

    With a tracker in --load this is a resume, and --start-rollout-id must say where: slime itself stops with a
    TypeError without it. Otherwise weights come from --ref-load. Raises TrainingError.
    """
    tracker = None if args.load is None else torch_dist.read_tracker(Path(args.load))
    if tracker is None:
        args.load, args.ckpt_step, args.finetune = args.ref_load, args.ref_ckpt_step, True
        args.start_rollout_id = 0
        args.exit_on_missing_checkpoint = True  # slime would start from random weights and not say so
        return
    if not isinstance(tracker, int):
        raise arguments.TrainingError(
            f"error: --load: expected a run's own checkpoints, found a converted one ('{tracker}') in {args.load}; "
            "name it with --ref-load"
        )
    if args.start_rollout_id != tracker + 1:
        raise arguments.TrainingError(
            f"error: --start-rollout-id: expected {tracker + 1}, one more than the tracker in {args.load} says, "
            f"found {args.start_rollout_id}"
        )


def _check_sampling(args: argparse.Namespace) -> list[str]:
    errors = []
    if args.rollout_temperature <= 0.0:  # the trainer divides logits by it
        errors.append(f"error: --rollout-temperature: expected a positive number, found {args.rollout_temperature}")
    if args.eval_temperature is not None and args.eval_temperature < 0.0:
        errors.append(f"error: --eval-temperature: expected at least 0, found {args.eval_temperature}")
    for flag, value in (("--rollout-top-p", args.rollout_top_p), ("--eval-top-p", args.eval_top_p)):
        if value is not None and not 0.0 < value <= 1.0:
            errors.append(f"error: {flag}: expected more than 0 and at most 1, found {value}")
    return errors


def _check(args: argparse.Namespace) -> list[str]:
    errors = arguments.check_model(args) + _check_batches(args) + _check_mode(args)
    if args.save is not None and args.save_interval == 1:
        errors.append(f"error: --save-interval: expected at least 2, found 1: {ROLLOUT_0}")
    if args.num_rollout is None and args.num_epoch is None:
        errors.append("error: --num-rollout: expected it or --num-epoch, found neither")
    if Path(args.prompt_data).suffix not in (".jsonl", ".parquet"):
        errors.append(f"error: --prompt-data: expected a .jsonl or .parquet file, found {args.prompt_data}")
    if args.use_kl_loss and not args.kl_loss_coef:
        errors.append(
            "error: --use-kl-loss: expected a --kl-loss-coef other than 0: the term would cost a forward pass of the "
            "reference model and change nothing"
        )
    return errors


def _check_batches(args: argparse.Namespace) -> list[str]:
    errors = []
    if args.global_batch_size is None:
        errors.append("error: --global-batch-size: expected a value, found none")
    elif samples_per_rollout(args) % args.global_batch_size:
        errors.append(
            f"error: --global-batch-size: expected a divisor of the {samples_per_rollout(args)} samples of a rollout, "
            f"found {args.global_batch_size}"
        )
    elif args.num_steps_per_rollout not in (None, samples_per_rollout(args) // args.global_batch_size):
        errors.append(
            f"error: --num-steps-per-rollout: expected {samples_per_rollout(args) // args.global_batch_size}, as "
            f"--global-batch-size {args.global_batch_size} cuts the {samples_per_rollout(args)} samples of a rollout, "
            f"found {args.num_steps_per_rollout}"
        )
    if args.over_sampling_batch_size < args.rollout_batch_size:
        errors.append(
            f"error: --over-sampling-batch-size: expected at least --rollout-batch-size {args.rollout_batch_size}, "
            f"found {args.over_sampling_batch_size}"
        )
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is None:
        errors.append("error: --max-tokens-per-gpu: expected a value, since --use-dynamic-batch-size is given")
    if not args.use_dynamic_batch_size and args.global_batch_size and args.global_batch_size % args.micro_batch_size:
        errors.append(
            f"error: --micro-batch-size: expected a divisor of --global-batch-size {args.global_batch_size}, "
            f"found {args.micro_batch_size}"
        )
    return errors


def _check_mode(args: argparse.Namespace) -> list[str]:
    """The flags that make SFT of slime's loop, and those that make RL."""
    if is_sft(args):
        wanted = {
            "--loss-type sft_loss": args.loss_type == "sft_loss",
            "--calculate-per-token-loss": args.calculate_per_token_loss,
            "--disable-compute-advantages-and-returns": not args.compute_advantages_and_returns,
            "--debug-train-only": args.debug_train_only,
            "--n-samples-per-prompt 1": args.n_samples_per_prompt == 1,
        }
        return [f"error: {flag}: expected with {SFT_ROLLOUT}, not found" for flag, there in wanted.items() if not there]
    errors = []
    if args.loss_type != "policy_loss" or args.debug_train_only or not args.compute_advantages_and_returns:
        errors.append(
            f"error: --rollout-function-path: expected {SFT_ROLLOUT} with the flags of SFT, found {RL_ROLLOUT}"
        )
    if args.label_key is None:
        errors.append("error: --label-key: expected the key of the right answer, found none")
    try:
        rewards.reward(args.rm_type or "", "", "")
    except ValueError as error:
        errors.append(f"error: {error}")
    if args.eval_interval and not args.eval_prompt_data:
        errors.append("error: --eval-prompt-data: expected NAME FILE pairs, since --eval-interval is given, found none")
    if args.eval_prompt_data and len(args.eval_prompt_data) % 2:
        errors.append(f"error: --eval-prompt-data: expected NAME FILE pairs, found {' '.join(args.eval_prompt_data)}")
    return errors
