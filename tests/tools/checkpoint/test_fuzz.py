"""Whatever the bytes are, the readers succeed or raise CheckpointError: no other exception, no hang, no memory."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import REPO, run
from tests.tools import models
from tools import bf16_cast_fp8, convert_hf_to_torch_dist, convert_torch_dist_to_hf
from tools.checkpoint import torch_dist
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.qwen2_layout import Qwen2Shape
from tools.checkpoint.safetensors_io import INDEX, HfReader

SMALL = Qwen2Shape(layers=2, hidden=16, ffn=24, heads=2, groups=1, head_dim=8, vocab_rows=30, tied=False)
EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
FEWER = settings(EXAMPLES, max_examples=80)  # where the readers are given more to do, or less to stumble over
SECONDS, ADDRESS_SPACE, RESIDENT = 5, 2 << 30, 300 << 20


class Hangs(BaseException):
    """Not an Exception: nothing on the way may take it for an error of the file."""


def _late(*_: object) -> None:
    raise Hangs


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little time and no more than 2 GB of address space beyond what this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < RESIDENT


def attempt(main: Callable, out: Path, *arguments: object) -> dict[str, bytes] | None:
    """The output's weight files, or None where the command refused; then nothing is left."""
    try:
        with bounded(), contextlib.redirect_stdout(io.StringIO()):
            main([str(word) for word in (*arguments, "--threads", 2)])
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000
        assert not out.exists() and not out.with_name(f".{out.name}.partial").exists()
        return None
    found = {path.name: path.read_bytes() for path in out.rglob("*") if path.suffix in (".safetensors", ".distcp")}
    shutil.rmtree(out)
    return found


def to_hf(checkpoint: Path, origin: Path, out: Path) -> dict[str, bytes] | None:
    words = ("--input-dir", checkpoint, "--origin-hf-dir", origin, "--output-dir", out)
    return attempt(convert_torch_dist_to_hf.main, out, *words)


def to_dist(source: Path, out: Path) -> dict[str, bytes] | None:
    return attempt(convert_hf_to_torch_dist.main, out, "--input-dir", source, "--output-dir", out)


def cast(source: Path, out: Path) -> dict[str, bytes] | None:
    words = ("--input-bf16-hf-path", source, "--output-fp8-hf-path", out)
    return attempt(bf16_cast_fp8.main, out, *words)


@pytest.fixture(scope="module")
def root(tmp_path_factory, megatron_checkpoint) -> Path:
    """hf, and checkpoints with an hf/ in each: of our writer, of torch's (two ranks; Transformer Engine's keys)."""
    folder = tmp_path_factory.mktemp("fuzz")
    models.save(folder / "hf", SMALL, shard_bytes=6000)
    for name in ("tp2_distopt_tied_padded", "te_style_tp2"):
        shutil.copytree(megatron_checkpoint(name), folder / name)
        for path in (folder / name).rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
    with contextlib.redirect_stdout(io.StringIO()):
        words = ("--input-dir", folder / "hf", "--output-dir", folder / "ours")
        convert_hf_to_torch_dist.main([str(word) for word in words])
    shutil.copytree(folder / "hf", folder / "ours" / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


CHECKPOINTS = {
    "ours": "release",
    "tp2_distopt_tied_padded": "iter_0000004",
    "te_style_tp2": "iter_0000004",
}


# ---------------------------------------------------------------- changed bytes

INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**64 - 1]


@st.composite
def edits(draw) -> list[tuple]:
    """What to do to some bytes; positions are fractions, so that one edit suits every file."""
    where = st.floats(0, 1, exclude_max=True)
    length = st.integers(1, 64)
    edit = st.one_of(
        st.tuples(st.just("flip"), where, st.integers(0, 7)),
        st.tuples(st.just("write"), where, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("number"), where, st.sampled_from(INTERESTING), st.sampled_from([1, 2, 4, 8])),
        st.tuples(st.just("cut"), where),
        st.tuples(st.just("repeat"), where, length, where),
        st.tuples(st.just("remove"), where, length),
        st.tuples(st.just("swap"), where, where, length),
    )
    return draw(st.lists(edit, min_size=1, max_size=3))


def changed(content: bytes, todo: list[tuple], places: list[int] | None = None) -> bytes:
    """`content` after the edits. places: the only positions at which they begin."""
    data = bytearray(content)

    def at(fraction: float) -> int:
        return places[int(fraction * len(places))] if places else int(fraction * len(data))

    for kind, *arguments in todo:
        if not data:
            break
        position = at(arguments[0])
        if kind == "flip" and position < len(data):
            data[position] ^= 1 << arguments[1]
        elif kind == "write":
            data[position : position + len(arguments[1])] = arguments[1]
        elif kind == "number":
            value, size = arguments[1:]
            data[position : position + size] = struct.pack("<Q", value)[:size]
        elif kind == "cut":
            del data[position:]
        elif kind == "repeat":
            target = at(arguments[2])
            data[target:target] = data[position : position + arguments[1]]
        elif kind == "remove":
            del data[position : position + arguments[1]]
        elif kind == "swap":
            first, second = sorted((position, at(arguments[1])))
            size = min(arguments[2], second - first)
            one, two = data[first : first + size], data[second : second + size]
            data[second : second + size] = one
            data[first : first + size] = two
    return bytes(data)


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


