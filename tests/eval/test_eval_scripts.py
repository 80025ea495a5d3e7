"""The four scripts with the real evalscope: known answers give the known result, interruptions cost nothing, errors
are one line, and nothing is left running.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.eval import samples
from tests.eval.conftest import BENCHMARKS, NAMESPACES, SERVER, Evaluation, assert_quoted, processes_with, wait_until

isolation = pytest.mark.skipif(
    subprocess.run(NAMESPACES, capture_output=True).returncode != 0, reason="user namespaces are off on this machine"
)
LIMITS = {"aime24": 31000, "aime25": 31000, "gpqa": 26000, "livecodebenchv5": 27000}


def evaluation(benchmark, tmp_path, local_data, url, **env) -> Evaluation:
    data = {"DATASET_LOCAL": local_data / benchmark, "SERVER_URL": url, "SERVED_NAME": "tiny"}
    return Evaluation(benchmark, tmp_path / "it's out", data | env)


def good(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def refused(result: subprocess.CompletedProcess, status: int = 1) -> str:
    """The error, which is the last line."""
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0].removeprefix("error: ")


def known(benchmark, release, tmp_path, local_data, scripted) -> Evaluation:
    """Eight samples of questions with known answers, in a release of evalscope: what is asked, and the result."""
    server = scripted()
    one = evaluation(benchmark, tmp_path, local_data, server.url, EVALSCOPE=release)
    result = good(one.run())
    requests = server.requests()
    truth = samples.TRUTH[benchmark]
    n = 8 if release == "0.17.1" else None  # it asks for all samples of a question at once
    assert len(requests) == 8 * len(truth) // (n or 1)
    for request in requests:
        body, text = request["body"], json.dumps(request["body"])
        assert (body["max_tokens"], body["temperature"], body["top_p"]) == (LIMITS[benchmark], 0.65, 0.95)
        assert not {"seed", "max_new_tokens", "do_sample"} & body.keys() and body.get("n") == n
        assert "<|im_start|>" not in text and "{{" not in text and "<think>" not in text
        assert body["model"] == "tiny" and request["path"] == "/v1/chat/completions"
    quotes = {"aime24": "aime", "aime25": "aime", "gpqa": f"gpqa {release}"}
    assert_quoted(requests, quotes.get(benchmark, benchmark))
    if benchmark == "livecodebenchv5":
        assert "programs that the model wrote must run" in result.stderr and not (one.out / "summary.json").exists()
        return one
    summary = one.summary()
    assert summary["average"] == pytest.approx(100 * sum(truth) / 8 / len(truth), abs=1e-9)
    assert (summary["questions"], summary["samples"], summary["problems"]) == (len(truth), 8, [])
    # All done: no server is needed any more.
    server.process.kill()
    assert "nothing to do" in good(one.run()).stderr
    return one


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_known_answers_give_the_known_result(benchmark, tmp_path, local_data, scripted):
    one = known(benchmark, "1.14.1", tmp_path, local_data, scripted)
    if benchmark != "livecodebenchv5":
        truth, summary = samples.TRUTH[benchmark], one.summary()
        assert summary["tokens"]["mean"] == 5 and summary["truncated"] == 0
        assert summary["pass_at_k"]["8"] == pytest.approx(100 * sum(right > 0 for right in truth) / len(truth))


def graded(one: Evaluation) -> subprocess.CompletedProcess:
    """Generated without permission to run programs, then graded with it."""
    assert "programs that the model wrote must run" in good(one.run(GENERATED_NUM=2)).stderr
    return one.run(GENERATED_NUM=2, ALLOW_CODE_EXECUTION=1, ISOLATION="namespaces")


@isolation
def test_programs_are_graded_in_isolation(tmp_path, local_data, scripted):
    """Right are every second program of `sum`, all of `double`, none of `edge`; of none two are asked for twice."""
    server = scripted()
    one = evaluation("livecodebenchv5", tmp_path, local_data, server.url)
    result = good(graded(one))
    assert len(server.requests()) == 6
    assert one.summary()["average"] == pytest.approx(50) and one.summary()["problems"] == []
    assert "nothing to do" in good(one.run(GENERATED_NUM=2, ALLOW_CODE_EXECUTION=1)).stderr, result.stderr


def test_an_interrupted_run_goes_on(tmp_path, local_data, scripted):
    """Samples that were answered are not asked for again."""
    server = scripted("slow")
    one = evaluation("aime24", tmp_path, local_data, server.url, EVAL_BATCH=1)
    process = one.start()
    wait_until(lambda: len(server.requests()) >= 5, "no requests")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "run the same command again to continue" in one.shown()
    assert processes_with(str(one.out)) == []
    before = len(server.requests())
    good(one.run())
    assert before < 24 and len(server.requests()) <= 25  # the one that was interrupted, again
    assert one.summary()["samples"] == 8 and one.summary()["problems"] == []


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ("other_model", "{url}: expected the model tiny, found another"),
        ("never_ready", "{url}/health: expected status 200 within 2 s, found HTTP status 503"),
    ],
)
def test_a_server_that_is_not_the_right_one(tmp_path, local_data, scripted, behaviour, line):
    server = scripted(behaviour)
    one = evaluation("aime24", tmp_path, local_data, server.url, READY_TIMEOUT=2)
    assert refused(one.run()) == line.format(url=server.url)
    assert server.requests() == []


def test_a_server_that_answers_garbage(tmp_path, local_data, scripted):
    server = scripted("garbage")
    one = evaluation("aime24", tmp_path, local_data, server.url)
    line = refused(one.run())
    assert line.startswith("evalscope failed with status") and f"see {one.out}/evalscope.log" in line


def test_no_server(tmp_path, local_data):
    one = evaluation("aime24", tmp_path, local_data, "http://127.0.0.1:9", READY_TIMEOUT=1)
    assert refused(one.run()) == "http://127.0.0.1:9/health: expected status 200 within 1 s, found no answer"


# ---------------------------------------------------------------- a server of its own

FAKE = f"""#!/bin/sh
# Stands for `python -m sglang.launch_server`: any other program of this Python is the real one.
if [ "$1" = -m ] && [ "$2" = sglang.launch_server ]; then
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      --port) port=$2 ;;
      --served-model-name) name=$2 ;;
    esac
    shift
  done
  [ -z "$FAKE_DIES" ] || {{ echo "CUDA error: no device"; exit 7; }}
  sleep 1000 &
  exec {sys.executable} {SERVER} --port "$port" --name "$name" --log "$FAKE_LOG" --behaviour "${{FAKE_BEHAVIOUR:-good}}"
