"""Sizes, data, arguments and the run's directory: what is right passes, what is wrong is one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest

from eval import check
from tests.conftest import PUBLISHED, REPO, hf_config, whole_block_splits
from tests.eval import samples

QWEN_7B = hf_config("qwen2.5-7B") | {"max_position_embeddings": 32768}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def refused(*words: object) -> str:
    """The line that check.py says."""
    command = [sys.executable, REPO / "eval" / "check.py", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_DATASETS_OFFLINE": "1"})
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (1, "", 1), result
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def model(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN_7B | config))
    return folder


def sizes(folder, *flags):
    given = ["sizes", "--model", folder, "--max-tokens", 31000, "--prompt-tokens", 1024, "--tensor-parallel", 1, *flags]
    return list(map(str, given))


def test_the_context_is_what_the_model_has(tmp_path, capsys):
    assert check.main(sizes(model(tmp_path))) == 0
    assert capsys.readouterr().out == "32768\n"
    assert check.main(sizes(model(tmp_path), "--context-length", 32100)) == 0
    assert capsys.readouterr().out == "32100\n"


@pytest.mark.parametrize(
    ("config", "flags", "line"),
    [
        (
            {},
            ["--prompt-tokens", 1769],
            "MAX_NEW_TOKENS: 31000 beside PROMPT_TOKENS=1769 need a context of 32769 tokens, the model has 32768",
        ),
        (
            {},
            ["--context-length", 32000],
            "MAX_NEW_TOKENS: 31000 beside PROMPT_TOKENS=1024 need a context of 32024 tokens, CONTEXT_LENGTH is 32000",
        ),
        (
            {},
            ["--context-length", 40000],
            "CONTEXT_LENGTH: expected at most the model's max_position_embeddings, 32768, found 40000",
        ),
        ({}, ["--tensor-parallel", 3], "TP_SIZE: 3 does not divide the model's 28 attention heads and 4 KV heads"),
        (
            FP8,
            ["--tensor-parallel", 7],
            "TP_SIZE: 7 does not divide the model's 28 attention heads and 4 KV heads",
        ),
        (
            FP8 | {"num_attention_heads": 32, "hidden_size": 4096, "num_key_value_heads": 8},
            ["--tensor-parallel", 8],
            "TP_SIZE: with 8, gate_proj rows are 2368 per GPU, expected a multiple of the FP8 block of 128; use a "
            "smaller TP_SIZE and DP_SIZE for the rest",
        ),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, config, flags, line):
    assert refused(*sizes(model(tmp_path, **config), *flags)) == line


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_fp8_model_is_split_in_whole_blocks(tmp_path, name):
    config = hf_config(name) | FP8 | {"max_position_embeddings": 32768}
    passed = [n for n in range(1, 9) if check.main(sizes(model(tmp_path, **config), "--tensor-parallel", n)) == 0]
    assert passed == whole_block_splits(name)


def test_no_model(tmp_path):
    assert refused(*sizes(tmp_path)).startswith(f"{tmp_path}/config.json: expected a JSON file: ")


def test_a_view_of_a_checkpoint_samples(tmp_path):
    """transformers serve samples only where the model's own generation_config.json says so."""
    source, view = model(tmp_path / "model"), tmp_path / "view"
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": False}))
    flags = ["view", "--model", str(source), "--output", str(view)]
    for temperature, sampled in ((0.65, True), (0.0, False)):
        assert check.main([*flags, "--temperature", str(temperature)]) == 0
        made = json.loads((view / "generation_config.json").read_text())
        assert made == {"eos_token_id": [1, 2], "do_sample": sampled, "top_k": 0}
    assert (view / "config.json").resolve() == source / "config.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return samples.build(tmp_path_factory.mktemp("it's data"))


def dataset(benchmark, path, *flags, release="1.14.1"):
    window = ["--window", "2024-08-01", "2025-02-01"] if benchmark == "livecodebenchv5" else []
    return ["dataset", "--benchmark", benchmark, "--evalscope", release, "--path", str(path), *window, *flags]


@pytest.mark.parametrize("release", ["1.14.1", "0.17.1"])
@pytest.mark.parametrize(("benchmark", "count"), [("aime24", 3), ("aime25", 3), ("gpqa", 2), ("livecodebenchv5", 3)])
def test_good_data_is_counted(data, capsys, benchmark, count, release):
    assert check.main(dataset(benchmark, data / benchmark, release=release)) == 0
    assert capsys.readouterr().out == f"{count}\n"
    assert check.main(dataset(benchmark, data / benchmark, "--limit", "1", release=release)) == 0
    assert capsys.readouterr().out == "1\n"