@cache
def headers(path: Path) -> list[int]:
    """The positions of a shard that are not raw elements: records of the archives, and their pickles."""
    content, places = path.read_bytes(), set()
    for mark, length in ((b"PK\3\4", 600), (b"PK\1\2", 120), (b"PK\5\6", 22), (b"PK\6\6", 56), (b"PK\6\7", 20)):
        start = content.find(mark)
        while start >= 0:
            places.update(range(start, min(start + length, len(content))))
            start = content.find(mark, start + 1)
    return sorted(places)


@EXAMPLES
@given(name=st.sampled_from(sorted(CHECKPOINTS)), file=st.sampled_from([".metadata", "common.pt"]), todo=edits())
def test_pickles(root, tmp_path, name, file, todo):
    path = root / name / CHECKPOINTS[name] / file
    with replaced(path, changed(path.read_bytes(), todo)):
        to_hf(path.parent, root / name / "hf", tmp_path / "out")


@pytest.fixture(scope="module")
def intact(root) -> dict[str, dict[str, bytes]]:
    out = root / "out"
    found = {name: to_hf(root / name / CHECKPOINTS[name], root / name / "hf", out) for name in CHECKPOINTS}
    assert all(found.values())
    return found


@EXAMPLES
@given(name=st.sampled_from(sorted(CHECKPOINTS)), number=st.integers(0, 3), todo=edits())
def test_shards(root, intact, tmp_path, name, number, todo):
    """What is written in spite of it is what the intact shard gives."""
    directory = root / name / CHECKPOINTS[name]
    shards = sorted(directory.glob("*.distcp"))
    path = shards[number % len(shards)]
    with replaced(path, changed(path.read_bytes(), todo, headers(path))):
        found = to_hf(directory, root / name / "hf", tmp_path / "out")
    assert found is None or found == intact[name]


@FEWER
@given(number=st.integers(0, 2), file=st.sampled_from([".metadata", "__0_0.distcp"]), todo=edits())
def test_everything_in_a_checkpoint(root, number, file, todo):
    """Optimizer states and objects as well, which the command does not read."""
    name = sorted(CHECKPOINTS)[number]
    path = root / name / CHECKPOINTS[name] / file
    places = headers(path) if file != ".metadata" else None
    with (
        replaced(path, changed(path.read_bytes(), todo, places)),
        contextlib.suppress(CheckpointError),
        bounded(),
        torch_dist.Reader(path.parent) as reader,
    ):
        for key in reader.tensors:
            reader.read(key)
        for key in reader.objects:
            reader.read_object(key)
        reader.common()


@EXAMPLES
@given(data=st.data(), todo=edits())
def test_hugging_face_directories(root, tmp_path, data, todo):
    source = root / "hf"
    shards = sorted(source.glob("*.safetensors"))
    path = data.draw(st.sampled_from([*shards, source / INDEX, source / "config.json"]))
    content = path.read_bytes()
    places = None
    if path.suffix == ".safetensors":
        places = list(range(8 + struct.unpack("<Q", content[:8])[0]))
    with replaced(path, changed(content, todo, places)):
        with contextlib.suppress(CheckpointError), bounded(), HfReader(source) as reader:
            for entry in reader.tensors.values():
                reader.read_into(entry, 0, memoryview(bytearray(entry.nbytes)))
        to_dist(source, tmp_path / "out")


@FEWER
@given(todo=edits(), file=st.sampled_from(["hf/config.json", "release/metadata.json", torch_dist.TRACKER]))
def test_json_beside_a_checkpoint(root, tmp_path, todo, file):
    checkpoint = root / "ours"
    path = checkpoint / file
    with replaced(path, changed(path.read_bytes(), todo)):
        to_hf(checkpoint, checkpoint / "hf", tmp_path / "out")


# ---------------------------------------------------------------- well-formed, but of the wrong kind

JSON = ["null", "true", "-1", "0", "1.5", "NaN", "Infinity", "1" + 400 * "0", "1" + 5000 * "0", '""', '"x"', '"é"']
JSON += ["[]", "[1]", "{}", '{"type": []}', '{"rope_type": {"a": 1}}', '{"rope_theta": "x"}', "[" * 900 + "]" * 900]
JSON += ["1e999", "1e-999", "2147483648", "[" * 5000 + "]" * 5000]


def each(values: Iterable[tuple[str, Callable[[], Any]]]) -> None:
    """Try them all; one failure shows every value that is not taken well."""
    failed = {}
    for name, attempted in values:
        try:
            attempted()
        except (Exception, Hangs) as error:
            failed[name] = f"{type(error).__name__}: {error}"[:100]
    assert not failed


