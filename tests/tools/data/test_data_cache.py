"""The kept result of a check stands exactly as long as nothing that it depends on has changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from tests.tools.data.samples import chat, jsonl
from tools.data import DataError
from tools.data.cache import cached
from tools.data.check import Counts, Rules, scan

RULES = Rules(kind="sft", input_key="messages", label_key="label")


@pytest.fixture
def checked(tmp_path, tiny_data):
    """A function that checks a file with a cache, and says whether it had to read it."""
    shutil.copytree(tiny_data / "tokenizer", tmp_path / "tokenizer")
    path = jsonl(tmp_path / "a b.jsonl", [chat(index) for index in range(5)])
    calls: list[int] = []

    def counting(path, rules) -> Counts:
        calls.append(1)
        return scan(path, rules)

    def run(data=path, **changes) -> tuple[Counts, bool]:
        calls.clear()
        rules = dataclasses.replace(RULES, **{"tokenizer": tmp_path / "tokenizer", **changes})
        return cached(tmp_path / "kept" / "data.json", data, rules, counting), bool(calls)

    return run


def test_kept_and_equal(checked):
    first, read = checked()
    again, read_again = checked()
    assert read and not read_again and first == again and first.tokens > 0


def test_warnings_are_kept(checked):
    first, _ = checked(limit=5, allow_long=True)
    assert first.warnings and checked(limit=5, allow_long=True) == (first, False)


def test_whatever_changes_is_noticed(checked, tmp_path):
    checked()
    path, tokenizer = tmp_path / "a b.jsonl", tmp_path / "tokenizer"
    assert checked(limit=100)[1] and checked(tokenizer=None)[1] and checked()[1]
    os.utime(path, ns=(1, 1))
    assert checked()[1] and not checked()[1]
    jsonl(path, [chat(index) for index in range(6)])
    assert checked()[0].samples == 6
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    assert checked()[1] and not checked()[1]
    other = jsonl(tmp_path / "other.jsonl", [chat(0)])
    assert checked(other)[0].samples == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', "\x00"])
def test_a_damaged_cache_means_checking_again(checked, tmp_path, content):
    first, _ = checked()
    (tmp_path / "kept" / "data.json").write_text(content)
    assert checked() == (first, True) and checked() == (first, False)


def test_what_fails_is_not_kept(checked, tmp_path):
    path = jsonl(tmp_path / "a b.jsonl", [{"messages": []}])
    for _ in range(2):
        with pytest.raises(DataError, match="a b.jsonl:1: messages"):
            checked(path)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(DataError, match="absent.jsonl: No such file"):
        checked(tmp_path / "absent.jsonl")
