"""The commands on damaged and dishonest input, bad options and signals: one line that names the file, no output."""

from __future__ import annotations

import filecmp
import json
import os
import pickle
import posix
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import REPO, ok, run
from tests.tools import models
from tests.tools.checkpoint.test_safetensors_io import refused as refused_soon
from tests.tools.checkpoint.test_staging import in_small_disk
from tools.checkpoint import qwen2_config, qwen2_layout, safetensors_io, torch_dist, torch_dist_writer
from tools.checkpoint.qwen2_layout import Qwen2Shape

TOOLS = REPO / "tools"
SHARD = torch_dist_writer.SHARD
INDEX = safetensors_io.INDEX
KINDS = {
    "embedding": "embedding.word_embeddings.weight",
    "qkv": "decoder.layers.self_attention.linear_qkv.weight",
    "qkv bias": "decoder.layers.self_attention.linear_qkv.bias",
    "proj": "decoder.layers.self_attention.linear_proj.weight",
    "fc1": "decoder.layers.mlp.linear_fc1.weight",
    "fc2": "decoder.layers.mlp.linear_fc2.weight",
    "input norm": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "mlp norm": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "final norm": "decoder.final_layernorm.weight",
    "output": "output_layer.weight",
}


def to_hf(checkpoint: Path, out: Path, origin: Path, *more: object) -> tuple:
    tool = TOOLS / "convert_torch_dist_to_hf.py"
    return (sys.executable, tool, "--input-dir", checkpoint, "--output-dir", out, "--origin-hf-dir", origin, *more)


def to_dist(source: Path, out: Path, *more: object) -> tuple:
    return (sys.executable, TOOLS / "convert_hf_to_torch_dist.py", "--input-dir", source, "--output-dir", out, *more)


def cast(source: Path, out: Path, *more: object) -> tuple:
    tool = TOOLS / "bf16_cast_fp8.py"
    return (sys.executable, tool, "--input-bf16-hf-path", source, "--output-fp8-hf-path", out, *more)


FROM_HF = {"to_dist": to_dist, "cast": cast}


def one_line(result: subprocess.CompletedProcess, *parts: object, status: int = 1) -> None:
    """The command failed and said so in one line with `parts` in it."""
    assert result.returncode == status, f"{result.stdout}\n{result.stderr}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{Path(result.args[1]).name}: error: ")
    assert all(str(part) in lines[0] for part in parts), lines[0]


def refused(out: Path, command: tuple, *parts: object, status: int = 1) -> None:
    """As one_line, and there is neither output nor anything else where it would have been."""
    one_line(run(*command), *parts, status=status)
    nearest = next(path for path in out.parents if path.exists())
    assert not out.exists() and not list(nearest.glob(f".{out.name}.*"))
    assert nearest == out.parent or not (nearest / out.relative_to(nearest).parts[0]).exists()


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    """hf: a tiny Qwen2 in several shards. dist: the same as torch_dist."""
    root = tmp_path_factory.mktemp("originals")
    models.save(root / "hf", models.TINY, seed=5, shard_bytes=100_000)
    assert len(list((root / "hf").glob("*.safetensors"))) > 2
    ok(run(*to_dist(root / "hf", root / "dist")))
    return root


@pytest.fixture
def hf(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "hf", tmp_path / "hf"))


@pytest.fixture
def dist(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "dist", tmp_path / "dist"))


@pytest.fixture
def release(dist) -> Path:
    return dist / "release"


@pytest.fixture
def out(tmp_path) -> Path:
    """Where nothing is yet, not even the parent."""
    return tmp_path / "new" / "out"


def megatron(checkpoint: Path, tmp_path: Path) -> Path:
    """A writable copy of a fixture."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "megatron"))
    for path in copied.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copied


def change_json(path: Path, **changes: Any) -> None:
    """None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_nothing_is_wrong_with_the_originals(hf, dist, out):
    ok(run(*to_hf(dist, out, hf)))
    assert models.load(out) == models.load(hf)


# ---------------------------------------------------------------- pickles


