"""torch_dist <-> Hugging Face: Megatron's own checkpoints give Megatron's logits, and nothing changes on the way
back.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import Qwen2ForCausalLM

from tests.conftest import REPO, ok, run
from tests.tools import models
from tests.tools.checkpoint.test_torch_dist import FIXTURES, mcore_logits, shapes
from tools import convert_hf_to_torch_dist, convert_torch_dist_to_hf
from tools.checkpoint import torch_dist
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safetensors_io import HfReader

TO_HF = REPO / "tools" / "convert_torch_dist_to_hf.py"
TO_TORCH_DIST = REPO / "tools" / "convert_hf_to_torch_dist.py"


def to_hf(checkpoint: Path, out: Path, origin: Path, *more: object):
    command = (sys.executable, TO_HF, "--input-dir", checkpoint, "--output-dir", out, "--origin-hf-dir", origin)
    return run(*command, *more)


def hf_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of transformers' own loading of a directory, float32; every key must be used and none missing."""
    model, report = Qwen2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("name", FIXTURES)
def test_megatron_checkpoints_give_megatrons_logits(megatron_checkpoint, tmp_path, name):
    source = megatron_checkpoint(name)
    ok(to_hf(source, tmp_path / "out put", source / "hf"))
    truth = np.load(source / "truth.npz")
    logits = hf_logits(tmp_path / "out put", truth["input_ids"])
    assert logits.shape == truth["logits"].shape
    assert np.abs(logits - truth["logits"]).max() <= 2e-6
    config = json.loads((tmp_path / "out put" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_root_directory_step_and_release_are_the_same_checkpoint(megatron_checkpoint, tmp_path):
    source = megatron_checkpoint("tp1_untied_noopt")
    shutil.copytree(source, tmp_path / "root")
    shutil.copytree(source / "iter_0000002", tmp_path / "root" / "iter_0000007")
    shutil.copytree(source / "iter_0000002", tmp_path / "release only" / "release")
    (tmp_path / "release only" / torch_dist.TRACKER).write_text("release")
    (tmp_path / "root" / torch_dist.TRACKER).write_text("7\n")
    ways = {
        "root": (tmp_path / "root",),
        "iter": (tmp_path / "root" / "iter_0000002",),
        "step": (tmp_path / "root", "--ckpt-step", 2),
        "release": (tmp_path / "release only",),
        "release dir": (tmp_path / "release only" / "release",),
    }
    found = {}
    for name, (where, *more) in ways.items():
        result = ok(to_hf(where, tmp_path / "out" / name, source / "hf", *more))
        found[name] = models.load(tmp_path / "out" / name)
        assert {"root": "iter_0000007", "step": "iter_0000002"}.get(name, "") in result.stdout
    assert all(tensors == found["root"] for tensors in found.values())


def test_everything_beside_the_weights_comes_along(megatron_checkpoint, tmp_path):
    source = megatron_checkpoint("tp2_distopt_tied_padded")
    origin = tmp_path / "origin"
    origin.mkdir()
    config = json.loads((source / "hf" / "config.json").read_text())
    config |= {"torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}, "extra": [1, "ü"]}
    (origin / "config.json").write_text(json.dumps(config))
    others = {"qwen.tiktoken": b"\x00\xff", "merges.txt": b"a b\n", "chat_template.jinja": b"{{ x }}", "code.py": b"#"}
    for name, content in others.items():
        (origin / name).write_bytes(content)
    for stale in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (origin / stale).write_bytes(b"stale")
    (origin / "link.txt").symlink_to(source / "NOTE.txt")
    ok(to_hf(source, tmp_path / "out", origin))
    out = tmp_path / "out"
    written = {"config.json", "model.safetensors", "model.safetensors.index.json", "link.txt", *others}
    assert {path.name for path in out.iterdir()} == written
    assert all((out / name).read_bytes() == content for name, content in others.items())
    assert not (out / "link.txt").is_symlink()
    changed = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    assert changed == config | {"torch_dtype": "bfloat16"}
    with safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with HfReader(out) as reader:
        assert index["metadata"]["total_size"] == reader.nbytes
        assert set(index["weight_map"]) == set(reader.tensors)


@pytest.mark.parametrize("limit", [60_000, 8_000, 1])
def test_shards_are_at_most_chunk_size(megatron_checkpoint, tmp_path, limit):
    source = megatron_checkpoint("tp1_untied")
    ok(to_hf(source, tmp_path / "one", source / "hf"))
    ok(to_hf(source, tmp_path / "many", source / "hf", "--chunk-size", limit))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    weight_map = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    for path in files:
        inside = [name for name, file in weight_map.items() if file == path.name]
        assert path.stat().st_size <= limit or len(inside) == 1
    assert models.load(tmp_path / "many") == models.load(tmp_path / "one")
    truth = np.load(source / "truth.npz")
    assert np.abs(hf_logits(tmp_path / "many", truth["input_ids"]) - truth["logits"]).max() <= 2e-6


# ---------------------------------------------------------------- vocabulary


def test_vocabulary_rows(megatron_checkpoint, tmp_path):
    source = megatron_checkpoint("tp2_distopt_tied_padded")  # 199 tokens, 208 rows stored
    result = ok(to_hf(source, tmp_path / "config's", source / "hf"))
    assert "199 of 208 vocabulary rows (9 padding rows dropped)" in result.stdout
    ok(to_hf(source, tmp_path / "all", source / "hf", "--vocab-size", 208))
    name = "model.embed_tokens.weight"
    table = models.raw(tmp_path / "all", name, np.uint16)
    assert table.shape[0] == 208 and json.loads((tmp_path / "all/config.json").read_text())["vocab_size"] == 208
    assert (models.raw(tmp_path / "config's", name, np.uint16) == table[:199]).all()

    failed = to_hf(source, tmp_path / "more", source / "hf", "--vocab-size", 220)
    assert failed.returncode == 1 and not (tmp_path / "more").exists()
    assert "has 208 rows, expected 220" in failed.stderr and "--pad-vocab adds 12 rows" in failed.stderr
    result = ok(to_hf(source, tmp_path / "more", source / "hf", "--vocab-size", 220, "--pad-vocab"))
    assert "208 vocabulary rows and 12 rows of zeros" in result.stdout
    padded = models.raw(tmp_path / "more", name, np.uint16)
    assert (padded[:208] == table).all() and padded.shape[0] == 220 and not padded[208:].any()


# ---------------------------------------------------------------- there and back


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    ranks=st.sampled_from([1, 1, 2, 3]),
    multiple=st.sampled_from([None, 1, 8]),
    chunk=st.sampled_from([64, 1 << 20]),
)
def test_there_and_back_is_the_same_bytes(tmp_path_factory, shape, seed, dtype, ranks, multiple, chunk):
    shape = replace(shape, qkv_bias=True, groups=shape.groups * ranks, heads=shape.heads * ranks, ffn=shape.ffn * ranks)
    tmp_path = tmp_path_factory.mktemp("back")
    source = models.save(tmp_path / "hf", shape, seed, dtype=dtype, shard_bytes=5000)
    more = ["--make-vocab-size-divisible-by", str(multiple)] if multiple else []
    there = ["--input-dir", source, "--output-dir", tmp_path / "ckpt", "--tensor-model-parallel-size", ranks, *more]
    back = ["--input-dir", tmp_path / "ckpt", "--output-dir", tmp_path / "out", "--origin-hf-dir", source]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_hf_to_torch_dist, "VOCABULARY_CHUNK", chunk)
        if not multiple and shape.vocab_rows % ranks:
            with pytest.raises(CheckpointError, match="--make-vocab-size-divisible-by"):
                convert_hf_to_torch_dist.main([*map(str, there)])
            return
        convert_hf_to_torch_dist.main([*map(str, there)])
    convert_torch_dist_to_hf.main([*map(str, back)])
    assert models.load(tmp_path / "out") == models.load(source)
    shutil.rmtree(tmp_path / "out")
    with torch_dist.Reader(tmp_path / "ckpt" / "release") as reader:
        stored = reader.tensors["embedding.word_embeddings.weight"].shape[0]
        assert stored == -(-shape.vocab_rows // ((multiple or 1) * ranks)) * (multiple or 1) * ranks
        padding = reader.read("embedding.word_embeddings.weight", shape.vocab_rows, stored)
        assert not padding.any()


@pytest.mark.parametrize(("name", "ranks", "more"), [("tp1_untied", 2, ()), ("tp2_distopt_tied_padded", 2, (104,))])
def test_megatron_core_loads_what_we_write(megatron_checkpoint, tmp_path, name, ranks, more):
    source = megatron_checkpoint(name)
    ok(to_hf(source, tmp_path / "hf", source / "hf"))
    arguments = ["--input-dir", tmp_path / "hf", "--output-dir", tmp_path / "ckpt"]
    arguments += [
        "--tensor-model-parallel-size",
        ranks,
        *(w for n in more for w in ("--make-vocab-size-divisible-by", n)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_hf_to_torch_dist, "VOCABULARY_CHUNK", 3000)  # several chunks of the table for each rank
        convert_hf_to_torch_dist.main([*map(str, arguments)])
    truth = np.load(source / "truth.npz")
    logits = mcore_logits(tmp_path / "ckpt" / "release", source / "truth.npz", tmp_path / "logits.npy")
    ours = hf_logits(tmp_path / "hf", truth["input_ids"])
    assert np.abs(logits[..., : ours.shape[-1]] - ours).max() <= 2e-6
    assert np.abs(logits[..., : ours.shape[-1]] - truth["logits"]).max() <= 2e-6
    # What docs/TOOLS.md says of padding: logit 0, so that many times exp(0) more in the sum under Megatron's loss.
    assert not logits[..., ours.shape[-1] :].any()
    total = np.exp(ours.astype(np.float64)).sum(-1)
    added = np.log(np.exp(logits.astype(np.float64)).sum(-1) / total)
    np.testing.assert_allclose(added, np.log1p((logits.shape[-1] - ours.shape[-1]) / total), atol=1e-6)
    assert (tmp_path / "ckpt" / torch_dist.TRACKER).read_text() == "release"


def test_common_pt_is_what_torch_loads(tmp_path):
    source = models.save(tmp_path / "hf", models.TINY)
    ok(run(sys.executable, TO_TORCH_DIST, "--input-dir", source, "--output-dir", tmp_path / "ckpt"))
    common = torch.load(tmp_path / "ckpt" / "release" / "common.pt", weights_only=False)
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 0
    args = common["args"]
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.padded_vocab_size) == (2, 64, 160, 200)
    assert (args.rotary_base, args.norm_epsilon, args.untie_embeddings_and_output_weights) == (1000000, 1e-6, True)


def test_what_the_model_computes_is_left_out_and_said(tmp_path):
    shape = replace(models.TINY, tied=True)
    tensors = models.weights(shape, 0)
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    source = models.save(tmp_path / "hf", shape, tensors={**tensors, **extra})
    result = ok(run(sys.executable, TO_TORCH_DIST, "--input-dir", source, "--output-dir", tmp_path / "ckpt"))
    assert "note: lm_head.weight is left out" in result.stdout
    source = models.save(
        tmp_path / "odd", shape, tensors={**tensors, "model.layers.0.mlp.odd.weight": tensors["model.norm.weight"]}
    )
    failed = run(sys.executable, TO_TORCH_DIST, "--input-dir", source, "--output-dir", tmp_path / "odd ckpt")
    assert failed.returncode == 1 and "model.layers.0.mlp.odd.weight is not a tensor of this Qwen2" in failed.stderr


# ---------------------------------------------------------------- where it runs


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> Path:
    """A Python with numpy, safetensors and tqdm, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    ours = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "safetensors", "tqdm"):
        if (ours / name).exists():
            (site / name).symlink_to(ours / name)
    python = folder / "bin" / "python"
    assert run(python, "-c", "import torch").returncode != 0 and run(python, "-c", "import numba").returncode != 0
    return python


@pytest.mark.parametrize(
    "tool", ["convert_torch_dist_to_hf", "convert_hf_to_torch_dist", "bf16_cast_fp8", "verify_checkpoint"]
)
def test_help_needs_the_listed_packages_only(bare_python, tool, tmp_path):
    result = ok(run(bare_python, REPO / "tools" / f"{tool}.py", "--help", cwd=tmp_path))
    assert "usage" in result.stdout and f"python tools/{tool}.py" in result.stdout and result.stderr == ""


def test_all_but_the_cast_run_without_torch(bare_python, megatron_checkpoint, tmp_path):
    source = megatron_checkpoint("te_style_tp2")
    tools = REPO / "tools"
    # A folder of the same name on the caller's path, as Megatron-LM has one, must not get in the way.
    (tmp_path / "other" / "tools").mkdir(parents=True)
    (tmp_path / "other" / "tools" / "__init__.py").write_text("raise ImportError('the wrong tools')\n")
    env = {"PYTHONPATH": str(tmp_path / "other")}
    arguments = ("--input-dir", source, "--output-dir", tmp_path / "hf", "--origin-hf-dir", source / "hf")
    ok(run(bare_python, TO_HF, *arguments, env=env, cwd=tmp_path))
    ok(run(bare_python, TO_TORCH_DIST, "--input-dir", tmp_path / "hf", "--output-dir", tmp_path / "back", cwd=tmp_path))
    verified = ok(run(bare_python, tools / "verify_checkpoint.py", tmp_path / "back", source, cwd=tmp_path))
    assert "verdict: equal: 51 tensors" in verified.stdout
    cast = ("--input-bf16-hf-path", tmp_path / "hf", "--output-fp8-hf-path", tmp_path / "fp8")
    failed = run(bare_python, tools / "bf16_cast_fp8.py", *cast)
    assert failed.returncode == 1 and "needs numba (fast) or torch" in failed.stderr


def test_the_summary_says_bytes_seconds_and_memory(tmp_path):
    source = models.save(tmp_path / "hf", models.TINY)
    result = ok(run(sys.executable, TO_TORCH_DIST, "--input-dir", source, "--output-dir", tmp_path / "ckpt"))
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'ckpt'}: ") and " kB in, " in last and " s, " in last
    assert float(last.split("peak RSS ")[1].split()[0]) > 10


def test_threads_and_fsync_change_nothing(tmp_path):
    source = models.save(tmp_path / "hf", models.TINY, shard_bytes=40_000)
    for name, more in {"a": (), "b": ("--threads", 1), "c": ("--threads", 7, "--fsync")}.items():
        ok(run(sys.executable, TO_TORCH_DIST, "--input-dir", source, "--output-dir", tmp_path / name, *more))
    files = {name: tree(tmp_path / name) for name in "abc"}
    assert files["a"] == files["b"] == files["c"] and len(files["a"]) == 5


def tree(folder: Path) -> dict[str, bytes]:
    return {os.path.relpath(path, folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
