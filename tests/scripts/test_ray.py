"""Real Ray: heads and workers that start, are killed, start again and stop alone; jobs that are followed to their end.

All clusters live under one short directory, under a HOME with a token (which `ray.init()` leaves behind and which
changes how a head starts) and behind proxies that lead nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import REPO, ok, run

START, STOP = REPO / "scripts" / "ray_start.sh", REPO / "scripts" / "ray_stop.sh"
DEAD_PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}

# What a recipe does with scripts/lib/ray.sh, no more.
LAUNCHER = """
set -euo pipefail
source "$REPO/scripts/lib/all.sh"
source "$REPO/scripts/lib/ray.sh"
DRY_RUN=0
hold_lock "$OUT_DIR/.lock" "$@"
find_ray
ADDRESS=$(ray_address)
ID=$(find_job "$ADDRESS" "$OUT_DIR")
if [[ -z $ID ]]; then
  ID=job-$$
  COMMAND=("$RAY" job submit --no-wait --address "$ADDRESS" --submission-id "$ID"
    --metadata-json "$META" --runtime-env-json "$(runtime_env '' "VALUE=$VALUE")" -- "$@")
  submit_job "$ADDRESS" "$ID"
fi
follow_job "$ADDRESS" "$ID" "$OUT_DIR/train.log"
printf '%s|%s|%s\\n' "$STATUS" "$STOPPED" "$JOB_MESSAGE" >"$OUT_DIR/end"
exit "$((STOPPED ? STOPPED : STATUS))"
"""


@dataclass
class Cluster:
    """One RAY_TEMP_DIR, and what it takes to use it."""

    directory: Path
    home: Path
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.env = {"RAY_TEMP_DIR": str(self.directory), "HOME": str(self.home), "NUM_GPUS": "2", **DEAD_PROXY}

    def start(self, *flags: object, **env: str) -> subprocess.CompletedProcess:
        return run("bash", START, *(flags or ("--any-port",)), env=self.env | env)

    def stop(self) -> subprocess.CompletedProcess:
        return run("bash", STOP, env=self.env)

    def processes(self) -> dict[int, str]:
        """Command line by process id, as ray_stop.sh sees the cluster."""
        lines = ok(run("bash", STOP, "--dry-run", env=self.env)).stdout.splitlines()
        return {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in lines}

    def lasting(self) -> set[int]:
        """Its daemons and the drivers of jobs; Ray's idle workers come and go."""
        kinds = ("/gcs_server ", "/raylet --", "ray-dashboard", "Agent", "log_monitor", "monitor.py", "job.py")
        return {pid for pid, command in self.processes().items() if any(kind in command for kind in kinds)}

    def addresses(self) -> list[str]:
        return (self.directory / "head").read_text().split()

    def lib(self, code: str, *words: object, **env: str) -> subprocess.CompletedProcess:
        """Runs Bash code with the library loaded."""
        libs = 'source "$REPO/scripts/lib/all.sh"; source "$REPO/scripts/lib/ray.sh"'
        script = f'set -euo pipefail; REPO="{REPO}"; {libs}; DRY_RUN=0; {code}'
        return run("bash", "-c", script, "bash", *words, env=self.env | env)

    def launcher(self, out: Path, *command: object, value: str = "") -> subprocess.Popen:
        """A launcher of `command` in a session of its own; its output goes to out/shown."""
        out.mkdir(exist_ok=True)
        env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "REPO": str(REPO), "OUT_DIR": str(out)} | self.env
        env |= {"META": json.dumps({"infir2_out_dir": str(out)}), "VALUE": value}
        script(out, LAUNCHER, "launch.sh")
        with (out / "shown").open("ab") as shown:
            return subprocess.Popen(
                ["bash", str(out / "launch.sh"), *map(str, command)],
                env=env,
                stdout=shown,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def job(self, out: Path, *command: object, value: str = "") -> tuple[int, str, list[str]]:
        """Runs a job to its end: the launcher's status, its `STATUS|STOPPED|MESSAGE`, the lines of the log."""
        status = self.launcher(out, *command, value=value).wait(300)
        end = (out / "end").read_text().strip() if (out / "end").exists() else (out / "shown").read_text()
        return status, end, (out / "train.log").read_text().splitlines()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short directory, as the paths of sockets have a limit, and nothing of Ray under it afterwards."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="r"))
    (path / "home" / ".ray").mkdir(parents=True)
    (path / "home" / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    yield path
    for directory in path.iterdir():
        ok(Cluster(directory, path / "home").stop())
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def head(place) -> Cluster:
    """A running head, in the longest directory that is allowed."""
    cluster = Cluster(place / "it's one ".ljust(39 - len(f"{place}/"), "x"), place / "home")
    ok(cluster.start())
    return cluster


@pytest.fixture(scope="module")
def spare(place) -> Cluster:
    """A second cluster, to be killed; the name of its directory is the start of the first one's."""
    return Cluster(place / "it's one ".ljust(38 - len(f"{place}/"), "x"), place / "home")


def script(folder: Path, code: str, name: str = "job.py") -> Path:
    path = folder / name
    path.write_text(code)
    return path


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ended(pid: int) -> bool:
    """Gone, or a zombie that its new parent has not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def refused(result: subprocess.CompletedProcess, *parts: str) -> str:
    """The one line of an error, which holds `parts`."""
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and result.stdout == "" and len(lines) == 1, result
    assert lines[0].startswith("error: ") and all(part in lines[0] for part in parts), lines[0]
    return lines[0]


# UP_TO SECONDS [FILE]: one number after the other, until FILE is there.
COUNT = """
import os, sys, time
for number in range(int(sys.argv[1])):
    print("number", number, flush=True)
    time.sleep(float(sys.argv[2]))
    if sys.argv[3:] and os.path.exists(sys.argv[3]):
        break
"""


def numbers(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith("number ")]


# --- jobs


ASK = """
import json, os, ray
print(json.dumps([os.environ[name] for name in ("VALUE", "RAY_USAGE_STATS_ENABLED", "RAY_COLOR_PREFIX")]))
ray.init()
print(ray.get_runtime_context().gcs_address, ray.cluster_resources()["GPU"])
for number in range(2000):
    print("number", number)
"""


def test_a_job_right_after_the_start(head, tmp_path):
    """Its environment arrives whatever is in it, it finds its own cluster, and its output is shown and logged whole."""
    value = 'it\'s "all"\nhere: $ {} \\n $(x) é 試'
    status, end, log = head.job(tmp_path, sys.executable, script(tmp_path, ASK), value=value)
    assert (status, end.split("|")[:2]) == (0, ["0", "0"])
    assert json.dumps([value, "0", "0"]) in log and f"{head.addresses()[1]} 2.0" in log
    assert numbers(log) == numbers((tmp_path / "shown").read_text().splitlines()) == list(range(2000))
    assert not list(tmp_path.glob("train.log.*"))


def test_a_job_that_fails(head, tmp_path):
    status, end, log = head.job(tmp_path, sys.executable, "-c", "print('last words'); raise SystemExit(7)")
    assert status == 1 and end == "1|0|Job entrypoint command failed with exit code 7"
    assert log[-1] == "last words"


def test_output_that_is_not_text(head, tmp_path):
    """Ray cannot stream it: the job's end must be seen nevertheless, and where its output is."""
    code = r"import sys; print('before', flush=True); sys.stdout.buffer.write(b'\xff\xfe\n'); raise SystemExit(3)"
    launcher = head.launcher(tmp_path, sys.executable, "-c", code)
    assert launcher.wait(120) == 1
    assert (tmp_path / "end").read_text().strip().endswith("failed with exit code 3")
    warning = (tmp_path / "shown").read_text().splitlines()[-1]
    assert warning.startswith("warning: Ray could not show all")
    assert b"before\n\xff\xfe\n" in (head.directory / warning.split(": ")[-1]).read_bytes()


SAVE = """
import pathlib, signal, sys, time
def stop(*_):
    print("saving", flush=True)
    time.sleep(5)  # longer than Ray's own patience of 3 s
    pathlib.Path(sys.argv[1], "saved").touch()
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(600)
"""


def test_ctrl_c_stops_the_job_which_may_save(head, tmp_path):
    launcher = head.launcher(tmp_path, sys.executable, script(tmp_path, SAVE), tmp_path)
    wait_for(lambda: "ready" in (tmp_path / "shown").read_text())
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: to the launcher and all that it runs in its group
    assert launcher.wait(120) == 130
    assert (tmp_path / "end").read_text().startswith("130|130|Job was intentionally stopped")
    assert (tmp_path / "saved").exists() and "saved" in (tmp_path / "train.log").read_text().splitlines()
    assert ok(head.lib('find_job "$@"', head.addresses()[0], tmp_path)).stdout.strip() == ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_during_the_submission_leaves_no_job(head, tmp_path, sent):
    launcher = head.launcher(tmp_path, sys.executable, script(tmp_path, COUNT), 600, 1)
    submitted = f"--submission-id\0job-{launcher.pid}\0".encode()

    def submitting() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if submitted in path.read_bytes():
                    return True
        return False

    wait_for(submitting)
    os.killpg(launcher.pid, sent)
    assert launcher.wait(120) == 128 + sent
    assert ok(head.lib('find_job "$@"', head.addresses()[0], tmp_path)).stdout.strip() == ""


def test_a_second_launcher_takes_over_from_a_killed_one(head, tmp_path):
    job = script(tmp_path, COUNT)
    first = head.launcher(tmp_path, sys.executable, job, 10, 1)
    wait_for(lambda: "number 2" in (tmp_path / "shown").read_text())
    found = ok(head.lib('find_job "$@"', head.addresses()[0], tmp_path)).stdout.strip()
    assert found == f"job-{first.pid}"
    assert ok(head.lib('find_job "$@"', head.addresses()[0], tmp_path / "other")).stdout.strip() == ""
    first.kill()
    first.wait()
    status, _, log = head.job(tmp_path, sys.executable, job, 10, 1)
    assert status == 0 and numbers(log) == list(range(10))
    assert sum("Running entrypoint" in line for line in log) == 1
    assert not list(tmp_path.glob("train.log.*"))


def test_a_submission_that_is_refused(head, tmp_path):
    address = head.addresses()[0]
    submit = 'find_ray; COMMAND=("$RAY" job submit --no-wait --submission-id "$2" "${@:3}"); submit_job "$1" "$2"'
    ok(head.lib(submit, address, "twice", "--", "true"))
    refused(head.lib(submit, address, "twice", "--", "true"), "twice already exists")
    refused(head.lib(submit, address, "x", "--runtime-env-json", "{", "--", "true"), "job x was not accepted", address)
    refused(head.lib(submit, "http://127.0.0.1:9", "x", "--", "true"), "Failed to connect to Ray")
    refused(head.lib('find_job "$@"', "http://127.0.0.1:9", tmp_path), "http://127.0.0.1:9", "Failed to connect")


# --- heads and workers


def test_a_running_head_is_left_alone(head):
    before = head.lasting()
    again = ok(head.start())
    job_server, gcs, _ = head.addresses()
    assert again.stdout.startswith("nothing to do") and job_server in again.stdout
    assert f"bash scripts/ray_start.sh --worker {gcs}" in again.stdout
    assert before and before <= head.lasting()


def test_its_job_server_is_on_loopback_only(head):
    port = int(head.addresses()[0].rsplit(":", 1)[1])
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    assert [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")] == [
        f"0100007F:{port:04X}"
    ]


def test_a_worker_joins_and_leaves(head, place, tmp_path):
    """On one machine, a worker has a directory of its own."""
    worker = Cluster(place / "worker", place / "home")
    gcs = head.addresses()[1]
    result = ok(worker.start("--worker", gcs, NUM_GPUS="3"))
    assert gcs in result.stdout and not (worker.directory / "head").exists()
    assert ok(worker.start("--worker", gcs)).stdout.startswith("nothing to do")
    refused(worker.start("--worker", "10.0.0.1"), "10.0.0.1:6379", "has joined another head")
    refused(worker.start(), "is that of a running worker")
    count = "import ray; ray.init(); print('GPUs', ray.cluster_resources()['GPU'])"
    assert "GPUs 5.0" in head.job(tmp_path, sys.executable, "-c", count)[2]
    before = head.lasting()
    assert "stopped " in ok(worker.stop()).stdout and worker.processes() == {}
    assert before and before <= head.lasting()


def test_wrong_heads_to_join(head, place):
    worker = Cluster(place / "worker", place / "home")
    refused(worker.start("--worker", head.addresses()[0].removeprefix("http://")), "is a dashboard", "6379")
    refused(worker.start("--worker", "127.0.0.1:9", RAY_START_TIMEOUT="1"), "nothing answers at 127.0.0.1:9", "GCS")
    refused(worker.start("--worker", "http://h:1"), "expected HOST[:PORT]", "'http://h:1'")
    refused(head.start("--worker", head.addresses()[1]), "is that of a running head")
    assert worker.processes() == {}


def test_two_clusters_on_one_machine(head, spare, tmp_path):
    """Two starts at once make one head; stopping it ends all that its jobs left behind, and nothing else."""
    both = [
        subprocess.Popen(
            ["bash", START, "--any-port"], env={"PATH": os.environ["PATH"], "PYTHON": sys.executable} | spare.env
        )
        for _ in range(2)
    ]
    assert [process.wait(300) for process in both] == [0, 0]
    assert sum("gcs_server" in command for command in spare.processes().values()) == 1
    assert spare.addresses()[:2] != head.addresses()[:2]

    daemon = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(600)"
    assert spare.job(tmp_path / "spare", sys.executable, "-c", daemon)[0] == 0
    outside = [pid for pid, command in spare.processes().items() if "time.sleep(600)" in command]
    assert len(outside) == 1 and Path(f"/proc/{outside[0]}/stat").read_text().rsplit(")", 1)[1].split()[1] == "1"
    job = script(tmp_path, COUNT)
    running = spare.launcher(tmp_path / "running", sys.executable, job, 600, 1)
    other = head.launcher(tmp_path / "other", sys.executable, job, 600, 0.1, tmp_path / "go")
    reader = subprocess.Popen(
        ["tail", "-f", str((spare.directory / "session_latest").resolve() / "logs" / "raylet.out")],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: all("number 1" in (tmp_path / name / "shown").read_text() for name in ("running", "other")))
        before = head.lasting()
        result = ok(spare.stop())
        assert result.stdout.startswith("stopped ") and "processes of Ray" in result.stdout
        assert spare.processes() == {} and not (spare.directory / "head").exists()
        assert ended(outside[0]) and reader.poll() is None
        assert before and before <= head.lasting()
        (tmp_path / "go").touch()
        assert other.wait(120) == 0
        assert running.wait(120) == 1
    finally:
        for process in (reader, running, other):
            process.kill()
            process.wait()
    seen = numbers((tmp_path / "other" / "train.log").read_text().splitlines())
    assert seen == list(range(len(seen)))
    assert ok(spare.stop()).stdout.startswith("nothing to do")


@pytest.mark.parametrize("victim", ["", "/raylet --"], ids=["everything", "raylet"])
def test_a_head_that_is_killed_under_a_job(spare, tmp_path, victim):
    """Without its raylet the job server answers on, that the job is RUNNING."""
    ok(spare.start())
    address = spare.addresses()[0]
    launcher = spare.launcher(tmp_path, sys.executable, script(tmp_path, COUNT), 600, 1)
    wait_for(lambda: "number 1" in (tmp_path / "shown").read_text())
    for pid, command in spare.processes().items():
        if victim in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert launcher.wait(240) == 1
    assert (tmp_path / "end").read_text().strip() == f"1|0|the Ray head at {address} no longer answers"


def test_a_broken_head_is_replaced_and_a_half_started_one_tried_again(spare, tmp_path):
    """`ray start` gives up after 30 s on a busy machine, and leaves what it started."""
    ok(spare.start())
    (gcs,) = (pid for pid, command in spare.processes().items() if "/gcs_server " in command)
    os.kill(gcs, signal.SIGKILL)
    fake, real = tmp_path / "it's bin", Path(sys.executable)
    fake.mkdir()
    script(fake, f'#!/bin/sh\nexec "{real}" "$@"\n', "python")
    gives_up = f'[ -e "{fake}/tried" ] || {{ touch "{fake}/tried"; echo "Exception: timed out"; exit 1; }}'
    script(fake, f'#!/bin/sh\n"{real.with_name("ray")}" "$@" || exit\n{gives_up}\n', "ray")
    for path in fake.iterdir():
        path.chmod(0o755)
    result = ok(spare.start(PYTHON=str(fake / "python")))
    assert "left of a cluster that does not answer" in result.stderr and result.stdout.startswith("Ray is running")
    assert "warning: attempt 1 of 3: Exception: timed out; trying again" in result.stderr.splitlines()
    assert sum("/gcs_server " in command for command in spare.processes().values()) == 1
    assert spare.job(tmp_path, "true")[0] == 0


def test_an_interrupted_start_leaves_nothing(spare):
    ok(spare.stop())
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable} | spare.env
    start = subprocess.Popen(["bash", START, "--any-port"], env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: any("gcs_server" in command for command in spare.processes().values()))
    os.killpg(start.pid, signal.SIGINT)
    assert start.wait(60) == 130
    assert spare.processes() == {} and not (spare.directory / "head").exists()


# --- without any Ray


@pytest.fixture(scope="module")
def nowhere(place) -> Cluster:
    return Cluster(place / "none", place / "home")


def test_the_commands_of_a_dry_run(nowhere):
    def words(*flags: str, **env: str) -> list[str]:
        return shlex.split(ok(nowhere.start("--dry-run", *flags, **env)).stdout.replace("\\\n", ""))

    def value(flag: str, words: list[str]) -> str:
        return words[words.index(flag) + 1]

    ports = {"RAY_PORT": "26379", "RAY_DASHBOARD_PORT": "28265"}
    head = words("--", "--resources", "{}", MASTER_ADDR="10.0.0.1", NUM_CPUS="5", **ports)
    assert "--head" in head and "--disable-usage-stats" in head and head[-2:] == ["--resources", "{}"]
    assert (value("--port", head), value("--node-ip-address", head)) == ("26379", "10.0.0.1")
    assert (value("--dashboard-host", head), value("--dashboard-port", head)) == ("127.0.0.1", "28265")
    assert (value("--num-gpus", head), value("--num-cpus", head)) == ("2", "5")
    assert value("--port", words("--any-port")) == "0"
    worker = words("--worker", "10.0.0.1", NUM_GPUS="", CUDA_VISIBLE_DEVICES="0,3")
    assert value("--address", worker) == "10.0.0.1:6379" and "--head" not in worker and "--num-cpus" not in worker
    assert value("--num-gpus", worker) == "2"
    assert value("--address", words("--worker", "10.0.0.1:7")) == "10.0.0.1:7"
    assert not nowhere.directory.exists()


@pytest.mark.parametrize("name", ["RAY_PORT", "RAY_DASHBOARD_PORT"])
def test_a_named_port_that_is_in_use(place, name):
    nowhere = Cluster(place / name.lower(), place / "home")
    ports = {"RAY_PORT": "26379", "RAY_DASHBOARD_PORT": "28265"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports[name] = str(server.getsockname()[1])
        refused(nowhere.start("--", **ports), f"{name}: {ports[name]} is in use", "--any-port")
        result = ok(nowhere.start("--dry-run", **ports))
        assert f"warning: {name}: {ports[name]} is in use" in result.stderr


@pytest.mark.parametrize(
    ("flags", "env", "parts"),
    [
        (["--worker"], {}, ["--worker: expected a value", "''"]),
        (["--worker", "a;b:1"], {}, ["--worker: expected HOST[:PORT]", "'a;b:1'"]),
        (["--nonsense"], {}, ["--nonsense: unknown option"]),
        ([], {"NUM_GPUS": "all"}, ["NUM_GPUS: expected an integer >= 0", "'all'"]),
        ([], {"NUM_CPUS": "0"}, ["NUM_CPUS: expected an integer > 0", "'0'"]),
        ([], {"RAY_PORT": "x"}, ["RAY_PORT: expected an integer > 0", "'x'"]),
        ([], {"RAY_TEMP_DIR": "/tmp/" + "é" * 18}, ["RAY_TEMP_DIR: expected at most 39 bytes", "é'"]),
        ([], {"PYTHON": "/nowhere/python"}, ["PYTHON: /nowhere/python not found"]),
        ([], {"PYTHON": "/bin/true", "PATH": "/usr/bin:/bin"}, ["ray: not found beside /bin/true"]),
    ],
)
def test_a_start_that_is_refused(nowhere, flags, env, parts):
    refused(nowhere.start(*(flags or ["--any-port"]), **env), *parts)
    assert not nowhere.directory.exists()


def test_nothing_to_stop(nowhere):
    result = ok(nowhere.stop())
    assert result.stdout == f"nothing to do: no Ray runs in {nowhere.directory}\n" and result.stderr == ""
    refused(run("bash", STOP, "--all", env=nowhere.env), "--all: unknown option")
    refused(run("bash", STOP, env=nowhere.env | {"GRACE_S": "long"}), "GRACE_S: expected seconds, found 'long'")


def test_the_address_of_the_job_server(nowhere, place):
    def address(**env: str) -> str:
        return ok(nowhere.lib("ray_address", **env)).stdout.strip()

    assert address() == "http://127.0.0.1:8265"
    assert (
        address(RAY_ADDRESS="10.0.0.1:8265") == address(RAY_ADDRESS="http://10.0.0.1:8265/") == "http://10.0.0.1:8265"
    )
    assert address(RAY_ADDRESS="https://ray.example.com/jobs") == "https://ray.example.com/jobs"
    known = place / "known"
    known.mkdir()
    (known / "head").write_text("http://127.0.0.1:28265 10.0.0.1:6379 http://127.0.0.1:1\n")
    assert address(RAY_TEMP_DIR=str(known)) == "http://127.0.0.1:28265"
    assert address(RAY_TEMP_DIR=str(known), RAY_ADDRESS="http://h:1") == "http://h:1"
    for wrong in ("ray://10.0.0.1:10001", "10.0.0.1:6379", "http://10.0.0.1:6379", "auto", "10.0.0.1"):
        refused(nowhere.lib("ray_address", RAY_ADDRESS=wrong), "RAY_ADDRESS: expected Ray's job server", f"'{wrong}'")
    refused(nowhere.lib("ray_address", RAY_ADDRESS="10.0.0.1:7000", RAY_PORT="7000"), "'10.0.0.1:7000'")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_the_job_server_of_another_user_is_not_used(nowhere, place):
    known = place / "known"
    known.mkdir(exist_ok=True)
    server = subprocess.Popen(
        ["/usr/bin/env", "python3", "-c", "import socket; s = socket.create_server(('127.0.0.1', 0));"
         "print(s.getsockname()[1], flush=True); input()"],
        user=65534, cwd="/", text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        (known / "head").write_text(f"{address} 10.0.0.1:6379 http://127.0.0.1:1\n")
        env = {"RAY_TEMP_DIR": str(known)}
        refused(nowhere.lib("ray_address", **env), f"{address}: belongs to another user (65534)", "--any-port")
        assert ok(nowhere.lib("ray_address", RAY_ADDRESS=address, **env)).stdout.strip() == address
    finally:
        server.communicate("\n")


def test_who_answers(head, nowhere):
    assert nowhere.lib('ray_answers "$1"', head.addresses()[0]).returncode == 0
    assert nowhere.lib('ray_answers "$1"', f"http://{head.addresses()[1]}").returncode == 1  # the GCS
    assert nowhere.lib('ray_answers "$1"', "http://127.0.0.1:9").returncode == 1


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
values = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, values, max_size=4), values)
def test_runtime_env_is_json(env, directory):
    words = [directory, *(f"{name}={value}" for name, value in env.items())]
    command = f'source "{REPO}/scripts/lib/cli.sh"; source "{REPO}/scripts/lib/ray.sh"; runtime_env "$@"'
    result = json.loads(ok(run("bash", "-c", command, "bash", *words)).stdout)
    assert result == {"env_vars": env} | ({"working_dir": directory} if directory else {})
