"""The real sglang-router in front of two workers."""

from __future__ import annotations

import importlib.util

import pytest

from tests.eval.conftest import processes_with
from tests.eval.test_eval_scripts import evaluation, good

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang_router") is None, reason="sglang-router has no wheel for this Python"
)


def test_two_workers_share_the_questions(tmp_path, local_data, scripted):
    workers = [scripted(), scripted()]
    one = evaluation("aime24", tmp_path, local_data, " ".join(worker.url for worker in workers))
    result = good(one.run())
    # The router writes max_tokens anew.
    bodies = [[row["body"] for row in worker.requests()] for worker in workers]
    asked = [[body for body in some if body["max_completion_tokens"] > 1] for some in bodies]
    assert sum(map(len, asked)) == 24 and min(map(len, asked)) > 0, bodies
    for body in asked[0] + asked[1]:
        assert (body["max_completion_tokens"], body["temperature"], body["top_p"]) == (31000, 0.65, 0.95)
        assert "seed" not in body and len(body["messages"]) == 2
    summary = one.summary()
    # Each worker answers one question right every second time: 4 of 8 in all, or 5.
    assert summary["average"] == pytest.approx(50, abs=100 / 24 + 1e-9)
    assert (summary["questions"], summary["samples"], summary["problems"]) == (3, 8, [])
    assert "stopping the server" in result.stderr and processes_with(str(one.out)) == []