class Execute:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable, *args: object):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("where", [".metadata", "common.pt", "deep in common.pt", SHARD])
@pytest.mark.parametrize("function", [posix.system, eval, subprocess.Popen], ids=lambda function: function.__name__)
def test_a_pickle_that_calls_something(release, hf, out, tmp_path, function, where):
    made = tmp_path / "made"
    argument = {eval: f"open({str(made)!r}, 'w')", posix.system: f"touch {made}", subprocess.Popen: ["touch", made]}
    payload = Execute(function, argument[function])
    path = release / where.split()[-1]
    if where == ".metadata":
        path.write_bytes(pickle.dumps(payload))
    elif where == "common.pt":
        torch.save({"args": payload}, path)
    elif where == "deep in common.pt":
        common = torch.load(path, weights_only=False)
        common["args"].hook = [{"x": (1, payload)}]
        torch.save(common, path)
    else:
        replace_chunk(release, KINDS["final norm"], payload)
    refused(out, to_hf(release, out, hf), path, "refused global", function.__name__)
    assert not made.exists()


def metadata_of(release: Path) -> Any:
    return pickle.loads((release / ".metadata").read_bytes())  # noqa: S301 (written by ourselves)


def write_metadata(release: Path, metadata: Any) -> None:
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_chunk(release: Path, key: str, value: Any) -> None:
    """Put a torch.save archive of `value` behind the shard and let the first chunk of `key` be there."""
    metadata = metadata_of(release)
    with open(release / SHARD, "ab") as file:
        start = file.tell()
    torch.save(value, release / "piece")
    with open(release / SHARD, "ab") as file:
        file.write((release / "piece").read_bytes())
    (release / "piece").unlink()
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    info.offset, info.length = start, (release / SHARD).stat().st_size - start
    write_metadata(release, metadata)


# ---------------------------------------------------------------- .metadata that lies


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "sub/__0.distcp", "..", ".", "", ".metadata\0"])
def test_a_shard_outside_the_directory(release, hf, out, name):
    (release.parent / "elsewhere").write_bytes((release / SHARD).read_bytes())
    metadata = metadata_of(release)
    for info in metadata.storage_data.values():
        info.relative_path = name
    write_metadata(release, metadata)
    refused(out, to_hf(release, out, hf), release / ".metadata", repr(name))


@pytest.mark.parametrize(
    ("kind", "change", "file", "part"),
    [
        ("embedding", {"offset": 10**9}, SHARD, "truncated shard"),
        ("qkv", {"offset": 2**62}, ".metadata", KINDS["qkv"]),
        ("fc1", {"offset": -1}, ".metadata", KINDS["fc1"]),
        ("fc2", {"length": 10**9}, "", KINDS["fc2"]),
        ("embedding", {"length": 5}, ".metadata", "does not fit"),
        ("final norm", {"offset": 7}, ".metadata", "overlaps"),
        ("qkv", {"offset": None}, ".metadata", KINDS["qkv"]),
        ("fc1", {"offset": 1.0}, ".metadata", KINDS["fc1"]),
        ("output", {"relative_path": "__9_9.distcp"}, "__9_9.distcp", "missing"),
        ("fc2", {"transform_descriptors": ["zstd"]}, ".metadata", "compressed"),
    ],
    ids=str,
)
def test_a_range_that_lies(release, hf, out, kind, change, file, part):
    metadata = metadata_of(release)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == KINDS[kind])
    vars(info).update(change)
    write_metadata(release, metadata)
    refused(out, to_hf(release, out, hf), release / file, part)


def drop_tensor(metadata: Any) -> None:
    del metadata.state_dict_metadata[KINDS["fc2"]]
    for index in [index for index in metadata.storage_data if index.fqn == KINDS["fc2"]]:
        del metadata.storage_data[index]


def drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[KINDS["fc2"]].chunks.pop()
    index = [index for index in metadata.storage_data if index.fqn == KINDS["fc2"]][-1]
    del metadata.storage_data[index]


