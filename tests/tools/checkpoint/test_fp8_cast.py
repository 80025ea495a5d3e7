"""Every FP8 kernel, code for code and scale for scale, against ml_dtypes and float64; and what is cast at all.

The reference knows nothing of the kernels' tricks: it divides and multiplies in float64, rounds to float32 where
TransformerEngine computes in float32 (a quotient or product of two float32 numbers rounds correctly that way), and lets
ml_dtypes round to E4M3.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import PUBLISHED, REPO, hf_config, whole_block_splits
from tools.checkpoint import qwen2_layout
from tools.checkpoint.fp8_cast import (
    Rule,
    is_linear,
    kernel,
    quantization_config,
    scale_shape,
    tensor_parallel_problem,
)
from tools.checkpoint.qwen2_layout import Qwen2Shape
from tools.checkpoint.safetensors_io import Entry
from tools.checkpoint.sources import dequantize

NUMBERS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
RULES = {"te pow2": Rule(True), "te fp32": Rule(False), "slime": Rule(False, "slime")}
# torch's kernel is what runs without numba; a machine with a GPU checks that one as well.
DEVICES = {
    "numba": lambda rule: kernel("cpu", rule),
    "torch": lambda rule: _torch(rule, "cpu"),
    "cuda": lambda rule: _torch(rule, "cuda"),
}
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
KERNELS = ["numba", "torch", pytest.param("cuda", marks=no_gpu)]


def _torch(rule: Rule, device: str):
    from tools.checkpoint.fp8_cast import _torch_kernel

    return _torch_kernel(rule, device)


def reference(x: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray, int]:
    """(codes, scale_inv, blocks with NaN or infinity) by the rules in the docstring of `block_fp8`."""
    largest = float(ml_dtypes.finfo(x.dtype).max)
    rows, columns = scale_shape(x.shape)
    codes, inverse, bad = np.empty(x.shape, np.uint8), np.empty((rows, columns), np.float32), 0
    for i in range(rows):
        for j in range(columns):
            here = np.s_[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            block = x[here].astype(np.float64)
            bad += not np.isfinite(block).all()
            amax = np.nanmax(np.abs(block), initial=0.0)
            if rule.formula == "slime":
                inverse[i, j] = np.float32(max(amax, float(np.float32(1e-10))) / 448)
                scale = np.float32(1 / np.float64(inverse[i, j]))
            else:
                scale = np.float32(448 / amax) if 0 < amax < np.inf else np.float32(1)
                scale = np.float32(largest) if np.isinf(scale) else scale
                if rule.pow2:
                    scale = np.float32(2.0 ** np.floor(np.log2(np.float64(scale))))
                inverse[i, j] = np.float32(1 / np.float64(scale))
            scaled = (block * np.float64(scale)).astype(np.float32)
            found = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            codes[here] = np.where(np.isnan(block), 0x7F, found)
    return codes, inverse, bad


def cast(x: np.ndarray, device: str, rule: Rule) -> tuple[np.ndarray, np.ndarray, int]:
    dtype = next(name for name, number in NUMBERS.items() if x.dtype == number)
    codes, inverse = np.empty(x.shape, np.uint8), np.empty(scale_shape(x.shape), np.float32)
    bad = DEVICES[device](rule).cast(x.view(f"u{x.itemsize}"), dtype, codes, inverse)
    return codes, inverse, bad


def check(x: np.ndarray, device: str, rule: Rule) -> None:
    with np.errstate(all="ignore"):
        codes, inverse, bad = reference(x, rule)
    ours = cast(x, device, rule)
    assert (ours[1].view(np.uint32) == inverse.view(np.uint32)).all()
    wrong = np.argwhere(ours[0] != codes)
    assert len(wrong) == 0, f"{len(wrong)} codes, the first at {wrong[0]}: {x[tuple(wrong[0])]!r}"
    assert ours[2] == bad


@st.composite
def matrices(draw) -> np.ndarray:
    """Ragged shapes; every size of number a block can have; zeros, arbitrary bits, NaN and infinity here and there."""
    number = NUMBERS[draw(st.sampled_from(list(NUMBERS)))]
    rows, columns = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = draw(st.sampled_from([(-3, 1), (-38, 38), (-45, -30), (30, 38), (-8, -4), (0, 0)]))
    size = 10.0 ** rng.uniform(low, high, (-(-rows // 90), -(-columns // 90)))
    x = rng.standard_normal((rows, columns)) * np.kron(size, np.ones((90, 90)))[:rows, :columns]
    x[rng.random(x.shape) < draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))] = 0.0
    with np.errstate(over="ignore"):
        x = x.astype(np.float32).astype(number)
    raw = x.reshape(-1).view(f"u{x.itemsize}")
    count = draw(st.sampled_from([0, 0, 0, 1, 50]))
    raw[rng.integers(0, raw.size, count)] = rng.integers(0, np.iinfo(raw.dtype).max, count, dtype=raw.dtype)
    return x


def finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x.astype(np.float32)), x, x.dtype.type(0))


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(x=matrices())
def test_codes_and_scales_equal_the_reference(device, rule, x):
    check(finite(x) if rule == "slime" else x, device, RULES[rule])


def all_bf16() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ceiling", [2.0**-126, 1e-10, 1e-4, 0.02, 1.0, 448.0, 3e38])
def test_all_bf16_values(device, rule, ceiling):
    """Each of the 65,536 bit patterns, below ceilings that move the scale through the whole range."""
    values = finite(all_bf16())
    values = np.where(np.abs(values.astype(np.float32)) <= ceiling, values, values.dtype.type(0))
    rng = np.random.default_rng(5)
    check(rng.permutation(values).reshape(512, 128), device, RULES[rule])
    check(values.reshape(128, 512), device, RULES[rule])


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("rule", ["te pow2", "te fp32"])
def test_all_bf16_values_with_nan_and_infinity(device, rule):
    check(all_bf16().reshape(256, 256), device, RULES[rule])
    check(np.random.default_rng(1).permutation(all_bf16()).reshape(64, 1024), device, RULES[rule])


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("rule", RULES)
def test_every_mantissa_and_exponent_as_amax(device, rule):
    """Every finite positive bf16 as the largest of its block: one block a row band, 1 wide."""
    positive = np.arange(1, 0x7F80, 7, dtype=np.uint16).view(ml_dtypes.bfloat16)
    x = np.zeros((128, 128 * 20), ml_dtypes.bfloat16)
    for start in range(0, len(positive), 20):
        few = positive[start : start + 20]
        x[:] = 0
        x[0, : 128 * len(few) : 128] = few
        x[1, : 128 * len(few) : 128] = (-few.astype(np.float32) / 3).astype(x.dtype)
        x[2, : 128 * len(few) : 128] = (few.astype(np.float32) / 448).astype(x.dtype)
        check(x[:3], device, RULES[rule])


@pytest.mark.parametrize("device", KERNELS)
def test_documented_edge_blocks(device):
    zero = np.zeros((3, 200), ml_dtypes.bfloat16)
    codes, inverse, _ = cast(zero, device, Rule())
    assert not codes.any() and (inverse == 1).all()
    subnormal = zero.copy()
    subnormal[0, 0] = 2.0**-133  # the smallest bf16: 448 / amax overflows float32
    codes, inverse, _ = cast(subnormal, device, Rule(False))
    assert inverse[0, 0] == np.float32(1 / np.float64(np.float32(3.3895313892515355e38)))
    infinite = zero.copy()
    infinite[0, :3] = [np.inf, -np.inf, np.nan]
    infinite[0, 3] = 1000
    codes, inverse, bad = cast(infinite, device, Rule())
    assert list(codes[0, :4]) == [0x7E, 0xFE, 0x7F, 0x7E] and inverse[0, 0] == 1 and bad == 1
    nan = zero.copy()
    nan[0, :2] = [np.nan, 224]
    codes, inverse, bad = cast(nan, device, Rule())
    assert list(codes[0, :2]) == [0x7F, 0x7E] and inverse[0, 0] == 0.5 and bad == 1


# ---------------------------------------------------------------- casting what has been cast


@settings(max_examples=60, deadline=None)
@given(x=matrices())
@example(x=np.array([[229.0, 3.0]], ml_dtypes.bfloat16))  # 229 rounds to 224: its block doubles its scale
def test_power_of_two_cast_of_its_own_output_is_lossless(x):
    """dequantise(cast(.)) is a fixed point: values always, codes and scales too unless the largest code is 224.

    In bfloat16, wherever it can hold the smallest step and the largest number: 2**-9 * scale_inv >= 2**-133 and
    448 * scale_inv < 2**128.
    """
    x = finite(x)
    if x.dtype != ml_dtypes.bfloat16:
        x = x.astype(ml_dtypes.bfloat16)
        x = finite(x)
    codes, inverse, _ = cast(x, "numba", Rule())
    with np.errstate(over="ignore"):
        values = dequantize(codes, inverse)
    stored = np.where(np.isfinite(values), values, 0).astype(ml_dtypes.bfloat16)
    fits = (inverse >= 2.0**-124) & (inverse <= 2.0**119)
    holds = np.kron(fits, np.ones((128, 128), bool))[: x.shape[0], : x.shape[1]]
    assert (stored.astype(np.float32) == values)[holds].all()
    again, inverse_again, _ = cast(stored, "numba", Rule())
    values_again = dequantize(again, inverse_again)
    assert (values_again.view(np.uint32) == values.view(np.uint32))[holds].all()
    largest = np.maximum.reduceat(
        np.maximum.reduceat(codes & 0x7F, np.arange(0, x.shape[0], 128), 0), np.arange(0, x.shape[1], 128), 1
    )
    same = (largest != 0x76) & (largest != 0) & fits
    assert (inverse_again == inverse)[same].all()
    everywhere = np.kron(same, np.ones((128, 128), bool))[: x.shape[0], : x.shape[1]]
    assert (again == codes)[everywhere].all()
    third = cast(dequantize(again, inverse_again).astype(ml_dtypes.bfloat16), "numba", Rule())
    assert (third[0] == again)[holds].all()


def test_how_far_the_rules_are_apart():
    """The figures of docs/TOOLS.md: te and slime in float32 scales, and what powers of two cost."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 0.02, (2048, 2048)) * np.exp(rng.normal(0, 0.3, (2048, 1)))
    x = x.astype(np.float32).astype(ml_dtypes.bfloat16)
    te, slime, pow2 = (cast(x, "numba", rule) for rule in (Rule(False), Rule(False, "slime"), Rule()))
    assert 0.15 < (te[1] != slime[1]).mean() < 0.35 and 1 / 8000 < (te[0] != slime[0]).mean() < 1 / 2500
    exact = x.astype(np.float64)
    decibels = [
        20 * np.log10(np.linalg.norm(exact) / np.linalg.norm(dequantize(c, s) - exact)) for c, s, _ in (te, pow2)
    ]
    assert 31 < decibels[1] < decibels[0] < min(decibels[1] + 0.5, 32)


