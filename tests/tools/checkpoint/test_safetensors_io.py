"""Hugging Face directories: what is read right, what is refused and how, and files that other libraries accept."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools.checkpoint import safetensors_io
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safetensors_io import DTYPES, INDEX, ITEMSIZE, SINGLE, HfReader

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {
    FIRST: {"a.weight": torch.randn(3, 5).bfloat16(), "a.bias": torch.randn(7)},
    SECOND: {"b.weight": torch.randn(2, 2, 2).half(), "b.count": torch.arange(9), "b.empty": torch.zeros(0, 4)},
}


def write_index(directory: Path, weight_map: dict) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path) -> Path:
    for file, tensors in TENSORS.items():
        save_file(tensors, tmp_path / file, metadata={"format": "pt", "who": file})
    write_index(tmp_path, {name: file for file, tensors in TENSORS.items() for name in tensors})
    return tmp_path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor, read in pieces of three bytes from the back to the front."""
    found = {}
    with HfReader(directory) as reader:
        for name, entry in reader.tensors.items():
            data = bytearray(entry.nbytes)
            for start in reversed(range(0, entry.nbytes, 3)):
                reader.read_into(entry, start, memoryview(data)[start : start + 3])
            found[name] = DTYPES[entry.dtype], entry.shape, bytes(data)
    return found


def expected(*files: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {name: tensor for file in files for name, tensor in TENSORS[file].items()}
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), raw(t)) for name, t in tensors.items()}


