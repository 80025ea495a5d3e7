"""evalscope 1.14.1 on LiveCodeBench, which only generates: no program that the model wrote is run.

    python -m eval.generate eval ...        the flags of evalscope

evalscope grades each sample right after it was generated, and has no flag against that. Here each sample is marked as
excluded instead; `evalscope eval ... --use-cache --rerun-review` grades them later (eval/isolate.sh).
"""

from __future__ import annotations

import sys
from typing import Any

from evalscope.api.metric import Score
from evalscope.benchmarks.live_code_bench.live_code_bench_adapter import LiveCodeBenchAdapter
from evalscope.cli.cli import run_cmd
from evalscope.constants import ScoreStatus


def ungraded(
    self: LiveCodeBenchAdapter, original_prediction: str, filtered_prediction: str, reference: str, task_state: Any
) -> Score:
    """Stands for LiveCodeBenchAdapter.match_score."""
    return Score(
        extracted_prediction=filtered_prediction,
        prediction=original_prediction,
        status=ScoreStatus.EXCLUDED,
        explanation="not graded yet",
    )


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    LiveCodeBenchAdapter.match_score = ungraded
    run_cmd()
