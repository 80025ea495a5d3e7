#!/usr/bin/env python3
"""From evalscope's reviews to numbers with their errors: a table, JSON and a picture.

    .venv/bin/python eval/summarize.py exp/eval/MODEL --output exp/eval/MODEL
    .venv/bin/python eval/summarize.py exp/eval/FP8 --against exp/eval/BF16 --output exp/eval/compare

A directory is searched for runs (run.json). Exit status 2: a number is not to be published; the lines say why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import stats  # noqa: E402
from eval.paper import BENCHMARKS, PAPER  # noqa: E402
from eval.reviews import Run, RunError, read  # noqa: E402

KS = (1, 2, 4, 8, 16, 32)


@dataclass
class Summary:
    """Of one run; scores in percent."""

    benchmark: str
    model: str
    evalscope: str
    questions: int
    samples: int  # per question
    average: float
    error: float
    low: float
    high: float
    sampling_error: float
    pass_at_k: dict[int, float]
    tokens: dict[str, float]
    truncated: float
    problems: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict, repr=False)  # by question, 0 to 1


def problems(run: Run, by_question: dict[str, list[float]]) -> list[str]:
    """Why this number is not to be published."""
    said = []
    expected = int(run.settings.get("samples") or 0)
    questions = int(run.settings.get("questions") or 0)
    if run.settings.get("limit"):
        said.append(f"only the first {run.settings['limit']} questions were asked")
    failed = sum(sample.grader_failed for sample in run.samples)
    unscored = sum(sample.score is None for sample in run.samples) - failed
    failed += run.ungraded
    if failed:
        said.append(f"{failed} samples have no grade, because the grader itself failed")
    if unscored:
        said.append(f"{unscored} samples are not scored")
    if run.unreadable:
        said.append(f"{run.unreadable} lines of the reviews cannot be read")
    if questions and len({sample.question for sample in run.samples}) != questions:
        said.append(f"expected {questions} questions, found {len({sample.question for sample in run.samples})}")
    short = sum(len(scores) != expected for scores in by_question.values())
    if expected and short:
        said.append(f"{short} questions have another number of scored samples than {expected}")
    return said


def summary_of(run: Run) -> Summary:
    """Raises RunError for a run without any score."""
    by_question: dict[str, list[float]] = defaultdict(list)
    for sample in run.samples:
        if sample.score is not None:
            by_question[sample.question].append(sample.score)
    if not by_question:
        raise RunError(f"{run.directory}: no sample is scored")
    counts = np.array([len(scores) for scores in by_question.values()])
    scores = np.array([np.mean(scores) for scores in by_question.values()])
    low, high = stats.interval(scores)
    tokens = np.array([sample.tokens for sample in run.samples if sample.tokens is not None], dtype=float)
    cut = [sample.truncated for sample in run.samples if sample.truncated is not None]
    passed = {
        k: 100 * float(np.mean([stats.pass_at_k(len(s), round(sum(s)), k) for s in by_question.values()]))
        for k in KS
        if k <= counts.min()
    }
    lengths = {}
    if len(tokens):
        lengths = {"mean": float(tokens.mean()), "median": float(np.median(tokens)), "max": float(tokens.max())}
    return Summary(
        benchmark=run.benchmark,
        model=run.model,
        evalscope=run.settings.get("evalscope", ""),
        questions=len(by_question),
        samples=int(counts.max()),
        average=100 * float(scores.mean()),
        error=100 * stats.standard_error(scores),
        low=100 * low,
        high=100 * high,
        sampling_error=100 * stats.sampling_error(scores, counts.astype(float)),
        pass_at_k=passed,
        tokens=lengths,
        truncated=100 * float(np.mean(cut)) if cut else math.nan,
        problems=problems(run, by_question),
        scores={question: float(np.mean(values)) for question, values in by_question.items()},
    )


def find(directory: Path) -> list[Summary]:
    """The runs below a directory, in the order of the paper's table. Raises RunError."""
    files = sorted(directory.rglob("run.json"))
    if not files:
        raise RunError(f"{directory}: expected a run of eval/*_eval.sh (run.json), found none")
    made = [summary_of(read(file.parent)) for file in files]
    order = list(BENCHMARKS)
    return sorted(made, key=lambda one: (order.index(one.benchmark) if one.benchmark in order else 99, one.model))


# ---------------------------------------------------------------- tables


def number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def between(low: float, high: float) -> str:
    return "none: all questions have equal scores" if math.isnan(low) else f"{low:.2f} to {high:.2f}"


