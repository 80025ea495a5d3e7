"""Rewards by rule: the verdicts of the pinned slime on a table of answers, format rules, and hostile text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.embedded.rewards import boxed, reward, same_answer

# label -> other spellings that slime at 8359c9a accepts with (deepscaler and math, dapo); recorded by running its
# graders on every pair of a label and a spelling below.
ACCEPTED: dict[str, tuple[list[str], list[str]]] = {
    "5": (["5.", "5.0", "x=5"], ["x=5"]),
    "-3": (["-3.0"], []),
    "1/2": (["0.5", "1/2+0", "\\frac12", "\\frac{1}{2}"], []),
    "\\frac{1}{2}": (["0.5", "1/2", "1/2+0", "\\frac12"], ["\\frac12"]),
    "\\sqrt{3}": ([], []),
    "2\\sqrt{3}": (["\\sqrt{12}"], []),
    "\\frac{\\pi}{2}": (["\\pi/2"], []),
    "(1,2)": (["(1, 2)", "\\left(1,2\\right)"], ["(1, 2)"]),
    "[0,1)": (["[0, 1)"], ["[0, 1)"]),
    "x+1": (["1+x"], []),
    "1000000": (["1,000,000"], ["1,000,000"]),
    "0.25": (["\\frac{1}{4}"], []),
    "7": (["7.0", "7^\\circ", "\\$7"], ["7^\\circ", "\\$7"]),
    "\\frac{3}{4}": (["0.75", "\\tfrac{3}{4}"], []),
    "12\\pi": (["12\\cdot\\pi"], []),
    "(-\\infty, 2]": ([], []),
    "\\text{Monday}": (["Monday"], ["Monday"]),
    "100": (["100 \\text{ cm}"], ["100 \\text{ cm}"]),
    "3x^2": (["3 x^2"], ["3 x^2"]),
    "25\\%": (["25"], []),
}
SPELLINGS = sorted(
    {*ACCEPTED, *(text for both in ACCEPTED.values() for texts in both for text in texts)}
    | {"", "(1,2]", "10^6", "2/4", "37.699", "\\dfrac{2}{4}", "seven", "two"}
)
RESPONSE = {
    "deepscaler": "<think>so \\boxed{0}</think> It is \\boxed{%s}.",
    "math": "Clearly \\boxed{0}, no: \\boxed{%s}",
    "dapo": "Answer: 0\nAnswer: %s\n",
}


@pytest.mark.parametrize("rm_type", RESPONSE)
@pytest.mark.parametrize("label", ACCEPTED)
def test_the_verdicts_of_the_pinned_slime(rm_type, label):
    accepted = {label, *ACCEPTED[label][rm_type == "dapo"]}
    wrong = -1.0 if rm_type == "dapo" else 0.0
    for text in SPELLINGS:
        found = reward(rm_type, RESPONSE[rm_type] % text, label)
        assert found == (1.0 if text in accepted else wrong), text


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("\\boxed{5}", "5", 0),  # no end of thinking, no reward
        ("<think>\\boxed{5}</think> 6", "5", 0),
        ("</think> \\boxed{5} </think> \\boxed{6}", "6", 1),
        ("###Response \\boxed{5} ###Response \\boxed{6}", "5", 1),
        ("</think> \\boxed{5", "5", 0),
        ("</think>\\boxed{}", "5", 0),
        ("</think>\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", 1),
        ("</think>\\boxed{5}", "", 0),
        ("</think>\\boxed{5}", None, 0),
        ("</think>\\boxed{5}", 5, 1),
        ("</think>\\boxed{2.5}", 2.5, 1),
    ],
)
def test_what_deepscaler_asks_of_the_format(response, label, expected):
    assert reward("deepscaler", response, label) == expected


@pytest.mark.parametrize(
    ("rm_type", "response", "label", "expected"),
    [
        ("math", "no box 5", "5", 0.0),
        ("math", "x \\boxed{5}", "\\boxed{5}", 1.0),
        ("dapo", "the answer is 5", "5", -1.0),
        ("dapo", "answer : 5", "5", 1.0),
        ("dapo", "Answer: 5" + "." * 300, "5", -1.0),  # too far from the end
        ("dapo", "Answer: 5", "", -1.0),
        ("boxed_dapo", "so \\boxed{Answer: 5}", "5", 1.0),
        ("boxed_math", "\\boxed{\\boxed{5}}", "5", 0.0),  # the last box has no box in it, as in slime
        ("boxed_math", "no box", "5", 0.0),
    ],
)
def test_what_the_others_ask_of_the_format(rm_type, response, label, expected):
    assert reward(rm_type, response, label) == expected


def test_an_unknown_type_is_named():
    with pytest.raises(ValueError, match="--rm-type: expected one of deepscaler, math, dapo, .* found 'f9'"):
        reward("f9", "", "")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{1}\\boxed{2}", "2"),
        ("\\boxed{1", None),
        ("none", None),
        ("\\boxed 5", None),
    ],
)
def test_boxed(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+2", "(x+1)^2", False),
        ("3^{1/2}", "\\sqrt{3}", True),
        ("-\\sqrt{2}", "\\sqrt{2}", False),
        ("7\\frac{3}{4}", "31/4", True),
        ("2/4", "1/2", False),  # not reduced
        ("1024", "2^{10}", False),  # an integer is written as one
        ("1/0", "1/0+1", False),
        ("xyz", "zyx", False),
        ("0.1", "1/10", True),
        ("0.333333333333", "1/3", False),  # rational numbers are compared exactly
    ],
)
def test_values(a, b, same):
    assert same_answer(a, b) is same_answer(b, a) is same


def test_text_of_the_model_is_not_executed(tmp_path):
    target = tmp_path / "made"
    for text in (f"__import__('os').mkdir('{target}')", f"open('{target}','w')", "exit()", "().__class__"):
        assert reward("math", f"\\boxed{{{text}}}", "5") == 0
    assert not target.exists()


HOSTILE = st.text(alphabet="0123456789xyz()[]{}^/*+-.,=\\ sqrtpifracboxed$\n", max_size=250)


@settings(max_examples=400, deadline=None)
@given(text=HOSTILE, label=HOSTILE)
def test_any_text_gives_a_verdict(text, label):
    for rm_type, form in RESPONSE.items():
        assert reward(rm_type, form % text, label) in (-1.0, 0.0, 1.0)
    assert reward("math", text, text) in (0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    ["9^64" + "^64" * 40, "(" * 190 + "1", "((((((9^64)^64)^64)^64)^64)^64)", "-" * 199, "9" * 10**6, "\\frac" * 10**5]
    + ["{" * 10**5, "1," * 10**5, "sqrt" * 50, "1" + "0" * 180 + "^64", "\\boxed{" * 10**4],
    ids=lambda text: text[:12],
)
def test_hostile_text_takes_no_time(text):
    started = time.process_time()
    for rm_type, form in RESPONSE.items():
        reward(rm_type, form % text, "x+1")
        reward(rm_type, text, "3^x")
    assert time.process_time() - started < 2
