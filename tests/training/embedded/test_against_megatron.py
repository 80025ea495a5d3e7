"""The embedded engine beside Megatron-LM itself: the same recipe, checkpoint and data give the same curve.

MEGATRON is the log of Megatron-LM core_v0.14.0 (23e00ed) for what `build` makes: the command that
scripts/CPT/InfiR2_CPT_FP8_7B.sh emits with FLAGS and PRECISION=bf16, on CPU with two data-parallel ranks, CUDA-only
features off. Two engines sum in different orders: losses agree to about 1e-4, not to the bit.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import REPO, ok, run
from tools.checkpoint import qwen2_layout, torch_dist, torch_dist_writer
from tools.checkpoint.qwen2_layout import Qwen2Shape

WORDS = 500
SHAPE = Qwen2Shape(layers=2, hidden=256, ffn=512, heads=4, groups=2, head_dim=64, vocab_rows=1188, tied=False)
FLAGS = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2"
    " --max-position-embeddings 128 --seq-length 128 --global-batch-size 4 --train-iters 20 --lr-warmup-iters 6"
    " --lr-wsd-decay-iters 6 --save-interval 20 --eval-interval 10 --eval-iters 1 --lr 1e-3 --min-lr 1e-4"
).split()
# (iteration, learning rate, loss, gradient norm)
MEGATRON = [
    (1, 0.0001666667, 7.125468, 1.871),
    (2, 0.0003333333, 7.115317, 2.061),
    (3, 0.0005, 7.062065, 1.668),
    (4, 0.0006666667, 7.023819, 1.406),
    (5, 0.0008333334, 6.896788, 1.477),
    (6, 0.001, 6.784251, 1.288),
    (7, 0.001, 6.656976, 1.116),
    (8, 0.001, 6.603078, 0.981),
    (9, 0.001, 6.372067, 0.96),
    (10, 0.001, 6.495734, 0.841),
    (11, 0.001, 6.22563, 0.825),
    (12, 0.001, 6.381738, 0.771),
    (13, 0.001, 6.450078, 0.832),
    (14, 0.001, 6.302412, 0.79),
    (15, 0.0009397114, 6.193204, 0.726),
    (16, 0.000775, 6.157162, 0.797),
    (17, 0.00055, 6.264728, 0.798),
    (18, 0.000325, 6.164672, 0.766),
    (19, 0.0001602886, 6.258132, 0.838),
    (20, 0.0001, 6.224335, 0.758),
]


def build(folder: Path) -> dict[str, str]:
    """A tokenizer, .bin/.idx and an initial checkpoint from fixed numbers; returns the launcher's environment."""
    vocabulary = {"<eos>": 0, **{f"w{n}": n for n in range(1, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "words")
    rng = np.random.default_rng(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(400):  # each word mostly follows from the one before it
            ids = np.cumsum(rng.geometric(0.3, rng.integers(20, 200))) % (WORDS - 1) + 1
            file.write(json.dumps({"text": " ".join(f"w{n}" for n in ids)}) + "\n")
    prepare = ["bash", REPO / "scripts" / "CPT" / "prepare_data.sh", "--engine", "embedded"]
    ok(
        run(
            *prepare,
            *("--input", folder / "text.jsonl", "--output-prefix", folder / "d", "--tokenizer", folder / "words"),
        )
    )

    generator = torch.Generator().manual_seed(1)

    def weight(name: str) -> torch.Tensor:
        size = sizes[name]
        drawn = torch.randn(size, generator=generator) * (0.1 if len(size) == 1 else 0.02)
        return (drawn + (1.0 if name.endswith("norm.weight") else 0.0)).bfloat16()

    sizes = {
        part.name: (sum(stop - start for start, stop in part.runs), *row.shape[1:])
        for row in qwen2_layout.table(SHAPE)
        for part in row.parts
    }
    weights = {name: weight(name) for name in sizes}
    with torch_dist_writer.Writer(folder / "init" / "release") as writer:
        for entry in qwen2_layout.to_megatron(weights.__getitem__, SHAPE):
            writer.add_tensor(entry.key, entry.tensor, global_shape=entry.global_shape, offset=entry.offset)
        for key in qwen2_layout.extra_state_keys(SHAPE):
            writer.add_object(key, torch.empty(0, dtype=torch.uint8))
        args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        writer.finish({"args": args, "iteration": 0})
    torch_dist.write_tracker(folder / "init", "release")
    return {
        "DATA_PATH": str(folder / "d_text_document"),
        "TOKENIZER_MODEL": str(folder / "words"),
        "INIT_CHECKPOINT": str(folder / "init"),
        "PRECISION": "bf16",
        "TP": "1",
        "WANDB_PROJECT": "",
    }


def curve(log: Path) -> list[tuple[int, float, float, float]]:
    """(iteration, learning rate, loss, gradient norm) of every log line of either engine."""
    pattern = r"iteration +(\d+)/.*learning rate: (\S+) .*lm loss: (\S+) .*grad norm: (\S+)"
    return [(int(a), float(b), float(c), float(d)) for a, b, c, d in re.findall(pattern, log.read_text())]


def test_the_same_curve(tmp_path):
    env = {**build(tmp_path), "OUT_DIR": str(tmp_path / "out")}
    recipe = REPO / "scripts" / "CPT" / "InfiR2_CPT_FP8_7B.sh"
    ok(run("bash", recipe, "--engine", "embedded", *FLAGS, env=env))
    found = curve(tmp_path / "out" / "logs" / "train_node0.log")
    assert len(found) == len(MEGATRON) == 20
    for (step, rate, loss, norm), (their_step, their_rate, their_loss, their_norm) in zip(found, MEGATRON, strict=True):
        assert step == their_step and rate == pytest.approx(their_rate, rel=1e-6)
        assert loss == pytest.approx(their_loss, rel=3e-4) and norm == pytest.approx(their_norm, rel=1e-2)
    assert found[-1][2] < 0.9 * found[0][2]
