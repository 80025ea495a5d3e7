"""Numbers from reviews: both releases, what is missing or was not graded, tables, pictures and comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval import summarize
from eval.paper import PAPER
from eval.reviews import RunError, read
from tests.conftest import REPO

SETTINGS = {
    "benchmark": "aime24",
    "model": "tiny",
    "evalscope": "1.14.1",
    "questions": "2",
    "samples": "2",
    "limit": "",
}


def review(
    sample: int, score: float | None, *, status: str = "success", name: str = "acc", metadata: object = None
) -> dict:
    value = {} if score is None else {name: score}
    inner = {"value": value, "status": status, "metadata": metadata or {}, "main_score_name": None}
    scored = {"score": inner, "sample_id": sample, "group_id": sample // 2, "generation_index": sample % 2}
    return {"index": sample, "sample_score": scored}


def prediction(sample: int, tokens: int, reason: str = "stop") -> dict:
    return {"index": sample, "model_output": {"choices": [{"stop_reason": reason}], "usage": {"output_tokens": tokens}}}


def lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def run_in(root: Path, reviews: list, predictions: list | None = None, **settings: str) -> Path:
    (root / "evalscope").mkdir(parents=True, exist_ok=True)
    (root / "run.json").write_text(json.dumps(SETTINGS | settings))
    lines(root / "evalscope" / "reviews" / "tiny" / "aime24_default.jsonl", reviews)
    if predictions:
        lines(root / "evalscope" / "predictions" / "tiny" / "aime24_default.jsonl", predictions)
    return root


GOOD = [review(0, 1.0), review(1, 0.0), review(2, 1.0), review(3, 1.0)]


def test_a_complete_run(tmp_path):
    answers = [prediction(0, 10), prediction(1, 30, "max_tokens"), prediction(2, 20), prediction(3, 20)]
    (one,) = summarize.find(run_in(tmp_path, GOOD, answers))
    assert (one.average, one.questions, one.samples, one.problems) == (75.0, 2, 2, [])
    assert one.error == pytest.approx(25.0) and one.pass_at_k == {1: 75.0, 2: 100.0}
    assert one.tokens == {"mean": 20.0, "median": 20.0, "max": 30.0} and one.truncated == 25.0


def test_the_older_release(tmp_path):
    """All samples of a question are one line, and its tokens one number."""

    def row(index: int, *results: float) -> dict:
        choices = [{"finish_reason": "stop", "review": {"result": result}} for result in results]
        return {"index": index, "choices": choices, "usage": {"completion_tokens": 40}}

    root = run_in(tmp_path, [], evalscope="0.17.1")
    (root / "evalscope" / "reviews" / "tiny" / "aime24_default.jsonl").unlink()
    lines(
        root / "evalscope" / "20261126_010101" / "reviews" / "tiny" / "aime24_default.jsonl",
        [row(0, 1.0, 0.0), row(1, 1.0, 1.0)],
    )
    (one,) = summarize.find(root)
    assert (one.average, one.samples, one.problems, one.tokens["mean"]) == (75.0, 2, [], 20.0)


def test_a_wrong_program_is_graded(tmp_path):
    """Its result is the same number as that of a failed grader."""
    why = '{"error_code": -2, "error_message": "Wrong answer"}'
    wrong = {"eval_results": {"0": [[-2]]}, "final_metadata": [[why]]}
    (one,) = summarize.find(run_in(tmp_path, [*GOOD[:3], review(3, 0.0, metadata=wrong)]))
    assert (one.average, one.problems) == (50.0, [])


FAILED = {"eval_results": {"0": [[-2]]}, "final_metadata": [["{}"]]}


@pytest.mark.parametrize(
    ("reviews", "settings", "problems"),
    [
        (
            [*GOOD[:3], review(3, 0.0, metadata=FAILED)],
            {},
            [
                "1 samples have no grade, because the grader itself failed",
                "1 questions have another number of scored samples than 2",
            ],
        ),
        (
            [*GOOD[:3], review(3, None, status="excluded")],
            {},
            ["1 samples are not scored", "1 questions have another number of scored samples than 2"],
        ),
        (GOOD[:2], {}, ["expected 2 questions, found 1"]),
        (GOOD[:3], {}, ["1 questions have another number of scored samples than 2"]),
        ([*GOOD, '{"index": 4, "sample'], {}, ["1 lines of the reviews cannot be read"]),
        (GOOD, {"limit": "2"}, ["only the first 2 questions were asked"]),
    ],
)
def test_what_is_not_to_be_published(tmp_path, capsys, reviews, settings, problems):
    root = run_in(tmp_path / "run", reviews, **settings)
    assert summarize.main([str(root), "--output", str(tmp_path / "out")]) == 2
    (one,) = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert one["problems"] == problems
    shown = capsys.readouterr()
    assert all(f"not to be published: aime24, tiny: {problem}" in shown.err for problem in problems)
    assert (
        "(not to be published)" in shown.out and "Not to be published:" in (tmp_path / "out" / "summary.md").read_text()
    )


def test_a_failed_grader_is_no_wrong_answer(tmp_path):
    (one,) = summarize.find(run_in(tmp_path, [*GOOD[:3], review(3, 0.0, metadata=FAILED)]))
    assert one.average == 75.0 and one.scores == {"aime24_default/0": 0.5, "aime24_default/1": 1.0}


def test_a_repeated_sample_counts_once(tmp_path):
    """An interruption may leave two lines of one sample."""
    (one,) = summarize.find(run_in(tmp_path, [*GOOD, review(0, 1.0)]))
    assert one.average == 75.0 and one.problems == []


def test_gpqa_has_another_name_for_its_score(tmp_path):
    rows = [review(sample, float(sample > 0), name="accuracy") for sample in range(4)]
    assert summarize.find(run_in(tmp_path, rows, benchmark="gpqa"))[0].average == 75.0


def test_the_paper_beside_ours(tmp_path):
    root = run_in(tmp_path / "run", GOOD)
    assert summarize.main([str(root), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "| InfiR2-7B-Instruct-FP8 (7B, paper) | 40.62 | 55.73 | 45.33 | 40.31 |" in text
    assert "| InfiR2-1.5B-Instruct-FP8 (1.5B, paper) | 18.45 | 17.39 | 29.48 | 17.10 |" in text
    assert "| tiny (measured) |  | 75.00 ± 49.00 |  |  |" in text
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_papers_numbers():
    text = (REPO / "README.md").read_text()
    for rows in PAPER.values():
        for name, values in rows.items():
            assert f"| {name} | {' | '.join(f'{value:.2f}' for value in values.values())} |" in text


def test_two_runs_question_by_question(tmp_path):
    first = run_in(tmp_path / "bf16", GOOD, model="bf16")
    second = run_in(tmp_path / "fp8", [*GOOD[:3], review(3, 0.0)], model="fp8")
    assert summarize.main([str(second), "--against", str(first), "--output", str(tmp_path)]) == 0
    (compared,) = json.loads((tmp_path / "summary.json").read_text())["comparisons"]
    assert compared["difference"] == -25.0 and compared["inside_noise"] is True
    assert "| AIME 24 | bf16 | fp8 | 2 | -25.00 |" in (tmp_path / "summary.md").read_text()


def test_other_questions_cannot_be_compared(tmp_path, capsys):
    first = run_in(tmp_path / "a", GOOD)
    second = run_in(tmp_path / "b", GOOD[:2])
    assert summarize.main([str(second), "--against", str(first), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: aime24: tiny and tiny have not the same questions\n"


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (None, "expected a run of eval/*_eval.sh (run.json), found none"),
        ([], "no sample is scored"),
        ([review(0, None, status="excluded")], "no sample is scored"),
    ],
)
def test_nothing_to_summarize(tmp_path, made, line):
    if made is not None:
        run_in(tmp_path, made)
    words = [sys.executable, REPO / "eval" / "summarize.py", tmp_path, "--output", tmp_path / "out"]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"error: {tmp_path}: {line}\n")
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_read(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="run.json: expected the settings of an evaluation"):
        read(tmp_path)
