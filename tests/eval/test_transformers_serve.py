"""A real model behind the real `transformers serve`, in BF16 and cast to FP8, asked by the real evalscope."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import REPO, ok, run
from tests.eval.conftest import Evaluation, processes_with

# A random model does not stop by itself.
SHORT = {"SERVER": "transformers", "MAX_NEW_TOKENS": 16, "GENERATED_NUM": 2, "EVAL_BATCH": 2, "PROMPT_TOKENS": 4096}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_model_is_served_and_measured(tmp_path, local_data, tiny_model, precision):
    model = tiny_model
    if precision == "fp8":
        model = tmp_path / "it's fp8"
        cast = [sys.executable, REPO / "tools" / "bf16_cast_fp8.py", "--input-bf16-hf-path", tiny_model]
        ok(run(*cast, "--output-fp8-hf-path", model))
        assert json.loads((model / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    one = Evaluation("aime24", tmp_path / "it's out", {"MODEL_PATH": model, "DATASET_LOCAL": local_data / "aime24"})
    result = one.run(**SHORT)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = one.summary()
    assert (summary["questions"], summary["samples"], summary["problems"]) == (3, 2, [])
    assert summary["model"] == model.name and 0 < summary["tokens"]["mean"] <= 16 and summary["truncated"] > 0
    assert "stopping the server" in result.stderr and processes_with(str(one.out)) == []
    (file,) = one.out.glob("evalscope/predictions/*/*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    said = {row["model_output"]["choices"][0]["message"]["content"] for row in rows}
    assert len(said) == 6  # it samples
    # The checkpoint is served through a directory of links, and is as it was.
    assert "do_sample" not in (model / "generation_config.json").read_text()
