"""The cast as a command: a checkpoint that loaders take, and the same bits on every path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2ForCausalLM

from tests.conftest import REPO, ok, run
from tests.tools import models
from tests.tools.checkpoint.test_fp8_cast import reference
from tools.checkpoint.fp8_cast import Rule
from tools.checkpoint.sources import dequantize

CAST = REPO / "tools" / "bf16_cast_fp8.py"


def cast(source: Path, out: Path, *more: object, env: dict[str, str] | None = None):
    return run(*(sys.executable, CAST, "--input-bf16-hf-path", source, "--output-fp8-hf-path", out), *more, env=env)


@pytest.mark.parametrize("shape", [models.TINY, models.BLOCKS], ids=["ragged", "blocks"])
@pytest.mark.parametrize("shards", [None, 100_000])
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ((), Rule(True)),
        (("--force-pow-2-scale", "False"), Rule(False)),
        (("--force-pow-2-scale", "false", "--scale-formula", "slime"), Rule(False, "slime")),
    ],
)
def test_every_tensor(tmp_path, shape, shards, options, rule):
    source = models.save(tmp_path / "bf16", shape, shard_bytes=shards)
    ok(cast(source, tmp_path / "fp8", *options))
    before, after = models.load(source), models.load(tmp_path / "fp8")
    linear = [name for name in before if name.endswith("_proj.weight")]
    assert set(after) == set(before) | {f"{name}_scale_inv" for name in linear}
    for name in before:
        if name not in linear:
            assert after[name] == before[name]
            continue
        codes, inverse, _ = reference(models.raw(source, name, np.uint16).view(ml_dtypes.bfloat16), rule)
        assert (models.raw(tmp_path / "fp8", name, np.uint8) == codes).all()
        stored = models.raw(tmp_path / "fp8", f"{name}_scale_inv", np.float32)
        assert stored.shape == inverse.shape and (stored.view(np.uint32) == inverse.view(np.uint32)).all()

    out = tmp_path / "fp8"
    names = {path.name for path in source.iterdir()} | {"model.safetensors.index.json"}
    assert {path.name for path in out.iterdir()} == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    data = sum((out / file).stat().st_size for file in set(index["weight_map"].values()))
    headers = 0
    for file in set(index["weight_map"].values()):
        with safe_open(out / file, "np") as opened:
            assert opened.metadata()["format"] == "pt"
            assert opened.metadata()["fp8_scale_format"] == ("pow2" if rule.pow2 else "fp32")
        headers += 8 + int.from_bytes((out / file).read_bytes()[:8], "little")
    assert index["metadata"]["total_size"] == data - headers
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    # What slime's weight sync asserts (megatron_to_hf/__init__.py:40 at the pin) and engines read.
    assert (quantization["quant_method"], quantization["fmt"]) == ("fp8", "e4m3")
    assert quantization["activation_scheme"] == "dynamic" and quantization["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("pow2", ["True", "False"])
def test_transformers_loads_it_and_dequantises_to_our_bits(tmp_path, pow2):
    source = models.save(tmp_path / "bf16", models.BLOCKS)
    ok(cast(source, tmp_path / "fp8", "--force-pow-2-scale", pow2))
    model, report = Qwen2ForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = model.state_dict()
    for name in models.sizes(models.BLOCKS):
        loaded = state[name].view(torch.int16).numpy().view(np.uint16)
        if name.endswith("_proj.weight"):
            codes = models.raw(tmp_path / "fp8", name, np.uint8)
            values = dequantize(codes, models.raw(tmp_path / "fp8", f"{name}_scale_inv", np.float32))
            expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            expected = models.raw(source, name, np.uint16)
        assert (loaded == expected).all(), name
    original = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        a, b = original(ids).logits, model.float()(ids).logits
    assert ((a - b).norm() / a.norm()).item() < 0.1


def test_without_numba_torch_gives_the_same_files(tmp_path):
    source = models.save(tmp_path / "bf16", models.TINY)
    (tmp_path / "no" / "numba").mkdir(parents=True)
    (tmp_path / "no" / "numba" / "__init__.py").write_text("raise ImportError('not here')\n")
    for options in ((), ("--force-pow-2-scale", "False")):
        fast = ok(cast(source, tmp_path / "numba", "-f", *options))
        slow = ok(cast(source, tmp_path / "torch", "-f", *options, env={"PYTHONPATH": str(tmp_path / "no")}))
        assert " (numba): " in fast.stdout and " (torch on cpu): " in slow.stdout
        assert models.load(tmp_path / "numba") == models.load(tmp_path / "torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_files(tmp_path):
    source = models.save(tmp_path / "bf16", models.TINY)
    for options in ((), ("--force-pow-2-scale", "False")):
        ok(cast(source, tmp_path / "cpu", "-f", *options, "--device", "cpu"))
        ok(cast(source, tmp_path / "gpu", "-f", *options, "--device", "cuda"))
        assert models.load(tmp_path / "cpu") == models.load(tmp_path / "gpu")


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_float_types(tmp_path, dtype):
    source = models.save(tmp_path / "in", models.TINY, dtype=dtype)
    ok(cast(source, tmp_path / "fp8"))
    number = {"F16": np.float16, "F32": np.float32}[dtype]
    name = "model.layers.1.mlp.down_proj.weight"
    codes, _, _ = reference(models.raw(source, name, number), Rule())
    assert (models.raw(tmp_path / "fp8", name, np.uint8) == codes).all()
    assert models.load(tmp_path / "fp8")["model.norm.weight"] == models.load(source)["model.norm.weight"]


def test_small_weights_keep_their_scales(tmp_path):
    """Scales in float16, as the original tool stored them, are zero here, and so was every weight."""
    tensors = models.weights(models.TINY, 0)
    name = "model.layers.0.mlp.up_proj.weight"
    values = tensors[name].view(ml_dtypes.bfloat16).astype(np.float32) * 1e-8
    tensors[name] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    source = models.save(tmp_path / "bf16", models.TINY, tensors=tensors)
    ok(cast(source, tmp_path / "fp8", "--force-pow-2-scale", "False"))
    codes = models.raw(tmp_path / "fp8", name, np.uint8)
    back = dequantize(codes, models.raw(tmp_path / "fp8", f"{name}_scale_inv", np.float32))
    assert np.linalg.norm(back - values) / np.linalg.norm(values) < 0.03


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nonfinite_tensors_that_keep_their_bits(tmp_path, name, dtype):
    tensors = models.weights(models.TINY, 0, dtype)
    tensors[name].reshape(-1)[-1] = {"BF16": 0xFF80, "F16": 0x7E00, "F32": 0x7F800000}[dtype]
    source = models.save(tmp_path / "bf16", models.TINY, dtype=dtype, tensors=tensors)
    failed = cast(source, tmp_path / "fp8")
    assert failed.returncode == 1 and f"{name}: NaN or infinity in 1 elements" in failed.stderr
    ok(cast(source, tmp_path / "fp8", "--allow-nonfinite"))
    assert models.load(tmp_path / "fp8")[name] == models.load(source)[name]


def test_nonfinite_weights(tmp_path):
    tensors = models.weights(models.TINY, 0)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name].view(ml_dtypes.bfloat16)[3, 5:7] = [np.nan, np.inf]
    source = models.save(tmp_path / "bf16", models.TINY, tensors=tensors)
    failed = cast(source, tmp_path / "fp8")
    assert failed.returncode == 1 and f"{name}: NaN or infinity in 1 blocks" in failed.stderr
    assert "--allow-nonfinite" in failed.stderr and not (tmp_path / "fp8").exists()
    ok(cast(source, tmp_path / "fp8", "--allow-nonfinite"))
    assert list(models.raw(tmp_path / "fp8", name, np.uint8)[3, 5:7]) == [0x7F, 0x7E]
    slime = ("--allow-nonfinite", "--scale-formula", "slime", "--force-pow-2-scale", "False")
    assert cast(source, tmp_path / "slime", *slime).returncode == 1


@pytest.mark.parametrize("text", ["True", "true", "1", "False", "FALSE", "0"])
def test_booleans_mean_what_they_say(tmp_path, text):
    source = models.save(tmp_path / "bf16", models.TINY)
    result = ok(cast(source, tmp_path / "fp8", "--force-pow-2-scale", text))
    wanted = "power-of-two" if text.lower() in ("true", "1") else "float32"
    assert f"{wanted} scales" in result.stdout
    scales = models.raw(tmp_path / "fp8", "model.layers.0.mlp.up_proj.weight_scale_inv", np.float32)
    assert (np.frexp(scales)[0] == 0.5).all() == (wanted == "power-of-two")


def test_options_that_contradict(tmp_path):
    source = models.save(tmp_path / "bf16", models.TINY)
    failed = cast(source, tmp_path / "fp8", "--force-pow-2-scale", "maybe")
    assert failed.returncode == 2 and "expected True or False, found 'maybe'" in failed.stderr
    failed = cast(source, tmp_path / "fp8", "--scale-formula", "slime")
    assert failed.returncode == 1 and "needs --force-pow-2-scale False" in failed.stderr
    failed = cast(source, tmp_path / "fp8", "--check-tp", 2)
    assert failed.returncode == 1 and "--check-tp 2: q_proj rows" in failed.stderr
    assert not (tmp_path / "fp8").exists()


def test_it_says_which_tensor_parallel_sizes_stay_aligned(tmp_path):
    source = models.save(tmp_path / "bf16", models.BLOCKS)
    result = ok(cast(source, tmp_path / "fp8", "--check-tp", 1))
    assert "block-aligned tensor parallel sizes: 1 (not 2: gate_proj" in result.stdout