def test_float32_scales_do_not_survive_bfloat16():
    """Why a model trained with float32 scales is not restored by bfloat16 weights, while power-of-two ones are."""
    x = np.random.default_rng(0).normal(0, 0.02, (256, 256)).astype(np.float32).astype(ml_dtypes.bfloat16)
    codes, inverse, _ = cast(x, "numba", Rule(False))
    stored = dequantize(codes, inverse).astype(ml_dtypes.bfloat16)
    assert (stored.astype(np.float32) != dequantize(codes, inverse)).any()


# ---------------------------------------------------------------- what is cast


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        *((f"model.layers.3.self_attn.{x}_proj.weight", True) for x in "qkvo"),
        *((f"model.layers.27.mlp.{x}_proj.weight", True) for x in ("gate", "up", "down")),
        ("language_model.model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.experts.7.down_proj.weight", True),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.61.eh_proj.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("language_model.lm_head.weight", False),
        ("visual.blocks.0.attn.proj.weight", False),
        ("model.visual.layers.0.attn.q_proj.weight", False),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", False),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", False),
    ],
)
def test_linear_weights_of_the_decoder_are_cast(name, linear):
    assert is_linear(Entry(name, "BF16", (256, 256), "f", 0, 131072)) is linear
    assert not is_linear(Entry(name, "BF16", (256,), "f", 0, 512))
    assert not is_linear(Entry(name, "I32", (256, 256), "f", 0, 262144))


