"""Rollouts and optimizer steps that follow from a number of samples, as slime 8359c9a counts them.

    rollouts per epoch   samples // rollout_batch_size
    rollouts             --num-rollout, otherwise num_epoch * rollouts per epoch
    optimizer steps      rollouts * rollout_batch_size * n_samples_per_prompt / global_batch_size

(slime/ray/placement_group.py, slime/backends/megatron_utils/model.py). SFT has one sample per "prompt", and its
rollout is a batch of the file. What these numbers would break is refused here, before a job is submitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.data.errors import DataError


@dataclass(frozen=True)
class Plan:
    """The numbers of a recipe; None where a flag is not given."""

    rollout_batch_size: int
    global_batch_size: int | None = None
    n_samples_per_prompt: int = 1
    num_epoch: int | None = None
    num_rollout: int | None = None  # wins over num_epoch, as in slime
    save_interval: int | None = None


@dataclass(frozen=True)
class Schedule:
    samples_per_epoch: int
    rollouts_per_epoch: int
    rollouts: int | None
    epochs: float | None
    optimizer_steps: int | None


def schedule(samples: int, plan: Plan, name: str) -> Schedule:
    """What follows for a file with that many samples; `name` is the file in errors. Raises DataError."""
    batch, step = plan.rollout_batch_size, plan.global_batch_size
    trained = batch * plan.n_samples_per_prompt
    if step and trained % step:
        raise DataError(
            f"--global-batch-size {step}: expected a divisor of --rollout-batch-size {batch} x --n-samples-per-prompt "
            f"{plan.n_samples_per_prompt} = {trained}"
        )
    per_epoch = samples // batch
    if not per_epoch:
        raise DataError(
            f"{name}: expected at least --rollout-batch-size {batch} samples, found {samples}: an epoch would have 0 "
            "rollouts"
        )
    rollouts = plan.num_rollout or (plan.num_epoch * per_epoch if plan.num_epoch else None)
    _check_saves(plan, per_epoch, name)
    return Schedule(
        samples_per_epoch=per_epoch * batch,
        rollouts_per_epoch=per_epoch,
        rollouts=rollouts,
        epochs=rollouts * batch / samples if rollouts else None,
        optimizer_steps=rollouts * trained // step if rollouts and step else None,
    )


def _check_saves(plan: Plan, per_epoch: int, name: str) -> None:
    """Is the last rollout saved, and the first one not?

    slime saves after rollout i if save_interval divides i + 1, and with num_epoch at the end of every epoch (train.py).
    The tracker file then holds i, and Megatron refuses a tracker of 0 (megatron/training/checkpointing.py:287).
    """
    interval = plan.save_interval
    if not interval:
        return
    refused = "leaves 0 in the tracker file, which Megatron refuses to load"
    if interval == 1:
        raise DataError(f"--save-interval 1: expected at least 2: a save after the first rollout {refused}")
    if plan.num_rollout and plan.num_rollout % interval:
        raise DataError(
            f"--save-interval {interval}: expected a divisor of --num-rollout {plan.num_rollout}, or the last rollout "
            "is never saved"
        )
    if plan.num_epoch and not plan.num_rollout and per_epoch == 1:
        raise DataError(
            f"{name}: expected at least 2 rollouts per epoch, found 1: slime saves at the end of an epoch, and a save "
            f"after the first rollout {refused}; lower --rollout-batch-size, or use --num-rollout"
        )
