#!/usr/bin/env python3
"""How fast the checkpoint tools are, beside `cp -r` of the same files and beside slime's converters.

    .venv/bin/python benchmarks/checkpoint_tools.py --size 1.5B --output exp/bench/1.5B.md

Makes a synthetic checkpoint with the exact shapes of Qwen2.5 under --work (0.5B: 1 GB, 1.5B: 3 GB), converts it to
torch_dist, and then runs each tool as a process of its own and prints tables. Both inputs are kept for the next call;
every output is removed. The disk must hold three times the model, and free memory as much.

Times on a shared machine wander, so nothing is compared with a number from another day. A `cp -r` of the tool's input
runs directly before the tool, in every second round directly after it; each ratio is that of two neighbours, and the
table shows the median over the rounds. Peak RSS is the largest of all rounds. Before every run the input is read, so
that the page cache holds it.

Before that goes an untimed copy, which is removed: a virtual machine may give memory that was free for two seconds back
to its host, and to get it again costs up to ten times a copy, in CPU seconds too. Without it (--as-is) chance decides
whether cp or the tool pays for that.

slime's converters run too if --slime is a checkout of slime. training/slime is the pinned one, once
`git submodule update --init training/slime` has filled it. They need torch and transformers, and here they do a little
less than they would elsewhere: the FP8 one wants a GPU and runs on the CPU, with the device replaced while it runs; the
torch_dist one runs without the imports of slime's weight sync (ray, sglang, Megatron).

The last part runs in this process on one thread: the FP8 kernel against a bare `bf16 -> float8_e4m3fn` copy by torch.

To make a checkpoint for something else, without any timing: --make DIR --size 0.5B.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.checkpoint import cli, safetensors_io  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

# numpy, numba and torch are imported only where they are used: a new process counts the peak memory of the process that
# started it as its own, so the one that measures must stay small.

REPO = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- the synthetic checkpoint

SEED = 20250
POOL = 16 << 20  # random values; every tensor is cut from them at an offset of its own
SIGMA, ROW_GAIN = 0.02, 0.3
SPIKES = 10_000  # one value in so many is 8 to 30 times larger


@dataclass(frozen=True)
class Size:
    """Sizes of a Qwen2 with tied embeddings, and the largest file to write."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    file_bytes: int

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": min(151643, self.vocabulary - 1),
            "eos_token_id": min(151643, self.vocabulary - 1),
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.ffn,
            "max_position_embeddings": 32768,
            "max_window_layers": self.layers,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.groups,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, safetensors dtype, shape) of every tensor."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.groups
        yield "model.embed_tokens.weight", "BF16", (self.vocabulary, hidden)
        shapes = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (self.ffn, hidden),
            "mlp.up_proj.weight": (self.ffn, hidden),
            "mlp.down_proj.weight": (hidden, self.ffn),
        }
        for layer in range(self.layers):
            for name, shape in shapes.items():
                yield f"model.layers.{layer}.{name}", "BF16", shape
        yield "model.norm.weight", "BF16", (hidden,)


SIZES = {
    "0.5B": Size(896, 4864, 24, 14, 2, 151936, 5 << 30),
    "1.5B": Size(1536, 8960, 28, 12, 2, 151936, 1_600_000_000),
    "tiny": Size(256, 512, 2, 4, 2, 1024, 2 << 20),
}


def make(directory: Path, size: Size) -> None:
    """Write a checkpoint of `size`, always the same bytes; one that is there already is kept."""
    if directory.exists():
        if safetensors_io.read_json(directory / "config.json") != size.config():
            raise CheckpointError(f"{directory}: is there and of another size, expected nothing or this model")
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = safetensors_io.shard(size.tensors(), size.file_bytes)
        values = weights(size.hidden)
        for file, tensors in files.items():
            write_file(partial / file, tensors, values)
        if len(files) > 1:
            write_json(partial / safetensors_io.INDEX, safetensors_io.index(files))
        write_json(partial / "config.json", size.config())
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], values: np.ndarray) -> None:
    plan = safetensors_io.plan_file(tensors)
    with path.open("wb") as file:
        file.write(plan.header)
        for name, _, shape in tensors:
            file.seek(plan.offsets[name])
            pieces = [norm(name, shape)] if "norm" in name else tiled(name, math.prod(shape), values)
            file.writelines(pieces)