def test_quantization_config_names_what_stays():
    kept = [
        Entry(name, "BF16", shape, "f", 0, 0)
        for name, shape in (
            ("model.embed_tokens.weight", (9, 9)),
            ("model.norm.weight", (9,)),
            ("model.layers.0.mlp.gate.weight", (9, 9)),
            ("language_model.lm_head.weight", (9, 9)),
        )
    ]
    config = quantization_config(kept)
    expected = ["language_model.lm_head", "lm_head", "model.layers.0.mlp.gate"]
    assert config.pop("modules_to_not_convert") == config.pop("ignored_layers") == expected
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize(
    ("model", "size", "problem"),
    [
        ("0.5B", 1, None),
        ("0.5B", 2, "448 per rank are 3.5 blocks"),
        ("0.5B", 4, "14 heads do not divide by 4"),
        ("1.5B", 2, None),
        ("1.5B", 4, "2240 per rank are 17.5 blocks"),
        ("7B", 2, None),
        ("7B", 4, None),
        ("7B", 8, "28 heads do not divide by 8"),
    ],
)
def test_tensor_parallel_sizes_of_the_qwen25_models(model, size, problem):
    found = tensor_parallel_problem(hf_config(f"qwen2.5-{model}"), size)
    assert found is None if problem is None else problem in found


def test_the_documentation_lists_the_tensor_parallel_sizes():
    page = (REPO / "docs" / "TOOLS.md").read_text()
    for model in PUBLISHED:
        config, size = hf_config(model), model.removeprefix("qwen2.5-")
        sizes = [parts for parts in range(1, 9) if tensor_parallel_problem(config, parts) is None]
        assert sizes == whole_block_splits(model) and f"{size} {', '.join(map(str, sizes))}" in page


@pytest.mark.parametrize("model", PUBLISHED)
def test_rows_whose_block_is_another_one_in_megatrons_layout(model):
    """docs/TOOLS.md: those of heads that are no whole blocks, in the matrix that holds q, k and v."""
    moved = {}
    for row in qwen2_layout.table(Qwen2Shape.from_hf_config(hf_config(model) | {"num_hidden_layers": 1})):
        if len(row.shape) != 2 or row.layer is None:
            continue
        blocks: dict[int, set[tuple[str, int]]] = {}  # of Megatron's matrix -> blocks of the Hugging Face ones
        for part in row.parts:
            for place, mine in enumerate(n for start, stop in part.runs for n in range(start, stop)):
                blocks.setdefault(mine // 128, set()).add((part.name, place // 128))
        moved[row.key.split(".")[-2]] = sum(128 for found in blocks.values() if len(found) > 1)
    assert moved.pop("linear_qkv") == (384 if model == "qwen2.5-0.5B" else 0)
    assert set(moved.values()) == {0} and len(moved) == 3