def add_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.router.weight"] = metadata.state_dict_metadata[KINDS["fc2"]]
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == KINDS["fc2"]:
            other = type(index)("decoder.layers.mlp.router.weight", index.offset)
            metadata.storage_data[other] = type(info)(SHARD, info.offset, info.length)


def other_shape(metadata: Any) -> None:
    metadata.state_dict_metadata[KINDS["final norm"]].size = torch.Size([65])


def other_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata[KINDS["final norm"]].properties.dtype = torch.float16


def exchange(metadata: Any) -> None:
    """Two tensors of another shape in each other's place."""
    one, two = (
        next(info for index, info in metadata.storage_data.items() if index.fqn == KINDS[kind])
        for kind in ("proj", "fc2")
    )
    one.offset, two.offset = two.offset, one.offset
    one.length, two.length = two.length, one.length


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (drop_tensor, KINDS["fc2"]),
        (drop_chunk, KINDS["fc2"]),
        (add_tensor, ""),
        (other_shape, KINDS["final norm"]),
        (other_dtype, KINDS["final norm"]),
        (exchange, ""),
        (lambda metadata: metadata.state_dict_metadata.clear(), ""),
        (lambda metadata: setattr(metadata, "storage_data", None), ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_metadata_of_other_tensors(release, hf, out, change, part):
    metadata = metadata_of(release)
    change(metadata)
    write_metadata(release, metadata)
    refused(out, to_hf(release, out, hf), release, part)


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("keep", [0, 22, 0.5, -1])
def test_a_truncated_shard(release, hf, out, keep):
    size = (release / SHARD).stat().st_size
    os.truncate(release / SHARD, keep + size if keep < 0 else int(keep * size) if keep < 1 else keep)
    refused(out, to_hf(release, out, hf), release / SHARD, "truncated shard")


def test_a_missing_shard(release, hf, out):
    (release / SHARD).unlink()
    refused(out, to_hf(release, out, hf), release / SHARD, "missing")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 30)])
def test_a_damaged_file_beside_the_shards(release, hf, out, name, damage):
    damage(release / name)
    refused(out, to_hf(release, out, hf), release, name)


@pytest.mark.parametrize("text", ["", "iter_1", "5"])
def test_a_broken_tracker(dist, hf, out, text):
    (dist / torch_dist.TRACKER).write_text(text)
    refused(out, to_hf(dist, out, hf), dist, "iter_0000005" if text == "5" else torch_dist.TRACKER)


