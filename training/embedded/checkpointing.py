"""Saving and restoring a run as a Megatron torch_dist checkpoint.

The layout is the one that core_v0.14.0 writes without the distributed optimizer: model weights in BF16, and
`optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.<key>` in float32. So any tool that reads Megatron's checkpoints reads
these, and this engine starts from checkpoints that Megatron wrote. Restoring is exact: weights, moments, step counts,
schedule, data position and random state, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from tools.checkpoint import qwen2_layout, torch_dist, torch_dist_writer
from training.embedded.errors import TrainingError
from training.embedded.optimization import MainParamOptimizer, load_scheduler

# What a checkpoint of another model gets wrong first (check_checkpoint_args, megatron/training/checkpointing.py:83 at
# the pin, compares three of these; rotary_base and norm_epsilon change results just as much).
_SAME = "num_layers hidden_size ffn_hidden_size num_attention_heads rotary_base norm_epsilon".split()


@dataclass
class Progress:
    """How far a run has come: optimizer steps, samples read of two splits, floating point operations."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    floating_point_operations: float = 0.0


def shape_of(args: argparse.Namespace, vocab_rows: int) -> qwen2_layout.Qwen2Shape:
    """The tensor shapes that the arguments describe."""
    return qwen2_layout.Qwen2Shape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_rows=vocab_rows,
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_qkv_bias,
    )


def save(
    args: argparse.Namespace,
    vocab_rows: int,
    model: nn.Module,
    optimizer: MainParamOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
) -> Path:
    """Write `iter_XXXXXXX` whole, then point the tracker at it. Returns the new directory."""
    root = Path(args.save)
    directory = root / f"iter_{progress.iteration:07d}"
    shape = shape_of(args, vocab_rows)
    tensors: dict[str, dict[str, Tensor]] = {"": dict(model.named_parameters())}
    if not args.no_save_optim:
        tensors["optimizer.state.fp32_param."] = dict(zip(optimizer.names, optimizer.main, strict=True))
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.state.{kind}."] = optimizer.moments(kind)
    # A run that was killed before the tracker moved comes here again, with the same content.
    with torch_dist_writer.Writer(directory, replace=True) as writer:
        for prefix, named in tensors.items():
            for entry in qwen2_layout.to_megatron(lambda name, named=named: named[name].detach().cpu(), shape, prefix):
                writer.add_tensor(entry.key, entry.tensor, global_shape=entry.global_shape, offset=entry.offset)
        for key in qwen2_layout.extra_state_keys(shape):
            writer.add_object(key, torch.empty(0, dtype=torch.uint8))
        if not args.no_save_rng:
            writer.add_object("rng_state/shard_0.0_1.1", _rng_state())
        writer.finish(_common(args, vocab_rows, optimizer, scheduler, progress))
    previous = torch_dist.read_tracker(root)
    torch_dist.write_tracker(root, progress.iteration)
    if args.save_retain_interval and isinstance(previous, int) and previous % args.save_retain_interval:
        if previous != progress.iteration:
            shutil.rmtree(root / f"iter_{previous:07d}", ignore_errors=True)
    return directory


def load(
    args: argparse.Namespace,
    vocab_rows: int,
    model: nn.Module,
    optimizer: MainParamOptimizer,
    scheduler: OptimizerParamScheduler,
) -> tuple[Progress, str]:
    """Restore what --load or --pretrained-checkpoint names, as load_checkpoint decides (checkpointing.py:1355).

    Returns the progress to go on from and a sentence that says what was loaded.
    """
    source, finetune = args.load, args.finetune
    if (
        args.pretrained_checkpoint
        and (source is None or torch_dist.read_tracker(Path(source)) is None)
        and not (args.ckpt_step and source and (Path(source) / f"iter_{args.ckpt_step:07d}").is_dir())
    ):
        source, finetune = args.pretrained_checkpoint, True
        if torch_dist.read_tracker(Path(source)) is None:
            raise TrainingError(
                f"--pretrained-checkpoint: expected a checkpoint with a tracker file, found none in {source}"
            )
    if source is None or (torch_dist.read_tracker(Path(source)) is None and not args.ckpt_step):
        if args.exit_on_missing_checkpoint:
            flag = "--ref-load" if source and source == getattr(args, "ref_load", None) else "--load"
            raise TrainingError(f"{flag}: expected a checkpoint, found none in {source}")
        return Progress(), f"random weights (seed {args.seed})"

    location = torch_dist.resolve(Path(source), args.ckpt_step)
    with torch_dist.Reader(location.directory) as reader:
        common, shape = _read_weights(args, vocab_rows, model, reader, location.directory)
        saved = common["args"]
        released = location.iteration == "release"
        with_optimizer = not (finetune or released or args.no_load_optim or getattr(saved, "no_save_optim", False))
        if with_optimizer:
            _load_optimizer(reader, shape, common, optimizer)
            load_scheduler(scheduler, common["opt_param_scheduler"])
        else:
            optimizer.copy_model_to_main()
        if not (finetune or released or args.no_load_rng or getattr(saved, "no_save_rng", False)):
            _set_rng_state(reader)
    what = f"{location.directory}, {'weights, optimizer and schedule' if with_optimizer else 'weights only'}"
    if finetune or released:
        return Progress(), what
    return (
        Progress(
            iteration=location.iteration,
            consumed_train_samples=saved.consumed_train_samples,
            consumed_valid_samples=saved.consumed_valid_samples,
            floating_point_operations=common.get("num_floating_point_operations_so_far", 0.0),
        ),
        what,
    )


