r"""Rewards by rule: does a response end in the right answer? `--rm-type deepscaler`, `math` and `dapo`, as slime asks.

| rm_type    | where the answer is                                                              | reward |
|------------|----------------------------------------------------------------------------------|--------|
| deepscaler | last \boxed{} after the last `</think>`, or after the first `###Response`; else 0 | 0, 1   |
| math       | last \boxed{} of the response                                                    | 0, 1   |
| dapo       | last line `Answer: ...` within the last 300 characters                           | -1, 1  |

`boxed_` before a type takes the content of the last \boxed{} for the response (slime/rollout/rm_hub at 8359c9a).

dapo compares text. For the others slime asks sympy's parser, which evaluates what the model wrote, and may hang on it.
Here a small grammar of its own reads numbers, variables, fractions, roots and powers, and two expressions are
equal if their values are, exactly where they are rational and at several points where they have variables. Of slime's
rules this keeps: an integer must be written as one, a fraction must be reduced as in the label, intervals and tuples
must have the same brackets, units and letter case do not count.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable
from fractions import Fraction

DAPO_TAIL = 300
LONGEST = 200  # characters of an expression that is evaluated
LONGEST_TEXT = 2000  # characters of an answer; a longer one is no answer
_POINTS = (0.734_218_9, 1.618_033_9, 2.302_585_1)  # values given to variables, in turn
_TOLERANCE = 1e-9
_LARGEST_POWER = 64
_LARGEST_BITS = 1 << 14  # of an exact number

_UNITS = (
    "degrees? centimeters? cm meters? miles? seconds? minutes? hours? days? weeks? months? years? foot feet "
    "inch(?:es)? yards? dollars? cents? units? points? square"
).split()
_WORDS = re.compile(rf"(?<![a-z\\])(?:{'|'.join(_UNITS)})(?:\s*\^\s*\{{?\d\}}?)?(?![a-z])")


def reward(rm_type: str, response: str, label: str | int | float | None) -> float:
    """The reward of a response to a question whose answer is `label`. Raises ValueError for an unknown type.

    A label of "" or None is never met: 0, or -1 for dapo.
    """
    if rm_type.startswith("boxed_"):
        return reward(rm_type.removeprefix("boxed_"), boxed(response) or "", label)
    if rm_type not in _ANSWERS:
        raise ValueError(
            f"--rm-type: expected one of {', '.join(_ANSWERS)}, or boxed_ and one of them, found {rm_type!r}"
        )
    wrong = -1.0 if rm_type == "dapo" else 0.0
    truth = "" if label is None else str(label)
    if rm_type != "dapo" and "\\boxed" in truth:
        truth = boxed(truth) or ""
    answer = _ANSWERS[rm_type](response)
    if answer is None or not truth.strip():
        return wrong
    same = _dapo_text(answer) == _dapo_text(truth) if rm_type == "dapo" else same_answer(answer, truth)
    return 1.0 if same else wrong


# ---------------------------------------------------------------- where the answer is


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched; None if there is none or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


def _after_thinking(response: str) -> str | None:
    if "</think>" in response:
        return boxed(response.rpartition("</think>")[2])
    if "###Response" in response:
        return boxed(response.split("###Response")[1])
    return None


def _answer_line(response: str) -> str | None:
    found = re.findall(r"(?i)answer\s*:\s*([^\n]+)", response[-DAPO_TAIL:])
    return found[-1] if found else None


_ANSWERS: dict[str, Callable[[str], str | None]] = {
    "deepscaler": _after_thinking,
    "math": boxed,
    "dapo": _answer_line,
}


def _dapo_text(text: str) -> str:
    """An answer as dapo compares it: as text, without spaces, units, dollar signs and thousands separators."""
    text = text[-DAPO_TAIL:].split("=")[-1].replace("\\$", "")
    text = re.sub(r"\\(?:text|textbf|mbox|overline|boxed)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\[;! ]|\b(?:an?|and)\s", "", text).replace("$", "")
    text = re.sub(r"\s+", "", _WORDS.sub("", text))
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    return text.replace(",", "") if text.replace(",", "").isdigit() else text


# ---------------------------------------------------------------- whether two answers are equal


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same, see the rules at the top of this file."""
    if max(len(given), len(truth)) > LONGEST_TEXT:
        return False
    a, b = _normalize(given), _normalize(truth)
    if a == b:
        return bool(b)
    if not a or not b:
        return False
    ours, theirs = _elements(a), _elements(b)
    if len(ours) != len(theirs) or (len(theirs) > 1 and (a[0], a[-1]) != (b[0], b[-1])):
        return False
    return all(map(_same_element, ours, theirs))


def _same_element(given: str, truth: str) -> bool:
    if given == truth:
        return True
    fraction = r"-?\d+/\d+"
    if re.fullmatch(fraction, given) and re.fullmatch(fraction, truth):
        return False  # equal fractions are equal text, once both are reduced
    if bool(re.fullmatch(r"-?\d+", given)) != bool(re.fullmatch(r"-?\d+", truth)):
        return False
    return _same_value(given, truth)


