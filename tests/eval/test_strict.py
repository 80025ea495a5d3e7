"""evalscope 0.17.1, which scores as the paper did, in the environment of eval/setup_strict.sh."""

from __future__ import annotations

import json
import signal

import pytest

from tests.conftest import REPO
from tests.eval import samples
from tests.eval.conftest import BENCHMARKS, assert_quoted, wait_until
from tests.eval.test_eval_scripts import LIMITS, evaluation, good, graded, isolation

pytestmark = pytest.mark.skipif(
    not (REPO / ".venv-strict" / "bin" / "python").exists(), reason="no .venv-strict; bash eval/setup_strict.sh"
)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_known_answers_give_the_known_result(benchmark, tmp_path, local_data, scripted):
    server = scripted()
    one = evaluation(benchmark, tmp_path, local_data, server.url, EVALSCOPE="0.17.1")
    result = good(one.run())
    truth = samples.TRUTH[benchmark]
    requests = server.requests()
    assert len(requests) == len(truth)  # all samples of a question in one request
    for request in requests:
        body, text = request["body"], json.dumps(request["body"])
        assert (body["max_tokens"], body["temperature"], body["top_p"]) == (LIMITS[benchmark], 0.65, 0.95)
        assert body["n"] == 8 and body["model"] == "tiny"
        assert not {"seed", "max_new_tokens", "do_sample"} & body.keys()
        assert "<|im_start|>" not in text and "{{" not in text and "<think>" not in text
    assert_quoted(requests, {"aime24": "aime", "aime25": "aime", "gpqa": "gpqa 0.17.1"}.get(benchmark, benchmark))
    if benchmark == "livecodebenchv5":
        assert "programs that the model wrote must run" in result.stderr and not (one.out / "summary.json").exists()
        return
    summary = one.summary()
    assert summary["average"] == pytest.approx(100 * sum(truth) / 8 / len(truth), abs=1e-9)
    assert (summary["questions"], summary["samples"], summary["problems"]) == (len(truth), 8, [])
    server.process.kill()
    assert "nothing to do" in good(one.run()).stderr


@isolation
def test_programs_are_graded_in_isolation(tmp_path, local_data, scripted):
    server = scripted()
    one = evaluation("livecodebenchv5", tmp_path, local_data, server.url, EVALSCOPE="0.17.1")
    good(graded(one, server.url))
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