def tiled(name: str, count: int, values: np.ndarray) -> Iterator[np.ndarray]:
    """`count` of the values, from a row that depends on the tensor's name."""
    flat, start = values.reshape(-1), zlib.crc32(name.encode()) % len(values) * values.shape[1]
    while count:
        piece = flat[start : start + count]
        yield piece
        start, count = 0, count - len(piece)


def norm(name: str, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    spread = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    return bfloat16(1 + spread / 10)


def weights(columns: int) -> np.ndarray:
    """About POOL weights as the bits of bfloat16: normal, each row with a gain of its own, and a few outliers."""
    import numpy as np

    random = np.random.default_rng(SEED)
    made = np.empty((POOL // columns, columns), np.uint16)
    for first in range(0, len(made), 1024):
        part = made[first : first + 1024]
        x = random.standard_normal(part.shape, np.float32)
        x *= (SIGMA * random.lognormal(0, ROW_GAIN, (len(x), 1))).astype(np.float32)
        spikes = random.integers(0, x.size, x.size // SPIKES)
        x.reshape(-1)[spikes] *= random.uniform(8, 30, len(spikes)).astype(np.float32)
        part[:] = bfloat16(x)
    return made


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of finite float32 numbers rounded to bfloat16, ties to even."""
    import numpy as np

    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


# ---------------------------------------------------------------- what is timed

CAST, TO_HF, TO_TORCH_DIST = "cast", "torch_dist -> HF", "HF -> torch_dist"
SLIME_CAST, SLIME_TO_HF = "slime: cast", "slime: torch_dist -> HF"

# Programs for `python -c`; the first argument is slime's script.
ON_CPU = """
import runpy, sys
import safetensors, torch
on_any = safetensors.safe_open
safetensors.safe_open = lambda *args, **options: on_any(*args, **{**options, "device": "cpu"})
torch.cuda.memory_allocated = lambda *_: 0
torch.cuda.empty_cache = lambda: None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT_WEIGHT_SYNC = """
import importlib.util, pathlib, runpy, sys, types
del sys.argv[0]
megatron_utils = pathlib.Path(sys.argv[0]).parents[1] / "slime" / "backends" / "megatron_utils"
spec = importlib.util.spec_from_file_location("qwen2", megatron_utils / "megatron_to_hf" / "qwen2.py")
qwen2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(qwen2)
stub = types.ModuleType("slime.backends.megatron_utils.update_weight_utils")
stub.convert_to_hf = lambda args, model_name, name, param: qwen2.convert_qwen2_to_hf(args, name, param)
vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
stub.remove_padding = lambda name, param, rows: param[:rows] if name.endswith(vocabulary) else param
sys.modules[stub.__name__] = stub
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TAKE = """
import mmap, sys
pages = int(sys.argv[1])
mmap.mmap(-1, pages * mmap.PAGESIZE)[:: mmap.PAGESIZE] = bytes(pages)
"""


@dataclass(frozen=True)
class Subject:
    """A tool, the directory that it reads (and that cp copies beside it), in how many rounds it runs, and what memory
    it fills beside its output, in sizes of that directory.
    """

    name: str
    source: Path
    command: tuple[object, ...]
    rounds: int
    memory: int = 0


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds, seconds of user and system time, and MiB."""

    wall: float
    cpu: float
    rss: float


@dataclass(frozen=True)
class Pair:
    """A run of a tool and the run of cp beside it."""

    tool: Cost
    copy: Cost


@dataclass(frozen=True)
class Folders:
    """Where the inputs and the output are."""

    root: Path

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def torch_dist(self) -> Path:
        return self.root / "torch_dist"

    @property
    def run(self) -> Path:
        """Holds nothing that outlives a run."""
        return self.root / "run"

    @property
    def out(self) -> Path:
        return self.run / "out"


def subjects(folders: Folders, options: argparse.Namespace) -> list[Subject]:
    """What to time, each beside the peer that it is compared with."""
    python, tools, out = sys.executable, REPO / "tools", folders.out
    cast = (python, tools / "bf16_cast_fp8.py", "--input-bf16-hf-path", folders.hf, "--output-fp8-hf-path", out)
    to_hf = (python, tools / "convert_torch_dist_to_hf.py", "--input-dir", folders.torch_dist, "--output-dir", out)
    to_hf += ("--origin-hf-dir", folders.hf)
    found = [
        Subject(CAST, folders.hf, cast, options.repeats),
        Subject(TO_HF, folders.torch_dist, to_hf, options.repeats),
        Subject(TO_TORCH_DIST, folders.hf, to_torch_dist(folders.hf, out), options.repeats),
    ]
    if options.slime:
        rounds, scripts = min(options.peer_repeats, options.repeats), options.slime / "tools"
        cast = (python, "-c", ON_CPU, scripts / "convert_hf_to_fp8.py", "--model-dir", folders.hf, "--save-dir", out)
        cast += ("--strategy", "block", "--block-size", 128, 128)
        to_hf = (python, "-c", WITHOUT_WEIGHT_SYNC, scripts / "convert_torch_dist_to_hf.py", "--model-name", "qwen2")
        to_hf += ("--input-dir", folders.torch_dist / "release", "--output-dir", out, "--origin-hf-dir", folders.hf)
        to_hf += ("--vocab-size", SIZES[options.size].vocabulary)
        found.insert(1, Subject(SLIME_CAST, folders.hf, cast, rounds, memory=3))
        found.insert(3, Subject(SLIME_TO_HF, folders.torch_dist, to_hf, rounds, memory=3))
    return found


def to_torch_dist(source: Path, out: Path) -> tuple[object, ...]:
    script = REPO / "tools" / "convert_hf_to_torch_dist.py"
    return (sys.executable, script, "--input-dir", source, "--output-dir", out)


def prepare(folders: Folders, size: str) -> None:
    """Make the two inputs where they are missing."""
    if not folders.hf.exists():
        shutil.rmtree(folders.torch_dist, ignore_errors=True)
    say(f"{folders.hf}: synthetic Qwen2.5 {size}")
    made = (sys.executable, Path(__file__).resolve(), "--make", folders.hf, "--size", size)
    measure(made, folders.run / "log")
    if not folders.torch_dist.exists():
        say(f"{folders.torch_dist}: the same in torch_dist")
        measure(to_torch_dist(folders.hf, folders.out), folders.run / "log")
        folders.out.rename(folders.torch_dist)


def time_all(found: list[Subject], folders: Folders, repeats: int, ready: bool) -> dict[str, list[Pair]]:
    """Every round of every subject. The n-th pair of each is from round n."""
    results: dict[str, list[Pair]] = {subject.name: [] for subject in found}
    say("a run to warm up, which fills numba's cache")
    measure_fresh(found[0].command, folders)
    for number in range(repeats):
        for subject in found:
            if number < subject.rounds:
                pair = time_pair(subject, folders, copy_first=number % 2 == 0, ready=ready)
                results[subject.name].append(pair)
                say(
                    f"round {number + 1} of {repeats}, {subject.name}: {pair.tool.wall:.2f} s, {pair.tool.cpu:.2f} s "
                    f"CPU, {pair.tool.rss:.0f} MiB; cp {pair.copy.wall:.2f} s, {pair.copy.cpu:.2f} s CPU"
                )
    return results


def time_pair(subject: Subject, folders: Folders, copy_first: bool, ready: bool) -> Pair:
    """A run and a cp. With `ready`, the memory that they fill is at hand."""
    copy = ("cp", "-r", subject.source.resolve(), folders.out)
    commands = {"tool": subject.command, "copy": copy}
    costs = {}
    for which in ("copy", "tool") if copy_first else ("tool", "copy"):
        if ready:
            take_memory(subject.memory * size_of(subject.source))
            measure_fresh(copy, folders)
        read(subject.source)
        costs[which] = measure_fresh(commands[which], folders)
    return Pair(**costs)


def take_memory(nbytes: int) -> None:
    """Take so much memory and give it back, so that it is at hand. In a process of its own, to keep this one small."""
    if not nbytes:
        return
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    nbytes = min(nbytes, int(available.split()[1]) * 1024 // 2)
    subprocess.run((sys.executable, "-c", TAKE, str(nbytes // mmap.PAGESIZE)), check=True)


def read(directory: Path) -> None:
    """Read every file, so that the page cache holds it."""
    piece = bytearray(1 << 20)
    for path in files_under(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def files_under(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in files_under(directory))


def measure_fresh(command: Iterable[object], folders: Folders) -> Cost:
    """`measure` with no output there before and none left after."""
    empty(folders.run)
    try:
        return measure(command, folders.run / "log")
    finally:
        empty(folders.run)


def empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def measure(command: Iterable[object], log: Path) -> Cost:
    """Run a command to its end. Raises CheckpointError with the end of its output if it fails."""
    words = [str(word) for word in command]
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = log.read_text(errors="replace")[-2000:]
        raise CheckpointError(f"exit status {process.returncode} of {' '.join(words)}\n{end}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


# ---------------------------------------------------------------- the kernel

MATRIX = (8960, 1536)
BEST_OF = 10
LARGEST_BFLOAT16 = 3.3895313892515355e38
BARE = "torch bf16 -> float8_e4m3fn"


def kernel_rates() -> dict[str, float]:
    """GB of bfloat16 input per second of CPU time: the best of several runs, interleaved. Leaves out what is not
    installed.
    """
    import numpy as np

    raw = weights(MATRIX[1])[: MATRIX[0]]
    codes = np.empty(MATRIX, np.uint8)
    calls = {**numba_calls(raw, codes), **torch_call(raw)}
    best = dict.fromkeys(calls, math.inf)
    for call in calls.values():  # compiles
        call()
    for _ in range(BEST_OF):
        for name, call in calls.items():
            started = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - started)
    return {name: raw.nbytes / seconds / 1e9 for name, seconds in best.items()}


def numba_calls(raw: np.ndarray, codes: np.ndarray) -> dict[str, Callable[[], object]]:
    import numpy as np

    try:
        from tools.checkpoint import block_fp8_numba as fused
    except (ImportError, RuntimeError):  # RuntimeError: numba finds no directory for its cache
        return {}
    scale_inv = np.empty((MATRIX[0] // 128, MATRIX[1] // 128), np.float32)
    rules = {"TE_POW2": fused.TE_POW2, "TE_FP32": fused.TE_FP32, "SLIME": fused.SLIME}
    return {
        f"numba {name}": lambda rule=rule: fused.cast(raw, codes, scale_inv, rule, LARGEST_BFLOAT16)
        for name, rule in rules.items()
    }


def torch_call(raw: np.ndarray) -> dict[str, Callable[[], object]]:
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    x = torch.from_numpy(raw.view("int16")).view(torch.bfloat16)
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    return {BARE: lambda: y.copy_(x)}


# ---------------------------------------------------------------- the least that the work costs

PIECE = 2 << 20
SCRATCH_BYTES = 512 << 20


@dataclass(frozen=True)
class Rates:
    """GB per second of CPU time on one core, the best of several: reading a cached file and writing a new one in
    pieces, the CRC of a piece, and the kernel (None without numba).
    """

    read: float
    write: float
    crc: float
    kernel: float | None


def measure_rates(folders: Folders, kernel: float | None) -> Rates:
    piece = memoryview(bytearray(os.urandom(PIECE)))
    source = max(files_under(folders.hf), key=lambda path: path.stat().st_size)
    folders.run.mkdir(parents=True, exist_ok=True)
    scratch = folders.run / "scratch"

    def read_all() -> int:
        with source.open("rb", buffering=0) as file:
            return sum(iter(lambda: file.readinto(piece), 0))

    def write_all() -> int:
        with scratch.open("wb", buffering=0) as file:
            return sum(file.write(piece) for _ in range(SCRATCH_BYTES // PIECE))

    def crc_all() -> int:
        for _ in range(64):
            zlib.crc32(piece)
        return 64 * PIECE

    def best(work: Callable[[], int]) -> float:
        rates = []
        for _ in range(BEST_OF):
            scratch.unlink(missing_ok=True)
            started = time.process_time()
            count = work()
            rates.append(count / 1e9 / max(time.process_time() - started, 1e-9))
        return max(rates)

    try:
        return Rates(best(read_all), best(write_all), best(crc_all), kernel)
    finally:
        scratch.unlink(missing_ok=True)


def roofline(results: dict[str, list[Pair]], rates: Rates, size: Size) -> str:
    """What each tool must do at least, at this machine's rates, beside the least that it took."""
    tensors = [(name, 2 * math.prod(shape)) for name, _, shape in size.tensors()]
    everything = sum(nbytes for _, nbytes in tensors) / 1e9
    linear = sum(nbytes for name, nbytes in tensors if name.endswith("_proj.weight")) / 1e9
    cast_out = everything - linear / 2
    work = {CAST: (linear, cast_out, cast_out), TO_HF: (0.0, everything, everything)}
    work[TO_TORCH_DIST] = work[TO_HF]
    known = f"read {rates.read:.1f}, write {rates.write:.1f}, CRC-32 {rates.crc:.1f}"
    lines = [
        f"## Roofline: GB/s of one core here: {known}" + (f", kernel {rates.kernel:.1f}" if rates.kernel else ""),
        "",
        "| tool | read s | kernel s | CRC s | write s | sum, CPU s | least measured, CPU s | least of its cp, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (cast_bytes, checked, written) in work.items():
        kernel = cast_bytes / rates.kernel if rates.kernel else 0.0
        parts = [everything / rates.read, kernel, checked / rates.crc, written / rates.write]
        least = [min(getattr(pair, side).cpu for pair in results[name]) for side in ("tool", "copy")]
        cells = [f"{value:.2f}" for value in (*parts, sum(parts), *least)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Bar:
    """A promise: `value`, None if it was not measured, is at most or at least `limit`."""

    text: str
    value: float | None
    limit: float
    unit: str
    at_most: bool = True

    def row(self) -> str:
        if self.value is None:
            return f"| {self.text} | not measured | - |"
        holds = self.value <= self.limit if self.at_most else self.value >= self.limit
        return f"| {self.text} | {self.value:.2f}{self.unit} | {'yes' if holds else '**no**'} |"


def report(
    options: argparse.Namespace,
    folders: Folders,
    found: list[Subject],
    results: dict[str, list[Pair]],
    machine_text: str,
) -> str:
    own = cli.peak_rss_mib()  # before numpy and torch are imported below
    rates = kernel_rates()
    slowest = min((rate for name, rate in rates.items() if name != BARE), default=None)
    nbytes = size_of(found[0].source)
    before = "a read of the input" if options.as_is else "an untimed copy and a read of the input"
    note = f"Before each run: {before}. Least peak RSS of any process: {own:.0f} MiB, that of this script."
    sections = [
        f"# Checkpoint tools, synthetic Qwen2.5 {options.size}, {cli.size_text(nbytes)}",
        f"{machine_text}, {load()} after",
        f"{cost_table(found, results)}\n\n{note}",
        kernel_table(rates),
        roofline(results, measure_rates(folders, slowest), SIZES[options.size]),
        bar_table(bars(results, rates, nbytes)),
    ]
    if options.size == "tiny":
        sections.append("At this size start-up is all there is: the bars mean nothing.")
    return "\n\n".join(sections) + "\n"


def cost_table(found: list[Subject], results: dict[str, list[Pair]]) -> str:
    copies: dict[Path, list[Cost]] = {}
    for subject in found:
        copies.setdefault(subject.source, []).extend(pair.copy for pair in results[subject.name])
    lines = [
        "| subject | n | wall s: median [min, max] | x cp, paired | x cp, medians | CPU s | x cp CPU | peak RSS MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for source, costs in copies.items():
        lines.append(cost_row(f"cp -r of {source.name}", [Pair(cost, cost) for cost in costs], costs))
    for subject in found:
        if results[subject.name]:
            lines.append(cost_row(subject.name, results[subject.name], copies[subject.source]))
    return "\n".join(lines)


def cost_row(name: str, pairs: list[Pair], copies: list[Cost]) -> str:
    wall = [pair.tool.wall for pair in pairs]
    middle, cpu = statistics.median(wall), statistics.median(pair.tool.cpu for pair in pairs)
    of_medians = middle / statistics.median(copy.wall for copy in copies)
    return (
        f"| {name} | {len(pairs)} | {middle:.3f} [{min(wall):.3f}, {max(wall):.3f}] | {to_copy(pairs, 'wall'):.2f} "
        f"| {of_medians:.2f} | {cpu:.3f} | {to_copy(pairs, 'cpu'):.2f} | {largest_rss(pairs):.0f} |"
    )


def to_copy(pairs: list[Pair], field: str) -> float:
    """Median over the rounds of a tool's cost, in costs of the cp beside it."""
    return statistics.median(quotient(pair.tool, pair.copy, field) for pair in pairs)


def quotient(a: Cost, b: Cost, field: str) -> float:
    below = getattr(b, field)
    return getattr(a, field) / below if below else math.nan


def largest_rss(pairs: list[Pair]) -> float:
    return max(pair.tool.rss for pair in pairs)


def to_peer(peer: list[Pair], ours: list[Pair], field: str) -> float | None:
    """Median over the peer's rounds of its cost, in costs of our tool in the same round."""
    together = list(zip(peer, ours, strict=False))
    return statistics.median(quotient(a.tool, b.tool, field) for a, b in together) if together else None


def kernel_table(rates: dict[str, float]) -> str:
    lines = [
        f"## Kernel: {MATRIX[0]} x {MATRIX[1]} bfloat16, one thread, best of {BEST_OF}",
        "",
        "| cast | GB/s of input by CPU time | x torch |",
        "|---|---|---|",
    ]
    bare = rates.get(BARE)
    for name, rate in rates.items():
        lines.append(f"| {name} | {rate:.2f} | {f'{rate / bare:.2f}' if bare else 'not measured'} |")
    if bare is None:
        lines.append("\ntorch is not installed")
    if len(rates) == (bare is not None):
        lines.append("\nnumba is not installed")
    return "\n".join(lines)


def bars(results: dict[str, list[Pair]], rates: dict[str, float], nbytes: int) -> Iterator[Bar]:
    """Yields each promise with what was measured."""
    cast, to_hf, to_dist = results[CAST], results[TO_HF], results[TO_TORCH_DIST]
    slime_cast, slime_to_hf = results.get(SLIME_CAST, []), results.get(SLIME_TO_HF, [])
    if nbytes >= 3e9:
        yield Bar("cast: wall <= 1.0 x cp", to_copy(cast, "wall"), 1.0, " x")
    else:
        more = statistics.median(pair.tool.wall - pair.copy.wall for pair in cast)
        yield Bar("cast: wall <= cp + 1.5 s", more, 1.5, " s more")
    yield Bar("cast: CPU <= 1.1 x cp", to_copy(cast, "cpu"), 1.1, " x")
    yield Bar("cast: peak RSS <= 256 MiB", largest_rss(cast), 256, " MiB")
    yield Bar("cast: >= 8 x faster than slime's", to_peer(slime_cast, cast, "wall"), 8, " x", at_most=False)
    yield Bar("torch_dist -> HF: wall <= 1.5 x cp", to_copy(to_hf, "wall"), 1.5, " x")
    yield Bar("torch_dist -> HF: CPU <= 2.5 x cp", to_copy(to_hf, "cpu"), 2.5, " x")
    yield Bar("torch_dist -> HF: peak RSS <= 192 MiB", largest_rss(to_hf), 192, " MiB")
    less_cpu, less_memory = to_peer(slime_to_hf, to_hf, "cpu"), to_peer(slime_to_hf, to_hf, "rss")
    yield Bar("torch_dist -> HF: >= 3 x less CPU than slime's", less_cpu, 3, " x", at_most=False)
    yield Bar("torch_dist -> HF: >= 10 x less memory than slime's", less_memory, 10, " x", at_most=False)
    yield Bar("HF -> torch_dist: wall <= 2.0 x cp", to_copy(to_dist, "wall"), 2.0, " x")
    yield Bar("HF -> torch_dist: peak RSS <= 512 MiB", largest_rss(to_dist), 512, " MiB")
    ours, bare = [rate for name, rate in rates.items() if name != BARE], rates.get(BARE)
    slowest = min(ours) / bare if ours and bare else None
    yield Bar("kernel, slowest rule: >= 0.75 x torch's bare copy", slowest, 0.75, " x", at_most=False)


def bar_table(found: Iterable[Bar]) -> str:
    return "\n".join(["## Bars", "", "| bar | measured | holds |", "|---|---|---|", *(bar.row() for bar in found)])


def machine(directory: Path) -> str:
    """The machine and what runs on it."""
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = subprocess.run(("stat", "-f", "-c", "%T", directory), capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "torch"))
    return (
        f"{cpu_model()}, {cpus} cores, {memory:.0f} GiB, file system {system or 'unknown'}, "
        f"Python {platform.python_version()}, {versions}; load average {load()} before"
    )


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def load() -> str:
    return f"{os.getloadavg()[0]:.2f}"


# ---------------------------------------------------------------- command


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = cli.parser(__doc__)
    options.add_argument("--size", choices=SIZES, default="0.5B", help="the model; tiny is for tests (%(default)s)")
    options.add_argument("--repeats", type=cli.positive, default=5, metavar="N", help="rounds (%(default)s)")
    options.add_argument(
        "--peer-repeats", type=int, default=1, metavar="N", help="rounds with slime's converters; 0: none (%(default)s)"
    )
    options.add_argument("--as-is", action="store_true", help="no untimed copy before each run")
    options.add_argument("--slime", type=Path, metavar="DIR", help="checkout of slime (training/slime if it is filled)")
    options.add_argument(
        "--work", type=Path, default=REPO / "exp" / "bench", metavar="DIR", help="inputs and outputs (exp/bench)"
    )
    options.add_argument("--output", type=Path, metavar="FILE", help="write the tables there as well")
    options.add_argument("--make", type=Path, metavar="DIR", help="only make the synthetic checkpoint of --size in DIR")
    found = options.parse_args(argv)
    if found.peer_repeats < 0:
        options.error("--peer-repeats: expected 0 or more")
    if found.slime and not has_converters(found.slime):
        options.error(f"--slime: {found.slime} has no tools/convert_hf_to_fp8.py")
    if found.slime is None and has_converters(REPO / "training" / "slime"):
        found.slime = REPO / "training" / "slime"
    return found


def has_converters(checkout: Path) -> bool:
    return (checkout / "tools" / "convert_hf_to_fp8.py").is_file()


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.make:
        make(options.make, SIZES[options.size])
        say(f"{options.make}: synthetic Qwen2.5 {options.size}")
        return 0
    if options.slime and not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        say("slime's converters need torch and transformers: left out")
        options.slime = None
    folders = Folders(options.work.resolve() / options.size)
    empty(folders.run)
    try:
        text = machine(folders.root)
        prepare(folders, options.size)
        found = subjects(folders, options)
        results = time_all(found, folders, options.repeats, not options.as_is)
        tables = report(options, folders, found, results, text)
    finally:
        shutil.rmtree(folders.run, ignore_errors=True)
    print(tables, end="")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(tables, encoding="utf-8")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
