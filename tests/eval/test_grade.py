"""The grader of LiveCodeBench's programs, on programs of ours: what it says of each, and when it says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval import reviews
from tests.conftest import REPO

# In a process of its own: forks need a main module that is not pytest.
PROGRAM = """
import json, multiprocessing, pathlib, sys
from eval import grade
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([grade.TESTS, "eval.grade"])
sample = {"input_output": json.dumps({"inputs": ["1 2\\n"], "outputs": ["3\\n"], "fn_name": None})}
grade.START = float(sys.argv[2])
check = grade.checker(context, pathlib.Path(sys.argv[3]))
for program in json.loads(sys.argv[1]):
    try:
        results, metadata = check(sample, program, timeout=1, debug=False)
        print("VERDICT", json.dumps([all(result is True for result in results), metadata]))
    except grade.GraderFailed as error:
        print("VERDICT", json.dumps(["failed", str(error)]))
"""


def verdicts(work_dir: Path, *programs: str, start: float = 120) -> list[list]:
    words = [sys.executable, "-c", PROGRAM, json.dumps(programs), str(start), str(work_dir)]
    result = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=300)
    found = [line.split(" ", 1)[1] for line in result.stdout.splitlines() if line.startswith("VERDICT ")]
    assert len(found) == len(programs), result.stdout + result.stderr
    return [json.loads(line) for line in found]


def test_verdicts(tmp_path):
    right = "a, b = map(int, input().split())\nprint(a + b)"
    spins = "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True:\n    pass"
    ends = "import ctypes\nctypes.string_at(0)"
    found = verdicts(tmp_path, right, right.replace("+", "*"), "", spins, ends, right)
    assert [verdict for verdict, _ in found] == [True, False, False, False, False, True]
    wrong, empty, slow, killed = (metadata for _, metadata in found[1:5])
    assert wrong["error_code"] == -2 and "Wrong answer" in wrong["error_message"]
    assert empty["error_code"] == -4
    assert slow == {"error_code": -3, "error_message": "Global time limit exceeded"}
    assert (tmp_path / "grading" / "ungraded.jsonl").read_text() == ""
    assert killed == {"error_code": -4, "error_message": "The program ended its process with status -11"}


def test_a_grader_that_does_not_start_says_nothing_of_the_program(tmp_path):
    assert verdicts(tmp_path, "print(3)", start=0.0) == [["failed", "the process did not start within 0 s"]]
    (line,) = (tmp_path / "grading" / "ungraded.jsonl").read_text().splitlines()
    assert json.loads(line) == {"why": "the process did not start within 0 s", "program": "print(3)"}
    verdicts(tmp_path, "print(3)")  # graded again
    assert (tmp_path / "grading" / "ungraded.jsonl").read_text() == ""


@pytest.mark.parametrize("lines", [0, 2])
def test_failures_are_counted_where_reviews_do_not_tell(tmp_path, lines):
    """Release 0.17.1 keeps no trace of them."""
    place = tmp_path / "evalscope" / "20261126_010101" / "reviews" / "tiny"
    place.mkdir(parents=True)
    row = {"index": 0, "choices": [{"review": {"result": 0.0}}], "usage": {"completion_tokens": 4}}
    (place / "live_code_bench_release_v5.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"benchmark": "livecodebenchv5", "model": "tiny"}))
    (tmp_path / "evalscope" / "grading").mkdir()
    (tmp_path / "evalscope" / "grading" / "ungraded.jsonl").write_text('{"why": "x"}\n' * lines)
    assert reviews.read(tmp_path).ungraded == lines
