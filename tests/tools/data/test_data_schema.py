"""What a row must be: a grammar for roles, texts that say something, labels that a rule can compare with."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.data.samples import assistant, conversations, system, tool, user
from tools.data.errors import MISSING
from tools.data.schema import conversation_problem, label_problem, metadata_problem, prompt_problem

LETTER = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}


@given(conversations())
def test_good_conversations(messages):
    assert conversation_problem(messages, "messages") is None
    prompt = messages[: max(index for index, message in enumerate(messages) if message["role"] == "user") + 1]
    assert prompt_problem(prompt, "prompt", True) is None


@given(st.lists(st.sampled_from(list(LETTER)), max_size=7))
def test_the_order_of_roles(roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    word = "".join(LETTER[role] for role in roles)
    assert (conversation_problem(messages, "m") is None) == bool(re.fullmatch("s?ua((t+|u)a)*", word))
    assert (prompt_problem(messages, "m", True) is None) == bool(re.fullmatch("s?u(a(t+a)*u)*", word))


GOOD = [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (MISSING, "m: expected a list of messages, found nothing"),
        (None, "m: expected a list of messages, found null"),
        ([], "m: expected a list of messages, found an empty list"),
        ("text", "m: expected a list of messages, found 'text'"),
        ({"role": "user"}, "m: expected a list of messages, found an object"),
        (["text"], 'm[0]: expected an object with "role" and "content", found \'text\''),
        ([{"content": "q"}], "m[0].role: expected system or user, found nothing"),
        ([{"role": ["user"], "content": "q"}], "m[0].role: expected system or user, found a list"),
        ([assistant("a")], "m[0].role: expected system or user, found 'assistant'"),
        ([user("q"), {"role": "bot", "content": "a"}], "m[1].role: expected assistant, found 'bot'"),
        ([user("q"), {"role": "Assistant", "content": "a"}], "m[1].role: expected assistant, found 'Assistant'"),
        ([user("q"), system("s"), assistant("a")], "m[1].role: expected assistant, found 'system'"),
        ([system("s"), system("s"), *GOOD], "m[1].role: expected user, found 'system'"),
        ([*GOOD, assistant("b")], "m[2].role: expected user or tool, found 'assistant'"),
        ([*GOOD, user("q")], "m[2].role: expected assistant in the last message, found 'user'"),
        ([user("q")], "m[0].role: expected assistant in the last message, found 'user'"),
        ([*GOOD, tool("t")], "m[2].role: expected assistant in the last message, found 'tool'"),
        ([user("q"), {"role": "assistant"}], "m[1].content: expected text, found nothing"),
        ([user("q"), assistant(None)], "m[1].content: expected text, found null"),
        ([user("q"), assistant("")], "m[1].content: expected text, found an empty one"),
        ([user("q"), assistant(" \n\t ")], "m[1].content: expected text, found only white space"),
        ([user(""), assistant("a")], "m[0].content: expected text, found an empty one"),
        ([system(""), *GOOD], "m[0].content: expected text, found an empty one"),
        ([user([{"type": "text", "text": "q"}]), assistant("a")], "m[0].content: expected text, found a list"),
        ([user("q"), assistant(3)], "m[1].content: expected text, found 3"),
        ([user("q"), assistant("x\ud800")], "m[1].content: expected Unicode text, found half a surrogate pair at"),
        ([user("q"), assistant("a", step_loss_mask=None)], "m[1].step_loss_mask: expected 0 or 1, found null"),
        ([user("q"), assistant("a", step_loss_mask="1")], "m[1].step_loss_mask: expected 0 or 1, found '1'"),
        ([user("q"), assistant("a", step_loss_mask=0)], "m: expected an answer with step_loss_mask 1, found none"),
        ([user("q" * 90), {"role": "b" * 90}], f"m[1].role: expected assistant, found '{'b' * 37}...'"),
    ],
)
def test_bad_conversations(messages, says):
    problem = conversation_problem(messages, "m")
    assert problem.startswith(says) and "\n" not in problem


@pytest.mark.parametrize(
    "messages",
    [
        [*GOOD, tool(""), assistant("b")],
        [user("q"), assistant("", tool_calls=[{"name": "f"}]), tool("1"), assistant("b")],
        [user("q", step_loss_mask=None), assistant("a", step_loss_mask=1)],
        [user("q"), assistant("a", step_loss_mask=0), user("q"), assistant("b", step_loss_mask=1.0)],
        [user("q", name="x"), assistant("a", anything=[1, None])],
    ],
)
def test_conversations_that_are_unusual(messages):
    assert conversation_problem(messages, "m") is None


@pytest.mark.parametrize(
    ("prompt", "template", "says"),
    [
        (
            "What?",
            True,
            "p: expected a list of messages, found text 'What?': --apply-chat-template would render a conv",
        ),
        ([user("q")], False, "p: expected text, found a list: messages need --apply-chat-template"),
        ([*GOOD], True, "p[1].role: expected user in the last message, found 'assistant'"),
        ([], True, "p: expected a list of messages, found an empty list"),
        (MISSING, True, "p: expected a list of messages, found nothing"),
        (MISSING, False, "p: expected text, found nothing"),
        (" ", False, "p: expected text, found only white space"),
        (3, False, "p: expected text, found 3"),
    ],
)
def test_bad_prompts(prompt, template, says):
    assert prompt_problem(prompt, "p", template).startswith(says)


@pytest.mark.parametrize("label", ["34", "-3", r"\frac{1}{2}", 34, 0, -1.5])
def test_good_labels(label):
    assert label_problem(label, "label") is None


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (MISSING, "nothing"),
        (None, "null"),
        ("", "a text without an answer"),
        ("  \n", "a text without an answer"),
        (True, "true"),
        (["34"], "a list"),
        ({"ground_truth": "34"}, "an object"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (b"34", "a bytes"),
    ],
)
def test_bad_labels(label, found):
    assert label_problem(label, "label") == f"label: expected text or a number, found {found}"


def test_metadata():
    for good in (MISSING, None, {}, {"a": 1}):
        assert metadata_problem(good, "metadata") is None
    for bad, found in ((3, "3"), ("x", "'x'"), ([1], "a list")):
        assert metadata_problem(bad, "metadata") == f"metadata: expected an object, found {found}"
