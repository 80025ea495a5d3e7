"""A whole file of training data, read before a job is submitted: the first bad row, and the lengths in tokens.

Besides bad rows this finds what pandas makes of a .jsonl, because slime reads it with that (the rules below are those
of pandas 2.3): where every value of a column reads as a number, texts too, the column becomes numbers. A label
"9007199254740993" is then 9007199254740992 and is never met, `--rm-type dapo` stops at a label that is no text, and
`--rm-type math` takes 0 for no label. A key that only some rows have is NaN in the others. In .parquet all stays as it
is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from tools.checkpoint.cli import Progress
from tools.data import chat
from tools.data.errors import MISSING, DataError, shown
from tools.data.rows import Parsed, Source
from tools.data.schema import conversation_problem, label_problem, metadata_problem, prompt_problem

_BATCH = 1 << 21  # characters tokenised at a time


@dataclass(frozen=True)
class Rules:
    """What a file is checked against; the names are slime's flags."""

    kind: str  # sft | rl
    input_key: str
    label_key: str
    metadata_key: str = "metadata"
    apply_chat_template: bool = False
    rm_type: str = "deepscaler"
    tokenizer: Path | None = None
    limit: int | None = None  # tokens of a conversation (sft) or of a prompt (rl)
    limit_flag: str = "--max-tokens"
    allow_long: bool = False

    def problem(self, row: dict[str, Any]) -> str | None:
        """What is wrong with a row."""
        value = row.get(self.input_key, MISSING)
        if self.kind == "sft":
            problem = conversation_problem(value, self.input_key)
        else:
            problem = prompt_problem(value, self.input_key, self.apply_chat_template) or label_problem(
                row.get(self.label_key, MISSING), self.label_key
            )
            if not problem and self.rule == "dapo" and not isinstance(row[self.label_key], str):
                problem = f"{self.label_key}: expected text for --rm-type dapo, found {shown(row[self.label_key])}"
        return problem or metadata_problem(row.get(self.metadata_key, MISSING), self.metadata_key)

    @property
    def rule(self) -> str:
        return self.rm_type.removeprefix("boxed_")


@dataclass
class Counts:
    """What a file holds; tokens are None when nothing was tokenised. trained: tokens that carry loss (sft)."""

    samples: int = 0
    tokens: int | None = None
    trained: int | None = None
    longest: int | None = None
    longest_at: int | None = None  # its line, or row
    unit: str = "line"
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def scan(path: Path, rules: Rules) -> Counts:
    """Read the whole file: its form first, then its lengths. Raises DataError that names the first bad row."""
    source = Source(path)
    tokenizer = chat.load_tokenizer(rules.tokenizer) if rules.tokenizer else None
    counts = Counts(unit=source.unit)
    _check_form(source, rules, counts)
    if tokenizer:
        lengths = _Lengths(tokenizer, rules)
        for number, row, _ in _rows(source, rules, "tokenising"):
            lengths.add(number, row[rules.input_key])
        lengths.judge(source, counts)
    return counts


def _rows(source: Source, rules: Rules, what: str) -> Iterator[Parsed]:
    progress = Progress(source.size, what)
    done = 0
    try:
        for parsed in source.parsed((rules.input_key, rules.label_key, rules.metadata_key)):
            progress.add(source.position - done)
            done = source.position
            yield parsed
    finally:
        progress.close()


def _check_form(source: Source, rules: Rules, counts: Counts) -> None:
    bad = _First()
    without_metadata = _First()
    columns = [_Column(rules.input_key), _Column(rules.label_key)] if source.text and rules.kind == "rl" else []
    for number, row, problem in _rows(source, rules, "checking"):
        problem = problem or rules.problem(row)
        if problem:
            bad.add(number, problem)
            continue
        counts.samples += 1
        if rules.metadata_key not in row:
            without_metadata.add(number)
        for column in columns:
            column.add(number, row[column.key])
    if bad:
        raise DataError(f"{source.where(bad.number)}: {bad.what}{bad.others(source.unit)}")
    if not counts.samples:
        raise DataError(f"{source.path}: expected at least one sample, found none")
    if source.text and 0 < without_metadata.count < counts.samples:
        raise DataError(
            f"{source.where(without_metadata.number)}: {rules.metadata_key}: expected it in every row or in none, "
            f"found nothing{without_metadata.others(source.unit)}: pandas makes NaN of it, at which slime stops"
        )
    for column in columns:
        counts.warnings += column.judge(source, rules)