def flip(directory: Path, kind: str, row: int, prefix: str = "") -> Path:
    """Flip a bit of a row (of the last layer), or of a vector, in its shard, where its bytes are found; the shard."""
    key = prefix + KINDS[kind]
    with torch_dist.Reader(directory) as reader:
        info = reader.tensors[key]
        array = reader.read(key, layer=info.shape[0] - 1 if ".layers." in key else None)
        files = {chunk.file for chunk in info.chunks}
    wanted = array.tobytes() if array.ndim == 1 else array[row].tobytes()[:64]  # 64: ranks may share a row
    for name in sorted(files):
        content = bytearray((directory / name).read_bytes())
        if content.count(wanted) == 1:
            content[content.find(wanted) + len(wanted) // 2] ^= 0x10
            (directory / name).write_bytes(content)
            return directory / name
    raise AssertionError(f"{key} row {row} is not found in one place")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_the_weights(release, hf, out, kind):
    path = flip(release, kind, 3)
    refused(out, to_hf(release, out, hf), path, KINDS[kind], "CRC")


@pytest.mark.parametrize("kind", ["embedding", "qkv", "fc1", "fc2", "final norm"])
def test_a_flipped_bit_in_megatrons_weights(megatron_checkpoint, tmp_path, out, kind):
    checkpoint = megatron(megatron_checkpoint("tp1_untied"), tmp_path)
    path = flip(checkpoint / "iter_0000004", kind, 5)
    refused(out, to_hf(checkpoint, out, checkpoint / "hf"), path, KINDS[kind], "CRC")


@pytest.mark.parametrize(("kind", "row"), [("embedding", 0), ("embedding", 207), ("qkv", 50), ("fc2", 2), ("proj", 63)])
def test_a_flipped_bit_in_chunks_of_two_ranks(megatron_checkpoint, tmp_path, out, kind, row):
    """Row 207 is padding, which is not written; it belongs to a chunk that is."""
    checkpoint = megatron(megatron_checkpoint("tp2_distopt_tied_padded"), tmp_path)
    path = flip(checkpoint / "iter_0000004", kind, row)
    refused(out, to_hf(checkpoint, out, checkpoint / "hf"), path, KINDS[kind], "CRC")


def test_optimizer_states_are_not_read(megatron_checkpoint, tmp_path, out):
    checkpoint = megatron(megatron_checkpoint("tp1_untied"), tmp_path)
    flip(checkpoint / "iter_0000004", "proj", 3, "optimizer.state.exp_avg.")
    ok(run(*to_hf(checkpoint, out, checkpoint / "hf")))


# ---------------------------------------------------------------- Hugging Face directories


def lie(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return act


NORM = "model.norm.weight"
HF_DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing shard": (lambda d: shard_of(d, NORM).unlink(), ["missing", ".safetensors"]),
    "truncated shard": (lambda d: os.truncate(shard_of(d, NORM), 50_000), [".safetensors"]),
    "short header": (lambda d: os.truncate(shard_of(d, NORM), 100), [".safetensors"]),
    "empty shard": (lambda d: os.truncate(shard_of(d, NORM), 0), [".safetensors"]),
    "another file": (lie(lambda m: m.update({NORM: m["model.embed_tokens.weight"]})), [INDEX, NORM]),
    "no file": (lie(lambda m: m.update({"model.nothing": m[NORM]})), [INDEX, "model.nothing"]),
    "not listed": (lie(lambda m: m.pop(NORM)), [INDEX, NORM]),
    "elsewhere": (lie(lambda m: m.update({NORM: "../hf/" + m[NORM]})), [INDEX, NORM, "../hf/"]),
    "no index": (lambda d: (d / INDEX).unlink(), [INDEX]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json"]),
}


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


@pytest.mark.parametrize("tool", FROM_HF)
@pytest.mark.parametrize("damage", HF_DAMAGE)
def test_a_damaged_hugging_face_directory(hf, out, tool, damage):
    act, parts = HF_DAMAGE[damage]
    act(hf)
    refused(out, FROM_HF[tool](hf, out), hf, *parts)


def test_tensors_that_are_not_those_of_the_config(out, tmp_path):
    weights = models.weights(models.TINY, 1)
    for number, (change, part) in enumerate(
        (
            (lambda w: w.pop("model.layers.1.self_attn.k_proj.bias"), "model.layers.1.self_attn.k_proj.bias"),
            (lambda w: w.update({"model.layers.1.mlp.router": np.zeros(3, np.uint16)}), "model.layers.1.mlp.router"),
            (lambda w: w.update({"model.norm.weight": np.zeros(63, np.uint16)}), "model.norm.weight"),
            (lambda w: w.pop("lm_head.weight"), "lm_head.weight"),
        )
    ):
        changed = dict(weights)
        change(changed)
        source = models.save(tmp_path / str(number), models.TINY, tensors=changed)
        refused(out, to_dist(source, out), source, part)


# ---------------------------------------------------------------- outputs


def commands(hf: Path, dist: Path, out: Path, *more: object) -> list[tuple]:
    return [to_hf(dist, out, hf, *more), to_dist(hf, out, *more), cast(hf, out, *more)]


@pytest.mark.parametrize("number", range(3))
def test_outputs_in_the_way(hf, dist, tmp_path, number):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    one_line(run(*commands(hf, dist, out)[number]), out, "-f")
    assert [path.name for path in out.iterdir()] == ["notes.txt"] and not list(tmp_path.glob(".*"))

    before = models.load(hf)
    for target in (hf, hf.parent, tmp_path / "link"):
        if target.name == "link":
            target.symlink_to(hf)
        one_line(run(*commands(hf, dist, target, "-f")[number]), os.path.realpath(target), "input")
    if number == 0:
        one_line(run(*to_hf(dist, dist, hf, "-f")), dist, "input")
        one_line(run(*to_hf(dist, dist / "release", hf, "-f")), dist, "input")
    assert models.load(hf) == before and (dist / "release" / SHARD).exists() and not list(tmp_path.glob(".*"))

    for target in ("/sys/infir2/out", "/dev/null/out"):
        one_line(run(*commands(hf, dist, Path(target))[number]), target)

    ok(run(*commands(hf, dist, out, "-f")[number]))
    assert not (out / "notes.txt").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [0, 2])
def test_a_disk_that_the_tokenizer_fills(hf, dist, tmp_path, number):
    """Its size is not part of the check before the run."""
    (hf / "tokenizer.json").write_bytes(bytes(3 << 20))
    (tmp_path / "disk").mkdir()
    result = in_small_disk(
        tmp_path / "disk", "size=1500k", *commands(hf, dist, tmp_path / "disk" / "new" / "out")[number]
    )
    assert result.returncode == 1 and result.stdout.splitlines()[-1].startswith((f"{dist}", "block-aligned"))
    assert len(result.stderr.splitlines()) == 1 and "disk" in result.stderr
    assert str(tmp_path / "disk") in result.stderr and "error: " in result.stderr


# ---------------------------------------------------------------- configurations


CONTRADICTIONS = [
    ("num_hidden_layers", 1, "num_layers"),
    ("num_hidden_layers", 3, "num_layers"),
    ("hidden_size", 128, "hidden_size"),
    ("num_attention_heads", 8, "num_attention_heads"),
    ("num_key_value_heads", 4, "num_query_groups"),
    ("num_key_value_heads", 1, "num_query_groups"),
    ("num_key_value_heads", 3, "key/value heads"),
    ("intermediate_size", 128, "ffn_hidden_size"),
    ("head_dim", 32, "kv_channels"),
    ("vocab_size", 201, "200 rows"),
    ("tie_word_embeddings", True, "untie_embeddings_and_output_weights"),
    ("rope_theta", 10000.0, "rotary_base"),
    ("rope_theta", None, "rotary_base"),
    ("rms_norm_eps", 1e-5, "norm_epsilon"),
    ("rms_norm_eps", "1e-6x", "rms_norm_eps"),
    ("rms_norm_eps", [1e-6], "rms_norm_eps"),
    ("model_type", "qwen3", "qwen3"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}, "yarn"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1000000.0}, "yarn"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}, "rotary_base"),
    ("hidden_act", "gelu", "gelu"),
    ("use_sliding_window", True, "use_sliding_window"),
    ("hidden_size", None, "hidden_size"),
    ("num_hidden_layers", "2", "layers"),
    ("num_hidden_layers", 0, "layers"),
    ("num_attention_heads", 0, "sizes"),
    ("intermediate_size", 160.5, "ffn"),
]


