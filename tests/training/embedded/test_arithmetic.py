"""The sums of the quickstart: right steps, splits without overlap, wrong answers where they are meant."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.embedded.quickstart import arithmetic, tokenizer

SIZES = {"pretrain": 3000, "stage1": 600, "stage2": 1000, "rl": 500, "validation": 64, "held_out": 200, "benchmark": 50}
NUMBER = st.integers(0, 999)


def build(**changed) -> dict[str, list[arithmetic.Row]]:
    return arithmetic.build(argparse.Namespace(**(SIZES | {"seed": 7, "wrong": 0.5} | changed)))


@pytest.fixture(scope="module")
def files() -> dict[str, list[arithmetic.Row]]:
    return build()


def asked(row: arithmetic.Row) -> str:
    """All of a row's text before the answer."""
    if "text" in row:
        return row["text"]
    return row.get("problem") or (row.get("messages") or row["prompt"])[0]["content"]


def pair_of(row: arithmetic.Row) -> frozenset[int]:
    return frozenset(map(int, re.search(r"(\d+)\+(\d+)", asked(row)).groups()))


@given(NUMBER, NUMBER)
def test_steps_add_up(a, b):
    """Read as a pupil would: every column is its digits and the carry before it; the result is read off the columns."""
    columns = [tuple(map(int, re.split(r"[+=]", column))) for column in arithmetic.steps(a, b).split()]
    assert "".join(str(x) for x, *_ in reversed(columns)).lstrip("0") == (str(a) if a else "")
    assert "".join(str(y) for _, y, *_ in reversed(columns)).lstrip("0") == (str(b) if b else "")
    before = 0
    for x, y, carry, total in columns:
        assert carry == before and total == x + y + carry
        before = total // 10
    *low, (*_, last) = columns
    assert str(last) + "".join(str(total % 10) for *_, total in reversed(low)) == str(a + b)


@given(NUMBER, NUMBER)
def test_columns_are_as_wide_as_they_say(a, b):
    *low, last = arithmetic.steps(a, b).split()
    assert all(re.fullmatch(r"\d\+\d\+[01]=[01]\d", column) for column in low)
    assert re.fullmatch(r"\d\+\d\+[01]=(0|[1-9]\d?)", last)


@given(NUMBER, NUMBER)
def test_the_split_of_a_pair_has_no_order(a, b):
    assert arithmetic.split_of(a, b) == arithmetic.split_of(b, a)


def test_the_splits_do_not_overlap(files):
    """No validation or held-out pair in anything that is trained on, nor in the other of the two, in either order."""
    pairs = {name: {pair_of(row) for row in rows} for name, rows in files.items()}
    trained = pairs["pretrain"] | pairs["sft_stage1"] | pairs["sft_stage2"] | pairs["rl"]
    assert not trained & pairs["held_out"] and not trained & pairs["validation"]
    assert not pairs["held_out"] & pairs["validation"]
    assert pairs["benchmark/test"] <= pairs["held_out"]
    for name in ("rl", "validation", "held_out"):
        assert len(pairs[name]) == len(files[name]), f"{name}: a question twice"


def test_pre_training_asks_and_works_out_the_same_sum(files):
    found = Counter()
    for row in files["pretrain"]:
        wording, a, b, steps, result = re.fullmatch(
            r"(.*?)(\d+)\+(\d+).* \2\+\3: (\S+=\d+(?: \S+=\d+)*)(?:, so|</think>) (\d+)\.(?:<\|im_end\|>)?",
            row["text"],
            re.DOTALL,
        ).groups()
        found[wording] += 1
        assert steps == arithmetic.steps(int(a), int(b)) and int(result) == int(a) + int(b)
    dialogues = found.pop("<|im_start|>user\nWhat is ")
    assert 0.45 < dialogues / len(files["pretrain"]) < 0.55  # 5 standard errors
    assert set(found) == {wording.split("{}")[0] for wording in arithmetic.WORDINGS}


def test_a_dialogue_of_pre_training_is_a_conversation_but_for_the_box(files):
    """The same tokens up to the end of the thought; the boxed answer is left to SFT."""
    row = files["sft_stage1"][0]
    a, b = map(int, re.search(r"(\d+)\+(\d+)", asked(row)).groups())
    words = tokenizer.train((row["messages"][1]["content"] for row in files["sft_stage1"]), 400)
    dialogue = words.encode(arithmetic.DIALOGUE.format(arithmetic.question(a, b), arithmetic.worked(a, b), a + b))
    conversation = words.encode(words.apply_chat_template(row["messages"], tokenize=False))
    assert words.decode(os.path.commonprefix([dialogue, conversation])).endswith(f"{arithmetic.worked(a, b)}</think")
    assert not any("boxed" in row["text"] for row in files["pretrain"])


def answers(rows: list[arithmetic.Row]) -> list[tuple[int, int]]:
    """(what is right, what is boxed) of conversations, whose steps have to be right."""
    found = []
    for row in rows:
        a, b = map(int, re.fullmatch(r"What is (\d+)\+(\d+)\?", asked(row)).groups())
        thought, boxed = re.fullmatch(r"<think> (.*)</think>\\boxed\{(\d+)\}", row["messages"][1]["content"]).groups()
        assert thought == f"{a}+{b}: {arithmetic.steps(a, b)}"
        found.append((a + b, int(boxed)))
    return found


def test_wrong_answers_are_in_stage_two_alone(files):
    assert all(right == boxed for right, boxed in answers(files["sft_stage1"]))
    off = [boxed - right for right, boxed in answers(files["sft_stage2"])]
    assert set(off) == {-10, -1, 0, 1, 10}
    assert 0.45 < sum(bool(by) for by in off) / len(off) < 0.55  # 3 standard errors
    assert all(right == boxed for right, boxed in answers(build(wrong=0.0)["sft_stage2"]))


def test_labels_are_right(files):
    for name in ("rl", "validation", "held_out", "benchmark/test"):
        for row in files[name]:
            a, b = re.search(r"(\d+)\+(\d+)", asked(row)).groups()
            assert int(row.get("label") or row["answer"]) == int(a) + int(b)


def test_rows_depend_on_the_seed_and_their_own_number_only(files):
    more = build(stage1=700, pretrain=10)
    assert more["sft_stage1"][:600] == files["sft_stage1"] and more["pretrain"] == files["pretrain"][:10]
    assert {name: more[name] for name in ("sft_stage2", "rl", "held_out")} == {
        name: files[name] for name in ("sft_stage2", "rl", "held_out")
    }
    other = build(seed=8)
    assert all(other[name] != rows for name, rows in files.items())