def load_weights(
    args: argparse.Namespace, vocab_rows: int, model: nn.Module, source: Path, step: int | None = None
) -> None:
    """The model's weights alone, from a checkpoint root (or one step of it)."""
    directory = torch_dist.resolve(source, step).directory
    with torch_dist.Reader(directory) as reader:
        _read_weights(args, vocab_rows, model, reader, directory)


def _read_weights(args, vocab_rows, model, reader, directory: Path) -> tuple[dict, qwen2_layout.Qwen2Shape]:
    common = reader.common()
    _check_same_model(args, common["args"], directory)
    shape = shape_of(args, vocab_rows)
    weights = dict(qwen2_layout.to_hf(reader, shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return common, shape


def _check_same_model(args: argparse.Namespace, saved, directory: Path) -> None:
    for dest in _SAME:
        expected, found = getattr(saved, dest, None), getattr(args, dest)
        if expected is not None and expected != found:
            raise TrainingError(
                f"--{dest.replace('_', '-')}: the checkpoint {directory} was trained with {expected}, found {found}"
            )


def _common(args, vocab_rows, optimizer, scheduler, progress) -> dict:
    saved = argparse.Namespace(**{k: v for k, v in vars(args).items() if _is_plain(v)})
    saved.consumed_train_samples = progress.consumed_train_samples
    saved.consumed_valid_samples = progress.consumed_valid_samples
    saved.padded_vocab_size = vocab_rows
    # One process wrote this, whatever parallel sizes the recipe asks of a cluster.
    saved.tensor_model_parallel_size = saved.pipeline_model_parallel_size = saved.context_parallel_size = 1
    saved.world_size = saved.data_parallel_size = 1
    common = {
        "args": saved,
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "num_floating_point_operations_so_far": progress.floating_point_operations,
        "content_metadata": {"chained_optim_avoid_prefix": True, "singleton_local_shards": False},
    }
    if not args.no_save_optim:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        step = torch.tensor(float(optimizer.steps()))
        common["optimizer"] = {"optimizer": {"state": {"common_step": step}, "param_groups": groups}}
        common["opt_param_scheduler"] = scheduler.state_dict()
    return common


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _load_optimizer(reader, shape, common: dict, optimizer: MainParamOptimizer) -> None:
    state = {}
    for kind in ("fp32_param", "exp_avg", "exp_avg_sq"):
        state[kind] = dict(qwen2_layout.to_hf(reader, shape, f"optimizer.state.{kind}."))
    saved = common["optimizer"]["optimizer"]
    step = int(np.asarray(saved["state"]["common_step"].numpy()).item())
    optimizer.load(state["fp32_param"], state["exp_avg"], state["exp_avg_sq"], step)
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update(max_lr=before["max_lr"], min_lr=before["min_lr"])


def _rng_state() -> dict:
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng_state"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(reader) -> None:
    if "rng_state/shard_0.0_1.1" not in reader.objects:
        return
    state = reader.read_object("rng_state/shard_0.0_1.1")
    random.setstate(state["random_rng_state"])
    name, keys, *position = state["np_rng_state"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(torch.from_numpy(state["torch_rng_state"].numpy().copy()))
    if torch.cuda.is_available() and "cuda_rng_state" in state:
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda_rng_state"].numpy().copy()))