def _normalize(text: str) -> str:
    """LaTeX, units, spaces and spelling removed: what is left is compared."""
    text = text.strip().strip("$").strip().removesuffix(".")
    text = re.sub(r"\\(?:left|right|displaystyle|[!,;: ])", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|boxed)\s*\{([^{}]*)\}", r" \1 ", text)
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", text).lower()
    text = _WORDS.sub("", text)
    for word, power in (("million", 6), ("billion", 9), ("trillion", 12)):
        text = re.sub(rf"\b{word}\b", f"*10^{power}", text)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name.strip()) <= 2:  # x = 5
        text = value
    text = _plain(text)
    while (shorter := re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)) != text:  # 1,000,000
        text = shorter
    text = re.sub(r"(?<=\d)\s+(?=\d+/\d)", "+", text.strip())  # 7 3/4
    text = re.sub(r"\s+", "", text)
    number = re.fullmatch(r"(-?\d*)\.(\d*)", text)
    if number and (number[1].strip("-") or number[2]):
        value = Fraction(text if number[2] else text + "0")
        return str(value.numerator) if value.denominator == 1 else text
    return re.sub(r"^(-?)0+(?=\d+$)", r"\1", text)


def _plain(text: str) -> str:
    """LaTeX mathematics as the grammar of `_Parser` writes it: 1/2, sqrt(3), 2^(1/3)."""
    text = re.sub(r"\\[dt]?frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    simple = r"\{([^{}]*)\}"
    for _ in range(20):  # innermost first
        before = text
        text = re.sub(rf"\\frac\s*{simple}\s*{simple}", lambda m: f" {_wrap(m[1])}/{_wrap(m[2])} ", text)
        text = re.sub(rf"\\sqrt\s*{simple}", r" sqrt(\1)", text)
        text = re.sub(rf"\^\s*{simple}", r"^(\1)", text)
        if text == before:
            break
    for latex, word in (("\\pi", "pi"), ("π", "pi"), ("\\cdot", "*"), ("\\times", "*"), ("·", "*"), ("×", "*")):
        text = text.replace(latex, f" {word} ")
    text = text.replace("\\infty", "inf").replace("\\cup", "u").replace("\\div", "/")
    return text.replace("{", "").replace("}", "").replace("\\", "")


def _wrap(text: str) -> str:
    text = text.strip()
    return text if re.fullmatch(r"\d+|[a-z]|pi", text) else f"({text})"


def _elements(text: str) -> list[str]:
    """The elements of a tuple or interval; else the text alone."""
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not re.search(r"[()\[\]]", text[1:-1]):
        return text[1:-1].split(",")
    return [text]


# ---------------------------------------------------------------- values


def _same_value(a: str, b: str) -> bool:
    """Whether two expressions have one value: exactly if both are rational, else at several points."""
    if max(len(a), len(b)) > LONGEST:
        return False
    variables = sorted(set(re.findall(r"(?<![a-z])[a-z](?![a-z])", a + " " + b)))
    if len(variables) > 2:
        return False
    try:
        for shift in range(len(_POINTS) if variables else 1):
            values = {name: _POINTS[(i + shift) % len(_POINTS)] for i, name in enumerate(variables)}
            x, y = (_Parser(text, values).value() for text in (a, b))
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                if x != y:
                    return False
            elif not cmath.isclose(complex(x), complex(y), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                return False
    except (ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return False
    return True


Number = Fraction | float | complex


class _Parser:
    """Evaluates sum := product (+|- product)*; product := power ((*|/|nothing) power)*; power := atom [^ power]."""

    def __init__(self, text: str, variables: dict[str, float]):
        self._tokens = re.findall(r"\d+(?:\.\d+)?|\.\d+|sqrt|pi|[a-z]|\S", text)
        self._variables = variables
        self._next = 0

    def value(self) -> Number:
        found = self._sum()
        if self._next < len(self._tokens):
            raise ValueError("trailing text")
        return found

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token

    def _sum(self) -> Number:
        total = self._product()
        while self._peek() in ("+", "-"):
            total = total + self._product() if self._take() == "+" else total - self._product()
        return total

    def _product(self) -> Number:
        total = self._signed()
        while (token := self._peek()) and token not in "+-)^":
            if token in "*/":
                self._take()
            factor = self._signed()
            total = total / factor if token == "/" else total * factor
        return total

    def _signed(self) -> Number:
        if self._peek() == "-":
            self._take()
            return -self._signed()
        return self._power()

    def _power(self) -> Number:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        exponent = self._signed()
        if abs(exponent) > _LARGEST_POWER:
            raise ValueError("a large power")
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            if isinstance(base, Fraction):
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits * abs(exponent) > _LARGEST_BITS:
                    raise ValueError("a large number")
            return base ** int(exponent)
        return complex(base) ** complex(exponent)

    def _atom(self) -> Number:
        token = self._take()
        if token == "(":
            found = self._sum()
            if self._take() != ")":
                raise ValueError("no closing bracket")
            return found
        if token == "sqrt":
            return cmath.sqrt(complex(self._atom()))
        if token == "pi":
            return math.pi
        if token in self._variables:
            return self._variables[token]
        if re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", token) and token.isascii():
            return Fraction(token)
        raise ValueError(f"unknown text {token!r}")
