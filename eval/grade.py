"""evalscope on LiveCodeBench, with a grader whose clock starts when the program does. Only inside eval/isolate.sh.

    python -m eval.grade eval ...        the flags of evalscope, 1.14.1 or 0.17.1

evalscope's own grader counts the start of its processes as the program's time, and cannot tell a program that killed
its process from a grader that did not start: on a loaded machine it gives 0 to right programs. Here each program is a
fork of a process that has all imports behind it. Limits and verdicts are evalscope's; only where the grader itself
fails there is none, and a line in WORK_DIR/grading/ungraded.jsonl.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from evalscope.benchmarks.live_code_bench import evaluate_utils
from evalscope.cli.cli import run_cmd

START = 120.0  # seconds that the start of a process may take
TESTS = "evalscope.benchmarks.live_code_bench.testing_util"
Verdict = tuple[list[Any], dict[str, Any]]


class GraderFailed(Exception):
    """No verdict about the program. evalscope catches it, and keeps an empty one."""


def work(answer: Connection, sample: dict[str, Any], program: str, debug: bool, timeout: int) -> None:
    """In a process of its own: run all tests and say what came out."""
    from evalscope.benchmarks.live_code_bench.testing_util import run_test

    answer.send("started")
    answer.send(run_test(sample, test=program, debug=debug, timeout=timeout))


def verdict(context: Any, sample: dict[str, Any], program: str, timeout: int, debug: bool) -> Verdict:
    """One result per test, and evalscope's metadata. Raises GraderFailed."""
    tests = len(json.loads(sample["input_output"])["inputs"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, sample, program, debug, timeout))
    try:
        process.start()
        theirs.close()
        if not ours.poll(START):
            raise GraderFailed(f"the process did not start within {START:g} s")
        ours.recv()
    except (EOFError, OSError) as error:
        raise GraderFailed(f"the process did not start: {error!r}") from error
    else:
        if not ours.poll((timeout + 1) * tests):
            return [-1] * tests, {"error_code": -3, "error_message": "Global time limit exceeded"}
        try:
            return ours.recv()
        except EOFError:
            process.join()
            said = f"The program ended its process with status {process.exitcode}"
            return [-1] * tests, {"error_code": -4, "error_message": said}
    finally:
        ours.close()
        if process.pid is not None:
            process.kill()
            process.join()


def checker(context: Any, work_dir: Path) -> Callable[..., Verdict]:
    """Stands for evaluate_utils.codegen_check_correctness; its failures so far are forgotten."""
    ungraded = work_dir / "grading" / "ungraded.jsonl"  # isolate.sh brings directories back
    ungraded.parent.mkdir(exist_ok=True)
    ungraded.write_text("")

    def checked(sample: dict[str, Any], generation: str, timeout: int, debug: bool = True) -> Verdict:
        try:
            return verdict(context, sample, generation, timeout, debug)
        except GraderFailed as error:
            with ungraded.open("a") as file:
                file.write(json.dumps({"why": str(error), "program": generation}) + "\n")
            raise

    return checked


def main() -> None:
    """Grade with evalscope's command line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([TESTS, "eval.grade"])
    work_dir = Path(sys.argv[sys.argv.index("--work-dir") + 1])
    evaluate_utils.codegen_check_correctness = checker(context, work_dir)
    run_cmd()


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    main()
