"""Read what evalscope wrote: reviews and predictions of both releases, as one kind of sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What evalscope 1.14.1 keeps of the test of a program when the grader itself failed: nothing. (Its result is then -2,
# as that of a wrong answer.)
NO_GRADE = [["{}"]]
LENGTH = ("length", "max_tokens", "model_length")


class RunError(Exception):
    """One line about a run that cannot be read."""


@dataclass(frozen=True)
class Sample:
    question: str
    number: int  # of the samples of this question
    score: float | None  # None: not scored
    grader_failed: bool = False
    tokens: float | None = None
    truncated: bool | None = None


@dataclass
class Run:
    """One benchmark of one model; settings: run.json."""

    directory: Path
    settings: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    unreadable: int = 0  # lines
    ungraded: int = 0  # programs that the grader failed on, where the reviews do not tell which

    @property
    def benchmark(self) -> str:
        return self.settings["benchmark"]

    @property
    def model(self) -> str:
        return self.settings["model"]


def lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """None for a line that an interruption cut off."""
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def one_of_1_14(row: dict[str, Any], outputs: dict[int, dict[str, Any]], subset: str) -> list[Sample]:
    scored = row["sample_score"]
    score, identity = scored["score"], scored["sample_id"]
    value = score["value"]
    name = next((key for key in (score.get("main_score_name"), "acc", "accuracy") if key in value), None)
    usable = name is not None and score.get("status", "success") in ("success", "fallback")
    metadata = score.get("metadata") or {}
    failed = metadata.get("final_metadata") == NO_GRADE or (usable and "error" in metadata)
    output = outputs.get(identity, {})
    choice = (output.get("choices") or [{}])[0]
    reason = choice.get("stop_reason")
    return [
        Sample(
            question=f"{subset}/{scored['group_id']}",
            number=scored.get("generation_index") or 0,
            score=float(value[name]) if usable and not failed else None,
            grader_failed=failed,
            tokens=(output.get("usage") or {}).get("output_tokens"),
            truncated=None if reason is None else reason in LENGTH,
        )
    ]


def all_of_0_17(row: dict[str, Any], subset: str) -> list[Sample]:
    choices = row["choices"]
    tokens = (row.get("usage") or {}).get("completion_tokens")
    made = []
    for number, choice in enumerate(choices):
        result = (choice.get("review") or {}).get("result")
        scored = isinstance(result, (bool, int, float))
        reason = choice.get("finish_reason")
        made.append(
            Sample(
                question=f"{subset}/{row['index']}",
                number=number,
                score=float(result) if scored else None,
                tokens=None if tokens is None else tokens / len(choices),  # it counts them for all samples together
                truncated=None if reason is None else reason in LENGTH,
            )
        )
    return made


def outputs_of(path: Path) -> dict[int, dict[str, Any]]:
    """What the model answered, by sample; the last one where an interruption made two."""
    if not path.exists():
        return {}
    return {row["index"]: row.get("model_output") or {} for row in lines(path) if row}


def read(directory: Path) -> Run:
    """Raises RunError."""
    settings_file = directory / "run.json"
    try:
        settings = json.loads(settings_file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{settings_file}: expected the settings of an evaluation: {error}") from None
    run = Run(directory, settings)
    files = sorted(directory.glob("evalscope/**/reviews/*/*.jsonl"))
    if not files:
        raise RunError(f"{directory}: expected reviews of evalscope, found none")
    found: dict[tuple[str, int], Sample] = {}
    for path in files:
        outputs = outputs_of(path.parents[2] / "predictions" / path.parent.name / path.name)
        for row in lines(path):
            try:
                if row is None:
                    raise ValueError
                made = one_of_1_14(row, outputs, path.stem) if "sample_score" in row else all_of_0_17(row, path.stem)
            except (KeyError, TypeError, ValueError):
                run.unreadable += 1
                continue
            found |= {(sample.question, sample.number): sample for sample in made}
    run.samples = list(found.values())
    ungraded = directory / "evalscope" / "grading" / "ungraded.jsonl"
    if ungraded.exists() and not any(sample.grader_failed for sample in run.samples):
        run.ungraded = len(ungraded.read_text().splitlines())
    return run
