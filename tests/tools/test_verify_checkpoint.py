"""verify_checkpoint: equal is equal, rounded is within the bound, and every kind of damage is seen."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.conftest import REPO, ok, run
from tests.tools import models
from tools.checkpoint import safetensors_io

TOOLS = REPO / "tools"
NAME = "model.layers.0.mlp.up_proj.weight"


def verify(a: Path, b: Path, *more: object):
    return run(sys.executable, TOOLS / "verify_checkpoint.py", a, b, *more)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    return models.save(tmp_path_factory.mktemp("verify") / "bf16", models.TINY)


@pytest.fixture(scope="module")
def fp8(bf16) -> Path:
    out = bf16.with_name("fp8")
    command = (sys.executable, TOOLS / "bf16_cast_fp8.py", "--input-bf16-hf-path", bf16, "--output-fp8-hf-path", out)
    ok(run(*command, "--force-pow-2-scale", "False"))
    return out


def changed(source: Path, copy: Path, name: str, dtype: type, change) -> Path:
    """A copy of a checkpoint in which `change` has worked on one tensor."""
    shutil.copytree(source, copy)
    with safetensors_io.HfReader(copy) as reader:
        entry = reader.entry(name)
    array = models.raw(copy, name, dtype).copy()
    change(array)
    with open(copy / entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(array.tobytes())
    return copy


@pytest.mark.parametrize("name", ["tp1_untied", "tp2_distopt_tied_padded", "pp2_untied", "te_style_perlayer_keys"])
def test_a_conversion_is_equal(megatron_checkpoint, tmp_path, name):
    source = megatron_checkpoint(name)
    convert = (sys.executable, TOOLS / "convert_torch_dist_to_hf.py", "--input-dir", source)
    ok(run(*convert, "--output-dir", tmp_path / "hf", "--origin-hf-dir", source / "hf"))
    for pair in ((source, tmp_path / "hf"), (tmp_path / "hf", source)):
        result = ok(verify(*pair, "--all", "--json", tmp_path / "report.json"))
        report = json.loads((tmp_path / "report.json").read_text())
        count = len(report["results"])
        assert f"verdict: equal: {count} tensors, bit for bit" in result.stdout
        assert report["verdict"].startswith("equal") and {r["verdict"] for r in report["results"]} == {"equal"}
        assert {report["a"]["kind"], report["b"]["kind"]} == {"torch_dist", "HF"}
        assert count == len(models.load(tmp_path / "hf"))
    padded = "9 padding rows not compared" in result.stdout
    assert padded == (name == "tp2_distopt_tied_padded")


@pytest.mark.parametrize("kind", ["one bit", "minus zero", "NaN"])
def test_any_other_bit_is_different(bf16, tmp_path, kind):
    def change(array: np.ndarray) -> None:
        array[7, 9] = {"one bit": array[7, 9] ^ 1, "minus zero": 0x8000, "NaN": 0x7FC0}[kind]

    source = bf16
    if kind != "one bit":
        source = changed(bf16, tmp_path / "a", NAME, np.uint16, lambda array: array.__setitem__((7, 9), 0))
    other = changed(source, tmp_path / "b", NAME, np.uint16, change)
    result = verify(source, other, "--json", tmp_path / "report.json")
    assert result.returncode == 1
    assert f"verdict: different: 1 of 27 tensors, the first is {NAME}" in result.stdout
    bad = [r for r in json.loads((tmp_path / "report.json").read_text())["results"] if r["verdict"] != "equal"]
    assert [r["name"] for r in bad] == [NAME] and bad[0]["differing"] == (0 if kind == "minus zero" else 1)


def test_missing_tensors_and_other_shapes(bf16, tmp_path):
    tensors = models.weights(models.TINY, 0)
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    tensors[NAME] = tensors[NAME][:-1]
    other = models.save(tmp_path / "other", models.TINY, tensors=tensors)
    result = verify(bf16, other)
    assert result.returncode == 1 and "2 of 27 tensors" in result.stdout
    assert "only in A" in result.stdout and "shape (160, 64) in A, (159, 64) in B" in result.stdout


def test_the_same_values_in_another_dtype_are_equal(bf16, tmp_path):
    wide = {
        name: raw.view(ml_dtypes.bfloat16).astype(np.float32) for name, raw in models.weights(models.TINY, 0).items()
    }
    other = models.save(tmp_path / "fp32", models.TINY, dtype="F32", tensors=wide)
    assert "verdict: equal: 27 tensors" in ok(verify(bf16, other)).stdout
    wide[NAME][0, 0] += np.float32(1e-9)
    other = models.save(tmp_path / "odd", models.TINY, dtype="F32", tensors=wide)
    assert verify(bf16, other).returncode == 1


def test_a_cast_is_within_the_bound(bf16, fp8, tmp_path):
    for a, b in ((bf16, fp8), (fp8, bf16)):
        result = ok(verify(a, b, "--json", tmp_path / "report.json"))
        assert "verdict: within the FP8 bound: 13 tensors equal, 14 rounded, SNR 31" in result.stdout
        found = {r["name"]: r for r in json.loads((tmp_path / "report.json").read_text())["results"]}
        one = found[NAME]
        assert one["verdict"] == "within bound" and one["beyond_half_step"] == 0
        # By hand: relative Frobenius error and SNR of this tensor.
        x = models.raw(bf16, NAME, np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
        codes = models.raw(fp8, NAME, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scale = models.raw(fp8, f"{NAME}_scale_inv", np.float32).astype(np.float64)
        y = codes * np.kron(scale, np.ones((128, 128)))[:160, :64]
        error = np.linalg.norm(x - y) / np.linalg.norm(x)
        assert one["rel_frobenius"] == pytest.approx(error, rel=1e-5)
        assert one["snr_db"] == pytest.approx(-20 * np.log10(error), rel=1e-5)
        blocks = [np.linalg.norm((x - y)[s]) / np.linalg.norm(x[s]) for s in (np.s_[:128], np.s_[128:])]
        assert one["worst_block"][2] == pytest.approx(max(blocks), rel=1e-5)
        assert one["worst_block"][:2] == [int(np.argmax(blocks)), 0]
    assert verify(bf16, fp8, "--bound", 0.02).returncode == 1
    assert "verdict: equal: 27 tensors" in ok(verify(fp8, fp8)).stdout


def test_fp8_is_compared_with_megatron_as_well(fp8, bf16, tmp_path):
    command = (
        sys.executable,
        TOOLS / "convert_hf_to_torch_dist.py",
        "--input-dir",
        bf16,
        "--output-dir",
        tmp_path / "td",
    )
    ok(run(*command))
    assert "within the FP8 bound" in ok(verify(tmp_path / "td", fp8)).stdout


SCALE = f"{NAME}_scale_inv"


@pytest.mark.parametrize(
    ("name", "dtype", "change"),
    [
        (NAME, np.uint8, lambda codes: codes.__setitem__((3, 3), codes[3, 3] ^ 8)),
        (NAME, np.uint8, lambda codes: codes.__setitem__((3, 3), codes[3, 3] ^ 0x80)),
        (NAME, np.uint8, lambda codes: codes.__setitem__((3, 3), 0x7F)),
        (NAME, np.uint8, lambda codes: codes.__setitem__(slice(None), np.roll(codes, 1, axis=0))),
        (SCALE, np.float32, lambda scale: scale.__imul__(2)),
        (SCALE, np.float32, lambda scale: scale.__setitem__(slice(None), scale[::-1].copy())),
        (SCALE, np.float32, lambda scale: scale.__setitem__((1, 0), np.nan)),
    ],
    ids=[
        "a code",
        "a sign",
        "a NaN",
        "rows moved",
        "scales doubled",
        "scales swapped",
        "scale NaN",
    ],
)
def test_a_wrong_cast_is_beyond_the_bound(bf16, fp8, tmp_path, name, dtype, change):
    other = changed(fp8, tmp_path / "other", name, dtype, change)
    for pair in ((bf16, other), (fp8, other)):
        result = verify(*pair)
        assert result.returncode == 1, result.stdout + result.stderr
        assert f"the first is {NAME}" in result.stdout


def test_scales_rounded_to_float16_show(bf16, fp8, tmp_path):
    """An error of 0.03 % in a scale moves a few of a block's elements across the middle between two codes."""
    other = tmp_path / "other"
    shutil.copytree(fp8, other)
    with safetensors_io.HfReader(other) as reader:
        scales = [entry for name, entry in reader.tensors.items() if name.endswith("_scale_inv")]
    with open(other / "model.safetensors", "r+b") as file:
        for entry in scales:
            file.seek(entry.offset)
            rounded = np.frombuffer(file.read(entry.nbytes), np.float32).astype(np.float16).astype(np.float32)
            file.seek(entry.offset)
            file.write(rounded.tobytes())
    result = verify(bf16, other, "--json", tmp_path / "report.json")
    assert result.returncode == 1
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    bad = [one for one in results if one["verdict"] == "different"]
    assert bad and all(one["beyond_half_step"] > 0 and one["worst_block"][2] < 0.0626 for one in bad)


def test_trouble_is_another_status(bf16, tmp_path):
    failed = verify(bf16, tmp_path / "nowhere")
    assert failed.returncode == 2 and str(tmp_path / "nowhere") in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    (tmp_path / "cut").mkdir()
    shutil.copy(bf16 / "config.json", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((bf16 / "model.safetensors").read_bytes()[:-5])
    failed = verify(bf16, tmp_path / "cut")
    assert failed.returncode == 2 and "not a complete safetensors file" in failed.stderr
