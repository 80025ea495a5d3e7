"""evalscope 0.17.1, which scores as the paper did, in the environment of eval/setup_strict.sh."""

from __future__ import annotations

import signal

import pytest

from tests.conftest import REPO
from tests.eval.conftest import BENCHMARKS, wait_until
from tests.eval.test_eval_scripts import evaluation, good, graded, isolation, known

pytestmark = pytest.mark.skipif(
    not (REPO / ".venv-strict" / "bin" / "python").exists(), reason="no .venv-strict; bash eval/setup_strict.sh"
)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_known_answers_give_the_known_result(benchmark, tmp_path, local_data, scripted):
    known(benchmark, "0.17.1", tmp_path, local_data, scripted)


@isolation
def test_programs_are_graded_in_isolation(tmp_path, local_data, scripted):
    server = scripted()
    one = evaluation("livecodebenchv5", tmp_path, local_data, server.url, EVALSCOPE="0.17.1")
    good(graded(one))
    assert len(server.requests()) == 3
    assert one.summary()["average"] == pytest.approx(50) and one.summary()["problems"] == []


def test_an_interrupted_run_goes_on(tmp_path, local_data, scripted):
    server = scripted("slow")
    one = evaluation("aime24", tmp_path, local_data, server.url, EVALSCOPE="0.17.1", EVAL_BATCH=1)
    process = one.start()
    wait_until(lambda: len(server.requests()) >= 2, "no requests")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    good(one.run())
    assert len(server.requests()) <= 4  # the one that was interrupted, again
    assert one.summary()["samples"] == 8 and one.summary()["problems"] == []
