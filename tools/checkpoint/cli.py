"""What the commands share: exits, options, the progress bar and the summary."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from tools.checkpoint.errors import CheckpointError


class Interrupted(KeyboardInterrupt):
    """SIGTERM, SIGHUP or Ctrl-C; `status` is the exit status that the shell expects of it."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.status = 128 + number


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None, *, trouble: int = 1) -> int:
    """Run a command's `main`: an error is one line on stderr and status `trouble`, a signal unwinds like Ctrl-C."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_IGN:  # nohup
                continue
            previous[number] = signal.signal(number, _raise_interrupted)
    try:
        status = main(argv)
        sys.stdout.flush()  # a reader that has gone shows here, not when the interpreter ends
        return status
    except CheckpointError as error:
        message, status = str(error), trouble
    except BrokenPipeError:  # the reader of the output has gone: no message, as of any filter
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        message, status = "interrupted", getattr(error, "status", 128 + signal.SIGINT)
    except MemoryError:
        message, status = "out of memory", trouble
    except OSError as error:
        message, status = str(CheckpointError.of(error)), trouble
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    return status


def _raise_interrupted(number: int, _frame: Any) -> None:
    raise Interrupted(number)


# ---------------------------------------------------------------- options


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help is the command's own docstring, followed by the options."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)


def add_output_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("-f", "--force", action="store_true", help="replace an existing output directory")
    options.add_argument("--resume", action="store_true", help="go on from what an interrupted run of the same left")
    options.add_argument("--fsync", action="store_true", help="force the output to disk before it gets its name")
    add_threads_option(options)


def add_threads_option(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--threads", type=positive, default=default_threads(), metavar="N", help="default: %(default)s, the CPUs here"
    )


def default_threads() -> int:
    """The CPUs of this process, at most 16: more do not make a disk faster, and each holds a buffer."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**48:
        raise argparse.ArgumentTypeError(f"expected a positive integer, found {text!r}")
    return int(text)


def boolean(text: str) -> bool:
    """True or False in the spellings that people use. argparse's own `type=bool` takes "False" for True."""
    value = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in value:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return value[text.lower()]


# ---------------------------------------------------------------- progress and summary


class Progress:
    """A bar of bytes on stderr, for several threads; where stderr is no terminal, a line every ten seconds."""

    def __init__(self, total: int, what: str):
        terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            mininterval=0.1 if terminal else 10,
            delay=0 if terminal else 10,
            dynamic_ncols=terminal,
            file=sys.stderr,
        )

    def add(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


def size_text(count: float) -> str:
    """A number of bytes for people: 3.09 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def peak_rss_mib() -> float:
    """The largest resident set of this process so far, MiB."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):  # not Linux; on Linux getrusage also counts what the parent had before exec
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def summary(what: str, read: int, written: int, seconds: float) -> str:
    """The line at the end of a command; GB/s counts the larger of what was read and what was written."""
    speed = max(read, written) / 1e9 / max(seconds, 1e-9)
    sizes = f"{size_text(read)} in, {size_text(written)} out" if written else f"{size_text(read)} in"
    return f"{what}: {sizes}, {seconds:.1f} s, {speed:.2f} GB/s, peak RSS {peak_rss_mib():.0f} MiB"
