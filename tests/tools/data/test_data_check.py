"""A whole file: the first bad row, lengths, and what pandas 2.3.3 makes of a .jsonl (found by running it)."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.data.samples import assistant, chat, conversations, jsonl, question, user, write
from tools.data import DataError, check
from tools.data.chat import encode_conversation, encode_prompt, load_tokenizer
from tools.data.check import Rules, scan

SFT = Rules(kind="sft", input_key="messages", label_key="label")
RL = Rules(kind="rl", input_key="prompt", label_key="label", apply_chat_template=True)


def rules(base: Rules = SFT, **changes) -> Rules:
    return dataclasses.replace(base, **changes)


def error(path, checked: Rules) -> str:
    with pytest.raises(DataError) as caught:
        scan(path, checked)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_first_bad_row_and_how_many_follow(tmp_path, suffix):
    unit, where = ("line", ":{}: ") if suffix == "jsonl" else ("row", ": row {}: ")
    path = tmp_path / f"it's data.{suffix}"
    good, bad = [chat(index) for index in range(9)], {"messages": [user("q"), assistant("")]}
    says = "messages[1].content: expected text, found an empty one"
    assert error(write(path, [*good, bad]), SFT) == where.format(10) + says
    assert error(write(path, [*good[:2], bad, good[2], bad]), SFT) == f"{where.format(3)}{says} (and 1 more {unit})"
    assert error(write(path, [bad] * 600), SFT) == f"{where.format(1)}{says} (and 599 more {unit}s)"
    assert scan(write(path, good), SFT).samples == 9


def test_lines_that_are_no_json_count_among_the_bad_ones(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [chat(0), {"messages": []}])
    path.write_text(path.read_text() + "\n{\n")
    assert error(path, SFT) == ":2: messages: expected a list of messages, found an empty list (and 1 more line)"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_keys(tmp_path, suffix):
    rows = [{"q": [user("x")], "a": 3, "prompt": None}, {"q": [user("y")], "a": 4, "prompt": None}]
    path = write(tmp_path / f"a.{suffix}", rows)
    assert scan(path, rules(RL, input_key="q", label_key="a")).samples == 2
    assert "prompt: expected a list of messages, found" in error(path, RL)
    assert "label: expected text or a number, found nothing" in error(path, rules(RL, input_key="q"))


def test_an_empty_file(tmp_path):
    assert error(jsonl(tmp_path / "a.jsonl", []), SFT) == ": expected at least one sample, found none"
    schema = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string())])))])
    assert error(write(tmp_path / "a.parquet", [], schema), SFT) == ": expected at least one sample, found none"


def test_a_mask_that_parquet_makes_null(tmp_path):
    rows = [chat(0), {"messages": [user("q"), assistant("a", step_loss_mask=1)]}]
    assert scan(write(tmp_path / "a.jsonl", rows), SFT).samples == 2
    assert error(write(tmp_path / "a.parquet", rows), SFT).startswith(
        ": row 1: messages[1].step_loss_mask: expected 0 or 1, found null"
    )


# ---------------------------------------------------------------- pandas


def labels(path, values, **changes):
    return scan(jsonl(path, [question(index, value) for index, value in enumerate(values)]), rules(RL, **changes))


@pytest.mark.parametrize(
    ("values", "found"),  # pandas makes 34, -3 | 34.0, 0.5 | 7, 1000; a single "1/2" or "0x10" keeps all texts
    [
        (["34", "-3"], None),
        (["34", "0.5"], None),
        (["007", "1e3"], None),
        (["12345678901234567891", "1/2"], None),
        (["0x10", "9007199254740993"], None),
        (["9007199254740993", "1"], "label: '9007199254740993' becomes 9007199254740992.0: every label reads as a"),
        (["1", "12345678901234567891"], "label: '12345678901234567891' becomes 1.2345678901234567e+19"),
        (["nan", 1], "label: 'nan' becomes nan"),
        (["1", "Infinity", "-inf"], "label: 'Infinity' becomes inf (and 1 more line)"),
        (["1", "1e400"], "label: '1e400' becomes inf"),
        ([9007199254740993, 1], None),
    ],
)
def test_labels_that_pandas_changes(tmp_path, values, found):
    path = tmp_path / "a.jsonl"
    warnings = labels(path, values).warnings
    if found is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and found in warnings[0] and warnings[0].startswith(f"{path}:")
        assert warnings[0].endswith("pandas makes numbers of such a .jsonl; write .parquet instead")
    if all(isinstance(value, str) for value in values):
        rows = [question(index, value) for index, value in enumerate(values)]
        assert scan(write(tmp_path / "a.parquet", rows), RL).warnings == []


def test_rules_that_need_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    for rule in ("dapo", "boxed_dapo"):
        with pytest.raises(DataError, match="a.jsonl:1: label: --rm-type dapo needs texts, but every label reads"):
            labels(path, ["34", "5"], rm_type=rule)
        with pytest.raises(DataError, match=r"a.jsonl:2: label: expected text for --rm-type dapo, found 5"):
            labels(path, ["1/2", 5], rm_type=rule)
        assert labels(path, ["34", "1/2"], rm_type=rule).warnings == []
    rows = [question(index) for index in range(3)]
    assert scan(write(tmp_path / "a.parquet", rows), rules(RL, rm_type="dapo")).warnings == []


def test_zero_with_the_rule_math(tmp_path):
    path = tmp_path / "a.jsonl"
    (warning,) = labels(path, ["1", "0", "0.0"], rm_type="math").warnings
    assert warning.startswith(f"{path}:2: label: --rm-type math never rewards the label 0 (and 1 more line): every")
    assert labels(path, ["1", "0", "x"], rm_type="math").warnings == []
    assert labels(path, ["1", "0"]).warnings == []


def test_prompts_that_pandas_makes_numbers(tmp_path):
    plain = rules(RL, apply_chat_template=False)
    rows = [{"prompt": "12", "label": "a"}, {"prompt": "13", "label": "b"}]
    assert error(jsonl(tmp_path / "a.jsonl", rows), plain).startswith(
        ":1: prompt: expected text, found a number: every"
    )
    assert scan(write(tmp_path / "a.parquet", rows), plain).samples == 2
    assert scan(jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "12?", "label": "c"}]), plain).samples == 3


def test_metadata_in_some_rows_only(tmp_path):
    rows = [chat(0, metadata={"k": 1}), chat(1), chat(2)]
    text = error(jsonl(tmp_path / "a.jsonl", rows), SFT)
    assert text.startswith(":2: metadata: expected it in every row or in none, found nothing (and 1 more line): pandas")
    assert scan(write(tmp_path / "a.parquet", rows), SFT).samples == 3
    assert scan(jsonl(tmp_path / "a.jsonl", [chat(0, metadata={}), chat(1, metadata=None)]), SFT).samples == 2
    assert error(jsonl(tmp_path / "a.jsonl", [chat(0, metadata=3)]), SFT) == ":1: metadata: expected an object, found 3"
    assert scan(jsonl(tmp_path / "a.jsonl", rows), rules(metadata_key="other")).samples == 3


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return tiny_data / "tokenizer"


@settings(max_examples=15, deadline=None)
@given(samples=st.lists(conversations(), min_size=1, max_size=9), batch=st.sampled_from([1, 60, 1 << 21]))
def test_tokens_of_conversations(tokenizer, tmp_path_factory, samples, batch):
    folder, loaded = tmp_path_factory.mktemp("tokens"), load_tokenizer(tokenizer)
    encoded = [encode_conversation(loaded, messages) for messages in samples]
    sizes = [len(ids) for ids, _ in encoded]
    before, check._BATCH = check._BATCH, batch
    try:
        for name in ("a.jsonl", "a.parquet"):
            path = write(folder / name, [{"messages": messages} for messages in samples])
            counts = scan(path, rules(tokenizer=tokenizer))
            assert (counts.samples, counts.tokens, counts.longest) == (len(samples), sum(sizes), max(sizes))
            assert counts.trained == sum(sum(mask) for _, mask in encoded)
            assert counts.longest_at == sizes.index(max(sizes)) + 1
    finally:
        check._BATCH = before


@pytest.mark.parametrize("template", [True, False])
def test_tokens_of_prompts(tokenizer, tmp_path, template):
    rows = [question(index) for index in range(5)]
    if not template:
        rows = [{"prompt": row["prompt"][0]["content"], "label": "x"} for row in rows]
    counts = scan(jsonl(tmp_path / "a.jsonl", rows), rules(RL, tokenizer=tokenizer, apply_chat_template=template))
    sizes = [len(encode_prompt(load_tokenizer(tokenizer), row["prompt"], template)) for row in rows]
    assert (counts.tokens, counts.longest, counts.trained) == (sum(sizes), max(sizes), None)


def test_long_samples(tokenizer, tmp_path):
    rows = [{"messages": [user("q"), assistant("word " * length)]} for length in (3, 100, 5, 90, 300)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    limited = rules(tokenizer=tokenizer, limit=60)
    size = len(encode_conversation(load_tokenizer(tokenizer), rows[1]["messages"])[0])
    says = f":2: expected at most 60 tokens (--max-tokens), found {size} (and 2 more lines)"
    assert error(path, limited) == f"{says}; slime cuts nothing off: shorten or drop it, or pass --allow-long"
    counts = scan(path, rules(limited, allow_long=True))
    assert counts.warnings == [f"{path}{says}"] and counts.longest_at == 5
    assert scan(path, rules(limited, limit=counts.longest)).warnings == []
    assert error(path, rules(limited, limit=counts.longest - 1)).startswith(":5: expected at most")
    # The form comes first, wherever it is.
    assert error(jsonl(path, [*rows, {"messages": []}]), limited).startswith(":6: messages: expected a list")