def main_table(found: list[Summary]) -> list[str]:
    text = [
        "| benchmark | model | questions x samples | avg@k | standard error | 95 % interval | sampling only | pass@k "
        "| tokens, mean | cut off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        best = max(one.pass_at_k)
        text.append(
            f"| {BENCHMARKS.get(one.benchmark, one.benchmark)} | {one.model} | {one.questions} x {one.samples} "
            f"| {number(one.average)}{' (not to be published)' if one.problems else ''} | {number(one.error)} "
            f"| {between(one.low, one.high)} | {number(one.sampling_error)} "
            f"| pass@{best} {number(one.pass_at_k[best])} "
            f"| {number(one.tokens.get('mean', math.nan), 0)} | {number(one.truncated, 1)} % |"
        )
    text += [
        "",
        "avg@k: mean over questions of the share of right samples, in percent. Standard error and interval: for other",
        "questions of this kind; sampling only: the standard error for other samples of the same questions.",
    ]
    return text


def paper_table(found: list[Summary]) -> list[str]:
    """The published numbers beside ours."""
    text = [f"| model | {' | '.join(BENCHMARKS.values())} |", "|---|" + "---|" * len(BENCHMARKS)]
    for size, rows in PAPER.items():
        for name, values in rows.items():
            text.append(f"| {name} ({size}, paper) | " + " | ".join(f"{values[key]:.2f}" for key in BENCHMARKS) + " |")
    for model in dict.fromkeys(one.model for one in found):
        ours = {one.benchmark: one for one in found if one.model == model}
        cells = []
        for key in BENCHMARKS:
            one = ours.get(key)
            cells.append(
                "" if one is None else f"{one.average:.2f} ± {number(1.96 * one.error)}{'*' if one.problems else ''}"
            )
        text.append(f"| {model} (measured) | " + " | ".join(cells) + " |")
    text += ["", "±: 1.96 standard errors over questions. *: not to be published."]
    return text


@dataclass
class Comparison:
    benchmark: str
    first: str
    second: str
    questions: int
    difference: float
    error: float
    low: float
    high: float
    inside_noise: bool
    resolvable: float  # the difference that as many questions show with 80 % power, in points


def compare(found: list[Summary], against: list[Summary]) -> list[Comparison]:
    """Runs of the same benchmark, question by question. Raises RunError where the questions differ."""
    made = []
    for second in found:
        for first in against:
            if first.benchmark != second.benchmark:
                continue
            if first.scores.keys() != second.scores.keys():
                raise RunError(f"{first.benchmark}: {first.model} and {second.model} have not the same questions")
            names = sorted(first.scores)
            one, other = (np.array([run.scores[name] for name in names]) for run in (first, second))
            result = stats.paired_difference(one, other)
            made.append(
                Comparison(
                    first.benchmark,
                    first.model,
                    second.model,
                    result.questions,
                    100 * result.value,
                    100 * result.error,
                    100 * result.low,
                    100 * result.high,
                    result.inside_noise,
                    100 * 2.8 * result.error,
                )
            )
    if not made:
        raise RunError("--against: no benchmark in common")
    return made


def comparison_table(compared: list[Comparison]) -> list[str]:
    text = [
        "| benchmark | from | to | questions | difference | standard error | 95 % interval | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in compared:
        verdict = "inside noise" if one.inside_noise else "a difference"
        text.append(
            f"| {BENCHMARKS.get(one.benchmark, one.benchmark)} | {one.first} | {one.second} | {one.questions} "
            f"| {one.difference:+.2f} | {number(one.error)} | {between(one.low, one.high)} | {verdict} |"
        )
    text += [
        "",
        "Paired: differences per question, resampled over questions, in points. A difference of about 2.8 standard",
        "errors would be seen with 80 % power.",
    ]
    return text


def picture(path: Path, found: list[Summary]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.45 * len(found)))
    names = [f"{BENCHMARKS.get(one.benchmark, one.benchmark)}\n{one.model}" for one in found]
    places = np.arange(len(found))[::-1]
    for place, one in zip(places, found, strict=True):
        axes.plot([one.low, one.high], [place, place], color="tab:blue", linewidth=2)
        axes.plot([one.average], [place], "o", color="tab:red" if one.problems else "tab:blue")
        published = [rows[one.model][one.benchmark] for rows in PAPER.values() if one.model in rows]
        axes.plot(published, [place] * len(published), "k|", markersize=14)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("avg@k in percent, 95 % interval over questions; bar: paper")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    os.replace(partial, path)


def write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def plain(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories with runs")
    parser.add_argument("--against", type=Path, help="runs to compare them with, question by question")
    parser.add_argument("--output", type=Path, required=True, help="directory for summary.{md,json,png}")
    options = parser.parse_args(argv)
    try:
        found = [one for directory in options.runs for one in find(directory)]
        against = find(options.against) if options.against else []
        compared = compare(found, against) if against else []
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    everything = found + against
    text = main_table(everything)
    if any(one.benchmark in BENCHMARKS for one in everything):
        text += ["", *paper_table(everything)]
    if compared:
        text += ["", *comparison_table(compared)]
    wrong = [f"{one.benchmark}, {one.model}: {problem}" for one in everything for problem in one.problems]
    if wrong:
        text += ["", "Not to be published:", "", *(f"- {line}" for line in wrong)]
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "summary.md", "\n".join(text) + "\n")
    picture(options.output / "summary.png", everything)
    data = {"runs": [asdict(one) for one in everything], "comparisons": [asdict(one) for one in compared]}
    write(options.output / "summary.json", json.dumps(plain(data), indent=1) + "\n")
    print("\n".join(main_table(everything) + ([""] + comparison_table(compared) if compared else [])))
    for line in wrong:
        print(f"not to be published: {line}", file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