class Hangs(BaseException):
    """Not an Exception: nothing on the way may take it for an error of the file."""


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """A CheckpointError of one line that says `parts`, and soon."""

    def late(*_: object) -> None:
        raise Hangs

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(CheckpointError) as caught:
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    text = str(caught.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


# ---------------------------------------------------------------- reading


def test_sharded_with_an_index(sharded):
    assert contents(sharded) == expected(FIRST, SECOND)
    with HfReader(sharded) as reader:
        assert reader.files == [FIRST, SECOND]
        assert reader.metadata[SECOND] == {"format": "pt", "who": SECOND}
        assert reader.nbytes == sum(len(raw(t)) for tensors in TENSORS.values() for t in tensors.values())
        offsets = [(entry.file, entry.offset) for entry in reader.tensors.values()]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize("name", [SINGLE, "weights.safetensors"])
def test_a_single_file_without_an_index(tmp_path, name):
    save_file(TENSORS[FIRST], tmp_path / name)
    assert contents(tmp_path) == expected(FIRST)


def test_a_single_file_with_an_index(tmp_path):
    save_file(TENSORS[FIRST], tmp_path / SINGLE)
    write_index(tmp_path, dict.fromkeys(TENSORS[FIRST], SINGLE))
    assert contents(tmp_path) == expected(FIRST)


def test_a_file_that_the_index_does_not_name_is_left_alone(sharded):
    (sharded / "consolidated.safetensors").write_bytes(b"of no interest")
    assert contents(sharded) == expected(FIRST, SECOND)


def test_shards_behind_symlinks(sharded, tmp_path_factory):
    """As in the cache of the hub."""
    links = tmp_path_factory.mktemp("links")
    for path in sharded.iterdir():
        (links / path.name).symlink_to(path)
    assert contents(links) == expected(FIRST, SECOND)


def test_a_read_outside_a_tensor(sharded):
    with HfReader(sharded) as reader:
        entry = reader.entry("a.bias")
        for position, length in ((-1, 1), (entry.nbytes, 1), (0, entry.nbytes + 1)):
            with refused(sharded / FIRST, "a.bias"):
                reader.read_into(entry, position, memoryview(bytearray(length)))
        with refused(sharded, "nothing.weight"):
            reader.entry("nothing.weight")


def test_a_file_that_shrinks_while_it_is_read(sharded):
    with HfReader(sharded) as reader:
        last = list(reader.tensors.values())[-1]
        os.truncate(sharded / last.file, last.offset + last.nbytes - 1)
        with refused(sharded / last.file, "truncated"):
            reader.read_into(last, 0, memoryview(bytearray(last.nbytes)))


# ---------------------------------------------------------------- what is missing


def test_no_directory_and_no_weights(tmp_path):
    with refused(tmp_path / "nowhere"):
        HfReader(tmp_path / "nowhere")
    with refused(tmp_path, "safetensors"):
        HfReader(tmp_path)
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file"):
        HfReader(tmp_path / "file")


def test_several_files_without_an_index(sharded):
    (sharded / INDEX).unlink()
    with refused(sharded, "2 safetensors files", INDEX):
        HfReader(sharded)


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_a_missing_shard(sharded, file):
    (sharded / file).unlink()
    with refused(sharded / file, "missing"):
        HfReader(sharded)


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_a_truncated_shard(sharded, file):
    """At every byte of the length and the header, and at some of the data."""
    content = (sharded / file).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for size in [*range(8 + length + 1), *range(9 + length, len(content), 5), len(content) - 1]:
        os.truncate(sharded / file, size)
        with refused(sharded / file):
            HfReader(sharded)
        (sharded / file).write_bytes(content)


def test_bytes_behind_the_data(sharded):
    with open(sharded / SECOND, "ab") as file:
        file.write(b"more")
    with refused(sharded / SECOND):
        HfReader(sharded)


def test_a_directory_as_shard(sharded):
    (sharded / FIRST).unlink()
    (sharded / FIRST).mkdir()
    with refused(sharded / FIRST):
        HfReader(sharded)


@pytest.mark.parametrize("file", [FIRST, INDEX])
def test_a_pipe_does_not_hang(sharded, file):
    (sharded / file).unlink()
    os.mkfifo(sharded / file)
    with refused(sharded / file):
        HfReader(sharded)


def test_a_pipe_as_config_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with refused(tmp_path / "config.json"):
        safetensors_io.read_json(tmp_path / "config.json")


# ---------------------------------------------------------------- an index that lies


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"a.bias": SECOND}, ["a.bias", FIRST, SECOND]),
        ({"c.weight": FIRST}, ["c.weight", FIRST, "no file has it"]),
        ({"a.bias": None}, ["a.bias"]),
        ({"a.bias": f"../{FIRST}"}, ["a.bias", f"../{FIRST}"]),
        ({"a.bias": f"/tmp/{FIRST}"}, ["a.bias", f"/tmp/{FIRST}"]),
        ({"a.bias": f"sub/{FIRST}"}, ["a.bias", f"sub/{FIRST}"]),
        ({"a.bias": f"./{FIRST}"}, ["a.bias"]),
        ({"a.bias": f"{FIRST}\0"}, ["a.bias"]),
        ({"a.bias": f"{FIRST}\n"}, ["a.bias"]),
        ({"a.bias": ".."}, ["a.bias"]),
        ({"a.bias": "pytorch_model.bin"}, ["a.bias", "pytorch_model.bin"]),
        ({"a.bias": ""}, ["a.bias"]),
        ({"a.bias": 17}, ["a.bias", "17"]),
        ({"a.bias": [FIRST]}, ["a.bias"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_lying_index(sharded, change, parts):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    write_index(sharded, weight_map | change)
    with refused(sharded / INDEX, *parts):
        HfReader(sharded)


def test_an_index_that_leaves_a_tensor_out(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    del weight_map["b.count"]
    write_index(sharded, weight_map)
    with refused(sharded / INDEX, "b.count", SECOND):
        HfReader(sharded)


def test_an_index_that_names_a_file_that_is_not_there(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    write_index(sharded, weight_map | {"b.count": "model-00003-of-00003.safetensors"})
    with refused(sharded / "model-00003-of-00003.safetensors", "missing"):
        HfReader(sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b"\xff\xfe\xfd",
        b"[" * 200_000,
        b'{"weight_map": ' * 200_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_an_index_that_is_none(sharded, content):
    (sharded / INDEX).write_bytes(content)
    with refused(sharded / INDEX):
        HfReader(sharded)


def test_a_tensor_in_two_shards(sharded):
    save_file({**TENSORS[SECOND], "a.bias": torch.zeros(7)}, sharded / SECOND)
    with refused("a.bias", FIRST, sharded / SECOND):
        HfReader(sharded)


# ---------------------------------------------------------------- headers that lie


def header_of(tensors: dict[str, dict]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: str, shape: list, start: object, stop: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 1) + b"{}",
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 8) + b"\xff" * 8,
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000,
        header_of({"a": {}}) + bytes(16),
        header_of({"a": None}) + bytes(16),
        header_of({"a": entry("F32", [4], 0, 15)}) + bytes(16),
        header_of({"a": entry("F32", [5], 0, 16)}) + bytes(16),
        header_of({"a": entry("F32", [4], 0, 32)}) + bytes(16),
        header_of({"a": entry("F32", [4], 4, 20)}) + bytes(20),
        header_of({"a": entry("F32", [4], -16, 0)}) + bytes(16),
        header_of({"a": entry("F32", [4], 16, 0)}) + bytes(16),
        header_of({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}) + bytes(24),
        header_of({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 0, 16)}) + bytes(16),
        header_of({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 20, 36)}) + bytes(36),
        header_of({"a": entry("F32", [4], 2**63, 2**63 + 16)}) + bytes(16),
        header_of({"a": entry("F32", [4], 2**64 - 8, 8)}) + bytes(16),
        header_of({"a": entry("F32", [2**33, 2**33], 0, 16)}) + bytes(16),
        header_of({"a": entry("F32", [2**62 + 1, 4], 0, 16)}) + bytes(16),
        header_of({"a": entry("F32", [-4], 0, 16)}) + bytes(16),
        header_of({"a": entry("F32", [4.0], 0, 16)}) + bytes(16),
        header_of({"a": entry("F32", [4], "0", "16")}) + bytes(16),
        header_of({"a": entry("F32", [4], 0.0, 16.0)}) + bytes(16),
        header_of({"a": entry("F31", [4], 0, 16)}) + bytes(16),
        header_of({"a": entry("", [4], 0, 16)}) + bytes(16),
        header_of({"a": entry("bfloat16", [8], 0, 16)}) + bytes(16),
        header_of({"a": entry("F4", [32], 0, 16)}) + bytes(16),
        header_of({"a": entry("F8_E8M0", [16], 0, 16)}) + bytes(16),
        header_of({"a": entry("C64", [2], 0, 16)}) + bytes(16),
        header_of({"a": entry("U16", [8], 0, 16)}) + bytes(16),
        header_of({"__metadata__": 17, "a": entry("F32", [4], 0, 16)}) + bytes(16),
        header_of({"__metadata__": {"a": 1}, "a": entry("F32", [4], 0, 16)}) + bytes(16),
    ],
    ids=lambda header: repr(header[8:60]),
)
def test_a_lying_header(tmp_path, header):
    (tmp_path / SINGLE).write_bytes(header)
    with refused(tmp_path / SINGLE), HfReader(tmp_path) as reader:
        reader.entry("a")


