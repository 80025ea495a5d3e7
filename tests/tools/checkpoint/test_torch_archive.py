"""Archives written without torch: torch loads them, so does our reader, and metadata is what torch's classes say."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tools.checkpoint import safe_pickle, torch_archive
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safe_pickle import NUMPY_DTYPES
from tools.checkpoint.torch_archive import Archive, Array, Named
from tools.checkpoint.torch_dist_writer import SHARD, Layout, as_array, common_bytes, plain

STORED = [dtype for dtype in NUMPY_DTYPES if not dtype.startswith("float8")]


def build(value: object) -> bytes:
    return Archive(value).to_bytes()


@st.composite
def arrays(draw) -> Array:
    dtype = draw(st.sampled_from(STORED))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize
    data = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8).copy()
    if dtype == "bool":
        data &= 1
    return Array(dtype, shape, data)


CONSTANTS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=9)
VALUES = st.recursive(
    CONSTANTS | st.binary(max_size=9) | arrays(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(ours: object, loaded: object) -> bool:
    """Whether what torch loaded is what was written."""
    if isinstance(ours, Array):
        raw = loaded.reshape(-1).view(torch.uint8).numpy().tobytes() if loaded.numel() else b""
        name = str(loaded.dtype).removeprefix("torch.")
        return (name, tuple(loaded.shape), raw) == (ours.dtype, ours.shape, ours.data.tobytes())
    if isinstance(ours, dict):
        return ours.keys() == loaded.keys() and all(same(ours[key], loaded[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return type(ours) is type(loaded) and all(map(same, ours, loaded)) and len(ours) == len(loaded)
    return type(ours) is type(loaded) and ours == loaded


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_torch_loads_what_was_written(value):
    content = build(value)
    assert same(value, torch.load(io.BytesIO(content), weights_only=False))
    assert content == build(value)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            # torch maps archives into memory and wants aligned elements
            header = content[info.header_offset : info.header_offset + 30]
            start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
            assert (start + int.from_bytes(header[28:30], "little")) % 64 == 0


def test_a_namespace_and_constants_of_torch(tmp_path):
    value = {"args": argparse.Namespace(x=1, dtype=Named("torch", "bfloat16")), "rng": np.arange(5, dtype=np.uint32)}
    (tmp_path / "common.pt").write_bytes(build(value))
    loaded = torch.load(tmp_path / "common.pt", weights_only=False)
    assert loaded["args"] == argparse.Namespace(x=1, dtype=torch.bfloat16) and (loaded["rng"] == value["rng"]).all()
    inert = safe_pickle.load(tmp_path / "common.pt")
    assert inert["args"].dtype == "bfloat16" and (inert["rng"].numpy() == value["rng"]).all()


def test_metadata_equals_that_of_torchs_classes():
    layout = Layout("here")
    table = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    halves = [layout.add_tensor("a.weight", (4, 3), (row, 0), as_array(table[row : row + 2])) for row in (0, 2)]
    state = layout.add_object("b._extra_state/shard_0_1", Array("uint8", (0,), np.empty(0, np.uint8)))
    size = torch.Size
    expected = dcp.Metadata(
        state_dict_metadata={
            "a.weight": dcp.TensorStorageMetadata(
                dcp.TensorProperties(dtype=torch.bfloat16),
                size([4, 3]),
                [dcp.ChunkStorageMetadata(size([row, 0]), size([2, 3])) for row in (0, 2)],
            ),
            "b._extra_state/shard_0_1": dcp.BytesStorageMetadata(),
        },
        planner_data=None,
        storage_data={
            dcp.MetadataIndex("a.weight", [0, 0]): _StorageInfo(SHARD, halves[0].start, halves[0].archive.size),
            dcp.MetadataIndex("a.weight", [2, 0]): _StorageInfo(SHARD, halves[1].start, halves[1].archive.size),
            dcp.MetadataIndex("b._extra_state/shard_0_1"): _StorageInfo(SHARD, state.start, state.archive.size),
        },
        storage_meta=dcp.StorageMeta(),
    )
    found = pickle.loads(layout.metadata())  # noqa: S301 (ours)
    assert found == expected
    for index, info in expected.storage_data.items():
        assert vars(found.storage_data[index]) == {k: v for k, v in vars(info).items() if v is not None}


def test_what_cannot_be_written_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match="args.odd: a object"):
        plain({"args": argparse.Namespace(odd=object())}, "common.pt")
    with pytest.raises(CheckpointError, match="needs args.pipeline_model_parallel_size"):
        common_bytes({"args": argparse.Namespace(tensor_model_parallel_size=1), "iteration": 0}, "x")
    monkeypatch.setattr(torch_archive, "_LIMIT", 1000)
    with pytest.raises(CheckpointError, match="expected at most 1000"):
        Archive(Array("float32", (1000,)))
