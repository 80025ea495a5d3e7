"""jsonl to .bin/.idx: the bytes of the pinned tool, read back by megatron-core's own reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import REPO, ok, run

PREPARE = REPO / "scripts" / "CPT" / "prepare_data.sh"
TEXTS = ["the cat sat", "", "on the mat", "sat sat unknown the", "cat " * 50]
# sha256 of what tools/preprocess_data.py of Megatron-LM core_v0.14.0 (23e00ed) writes for TEXTS and `words`.
PINNED = {
    "bin": "6f6e41ea48a9ad81670db4a3f9499217d3a3c1de82b765ea562b55599a440b59",
    "idx": "cf79eeb1c842672f0632901593d64c7afefcae1df1297ff9d41344d3285c4b60",
}


@pytest.fixture
def words(tmp_path) -> Path:
    """A tokenizer whose vocabulary is fixed here, so that the bytes cannot depend on a training run."""
    vocabulary = {word: n for n, word in enumerate(["<eos>", "<unk>", "the", "cat", "sat", "on", "mat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(*flags: object):
    return run("bash", PREPARE, "--engine", "embedded", *flags)


def test_bytes_of_the_pinned_tool(tmp_path, words):
    source = jsonl(tmp_path / "in.jsonl")
    for workers in (1, 2):
        prefix = tmp_path / f"out{workers}"
        result = prepare("--input", source, "--output-prefix", prefix, "--tokenizer", words, "--workers", workers)
        assert ok(result).stdout.strip().endswith(f"DATA_PATH={prefix}_text_document")
        found = {
            suffix: hashlib.sha256(Path(f"{prefix}_text_document.{suffix}").read_bytes()).hexdigest()
            for suffix in PINNED
        }
        assert found == PINNED


def test_megatron_cores_reader_gives_the_tokens_back(tiny_data):
    tokenizer = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    texts = [json.loads(line)["text"] for line in (tiny_data / "corpus.jsonl").open()]
    dataset = IndexedDataset(str(tiny_data / "text_text_document"))
    assert len(dataset) == len(texts) == len(dataset.document_indices) - 1
    for text, ids in zip(texts, dataset, strict=True):
        assert ids.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_a_complete_pair_is_left_alone(tmp_path, words):
    flags = ["--input", jsonl(tmp_path / "in.jsonl"), "--output-prefix", tmp_path / "out", "--tokenizer", words]
    ok(prepare(*flags))
    before = (tmp_path / "out_text_document.idx").stat().st_mtime_ns
    assert "nothing to do" in ok(prepare(*flags)).stderr
    assert (tmp_path / "out_text_document.idx").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"txt": "a"}', '{"text": 5}', '"text"'], ids=["json", "list", "key", "type", "string"]
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, words, line):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "the cat"}\n' + line + "\n")
    result = prepare("--input", source, "--output-prefix", tmp_path / "out", "--tokenizer", words)
    assert result.returncode == 1 and f"{source}:2: expected an object" in result.stderr
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-prefix", "x"], "--input: expected a jsonl file"),
        (["--input", "nowhere.jsonl", "--output-prefix", "x"], "--input: nowhere.jsonl not found"),
        (["--input", __file__], "--output-prefix: expected a path"),
        (["--input", __file__, "--output-prefix", "x", "--workers", "0"], "WORKERS: expected an integer > 0"),
        (["--input", __file__, "--output-prefix", "x", "--engine", "other"], "ENGINE: expected one of"),
        (["--input", __file__, "--output-prefix", "x", "--tokenizer", "nowhere"], "TOKENIZER_MODEL: directory nowhere"),
        (["--input"], "--input: expected a value"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path, flags, message):
    result = run("bash", PREPARE, "--engine", "embedded", *flags, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_pinned_tool(tmp_path, words):
    result = ok(run("bash", PREPARE, "--input", "a.jsonl", "--output-prefix", "b", "--dry-run", cwd=tmp_path))
    assert "Megatron-LM/tools/preprocess_data.py" in result.stdout and "--append-eod" in result.stdout
    assert list(tmp_path.iterdir()) == [words]