fi
exec {sys.executable} "$@"
"""


@pytest.fixture
def own(tmp_path, local_data) -> Evaluation:
    """With SERVER=sglang, which is a scripted one."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE)
    python.chmod(0o755)
    model = tmp_path / "it's tiny"
    model.mkdir()
    config = {"max_position_embeddings": 32768, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 256}
    (model / "config.json").write_text(json.dumps(config))
    env = {
        "PYTHON": python,
        "SERVER": "sglang",
        "MODEL_PATH": model,
        "SERVED_NAME": "tiny",
        "FAKE_LOG": tmp_path / "log",
    }
    env |= {"DATASET_LOCAL": local_data / "aime24"}
    return Evaluation("aime24", tmp_path / "it's out", env)


def nothing_left(one: Evaluation) -> None:
    assert processes_with(str(one.out)) == []
    assert processes_with(f"FAKE_LOG={one.env['FAKE_LOG']}") == []


def test_the_server_is_stopped_at_the_end(own):
    result = good(own.run())
    assert "stopping the server" in result.stderr and own.summary()["average"] == pytest.approx(50)
    nothing_left(own)
    keys = {json.loads(line)["authorization"] for line in Path(own.env["FAKE_LOG"]).read_text().splitlines()}
    assert len(keys) == 1 and re.fullmatch(r"Bearer [0-9a-f]{32}", keys.pop())


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"FAKE_DIES": 1}, "the server ended before it was ready: CUDA error: no device; see {out}/server.log"),
        (
            {"FAKE_BEHAVIOUR": "never_ready", "READY_TIMEOUT": 2},
            "/health: expected status 200 within 2 s, found HTTP status 503",
        ),
        ({"FAKE_BEHAVIOUR": "other_model"}, ": expected the model tiny, found another"),
        (
            {"FAKE_BEHAVIOUR": "dies", "EVAL_BATCH": 1},
            "the server died while evalscope ran: out of memory; see {out}/server.log",
        ),
        ({"FAKE_BEHAVIOUR": "garbage"}, "evalscope failed with status"),
    ],
)
def test_a_server_that_goes_wrong_leaves_nothing(own, env, line):
    assert line.format(out=own.out) in refused(own.run(**env))
    nothing_left(own)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
def test_a_signal_stops_everything(own, sent):
    process = own.start(FAKE_BEHAVIOUR="slow", EVAL_BATCH=1)
    wait_until(lambda: "answers with tiny" in own.shown(), "not ready")
    time.sleep(1)
    process.send_signal(sent)
    assert process.wait(60) == 128 + sent
    nothing_left(own)


def test_a_script_that_is_killed_takes_the_server_with_it(own):
    process = own.start(FAKE_BEHAVIOUR="slow", EVAL_BATCH=1)
    wait_until(lambda: "answers with tiny" in own.shown(), "not ready")
    process.kill()
    process.wait()
    server = f"--log\0{own.env['FAKE_LOG']}"  # its command line; it has a child that it alone would stop
    wait_until(lambda: processes_with(server) == [], "left", 20)
    for pid in processes_with(f"FAKE_LOG={own.env['FAKE_LOG']}"):
        os.kill(pid, signal.SIGKILL)