@pytest.mark.parametrize(("key", "value", "part"), CONTRADICTIONS)
def test_a_config_that_contradicts_the_checkpoint(dist, hf, out, key, value, part):
    change_json(hf / "config.json", **{key: value})
    where = dist if key == "vocab_size" else hf / "config.json"
    refused(out, to_hf(dist, out, hf), where, part)


def test_a_vocabulary_that_is_smaller_than_the_trained_one(dist, hf, out):
    """args.vocab_size says 200: what is cut is no padding."""
    change_json(hf / "config.json", vocab_size=150)
    refused(out, to_hf(dist, out, hf), "vocab_size", "150", "200")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("hidden_size", 128),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 1),
        ("intermediate_size", 128),
        ("vocab_size", 199),
        ("vocab_size", 201),
        ("rms_norm_eps", "1e-6x"),
        ("rms_norm_eps", -1.0),
        ("model_type", "qwen3"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("hidden_act", "gelu"),
    ],
)
def test_a_config_that_contradicts_the_weights(hf, out, key, value):
    change_json(hf / "config.json", **{key: value})
    refused(out, to_dist(hf, out), hf)


# ---------------------------------------------------------------- dtypes and numbers


@pytest.mark.parametrize(("kind", "dtype"), [("final norm", "int8"), ("fc1", "float64"), ("embedding", "uint8")])
def test_a_stored_dtype_that_is_no_weight(hf, out, tmp_path, dtype, kind):
    shape = models.TINY
    weights = {name: torch.from_numpy(bits.view(np.int16)) for name, bits in models.weights(shape, 1).items()}
    config, path = models.config_of(shape), hf / "config.json"
    with torch_dist_writer.Writer(tmp_path / "ckpt" / "release") as writer:
        for entry in qwen2_layout.to_megatron(lambda name: weights[name].view(torch.bfloat16), shape):
            tensor = entry.tensor.to(getattr(torch, dtype)) if entry.key == KINDS[kind] else entry.tensor
            writer.add_tensor(entry.key, tensor, global_shape=entry.global_shape, offset=entry.offset)
        args = qwen2_config.megatron_args(config, path, vocab_rows=shape.vocab_rows, tensor_parallel=1)
        writer.finish({"args": args, "iteration": 0})
    refused(out, to_hf(tmp_path / "ckpt" / "release", out, hf), tmp_path / "ckpt", KINDS[kind], dtype)


