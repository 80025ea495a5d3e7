"""Checkpoints: Megatron's are read right, ours are read by megatron.core, damage is named, nothing is executed."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import REPO, ok, run
from tools.checkpoint import qwen2_layout, safe_pickle, torch_dist, torch_dist_writer
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.qwen2_layout import Qwen2Shape

FIXTURES = [
    "tp1_untied",
    "tp1_untied_noopt",
    "tp2_distopt_tied_padded",
    "pp2_untied",
    "te_style_tp2",
    "te_style_perlayer_keys",
]


def hf_model(checkpoint: Path) -> Qwen2ForCausalLM:
    """The checkpoint's weights in transformers' model, float32."""
    with torch_dist.Reader(torch_dist.resolve(checkpoint).directory) as reader:
        args = reader.common()["args"]
        shape = Qwen2Shape.from_megatron_args(args)
        weights = {name: tensor.float() for name, tensor in qwen2_layout.to_hf(reader, shape)}
    config = Qwen2Config(
        vocab_size=shape.vocab_rows,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head_dim,
        rms_norm_eps=args.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if shape.tied else [])
    return model


@pytest.mark.parametrize("name", FIXTURES)
def test_megatron_checkpoint_gives_megatrons_logits(megatron_checkpoint, name):
    directory = megatron_checkpoint(name)
    truth = np.load(directory / "truth.npz")
    with torch.no_grad():
        logits = hf_model(directory)(torch.from_numpy(truth["input_ids"])).logits.numpy()
    assert np.abs(logits[..., : truth["logits"].shape[-1]] - truth["logits"]).max() < 2e-6


@pytest.mark.parametrize("name", ["tp1_untied", "te_style_perlayer_keys"])
def test_other_layouts_hold_the_same_bytes(megatron_checkpoint, name):
    def weights(which: str) -> dict[str, torch.Tensor]:
        with torch_dist.Reader(torch_dist.resolve(megatron_checkpoint(which)).directory) as reader:
            return dict(qwen2_layout.to_hf(reader, Qwen2Shape.from_megatron_args(reader.common()["args"])))

    ours, theirs = weights(name), weights("te_style_tp2")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@st.composite
def shapes(draw) -> Qwen2Shape:
    groups = draw(st.integers(1, 3))
    return Qwen2Shape(
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 12)),
        ffn=draw(st.integers(1, 9)),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        head_dim=draw(st.integers(1, 5)),
        vocab_rows=draw(st.integers(1, 20)),
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )


def random_hf(shape: Qwen2Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random bits under every Hugging Face name of `shape`, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {}
    for row in qwen2_layout.table(shape):
        for part in row.parts:
            sizes[part.name] = (sum(stop - start for start, stop in part.runs), *row.shape[1:])
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    info = torch.iinfo(bits)
    return {
        name: torch.randint(info.min, info.max + 1, size, generator=generator, dtype=bits).view(dtype)
        for name, size in sizes.items()
    }


def write(directory: Path, shape: Qwen2Shape, weights: dict[str, torch.Tensor], prefix: str = "") -> None:
    """A checkpoint of `weights` with the least that common.pt needs."""
    with torch_dist_writer.Writer(directory, replace=True) as writer:
        for entry in qwen2_layout.to_megatron(weights.__getitem__, shape, prefix):
            writer.add_tensor(entry.key, entry.tensor, global_shape=entry.global_shape, offset=entry.offset)
        for key in qwen2_layout.extra_state_keys(shape):
            writer.add_object(key, torch.empty(0, dtype=torch.uint8))
        args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        writer.finish({"args": args, "iteration": 1})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_there_and_back_is_the_same_bits(tmp_path, shape, seed, dtype):
    weights = random_hf(shape, seed, dtype)
    write(tmp_path / "iter_0000001", shape, weights)
    with torch_dist.Reader(tmp_path / "iter_0000001") as reader:
        back = dict(qwen2_layout.to_hf(reader, shape))
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name].view(bits), weights[name].view(bits)) for name in weights)


def test_equal_inputs_give_equal_files(tmp_path):
    shape = Qwen2Shape(2, 8, 6, 4, 2, 2, 10, tied=False)
    for folder in "ab":
        write(tmp_path / folder / "iter_0000001", shape, random_hf(shape, 7))
    files = sorted(path.name for path in (tmp_path / "a" / "iter_0000001").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b" / "iter_0000001").iterdir())
    for name in files:
        assert (tmp_path / "a/iter_0000001" / name).read_bytes() == (tmp_path / "b/iter_0000001" / name).read_bytes()


@pytest.mark.parametrize("name", ["tp1_untied", "tp2_distopt_tied_padded"])
def test_rewritten_checkpoint_loads_in_megatron_core(megatron_checkpoint, tmp_path, name):
    source = megatron_checkpoint(name)
    with torch_dist.Reader(torch_dist.resolve(source).directory) as reader:
        common = reader.common()
        shape = Qwen2Shape.from_megatron_args(common["args"])
        weights = dict(qwen2_layout.to_hf(reader, shape))
    plain = {
        key: value
        for key, value in vars(common["args"]).items()
        if not key.startswith("_") and (value is None or type(value) in (bool, int, float, str))
    }
    with torch_dist_writer.Writer(tmp_path / "release") as writer:
        for entry in qwen2_layout.to_megatron(weights.__getitem__, shape):
            writer.add_tensor(entry.key, entry.tensor, global_shape=entry.global_shape, offset=entry.offset)
        for key in qwen2_layout.extra_state_keys(shape):
            writer.add_object(key, torch.empty(0, dtype=torch.uint8))
        writer.finish({"args": argparse.Namespace(**plain), "iteration": 0})
    logits = mcore_logits(tmp_path / "release", source / "truth.npz", tmp_path / "logits.npy")
    truth = np.load(source / "truth.npz")["logits"]
    assert np.abs(logits[..., : truth.shape[-1]] - truth).max() < 2e-6


def mcore_logits(directory: Path, given_ids: Path, output: Path) -> np.ndarray:
    """Logits of the real megatron.core, see tests/mcore_logits.py."""
    ok(run(sys.executable, REPO / "tests" / "mcore_logits.py", directory, given_ids, output))
    return np.load(output)


# ---------------------------------------------------------------- damage


@pytest.fixture
def small(tmp_path) -> Path:
    shape = Qwen2Shape(1, 8, 6, 4, 2, 2, 10, tied=True)
    write(tmp_path / "iter_0000001", shape, random_hf(shape, 3))
    torch_dist.write_tracker(tmp_path, 1)
    return tmp_path / "iter_0000001"


def read_all(directory: Path) -> list[bytes]:
    """Everything there is, raw."""
    with torch_dist.Reader(directory) as reader:
        found = [reader.read(key).tobytes() for key in sorted(reader.tensors)]
        found += [reader.read_object(key).numpy().tobytes() for key in reader.objects]
        found.append(repr(sorted(vars(reader.common()["args"]).items())).encode())
    return found


SHARD = "__0_0.distcp"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / SHARD).unlink(), f"{SHARD}: shard is missing"),
        (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 1), "truncated shard"),
        (lambda d: (d / "metadata.json").write_text("{"), "metadata.json: not JSON"),
        (lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "expected {'sharded_backend'"),
        (lambda d: (d / "metadata.json").unlink(), "metadata.json: cannot be read"),
        (lambda d: (d / ".metadata").write_bytes(b""), ".metadata"),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps({"a": 1})), ".metadata"),
        (lambda d: (d / "common.pt").write_bytes(b"PK"), "common.pt"),
        (lambda d: (d / "common.pt").unlink(), "common.pt"),
    ],
)
def test_damage_is_named_in_one_line(small, damage, message):
    damage(small)
    with pytest.raises(CheckpointError) as caught:
        read_all(small)
    assert message in str(caught.value) and str(small) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_harmless(small, data):
    intact = read_all(small)
    path = small / data.draw(st.sampled_from([SHARD, ".metadata", "common.pt"]))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    content[position // 8] ^= 1 << position % 8
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        found = read_all(small)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        # Names and numbers of .metadata carry no checksum: a changed name is another checkpoint, not a wrong tensor.
        assert path.name == ".metadata" or found == intact
    finally:
        path.write_bytes(original)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("pickle") / "common.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        safe_pickle.load(path)


class Execute:
    """Pickles to a call of a function on a path."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, open, os.mkdir, subprocess.check_output, shutil.rmtree, torch.load, getattr, np.load],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("where", [".metadata", "common.pt"])