def test_a_port_in_use(own, scripted):
    port = scripted().url.rsplit(":", 1)[1]
    assert refused(own.run(API_PORT=port)) == f"API_PORT: {port} is in use"
    nothing_left(own)


def test_a_full_disk(own):
    line = refused(own.run(MIN_FREE_MB=10**9))
    assert line.startswith("OUT_DIR: expected 1000000000 MB of free space, found ") and line.endswith(f" in {own.out}")


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"MODEL_PATH": ""},
            "MODEL_PATH: set it to a checkpoint in the Hugging Face format, or SERVER_URL to a server",
        ),
        ({"MODEL_PATH": "/nowhere"}, "MODEL_PATH: expected a directory with config.json, found /nowhere"),
        ({"SERVER": "vllm"}, "SERVER: expected one of sglang transformers, found 'vllm'"),
        ({"EVALSCOPE": "1.0.0"}, "EVALSCOPE: expected one of 1.14.1 0.17.1, found '1.0.0'"),
        ({"GENERATED_NUM": "0"}, "GENERATED_NUM: expected an integer > 0, found '0'"),
        ({"TEMPERATURE": "0"}, "TEMPERATURE: at 0 all 8 samples of a question are the same; set GENERATED_NUM=1"),
        ({"TEMPERATURE": "hot"}, "TEMPERATURE: expected a number, found 'hot'"),
        ({"DATASET_LOCAL": "/nowhere"}, "DATASET_LOCAL: expected a directory, found /nowhere"),
        ({"PROMPT_TOKENS": "2000"}, "MAX_NEW_TOKENS: 31000 beside PROMPT_TOKENS=2000 need a context of 33000 tokens"),
        (
            {"EVALSCOPE": "0.17.1", "SERVER": "transformers"},
            "SERVER: transformers serve gives one sample for a request of n=8",
        ),
    ],
)
def test_what_is_refused_before_anything_starts(own, env, line):
    assert refused(own.run(**env)).startswith(line)
    assert not own.out.exists()


def test_another_run_in_the_same_directory(own):
    good(own.run())
    assert refused(own.run(TEMPERATURE="0.7")) == (
        f"OUT_DIR: {own.out} holds a run with temperature '0.65', this one has '0.7'; set another OUT_DIR"
    )


def test_a_part_of_the_questions_is_not_to_be_published(own):
    result = own.run(LIMIT=2)
    assert result.returncode == 2, result.stderr
    assert "not to be published: aime24, tiny: only the first 2 questions were asked" in result.stderr
    assert own.summary()["questions"] == 2


def test_a_dry_run_prints_and_starts_nothing(own):
    result = good(own.run("--dry-run", "--disable-radix-cache"))
    assert not own.out.exists() and not Path(own.env["FAKE_LOG"]).exists()
    assert re.search(r"sglang\.launch_server", result.stdout) and "--disable-radix-cache" in result.stdout
    assert "--repeats 8" in result.stdout and "seed" not in result.stdout
    for flag in ("--host 127.0.0.1", "--tp-size 1", "--dp-size 1", "--context-length 32768", "--api-key"):
        assert flag in result.stdout


def test_the_flags_of_the_server_are_those_of_the_pinned_one(own):
    """Of SGLang 0.5.3.post1, as its own parser declares them."""
    result = good(own.run("--dry-run", MAX_RUNNING_REQUESTS=8, MEM_FRACTION=0.8))
    server = result.stdout.split("evalscope.cli.cli")[0]
    facts = json.loads((REPO / "training" / "contract" / "sglang-server.json").read_text())
    known = {option for row in facts["options"] for option in row["options"]}
    used = set(re.findall(r"^  (--[a-z-]+)", server, re.MULTILINE))
    assert {"--tp-size", "--mem-fraction-static", "--max-running-requests"} <= used <= known


def test_several_workers_get_a_router(own):
    result = good(own.run("--dry-run", SERVER_URL="http://127.0.0.1:1 http://127.0.0.1:2", MODEL_PATH=""))
    facts = json.loads((REPO / "training" / "contract" / "sglang-router.json").read_text())
    known = {option for row in facts["options"] for option in row["options"]}
    router = result.stdout.split("evalscope.cli.cli")[0]
    assert "sglang_router.launch_router" in router and "--worker-urls http://127.0.0.1:1 http://127.0.0.1:2" in router
    assert set(re.findall(r"^  (--[a-z-]+)", router, re.MULTILINE)) <= known


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_help(benchmark):
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    result = good(
        subprocess.run([*Evaluation(benchmark, Path("/")).command, "--help"], env=env, capture_output=True, text=True)
    )
    assert f"MAX_NEW_TOKENS={LIMITS[benchmark]} " in result.stdout and result.stderr == ""