@pytest.mark.parametrize("hide", [False, True])
def test_weights_that_are_fp8_already(hf, out, tmp_path, hide):
    ok(run(*cast(hf, tmp_path / "fp8")))
    if hide:
        change_json(tmp_path / "fp8" / "config.json", quantization_config=None)
    for command in (to_dist, cast):
        parts = ["_proj.weight", ".safetensors"] if hide else [tmp_path / "fp8" / "config.json", "quanti"]
        refused(out, command(tmp_path / "fp8", out), *parts)


@pytest.mark.parametrize("bits", [0xFF80, 0x7FC0], ids=["-inf", "nan"])
def test_a_weight_that_is_no_number(out, tmp_path, bits):
    weights = models.weights(models.TINY, 1)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][130, 5] = bits
    source = models.save(tmp_path / "bad", models.TINY, tensors=weights, shard_bytes=100_000)
    refused(out, cast(source, out), shard_of(source, name), name, "rows")


# ---------------------------------------------------------------- options


def test_blocks_that_tensor_parallel_ranks_cannot_share(hf, out, tmp_path):
    refused(out, cast(hf, out, "--check-tp", "2"), "--check-tp 2", hf / "config.json", "128")
    old = tmp_path / "old"
    old.mkdir()
    (old / "weights").write_text("precious")
    one_line(run(*cast(hf, old, "--check-tp", "2", "-f")), "--check-tp 2")
    assert (old / "weights").read_text() == "precious" and not list(tmp_path.glob(".*"))
    ok(run(*cast(hf, out, "--check-tp", "1")))


@pytest.mark.parametrize(
    ("number", "options", "part"),
    [
        *((number, ("--threads", value), "--threads") for number, value in enumerate(("0", "-1", "1.5"))),
        *((1, ("--threads", value), "--threads") for value in ("", "٣", "9" * 30)),
        *((0, ("--chunk-size", value), "--chunk-size") for value in ("-1", "0", "5GB")),
        (0, ("--vocab-size", "0"), "--vocab-size"),
        (0, ("--ckpt-step", "latest"), "--ckpt-step"),
        (1, ("--tensor-model-parallel-size", "0"), "--tensor-model-parallel-size"),
        (1, ("--make-vocab-size-divisible-by", "-128"), "--make-vocab-size-divisible-by"),
        *((2, ("--force-pow-2-scale", value), "--force-pow-2-scale") for value in ("maybe", "")),
        (2, ("--scale-formula", "nvidia"), "--scale-formula"),
        (2, ("--device", "tpu"), "--device"),
        (2, ("--check-tp", "0"), "--check-tp"),
        (0, ("--thread", "1"), "--thread"),
        (1, ("more",), "more"),
    ],
    ids=str,
)
def test_bad_option_values(hf, dist, out, number, options, part):
    command = commands(hf, dist, out, *options)[number]
    result = run(*command)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith(f"{command[1].name}: error: ") and part in last
    assert not out.parent.exists() and not result.stdout