class _First:
    """The first row of a kind, and how many there are."""

    def __init__(self) -> None:
        self.number, self.what, self.count = 0, "", 0

    def add(self, number: int, what: str = "") -> None:
        self.count += 1
        if self.count == 1:
            self.number, self.what = number, what

    def __bool__(self) -> bool:
        return self.count > 0

    def others(self, unit: str) -> str:
        more = self.count - 1
        return f" (and {more:,} more {unit}{'s' if more > 1 else ''})" if more else ""


class _Lengths:
    """Tokens of the samples, a few megabytes of text at a time."""

    def __init__(self, tokenizer: Any, rules: Rules):
        self._tokenizer, self._rules = tokenizer, rules
        self._numbers: list[int] = []
        self._inputs: list[Any] = []
        self._characters = 0
        self._long = _First()
        self.tokens = self.trained = self.longest = self.longest_at = 0

    def add(self, number: int, value: Any) -> None:
        self._numbers.append(number)
        self._inputs.append(value)
        parts = [value] if isinstance(value, str) else [message.get("content") or "" for message in value]
        self._characters += sum(map(len, parts))
        if self._characters >= _BATCH:
            self._tokenise()

    def _tokenise(self) -> None:
        """Tokenise what has been added. Raises DataError if the chat template fails."""
        if self._rules.kind == "sft":
            encoded = chat.encode_conversations(self._tokenizer, self._inputs)
            sizes = [len(tokens) for tokens, _ in encoded]
            self.trained += sum(sum(mask) for _, mask in encoded)
        else:
            prompts = chat.encode_prompts(self._tokenizer, self._inputs, self._rules.apply_chat_template)
            sizes = [len(tokens) for tokens in prompts]
        for number, size in zip(self._numbers, sizes, strict=True):
            self.tokens += size
            if size > self.longest:
                self.longest, self.longest_at = size, number
            if self._rules.limit and size > self._rules.limit:
                self._long.add(number, f"{size:,}")
        self._numbers, self._inputs, self._characters = [], [], 0

    def judge(self, source: Source, counts: Counts) -> None:
        """Fill the counts. Raises DataError if samples are too long, unless they are allowed: then it is a warning."""
        self._tokenise()
        counts.tokens, counts.longest, counts.longest_at = self.tokens, self.longest, self.longest_at
        if self._rules.kind == "sft":
            counts.trained = self.trained
        if not self._long:
            return
        text = (
            f"{source.where(self._long.number)}: expected at most {self._rules.limit:,} tokens "
            f"({self._rules.limit_flag}), found {self._long.what}{self._long.others(source.unit)}"
        )
        if not self._rules.allow_long:
            raise DataError(f"{text}; slime cuts nothing off: shorten or drop it, or pass --allow-long")
        counts.warnings.append(text)


class _Column:
    """Is every value of a column of a .jsonl a number, or a text that reads as one? Then pandas makes numbers of it."""

    def __init__(self, key: str):
        self.key = key
        self._numbers_only = True
        self._changed, self._zero, self._first = _First(), _First(), 0

    def add(self, number: int, value: Any) -> None:
        if not self._numbers_only:
            return
        self._first = self._first or number
        try:
            converted = float(value)
        except (TypeError, ValueError, OverflowError):
            self._numbers_only = False
            return
        if converted == 0:
            self._zero.add(number)
        if not isinstance(value, str):
            return
        try:
            same = math.isfinite(converted) and Decimal(value.strip()) == Decimal(repr(converted))
        except InvalidOperation:
            same = False
        if not same:
            self._changed.add(number, f"{shown(value)} becomes {converted!r}")

    def judge(self, source: Source, rules: Rules) -> list[str]:
        """Warnings. Raises DataError where slime would stop."""
        if not self._numbers_only:
            return []
        why = f"every {self.key} reads as a number, and pandas makes numbers of such a .jsonl; write .parquet instead"
        if self.key == rules.input_key:
            raise DataError(f"{source.where(self._first)}: {self.key}: expected text, found a number: {why}")
        if rules.rule == "dapo":
            raise DataError(f"{source.where(self._first)}: {self.key}: --rm-type dapo needs texts, but {why}")
        warnings = []
        if self._zero and rules.rule == "math":
            warnings.append((self._zero, "--rm-type math never rewards the label 0"))
        if self._changed:
            warnings.append((self._changed, self._changed.what))
        return [
            f"{source.where(first.number)}: {self.key}: {what}{first.others(source.unit)}: {why}"
            for first, what in warnings
        ]