ROW = {"problem": "1 + 1", "answer": "2"}
QUIZ = samples.gpqa_rows()[0]
TASK = samples.CODE[0]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def evil() -> str:
    import base64
    import zlib

    return base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()


@pytest.mark.parametrize(
    ("benchmark", "file", "rows", "line"),
    [
        (
            "aime24",
            "test.jsonl",
            [ROW, ROW | {"answer": "x"}],
            "row 2 of 'test': answer: expected an integer from 0 to 999, found 'x'",
        ),
        (
            "aime24",
            "test.jsonl",
            [{"question": "q", "answer": "2"}],
            "row 1 of 'test': expected the fields problem, answer, found no problem",
        ),
        ("gpqa", "train.jsonl", [QUIZ | {"Incorrect Answer 1": "photon"}], "answers: expected four different ones"),
        ("gpqa", "train.jsonl", [QUIZ | {"Correct Answer": " "}], "answers: expected four different ones"),
        (
            "livecodebenchv5",
            "test.jsonl",
            [TASK],
            "contest_date: expected text, found datetime; keep it in a .parquet file",
        ),
        (
            "livecodebenchv5",
            "test.parquet",
            [TASK | {"contest_date": "soon"}],
            "contest_date: expected a date as 2024-08-01T00:00:00, found 'soon'",
        ),
        ("livecodebenchv5", "test.parquet", [TASK | {"private_test_cases": "?"}], "private_test_cases: cannot be read"),
        (
            "livecodebenchv5",
            "test.parquet",
            [TASK | {"private_test_cases": evil()}],
            "private_test_cases: a pickle that asks for posix.system",
        ),
        ("livecodebenchv5", "test.parquet", [samples.CODE[2]], "no question in the window"),
    ],
)
def test_bad_data_is_named(tmp_path, benchmark, file, rows, line):
    samples.write(tmp_path / file, rows)
    said = refused(*dataset(benchmark, tmp_path))
    assert said.startswith(f"DATASET_LOCAL: {tmp_path}") and line in said


def test_data_under_another_name(tmp_path):
    samples.write(tmp_path / "train.jsonl", [ROW])
    assert refused(*dataset("aime24", tmp_path)).startswith(
        f"DATASET_LOCAL: expected a split named 'test' in {tmp_path} (train.jsonl): "
    )


def test_no_data(tmp_path):
    assert refused(*dataset("aime24", tmp_path)) == (
        f"DATASET_LOCAL: expected test.jsonl or test.parquet in {tmp_path}, found no data file"
    )


def arguments(capsys, benchmark, release, *flags):
    numbers = ["--max-tokens", "100", "--samples", "8", "--timeout", "9", "--temperature", "0.65", "--top-p", "0.95"]
    assert check.main(["arguments", "--benchmark", benchmark, "--evalscope", release, *numbers, *flags]) == 0
    name, data, sampling = capsys.readouterr().out.splitlines()
    return name, json.loads(data)[name], json.loads(sampling)


@pytest.mark.parametrize("benchmark", samples.TRUTH)
@pytest.mark.parametrize("release", ["1.14.1", "0.17.1"])
def test_what_is_never_left_to_a_default(capsys, benchmark, release):
    """A default that changed between the releases would change the score."""
    _, data, sampling = arguments(capsys, benchmark, release)
    assert data["subset_list"] and "few_shot_num" in data and data["filters"] == {"remove_until": "</think>"}
    assert sampling["max_tokens"] == 100 and (sampling["temperature"], sampling["top_p"]) == (0.65, 0.95)
    assert "seed" not in sampling and ("n" in sampling) == (release == "0.17.1")
    assert "<|im_start|>" not in json.dumps(data)
    assert "{{" not in data.get("system_prompt", "")


def test_local_data_few_shot_and_window(capsys, data):
    flags = ["--path", str(data), "--few-shot", "5", "--window", "2024-08-01", "2025-02-01"]
    _, made, _ = arguments(capsys, "livecodebenchv5", "1.14.1", *flags)
    assert made["local_path"] == str(data) and made["subset_list"] == ["default"] and made["few_shot_num"] == 5
    assert made["extra_params"] == {"start_date": "2024-08-01", "end_date": "2025-02-01"}


def test_a_directory_holds_one_run(tmp_path):
    file = tmp_path / "run.json"
    flags = ["run", "--file", str(file)]
    assert check.main([*flags, "--", "samples=8", "model=a=b"]) == 0 and not file.exists()
    assert check.main([*flags, "--write", "--", "samples=8", "model=a=b"]) == 0
    assert check.main([*flags, "--write", "--", "samples=8", "model=a=b"]) == 0
    assert refused(*flags, "--", "samples=4", "model=a=b") == (
        f"OUT_DIR: {tmp_path} holds a run with samples '8', this one has '4'; set another OUT_DIR"
    )