@pytest.mark.parametrize("number", range(3))
def test_missing_options(hf, dist, out, number):
    command = commands(hf, dist, out)[number]
    for at in range(2, len(command), 2):
        result = run(*command[:at], *command[at + 2 :])
        assert result.returncode == 2 and str(command[at]) in result.stderr.splitlines()[-1]
    assert not out.parent.exists()


def test_options_that_do_not_go_together(hf, dist, out):
    refused(out, to_hf(dist, out, hf, "--model-name", "llama"), "--model-name", "llama")
    refused(out, to_hf(dist / "release", out, hf, "--ckpt-step", 3), dist)
    refused(out, to_hf(dist, out, hf, "--ckpt-step", 3), dist / "iter_0000003")
    refused(out, to_hf(dist, out, hf, "--vocab-size", 300), dist, "--vocab-size", "200 rows")
    refused(out, to_dist(hf, out, "--tensor-model-parallel-size", 3), hf / "config.json", "3")
    refused(out, to_dist(hf, out, "--make-vocab-size-divisible-by", 2**40), "--make-vocab-size-divisible-by")
    refused(out, cast(hf, out, "--scale-formula", "slime"), "--force-pow-2-scale")
    refused(out, to_dist(hf.parent / "nowhere", out), hf.parent / "nowhere")
    refused(out, to_hf(dist, out, hf.parent / "nowhere"), hf.parent / "nowhere")
    refused(out, to_hf(hf.parent / "nowhere", out, hf), hf.parent / "nowhere")


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt", torch_dist.TRACKER])
def test_a_pipe_does_not_hang(release, name):
    path = (release.parent if name == torch_dist.TRACKER else release) / name
    path.unlink()
    os.mkfifo(path)
    with refused_soon(path.parent), torch_dist.Reader(torch_dist.resolve(release.parent).directory) as reader:
        reader.common()


# ---------------------------------------------------------------- signals

