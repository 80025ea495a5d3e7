#!/usr/bin/env python3
"""Supervised fine-tuning and reinforcement learning on one CPU or GPU, with the command line of slime's train.py.

    python training/embedded/train.py --num-layers 4 ... --ref-load exp/cpt/checkpoints --save exp/sft/checkpoints

The recipes under scripts/SFT and scripts/RL assemble the command line and submit it as a Ray job; docs/EMBEDDED.md says
which flags act here. This process trains; an actor of the same Ray job tokenises conversations (SFT), or generates with
the policy's weights and rewards (RL). Called outside of a job it starts a Ray of its own.

A run that is interrupted at any moment goes on from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import datetime
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import ray  # noqa: E402
import torch  # noqa: E402

from tools.checkpoint.errors import CheckpointError  # noqa: E402
from training.embedded import arguments, train_arguments  # noqa: E402
from training.embedded.errors import TrainingError  # noqa: E402
from training.embedded.reporting import Recorder  # noqa: E402
from training.embedded.rollout import RolloutManager  # noqa: E402


def start_ray() -> None:
    """Join the cluster that this job belongs to, or start one for this process."""
    if os.environ.get("RAY_ADDRESS"):  # Ray sets it for a job
        ray.init(logging_level="warning")  # its greeting has colour codes
    else:
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        ray.init(address="local", include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})


def start_rollouts(args: argparse.Namespace):
    """The rollout actor. On a machine with GPUs it shares one with the trainer."""
    gpus = 0.5 if ray.cluster_resources().get("GPU") and torch.cuda.is_available() else 0
    return ray.remote(RolloutManager).options(num_gpus=gpus).remote(args, torch.get_num_threads())


def recorder(args: argparse.Namespace) -> Recorder:
    """Where slime sends metrics (slime/utils/tensorboard_utils.py and wandb_utils.py)."""
    directory = None
    if args.use_tensorboard:
        name = args.tb_experiment_name or f"{datetime.now():%Y%m%d_%H%M%S}"
        directory = os.environ.get("TENSORBOARD_DIR", f"tensorboard_log/{args.tb_project_name}/{name}")
    wandb = {
        "project": args.wandb_project,
        "group": args.wandb_group,
        "dir": args.wandb_dir,
        "entity": args.wandb_team,
        "mode": args.wandb_mode,
    }
    return Recorder(directory, wandb if args.use_wandb else None)


class Run:
    """The loop of slime's train.py: generate, train, save, hand over the weights, evaluate."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rollouts = start_rollouts(args)
        per_epoch = self.rollouts.start.remote()
        from training.embedded.learner import Learner  # takes seconds to import: those in which the actor starts

        self.per_epoch = train_arguments.set_length(args, ray.get(per_epoch))
        if args.start_rollout_id:
            ray.get(self.rollouts.load.remote(args.load, args.start_rollout_id - 1))
        self.learner = Learner(args)
        self.generates = not args.debug_train_only
        self.recorder = recorder(args)

    def run(self) -> None:
        """Every rollout from --start-rollout-id on."""
        args = self.args
        print(self.learner.describe(), flush=True)
        print(
            f"rollouts {args.start_rollout_id} to {args.num_rollout - 1}, {args.train_iters} optimizer steps",
            flush=True,
        )
        self.hand_over_weights()
        for rollout_id in range(args.start_rollout_id, args.num_rollout):
            if rollout_id == 0 and args.eval_interval:
                self.evaluate(rollout_id)
            self.rollout(rollout_id)
            if args.save_interval and self.due(rollout_id, args.save_interval):
                self.save(rollout_id)
            self.hand_over_weights()
            if args.eval_interval and self.due(rollout_id, args.eval_interval):
                self.evaluate(rollout_id)
        self.recorder.close()

    def due(self, rollout_id: int, interval: int) -> bool:
        """After every `interval` rollouts and at the end of an epoch."""
        done = rollout_id + 1
        return done % interval == 0 or (self.per_epoch is not None and done % self.per_epoch == 0)

    def rollout(self, rollout_id: int) -> None:
        """Make a batch and train on it."""
        batch, metrics = ray.get(self.rollouts.generate.remote(rollout_id))
        steps = len(batch) // self.args.global_batch_size
        start = time.perf_counter()
        for step, values in enumerate(self.learner.train(batch), rollout_id * steps):
            train = {name: value for name, value in values.items() if name.startswith("train/")}
            metrics |= {name: value for name, value in values.items() if name not in train}
            self.log("step", step, train)
        metrics["perf/actor_train_time"] = time.perf_counter() - start
        self.log("rollout", rollout_id, metrics, shown=rollout_id)

    def log(self, what: str, number: int, values: dict[str, float], shown: int | None = None) -> None:
        """Print a line of slime's form and record the values, which it counts in rollouts or in steps."""
        self.recorder.scalars(values, self.step_of(number) if shown is not None else number)
        text = ", ".join(f"'{name}': {value:.6g}" for name, value in values.items())
        print(f"{what} {number}: {{{text}}}", flush=True)

    def step_of(self, rollout_id: int) -> int:
        """What metrics of a rollout are recorded under (--wandb-always-use-train-step)."""
        if not self.args.wandb_always_use_train_step:
            return rollout_id
        return rollout_id * train_arguments.samples_per_rollout(self.args) // self.args.global_batch_size

    def save(self, rollout_id: int) -> None:
        """Metrics, then the data position, then the checkpoint: the tracker, last of all, vouches for the rest."""
        self.recorder.flush()
        ray.get(self.rollouts.save.remote(self.args.save, rollout_id))
        directory = self.learner.save(rollout_id)
        print(f"saved checkpoint {directory} after rollout {rollout_id}", flush=True)

    def hand_over_weights(self) -> None:
        """Send the policy to the rollout engine, in FP8 where that is what it runs."""
        if self.generates:
            fp8 = ray.get(self.rollouts.fp8.remote())
            ray.get(self.rollouts.update_weights.remote(self.learner.rollout_weights(fp8=fp8)))

    def evaluate(self, rollout_id: int) -> None:
        """Rewards on held-out prompts."""
        if self.generates:
            self.log("eval", rollout_id, ray.get(self.rollouts.evaluate.remote(rollout_id)), shown=rollout_id)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(__doc__ + arguments.acting(train_arguments.TRAIN))
        return 0
    try:
        args = train_arguments.parse(argv)
        train_arguments.choose_start(args)
        start_ray()
        Run(args).run()
    # The first one, as Ray makes it of the class of its cause, too, with a traceback for a text.
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, (TrainingError, CheckpointError)):
            raise
        print(error.cause, file=sys.stderr)
        return 1
    except (TrainingError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except ray.exceptions.RayActorError as error:
        print(f"error: the rollout actor died: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
