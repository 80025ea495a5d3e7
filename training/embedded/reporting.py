"""What a run tells: Megatron's log lines, TensorBoard (and W&B) scalars, and a progress bar on a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from datetime import datetime

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def floating_point_operations(args: argparse.Namespace, vocab_rows: int) -> float:
    """FLOPs of one optimizer step, forward and backward (num_floating_point_operations, training.py:145 at the pin)."""
    hidden = args.hidden_size
    projection = args.kv_channels * args.num_attention_heads / hidden
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    attention = hidden * (1 + groups / args.num_attention_heads + args.seq_length / hidden / 2) * projection
    layers = 12 * args.num_layers * hidden * (attention + args.ffn_hidden_size * 1.5)
    return args.global_batch_size * args.seq_length * (layers + 6 * hidden * vocab_rows)


class Recorder:
    """Scalars on their way to TensorBoard and W&B, as far as each is asked for."""

    def __init__(self, tensorboard_dir: str | None, wandb_settings: dict | None) -> None:
        self.writer = SummaryWriter(tensorboard_dir) if tensorboard_dir else None
        self.wandb = _wandb(wandb_settings) if wandb_settings else None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record values under their names."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step)

    def flush(self) -> None:
        """Put the scalars on disk: called before a checkpoint counts, so that a killed run loses none of them."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Flush and end the records."""
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


class Reporter:
    """Prints and records a run's progress. `close` flushes everything."""

    def __init__(self, args: argparse.Namespace, vocab_rows: int, iteration: int) -> None:
        self.args = args
        self.flops = floating_point_operations(args, vocab_rows)
        settings = {"project": args.wandb_project, "name": args.wandb_exp_name, "dir": args.wandb_save_dir}
        self.recorder = Recorder(args.tensorboard_dir, settings if args.wandb_project else None)
        # The launchers send the log to a file and a terminal here; without them the terminal is stderr.
        self.terminal = os.fdopen(int(os.environ["PROGRESS_FD"]), "w") if os.environ.get("PROGRESS_FD") else None
        self.bar = tqdm(
            total=args.train_iters,
            initial=iteration,
            unit="it",
            dynamic_ncols=True,
            file=self.terminal or sys.stderr,
            disable=not (self.terminal or sys.stderr).isatty(),
            leave=False,
        )
        self.sums: dict[str, float] = {}
        self.since_log = 0
        self.interval_start = time.perf_counter()

    def say(self, text: str, *, routine: bool = False) -> None:
        """Print to stdout, and beside a progress bar of its own unless it is routine."""
        if self.terminal and not routine:
            tqdm.write(text, file=self.terminal)
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def step(
        self,
        iteration: int,
        consumed: int,
        loss: float,
        lr: float,
        grad_norm: float,
        extras: dict[str, float],
    ) -> None:
        """One training iteration (training_log, training.py:1324). extras: 'num-zeros', 'params-norm'."""
        args = self.args
        self.since_log += 1
        self.sums["lm loss"] = self.sums.get("lm loss", 0.0) + loss
        self.bar.update()
        if iteration % args.tensorboard_log_interval == 0:
            scalars = {
                "lm loss": loss,
                "learning-rate": lr,
                "grad-norm": grad_norm,
                "batch-size": args.global_batch_size,
            }
            self.recorder.scalars({**scalars, **extras}, iteration)
        if iteration % args.log_interval:
            return
        seconds = (time.perf_counter() - self.interval_start) / self.since_log
        tokens = args.global_batch_size * args.seq_length / seconds
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens:,.0f} tokens/s")
        parts = [
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{args.train_iters:8d}",
            f"consumed samples: {consumed:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000.0:.1f}",
        ]
        if args.log_throughput:
            parts.append(f"throughput per GPU (TFLOP/s/GPU): {self.flops / seconds / 1e12:.3f}")
            self.recorder.scalars({"throughput": self.flops / seconds / 1e12, "tokens-per-second": tokens}, iteration)
        parts += [f"learning rate: {lr:.6E}", f"global batch size: {args.global_batch_size:5d}"]
        parts += [f"{name}: {total / self.since_log:.6E}" for name, total in self.sums.items()]
        parts += ["loss scale: 1.0", f"grad norm: {grad_norm:.3f}"]
        parts += [
            f"{name.replace('-', ' ')}: {value if isinstance(value, int) else round(value, 3)}"
            for name, value in extras.items()
        ]
        parts += ["number of skipped iterations:   0", "number of nan iterations:   0"]
        self.say(" | ".join(parts) + " |", routine=True)
        self.sums, self.since_log, self.interval_start = {}, 0, time.perf_counter()

    def evaluation(self, prefix: str, split: str, loss: float, iteration: int) -> None:
        """A held-out loss (evaluate_and_print_results, training.py:2467). split: 'validation' or 'test'."""
        self.recorder.scalars({f"lm loss {split}": loss}, iteration)
        text = (
            f" validation loss at {prefix} | lm loss value: {loss:.6E} | lm loss PPL: {math.exp(min(20, loss)):.6E} | "
        )
        rule = "-" * (len(text) + 1)
        self.say(f"{rule}\n{text}\n{rule}")
        self.interval_start = time.perf_counter()  # evaluation is not training time

    def flush(self) -> None:
        """Put the scalars on disk before a checkpoint counts."""
        self.recorder.flush()
        self.interval_start = time.perf_counter()

    def close(self) -> None:
        """Flush and end the run's records."""
        self.bar.close()
        self.recorder.close()


def _wandb(settings: dict):
    """A W&B run, where the package is installed."""
    if importlib.util.find_spec("wandb") is None:
        print(f"W&B project {settings['project']}: wandb is not installed here, nothing is sent to it")
        return None
    import wandb

    return wandb.init(**{name: value for name, value in settings.items() if value})
