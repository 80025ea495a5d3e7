"""Public formats into what slime reads: equal content, nothing changed without being counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.data.samples import TEXTS, assistant, conversations, jsonl, question, system, user, write
from tools.data import DataError
from tools.data.convert import Job, Tally, convert

SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
# A question of DAPO-Math-17k, and the same in zhuzilin/dapo-math-17k as docs/en/get_started/usage.md of slime 8359c9a
# shows it.
DAPO, BOXED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    f"{answer} where $Answer is the answer to the problem.\n\nProblem %s\n\n"
    'Remember to put your answer on its own line after "Answer:".'
    for answer in ("$Answer (without quotes)", "\\boxed{$Answer}")
)
CHATS = conversations().filter(lambda messages: all(message["role"] != "tool" for message in messages))


def converted(form: str, *inputs: Path, **more) -> tuple[list[dict], list[str]]:
    """The rows, and the lines that say what happened."""
    job, tally = Job(tuple(inputs), form, **more), Tally()
    rows = list(convert(job, tally))
    assert tally.written == len(rows)
    return rows, list(tally.lines(job))


def error(form: str, path: Path, **more) -> str:
    with pytest.raises(DataError) as caught:
        converted(form, path, **more)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path))
    return text.removeprefix(str(path))


def sharegpt(messages: list[dict]) -> dict:
    return {"conversations": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in messages]}


def alpaca(messages: list[dict]) -> dict:
    row = {"system": messages[0]["content"]} if messages[0]["role"] == "system" else {}
    texts = [message["content"] for message in messages if message["role"] != "system"]
    pairs = [[texts[index], texts[index + 1]] for index in range(0, len(texts), 2)]
    return {**row, "history": pairs[:-1], "instruction": pairs[-1][0], "output": pairs[-1][1]}


def dapo(index: int, answer: str, text: str = DAPO) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [user(text % index)],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{index}-uuid"},
    }


# ---------------------------------------------------------------- SFT


@settings(max_examples=30, deadline=None)
@given(chats=st.lists(CHATS, min_size=1, max_size=5), suffix=st.sampled_from(["jsonl", "parquet"]))
def test_the_same_conversation_in_every_format(tmp_path_factory, chats, suffix):
    folder = tmp_path_factory.mktemp("it's formats")
    expected = [{"messages": messages} for messages in chats]
    for form, change in {
        "messages": lambda messages: {"messages": messages},
        "sharegpt": sharegpt,
        "alpaca": alpaca,
    }.items():
        path = write(folder / f"{form}.{suffix}", [{"id": 1, **change(messages)} for messages in chats])
        rows, lines = converted(form, path)
        assert rows == expected and converted("infialign", path)[0] == expected
        assert lines == [f"rows: {len(chats)} read, {len(chats)} written", "keys left out: id"]


def test_several_files_of_several_formats_in_order(tmp_path):
    one, two, three = ([user(f"q{index}"), assistant(f"a{index}")] for index in range(3))
    inputs = [
        write(tmp_path / "a.parquet", [sharegpt(one)]),
        write(tmp_path / "b.jsonl", [alpaca(two), {"messages": three, "conversations": None}]),
    ]
    (tmp_path / "c.json").write_text(json.dumps([sharegpt(two)]))
    rows, _ = converted("infialign", *inputs, tmp_path / "c.json")
    assert [row["messages"] for row in rows] == [one, two, three, two]


def test_what_is_kept_and_left_out_of_a_message(tmp_path):
    message = assistant("a", step_loss_mask=0, name="x", reasoning=None, weight=0)
    rows, lines = converted(
        "messages", write(tmp_path / "a.jsonl", [{"messages": [user("q"), message, user("r"), assistant("b")]}])
    )
    assert rows[0]["messages"][1] == assistant("a", step_loss_mask=0)
    assert lines[1:] == ["keys left out: messages[].name"]


def test_alpaca_joins_instruction_and_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": ""},
        {"instruction": "Add 1 2.", "input": "", "output": "3", "system": None, "history": None},
    ]
    found, _ = converted("alpaca", jsonl(tmp_path / "a.jsonl", rows))
    assert [row["messages"][0]["content"] for row in found] == ["Add.\n1 2", "Add 1 2."]
    assert all(len(row["messages"]) == 2 for row in found)


def test_sharegpt_with_roles_and_a_system_prompt_beside_it(tmp_path):
    row = {"system": "s", "conversations": [user("q"), {"from": "assistant", "value": "a"}]}
    rows, _ = converted("sharegpt", jsonl(tmp_path / "a.jsonl", [row]))
    assert rows == [{"messages": [system("s"), user("q"), assistant("a")]}]


@pytest.mark.parametrize(
    ("form", "row", "says"),
    [
        ("messages", {"conversations": []}, "messages: expected a list of messages, found nothing"),
        ("messages", {"messages": [user("q"), "a"]}, 'messages[1]: expected an object with "role" and "content"'),
        ("messages", {"messages": [user("q"), assistant(" ")]}, "messages[1].content: expected text, found only white"),
        (
            "messages",
            {"messages": [user("q"), assistant("a", tool_calls=[1])]},
            "messages[1].tool_calls: expected none",
        ),
        ("sharegpt", {"messages": []}, "conversations: expected a list, found nothing"),
        ("sharegpt", {"conversations": [{"from": "observation", "value": "x"}]}, "conversations[0].from: expected one"),
        ("sharegpt", {"conversations": [{"from": 3, "value": "x"}]}, "conversations[0].from: expected one of human"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "messages[0].role: expected system or user, found nothing"),
        ("sharegpt", sharegpt([user("q")]), "messages[0].role: expected assistant in the last message, found 'user'"),
        ("alpaca", {"instruction": "q"}, "messages[1].content: expected text, found nothing"),
        ("alpaca", {"output": "a"}, "messages[0].content: expected text, found an empty one"),
        ("alpaca", {"instruction": 3, "output": "a"}, "instruction: expected text, found 3"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, "history: expected a list of [question, a"),
        (
            "infialign",
            {"question": "q", "x": None},
            "expected messages, conversations, or instruction and output, found",
        ),
        ("dapo-math", question(0), "reward_model: expected an object with ground_truth, found nothing"),
        ("dapo-math", {"prompt": [user("q")], "reward_model": {}}, "label: expected text or a number, found nothing"),
        ("dapo-math", {"reward_model": {"ground_truth": "1"}}, "prompt: expected a list of messages, found nothing"),
        ("prompt-label", {"prompt": "q"}, "label: expected text or a number, found nothing"),
        ("prompt-label", {"prompt": " ", "label": 1}, "prompt[0].content: expected text, found only white space"),
    ],
)
def test_an_invalid_row_is_an_error_or_dropped_and_counted(tmp_path, form, row, says):
    good = {
        "messages": {"messages": [user("q"), assistant("a")]},
        "sharegpt": sharegpt([user("q"), assistant("a")]),
        "alpaca": {"instruction": "q", "output": "a"},
        "infialign": {"messages": [user("q"), assistant("a")]},
        "dapo-math": dapo(1, "2"),
        "prompt-label": question(1),
    }[form]
    path = jsonl(tmp_path / "it's a.jsonl", [good, row, row])
    text = error(form, path)
    assert text.startswith(f":2: {says}") and text.endswith("; --drop-invalid leaves it out")
    rows, lines = converted(form, path, drop_invalid=True)
    (dropped,) = [line for line in lines if line.startswith("dropped: ")]
    assert len(rows) == 1 and dropped.startswith("dropped: 2: ") and lines[0] == "rows: 3 read, 1 written"
    path = jsonl(path, [row])
    assert error(form, path, drop_invalid=True) == ": expected at least one valid row, found none in 1"


def test_what_cannot_be_read_is_never_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [\n')
    assert error("messages", path, drop_invalid=True).startswith(":1: expected a JSON object")


# ---------------------------------------------------------------- RL


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_dapo_math(tmp_path, suffix):
    """Duplicates and conflicts as in the published file, whose rows look like these."""
    source = [dapo(index, str(index)) for index in (3, 1, 2)]
    again = [dapo(1, "1"), dapo(3, "33"), dapo(3, "34"), dapo(2, "2")]
    path = write(tmp_path / f"a.{suffix}", source + again)
    rows, lines = converted("dapo-math", path)
    assert [row["label"] for row in rows] == ["3", "1", "2"] and all(set(row) == {"prompt", "label"} for row in rows)
    assert rows[0]["prompt"] == [user(BOXED % 3)]
    where = f"{path}:5" if suffix == "jsonl" else f"{path}: row 5"
    assert lines == [
        "rows: 7 read, 3 written",
        "repeated questions left out: 4",
        f"questions again with another answer, the first kept: 1, {where}",
        r'instruction made "Answer: \boxed{$Answer}": 3, left as it was: 0',
        "keys left out: ability, data_source, extra_info",
    ]


def test_the_instruction_is_changed_as_slime_has_it_or_kept(tmp_path):
    texts = (DAPO, BOXED, "%s: put it in a box")
    path = jsonl(tmp_path / "a.jsonl", [dapo(index, "1", text) for index, text in enumerate(texts)])
    rows, lines = converted("dapo-math", path)
    assert [row["prompt"][0]["content"] for row in rows] == [BOXED % 0, BOXED % 1, "2: put it in a box"]
    assert lines[1] == r'instruction made "Answer: \boxed{$Answer}": 1, left as it was: 2'
    rows, lines = converted("dapo-math", path, instruction="keep")
    assert [row["prompt"][0]["content"] for row in rows] == [DAPO % 0, BOXED % 1, "2: put it in a box"]
    assert not any("instruction" in line for line in lines)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=30))
def test_each_question_once_with_its_first_answer(tmp_path_factory, pairs):
    path = jsonl(tmp_path_factory.mktemp("dapo") / "a.jsonl", [dapo(*map(str, pair)) for pair in pairs])
    rows, lines = converted("dapo-math", path, instruction="keep")
    first: dict[int, int] = {}
    for index, answer in pairs:
        first.setdefault(index, answer)
    assert [(row["prompt"], row["label"]) for row in rows] == [
        (dapo(index, "")["prompt"], str(answer)) for index, answer in first.items()
    ]
    conflicts = {index for index, answer in pairs if first[index] != answer}
    assert any(
        line.startswith(f"questions again with another answer, the first kept: {len(conflicts)},") for line in lines
    ) == bool(conflicts)


def test_prompt_label(tmp_path):
    source = [{"problem": "q", "solution": 34}, {"problem": [system("s"), user("q")], "solution": "x", "id": 7}]
    rows, lines = converted(
        "prompt-label", jsonl(tmp_path / "a.jsonl", source), prompt_key="problem", label_key="solution"
    )
    assert rows == [{"prompt": [user("q")], "label": "34"}, {"prompt": [system("s"), user("q")], "label": "x"}]
    assert lines[1:] == ["keys left out: id"]
    same, _ = converted("prompt-label", jsonl(tmp_path / "b.jsonl", rows))
    assert same == rows


@given(TEXTS)
def test_a_question_of_any_text_is_itself(tmp_path_factory, text):
    path = jsonl(tmp_path_factory.mktemp("any") / "a.jsonl", [{"prompt": text, "label": text}])
    assert converted("prompt-label", path)[0] == [{"prompt": [user(text)], "label": text}]
