"""The benchmark of rollout precisions, on runs of two rollouts."""

from __future__ import annotations

import re
import sys

from tests.conftest import REPO, ok, run


def test_three_runs_and_a_table(tiny_stages, tmp_path):
    """A model that has learned nothing is never right: its groups without signal are kept."""
    flags = "--rollout-max-response-len 4 --save-interval 2".split()
    result = ok(
        run(
            *(
                sys.executable,
                REPO / "benchmarks" / "fp8_rollout.py",
                "--data",
                tiny_stages,
                "--output",
                tmp_path / "out",
            ),
            *("--seeds", 7, "--num-rollout", 2, "--", *flags),
            env={"DYNAMIC_SAMPLING": "0", "OMP_NUM_THREADS": "1"},
        )
    )
    rows = re.findall(r"^\| 7 \| (.+?) \| (\d\.\d+) \| \d\.\d+ \| (\S+) \| (\S+) \|", result.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["BF16 rollouts, TIS", "FP8 rollouts, TIS", "FP8 rollouts, no TIS"]
    assert all(1.0 <= float(error) < 1.05 and float(kl) >= 0.0 and 0.9 < float(tis) < 1.1 for _, error, kl, tis in rows)
    assert rows[1][1] == rows[2][1]  # the first rollouts are the same, and rewards of 0 teach nothing