def test_no_pickle_is_executed(small, tmp_path, function, where):
    target = tmp_path / "made"
    arguments = {os.mkdir: (str(target),), open: (str(target), "w"), shutil.rmtree: (str(small),)}
    payload = Execute(function, *arguments.get(function, (f"open({str(target)!r}, 'w')",)))
    if where == ".metadata":
        (small / where).write_bytes(pickle.dumps(payload))
    else:
        torch.save({"args": payload}, small / where)
    with pytest.raises(CheckpointError, match=r"(?s)^[^\n]*$"):
        read_all(small)
    assert not target.exists() and small.exists()


def test_a_shard_outside_the_directory_is_refused(small, tmp_path):
    (tmp_path / "elsewhere").write_bytes((small / SHARD).read_bytes())
    metadata = (small / ".metadata").read_bytes()
    outside = b"../elsewhere"
    assert len(outside) == len(SHARD)
    (small / ".metadata").write_bytes(metadata.replace(SHARD.encode(), outside))
    with pytest.raises(CheckpointError, match=".metadata"):
        torch_dist.Reader(small)


# ---------------------------------------------------------------- finding and writing


@pytest.mark.parametrize("text", ["", "abc", "-1", "0", "1.5", "release2", "9" * 30])
def test_broken_tracker(tmp_path, text):
    (tmp_path / torch_dist.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=torch_dist.TRACKER):
        torch_dist.read_tracker(tmp_path)