LARGE = Qwen2Shape(layers=14, hidden=512, ffn=1408, heads=8, groups=2, head_dim=64, vocab_rows=4000, tied=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A model of 86 MB, as hf and as torch_dist with a padded vocabulary; the commands and their whole outputs."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(1)
    weights = {}
    for name, size in models.sizes(LARGE).items():  # random bits with an exponent of a weight: fast, and all finite
        weights[name] = rng.integers(0, 2**16, size, np.uint16) & np.uint16(0x83FF) | np.uint16(0x3C00)
    models.save(root / "hf", LARGE, tensors=weights, shard_bytes=30 << 20)
    dist = root / "to_dist"
    made = {
        "to_dist": lambda out, *more: to_dist(root / "hf", out, "--make-vocab-size-divisible-by", 4096, *more),
        "to_hf": lambda out, *more: to_hf(dist, out, root / "hf", "--chunk-size", 30 << 20, *more),
        "cast": lambda out, *more: cast(root / "hf", out, *more),
    }
    for name, command in made.items():
        ok(run(*command(root / name)))
    assert 60e6 < (dist / "release" / SHARD).stat().st_size < 110e6
    yield {"root": root, **made}
    shutil.rmtree(root)


# Read by Python before the command: its first records take long enough for a busy machine to see them.
SLOW = """
import os, time
write, seen = os.write, []
def slow(fd, data):
    done = write(fd, data)
    if data[:2] == b'["' and len(seen) < 20:
        seen.append(data)
        time.sleep(0.05)
    return done
os.write = slow
"""


def _default_signals() -> None:
    """A shell that starts the tests in the background lets them, and their children, ignore some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def stop(number: int, command: tuple, out: Path, *, may_fail: bool = False) -> subprocess.Popen:
    """Start a command and send it a signal once two items are in its journal. may_fail: it may have failed before."""
    journal = out.parent / f".{out.name}.partial" / ".journal.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(SLOW)
        process = subprocess.Popen(
            [str(word) for word in (*command, "--threads", 1)],
            env={**os.environ, "PYTHONPATH": folder},
            preexec_fn=_default_signals,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
            time.sleep(0.002)
        ended = process.poll()
        if not (may_fail and ended):
            assert ended is None, f"it ended before the signal: make LARGE larger\n{process.communicate()}"
            process.send_signal(number)
        process.out, process.err = process.communicate(timeout=60)
    return process


def assert_equal(one: Path, two: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(
    ("tool", "number"),
    [
        *(("to_hf", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)),
        *(("to_dist", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)),
        *(("cast", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_and_resume(large, tmp_path, tool, number):
    out = tmp_path / "out"
    process = stop(number, large[tool](out), out)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    finished = (tmp_path / ".out.partial" / ".journal.jsonl").read_text().count("\n") - 1
    assert finished >= 2
    if number != signal.SIGKILL:
        *notes, last = process.err.splitlines()
        assert last == f"{large[tool](out)[1].name}: error: interrupted"
        assert [str(tmp_path / ".out.partial") in note and "--resume" in note for note in notes] == [True]
    result = ok(run(*large[tool](out, "--resume")))
    assert result.stderr == "" and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_equal(out, large["root"] / tool)
    shutil.rmtree(out)


def test_a_signal_keeps_what_force_would_replace(large, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    stop(signal.SIGTERM, large["to_hf"](out, "-f"), out)
    assert [path.name for path in out.iterdir()] == ["old"]
    ok(run(*large["to_hf"](out, "-f", "--resume")))
    assert_equal(out, large["root"] / "to_hf")
    shutil.rmtree(out)


def test_the_next_run_without_resume_removes_what_a_kill_left(large, tmp_path):
    out = tmp_path / "out"
    stop(signal.SIGKILL, large["to_dist"](out), out)
    (tmp_path / ".out.partial" / "junk").write_text("")
    ok(run(*large["to_dist"](out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_equal(out, large["root"] / "to_dist")
    shutil.rmtree(out)


def test_a_changed_input_is_not_resumed(large, tmp_path):
    out, source = tmp_path / "out", Path(shutil.copytree(large["root"] / "hf", tmp_path / "hf"))
    stop(signal.SIGKILL, cast(source, out), out)
    name = "model.layers.0.mlp.up_proj.weight"
    with safetensors_io.HfReader(source) as reader:
        entry = reader.entry(name)
    with open(source / entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(1024))
    result = ok(run(*cast(source, out, "--resume")))
    assert "starting clean" in result.stderr
    assert not models.raw(out, name, np.uint8)[0, :512].any()
    shutil.rmtree(source)
    shutil.rmtree(out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_resume_does_not_publish_damaged_bytes(large, tmp_path, number):
    """The embedding is padded, so the CRC of its chunk is complete only after rows that are not written: a run that
    ends before that must not let the next one take the rows for good.
    """
    dist = Path(shutil.copytree(large["root"] / "to_dist", tmp_path / "dist"))
    out, origin = tmp_path / "out", large["root"] / "hf"
    path = flip(dist / "release", "embedding", 3)
    result = stop(number, to_hf(dist, out, origin), out, may_fail=True)
    if result.returncode != 1:  # it had not noticed
        result = run(*to_hf(dist, out, origin, "--resume"))
        result.err = result.stderr
    shutil.rmtree(dist)
    assert result.returncode == 1, "damaged bytes are published"
    assert str(path) in result.err and "CRC" in result.err and list(tmp_path.iterdir()) == []


def test_nohup(large, tmp_path):
    """Who started it with SIGHUP ignored wants it to go on when the terminal closes."""
    out = tmp_path / "out"
    ignore = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    process = stop(signal.SIGHUP, (*ignore, *large["to_hf"](out)), out)
    assert process.returncode == 0, process.err
    assert_equal(out, large["root"] / "to_hf")
    shutil.rmtree(out)