@pytest.mark.parametrize(
    "field",
    [
        *("hidden_size", "intermediate_size", "vocab_size", "head_dim", "rms_norm_eps", "rope_theta"),
        *("rope_scaling", "rope_parameters", "max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("command", ["to_hf", "to_dist", "cast"])
def test_a_config_of_odd_values(root, tmp_path, field, command):
    folder = root / "ours" / "hf" if command == "to_hf" else root / "hf"
    out, path = tmp_path / "out", folder / "config.json"
    config = json.dumps(json.loads(path.read_text()) | {field: "@"})

    def attempted(value: str) -> None:
        with replaced(path, config.replace('"@"', value).encode()):
            if command == "to_hf":
                to_hf(root / "ours", folder, out)
            else:
                (to_dist if command == "to_dist" else cast)(folder, out)

    each((value[:20], partial(attempted, value)) for value in JSON)


@pytest.mark.parametrize("command", ["to_hf", "cast"])
def test_a_config_with_half_a_character(root, tmp_path, command):
    """JSON may have one half of a surrogate pair, UTF-8 may not."""
    folder = root / "ours" / "hf" if command == "to_hf" else root / "hf"
    config = json.loads((folder / "config.json").read_text()) | {"note": "\ud800"}
    with replaced(folder / "config.json", json.dumps(config).encode()):
        if command == "to_hf":
            to_hf(root / "ours", folder, tmp_path / "out")
        else:
            cast(folder, tmp_path / "out")


def nested(depth: int) -> list:
    """Lists of two of the same: small as a pickle, 2**depth elements when written out."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Any] = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**400, 10**5000, "", "x", b"x", (), [], {}, [1]]
ODD += [{"a": 1}, deep(400), np.arange(3), np.float32(1), argparse.Namespace(a=1)]
ARGS = [
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("group_query_attention", "padded_vocab_size", "untie_embeddings_and_output_weights", "add_qkv_bias"),
    *("rotary_base", "norm_epsilon", "swiglu", "normalization", "rotary_percent", "num_experts", "vocab_size"),
]


def with_argument(root: Path, out: Path, name: str, value: Any) -> None:
    path = root / "ours" / "release" / "common.pt"
    with torch_dist.Reader(path.parent) as reader:
        args = dict(vars(reader.common()["args"]))
    args = {key: kept for key, kept in args.items() if not key.startswith("_")} | {name: value}
    with replaced(path, pickle.dumps({"args": argparse.Namespace(**args)})):
        to_hf(path.parent, root / "ours" / "hf", out)


@pytest.mark.parametrize("name", ARGS)
def test_arguments_of_the_wrong_kind(root, tmp_path, name):
    values = enumerate(ODD)
    each((f"{n} {type(v).__name__}", partial(with_argument, root, tmp_path / "out", name, v)) for n, v in values)


@pytest.mark.parametrize("name", ["num_layers", "swiglu", "rotary_base"])
def test_an_argument_that_is_a_small_pickle_of_a_large_text(root, tmp_path, name):
    with_argument(root, tmp_path / "out", name, nested(60))


@pytest.mark.parametrize("args", [None, 17, "x", [], {}, {"num_layers": 2}, ()], ids=repr)
@pytest.mark.parametrize("common", [lambda args: {"args": args}, lambda args: args, lambda args: [args]])
def test_a_common_without_arguments(root, tmp_path, args, common):
    path = root / "ours" / "release" / "common.pt"
    with replaced(path, pickle.dumps(common(args))):
        assert to_hf(path.parent, root / "ours" / "hf", tmp_path / "out") is None


class Call:
    """Pickles to a call of a function that the readers know."""

    def __init__(self, function: Callable, *args: object):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


LOAD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
from tools.checkpoint import safe_pickle
from tools.checkpoint.errors import CheckpointError
try:
    safe_pickle.load(sys.argv[1])
except CheckpointError as error:
    print(len(str(error)))
"""


@pytest.mark.parametrize(
    "value",
    [
        nested(60),
        {"args": argparse.Namespace(a=nested(60))},
        Call(pathlib.PosixPath, nested(60)),
        Call(pathlib.PosixPath, *(["x" * 1000] * 1000)),
        Call(np.dtype, nested(60)),
        Call(codecs.encode, "x", nested(60)),
        Call(codecs.encode, nested(60), "latin1"),
        {(1, (2, 3)): 4},
        deep(400),
    ],
    ids=["list", "argument", "path", "long path", "dtype", "encoding", "text", "key", "deep"],
)
def test_a_small_pickle_stays_small(tmp_path, value):
    """In a process of its own: what goes wrong here takes all memory."""
    (tmp_path / "common.pt").write_bytes(pickle.dumps(value, 2))
    assert (tmp_path / "common.pt").stat().st_size < 10_000
    result = run(sys.executable, "-c", LOAD, tmp_path / "common.pt", cwd=REPO)
    assert (result.returncode, result.stderr) == (0, "")
    assert not result.stdout or int(result.stdout) < 1000
