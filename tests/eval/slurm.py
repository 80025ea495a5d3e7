"""A real Slurm of one node with eight pretended GPUs, whose files all lie in one directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=15
OverTimeLimit=0
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=20000 Gres=gpu:8 State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def absent() -> list[str]:
    return [name for name in PROGRAMS if not shutil.which(name, path=SBIN)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Slurm:
    place: Path

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.place / "slurm.conf"), "PATH": SBIN}

    def run(self, *command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a Slurm command prints; it must succeed."""
        full = {**self.env, "HOME": os.environ.get("HOME", "/"), **(env or {})}
        words = [str(word) for word in command]
        result = subprocess.run(words, env=full, cwd=cwd, capture_output=True, text=True)
        assert result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *words: object, env: dict[str, str], cwd: Path) -> int:
        return int(self.run("sbatch", "--parsable", *words, env=env, cwd=cwd).strip().split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job."""
        text = self.run("scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int, states: tuple[str, ...], seconds: float = 240) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while True:
            found = self.job(number)
            if found["JobState"] in states:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.5)

    def end(self, number: int, seconds: float = 240) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.wait(number, ended, seconds)


@contextmanager
def running(place: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and slurmd; stop them and their jobs in the end."""
    host = socket.gethostname().split(".")[0]
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    for name in ("state", "spool"):
        (place / name).mkdir()
    values = {"host": host, "place": place, "user": user, "controller": free_port(), "daemon": free_port()}
    (place / "slurm.conf").write_text(CONF.format(**values))
    for number in range(8):
        (place / f"gpu{number}").touch()
    (place / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={place}/gpu[0-7]\n")
    slurm = Slurm(place)
    env = {**slurm.env, "HOME": str(place)}
    place.chmod(0o755)
    subprocess.run(["mungekey", "--create", f"--keyfile={place}/munge.key"], env=env, check=True)
    munge = [f"--{name}-file={place}/munge.{end}" for name, end in (("pid", "pid"), ("log", "log"), ("seed", "seed"))]
    programs = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={place}/munge.key",
            f"--socket={place}/munge.socket",
            *munge,
        ],
        ["slurmctld", "-D", "-f", str(place / "slurm.conf")],
        ["slurmd", "-D", "-N", host, "-f", str(place / "slurm.conf")],
    ]
    started = []
    try:
        for command in programs:
            with (place / f"{command[0]}.out").open("w") as out:
                started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while True:
            found = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True)
            if "idle" in found.stdout:
                break
            logs = "".join(path.read_text() for path in sorted(place.glob("*.out")))
            assert time.monotonic() < deadline, f"{found.stdout}{found.stderr}{logs}"
            time.sleep(0.5)
        yield slurm
        subprocess.run(["scancel", "--user", user], env=env)
        time.sleep(1)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