def test_resolve(small):
    root = small.parent
    assert torch_dist.resolve(root) == torch_dist.resolve(root, 1) == torch_dist.resolve(small)
    assert torch_dist.resolve(root).iteration == 1
    for path, step in ((root / "nowhere", None), (root, 2), (small, 1)):
        with pytest.raises(CheckpointError, match=str(path)):
            torch_dist.resolve(path, step)
    (root / torch_dist.TRACKER).unlink()
    with pytest.raises(CheckpointError, match=torch_dist.TRACKER):
        torch_dist.resolve(root)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="my own"), torch_dist_writer.Writer(tmp_path / "iter_0000001") as writer:
        writer.add_tensor("a", torch.zeros(2))
        raise RuntimeError("my own")
    with pytest.raises(CheckpointError, match="without finish"), torch_dist_writer.Writer(tmp_path / "iter_0000001"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_hole_in_a_tensor_is_refused(tmp_path):
    args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    with pytest.raises(CheckpointError, match="a: "), torch_dist_writer.Writer(tmp_path / "iter_0000001") as writer:
        writer.add_tensor("a", torch.zeros(1, 2), global_shape=(2, 2), offset=(0, 0))
        writer.finish({"args": args, "iteration": 1})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_kept_unless_replaced(small):
    before = read_all(small)
    with pytest.raises(CheckpointError, match="exists already"), torch_dist_writer.Writer(small):
        pass
    with pytest.raises(RuntimeError), torch_dist_writer.Writer(small, replace=True) as writer:
        writer.add_tensor("a", torch.zeros(2))
        raise RuntimeError
    assert read_all(small) == before


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    program = (
        "import sys, os, signal, torch; from pathlib import Path; from tools.checkpoint import torch_dist_writer\n"
        "with torch_dist_writer.Writer(Path(sys.argv[1])) as w:\n"
        "    w.add_tensor('a', torch.zeros(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = run(sys.executable, "-c", program, tmp_path / "iter_0000002", cwd=REPO)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    shape = Qwen2Shape(1, 2, 2, 1, 1, 2, 3, tied=True)
    write(tmp_path / "iter_0000001", shape, random_hf(shape, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]