def test_an_unknown_dtype_is_named(tmp_path):
    (tmp_path / SINGLE).write_bytes(header_of({"model.x": entry("F8_E8M0", [16], 0, 16)}) + bytes(16))
    with refused(tmp_path / SINGLE, "model.x", "F8_E8M0"):
        HfReader(tmp_path)


# ---------------------------------------------------------------- writing


@st.composite
def described(draw, names=None) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of some tensors."""
    names = names or st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
    return [
        (name, draw(st.sampled_from(sorted(DTYPES))), tuple(draw(st.lists(st.integers(0, 9), max_size=3))))
        for name in draw(st.lists(names, unique=True, max_size=8))
    ]


def build(path: Path, plan: safetensors_io.Plan, data: dict[str, bytes]) -> None:
    content = bytearray(plan.size)
    content[: len(plan.header)] = plan.header
    for name, chunk in data.items():
        content[plan.offsets[name] : plan.offsets[name] + len(chunk)] = chunk
    path.write_bytes(content)


@settings(max_examples=60, deadline=None)
@given(tensors=described(), seed=st.integers(0, 2**31))
def test_a_planned_file_is_what_the_library_reads(tmp_path_factory, tensors, seed):
    path = tmp_path_factory.mktemp("planned") / SINGLE
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for name, dtype, shape in tensors:
        count = math.prod(shape) * ITEMSIZE[dtype]
        data[name] = raw(torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8))
    plan = safetensors_io.plan_file(tensors)
    build(path, plan, data)
    assert path.stat().st_size == plan.size
    loaded = load_file(path)
    assert loaded.keys() == data.keys()
    for name, dtype, shape in tensors:
        assert (loaded[name].dtype, tuple(loaded[name].shape)) == (getattr(torch, DTYPES[dtype]), shape)
        assert raw(loaded[name]) == data[name]
        assert plan.offsets[name] % ITEMSIZE[dtype] == 0 or not data[name]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file that does not say so
    assert {name: content for name, (_, _, content) in contents(path.parent).items()} == data


def test_a_planned_file_keeps_the_order_within_a_width():
    tensors = [("n", "F32", (2,)), ("w", "BF16", (3,)), ("x", "F8_E4M3", (3,)), ("s", "F32", (1,)), ("v", "BF16", (1,))]
    plan = safetensors_io.plan_file(tensors, {"format": "pt", "more": "text"})
    assert sorted(plan.offsets, key=plan.offsets.__getitem__) == ["n", "s", "w", "v", "x"]
    (length,) = struct.unpack("<Q", plan.header[:8])
    assert json.loads(plan.header[8:])["__metadata__"] == {"format": "pt", "more": "text"}
    assert len(plan.header) == 8 + length and length % 8 == 0


NAMES = st.one_of(
    st.integers(0, 99).map(lambda n: f"model.layers.{n}.self_attn.q_proj.weight"),
    st.text(min_size=1, max_size=30).filter(lambda name: name != "__metadata__" and name.isprintable()),
)
SHAPES = st.lists(st.one_of(st.integers(0, 12), st.integers(1, 2**20)), max_size=4).map(tuple)
MANY = st.lists(st.tuples(NAMES, st.sampled_from(sorted(DTYPES)), SHAPES), max_size=25, unique_by=lambda t: t[0])


@settings(max_examples=200, deadline=None)
@given(tensors=MANY, limit=st.one_of(st.integers(1, 5000), st.integers(1, 2**45)))
def test_shards_keep_to_the_limit(tensors, limit):
    files = safetensors_io.shard(tensors, limit)
    assert [tensor for content in files.values() for tensor in content] == tensors
    for content in files.values():
        plan = safetensors_io.plan_file(content)
        assert plan.size <= limit or len(content) <= 1
    assert all(files.values()) or (list(files) == [SINGLE] and not tensors)
    count = len(files)
    assert list(files) == sorted(files)
    assert list(files)[-1] == (SINGLE if count == 1 else f"model-{count:05d}-of-{count:05d}.safetensors")


@settings(max_examples=60, deadline=None)
@given(tensors=MANY, limit=st.integers(300, 10**6))
def test_shards_are_not_many_more_than_needed(tensors, limit):
    """Two neighbours would not have fitted into one, give or take the estimate of a header."""
    files = list(safetensors_io.shard(tensors, limit).values())
    for here, there in zip(files, files[1:], strict=False):
        assert safetensors_io.plan_file([*here, *there[:1]]).size > limit - 256 - 128 * (len(here) + 1)


def test_a_large_header_counts(tmp_path):
    """Many small tensors: the names are larger than the data."""
    tensors = [(f"model.layers.{n}.mlp.experts.{n}.down_proj.weight_scale_inv", "F32", (1, 1)) for n in range(400)]
    files = safetensors_io.shard(tensors, 10_000)
    assert len(files) > 4
    for file, content in files.items():
        plan = safetensors_io.plan_file(content)
        build(tmp_path / file, plan, {})
        assert (tmp_path / file).stat().st_size <= 10_000


def test_the_index_of_a_plan_is_one_that_the_reader_accepts(tmp_path):
    tensors = [(f"model.layers.{n}.x", "BF16", (n, 7)) for n in range(12)]
    files = safetensors_io.shard(tensors, 1000)
    assert len(files) > 1
    for file, content in files.items():
        build(tmp_path / file, safetensors_io.plan_file(content), {})
    index = safetensors_io.index(files)
    assert index["metadata"]["total_size"] == sum(2 * n * 7 for n in range(12))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with HfReader(tmp_path) as reader:
        assert sorted(reader.tensors) == sorted(name for name, _, _ in tensors)


# ---------------------------------------------------------------- the files beside the weights

BESIDE = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("qwen.tiktoken", "modeling_qwen.py", "model.py", "LICENSE", "README.md", ".gitattributes", "model_index.json"),
    *("name with spaces.txt", "ünïcode.json", "-f", "preprocessor_config.json", "spiece.model", "model.safetensors.md"),
]
WEIGHTS = [
    *("model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "x.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "tf_model.h5"),
    *("flax_model.msgpack", "consolidated.00.pth", "model.gguf", "model.onnx", "rust_model.ot", "model.pt"),
    *("adapter_model.safetensors",),
]


def test_companions(tmp_path):
    for name in BESIDE + WEIGHTS:
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to("config.json")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = safetensors_io.companions(tmp_path)
    assert [path.name for path in found] == sorted([*BESIDE, "link.json"])
    assert all(path.parent == tmp_path for path in found)


@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-7b-instruct-q4_k_m.gguf",
        "qwen2.5-7b-instruct-fp16-00001-of-00004.gguf",
        "adapter_model.bin",
        "model.onnx_data",
        "openvino_model.bin",
        "optimizer.pt",
    ],
)
def test_weights_of_other_formats_stay_behind(tmp_path, name):
    (tmp_path / name).write_text(name)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert [path.name for path in safetensors_io.companions(tmp_path)] == ["tokenizer.json"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("")])
def test_companions_of_no_directory(tmp_path, make: Callable[[Path], object]):
    make(tmp_path / "x")
    with refused(tmp_path / "x"):
        safetensors_io.companions(tmp_path / "x")
