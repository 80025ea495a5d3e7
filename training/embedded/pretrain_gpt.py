#!/usr/bin/env python3
"""Continual pre-training on one CPU or GPU, with the command line of Megatron-LM's pretrain_gpt.py (core_v0.14.0).

    python training/embedded/pretrain_gpt.py --num-layers 4 ... --save exp/run/checkpoints --load exp/run/checkpoints

The recipes under scripts/CPT assemble the command line; docs/EMBEDDED.md says which flags act here. A run that is
interrupted at any moment goes on from its last checkpoint with the same command and ends with the same weights.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from tools.checkpoint.block_fp8 import power_of_two_scales  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402
from training.embedded import arguments, checkpointing, data, fp8_linear, model, optimization  # noqa: E402
from training.embedded.errors import TrainingError  # noqa: E402
from training.embedded.reporting import Reporter  # noqa: E402


class Stop:
    """Why a run should end early; false while it should not."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start, self.signalled = args, time.monotonic(), False
        if args.exit_signal_handler:
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "signalled", True))

    def reason(self, iteration: int) -> str | None:
        """checkpoint_and_decide_exit, megatron/training/training.py:1759 at the pin."""
        minutes = (time.monotonic() - self.start) / 60.0
        if self.signalled:
            return "exiting program after receiving SIGTERM."
        if self.args.exit_duration_in_mins and minutes > self.args.exit_duration_in_mins:
            return f"exiting program after {minutes:.1f} minutes"
        if self.args.exit_interval and iteration % self.args.exit_interval == 0:
            return f"exiting program at iteration {iteration}"
        return None


class Trainer:
    """One run: builds everything from the arguments, then `train`s."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        tokenizer = data.HuggingFaceTokenizer(args.tokenizer_model)
        self.vocab_rows = model.padded_vocab_size(
            tokenizer.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
        precision = fp8_linear.Precision(fp8=args.fp8 is not None, pow2=power_of_two_scales())
        self.model = model.build(args, self.vocab_rows, self.device, precision)
        self.optimizer = optimization.MainParamOptimizer(self.model, args)
        self.scheduler = optimization.build_scheduler(self.optimizer, args)
        self.progress, loaded = checkpointing.load(args, self.vocab_rows, self.model, self.optimizer, self.scheduler)
        self.datasets = data.build(args, tokenizer)
        print(
            f"model: {sum(p.numel() for p in self.model.parameters()):,} parameters on {self.device}, "
            f"started from {loaded}"
        )
        print(fp8_linear.describe(self.model, precision), flush=True)
        self.reporter = Reporter(args, self.vocab_rows, self.progress.iteration)

    def train(self) -> None:
        """Train to --train-iters or until something asks to stop; a checkpoint is on disk either way."""
        args, progress = self.args, self.progress
        stop = Stop(args)
        if progress.iteration == 0 and not args.skip_train:
            self.evaluate_test()
        if not args.skip_train and progress.iteration < args.train_iters:
            batches = self.micro_batches(self.datasets.train, progress.consumed_train_samples)
            while progress.iteration < args.train_iters:
                self.iteration(batches)
                if args.eval_interval and progress.iteration % args.eval_interval == 0:
                    self.evaluate_valid(f"iteration {progress.iteration}")
                reason = stop.reason(progress.iteration)
                last = progress.iteration == args.train_iters
                if last:
                    # Before the checkpoint that completes the run: a finished run always has its final held-out losses.
                    self.evaluate_valid(f"iteration {progress.iteration} on validation set")
                    self.evaluate_test()
                if args.save and (last or reason or progress.iteration % args.save_interval == 0):
                    self.save()
                if reason and not last:
                    self.reporter.say(reason)
                    break
        elif args.skip_train:
            self.evaluate_valid(f"iteration {progress.iteration} on validation set")
            self.evaluate_test()
        self.reporter.close()

    def micro_batches(self, dataset: data.GPTDataset, consumed: int) -> Iterator[data.Batch]:
        """The micro batches of a split after the first `consumed` samples."""
        return data.micro_batches(dataset, consumed, self.args.micro_batch_size, self.vocab_rows, self.device)

    def iteration(self, batches: Iterator[data.Batch]) -> None:
        """One optimizer step over --global-batch-size samples."""
        args, progress = self.args, self.progress
        count = args.global_batch_size // args.micro_batch_size
        total = tokens = 0.0
        for _ in range(count):
            summed, kept = self.loss(next(batches))
            (summed / kept.clamp(min=1) / count).backward()
            total += summed.item()
            tokens += kept.item()
        loss = total / max(tokens, 1.0)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise TrainingError(
                f"iteration {progress.iteration + 1}: the loss is {loss}; nothing was saved since the last checkpoint"
            )
        extras: dict[str, float] = {}
        if args.log_num_zeros_in_grad:
            extras["num-zeros"] = self.optimizer.zeros_in_grad()
        norm = self.optimizer.step()
        # Megatron steps the schedule after the optimizer and logs what that leaves: the rate of the next iteration.
        self.scheduler.step(args.global_batch_size)
        if args.log_params_norm:
            extras["params-norm"] = self.optimizer.params_norm()
        progress.iteration += 1
        progress.consumed_train_samples += args.global_batch_size
        progress.floating_point_operations += self.reporter.flops
        self.reporter.step(progress.iteration, progress.consumed_train_samples, loss, self.optimizer.lr, norm, extras)

    def loss(self, batch: data.Batch) -> tuple[Tensor, Tensor]:
        """Summed cross entropy over the unmasked tokens of a micro batch, and their number (loss_func)."""
        logits = self.model(input_ids=batch.tokens, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), batch.labels.view(-1), reduction="none")
        mask = batch.loss_mask.view(-1).float()
        return (losses * mask).sum(), mask.sum()

    def evaluate_valid(self, prefix: str) -> None:
        """Held-out loss on the next samples of the validation split: like Megatron's, the window moves on."""
        if self.datasets.valid is None or not self.args.eval_iters:
            return
        loss = self.evaluate(self.datasets.valid, self.progress.consumed_valid_samples)
        self.progress.consumed_valid_samples += self.args.eval_iters * self.args.global_batch_size
        self.reporter.evaluation(prefix, "validation", loss, self.progress.iteration)

    def evaluate_test(self) -> None:
        """Held-out loss on the first samples of the test split: the same ones at the start and at the end of a run."""
        if self.datasets.test is None or not self.args.eval_iters:
            return
        loss = self.evaluate(self.datasets.test, 0)
        self.reporter.evaluation(
            f"iteration {self.progress.iteration} on test set", "test", loss, self.progress.iteration
        )

    @torch.no_grad()
    def evaluate(self, dataset: data.GPTDataset, consumed: int) -> float:
        """Mean loss per token over --eval-iters global batches."""
        self.model.eval()
        batches = self.micro_batches(dataset, consumed)
        total = tokens = 0.0
        for _ in range(self.args.eval_iters * self.args.global_batch_size // self.args.micro_batch_size):
            summed, kept = self.loss(next(batches))
            total += summed.item()
            tokens += kept.item()
        self.model.train()
        return total / max(tokens, 1.0)

    def save(self) -> None:
        """Write a checkpoint; everything logged so far is on disk before it counts."""
        self.reporter.flush()
        directory = checkpointing.save(
            self.args, self.vocab_rows, self.model, self.optimizer, self.scheduler, self.progress
        )
        self.reporter.say(f"saved checkpoint {directory} at iteration {self.progress.iteration}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(__doc__ + arguments.acting(arguments.PRETRAIN))
        return 0
    try:
        args = arguments.parse(argv)
        Trainer(args).train()
    except (TrainingError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
