"""The benchmark of the checkpoint tools on a tiny model: its checkpoint is a Qwen2, its tables are complete."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.conftest import REPO, ok, run

SCRIPT = REPO / "benchmarks" / "checkpoint_tools.py"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "tiny"
    ok(run(sys.executable, SCRIPT, "--make", directory, "--size", "tiny"))
    return directory


def test_what_it_makes_is_always_the_same_and_kept(made, tmp_path):
    ok(run(sys.executable, SCRIPT, "--make", tmp_path / "again", "--size", "tiny"))
    assert files(made) == files(tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["again"]

    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    ok(run(sys.executable, SCRIPT, "--make", made, "--size", "tiny"))
    assert before == {path: path.stat().st_mtime_ns for path in made.iterdir()}

    other = run(sys.executable, SCRIPT, "--make", made, "--size", "0.5B")
    assert other.returncode == 1 and str(made) in other.stderr and len(other.stderr.splitlines()) == 1


def test_what_it_makes_is_a_qwen2(made):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config.from_pretrained(made)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del expected["lm_head.weight"]  # tied

    found = {}
    for path in made.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), name
                found[name] = tuple(tensor.shape)
                middle = 1 if "norm" in name else 0
                assert abs(tensor.float().mean() - middle) < 0.05 and 0.01 < tensor.float().std() < 0.2, name
    assert found == expected


def rows(tables: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`."""
    lines = tables.split(f"| {first} |")[1].splitlines()[2:]
    end = lines.index("") if "" in lines else len(lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def test_every_subject_has_a_row_of_numbers(tmp_path):
    work = tmp_path / "it's work"
    command = (sys.executable, SCRIPT, "--size", "tiny", "--repeats", "1", "--peer-repeats", "0", "--work", work)
    result = ok(run(*command, "--output", tmp_path / "new" / "tables.md"))
    assert (tmp_path / "new" / "tables.md").read_text() == result.stdout

    costs = {name: cells for name, *cells in rows(result.stdout, "subject")}
    tools = ["cast", "torch_dist -> HF", "HF -> torch_dist"]
    assert list(costs) == ["cp -r of hf", "cp -r of torch_dist", *tools]
    for name, (count, wall, *numbers) in costs.items():
        assert int(count) == (2 if name == "cp -r of hf" else 1)
        median, low, high = (float(text.strip("[],")) for text in wall.split())
        assert 0 < low <= median <= high
        assert all(math.isfinite(float(number)) and float(number) > 0 for number in numbers), name
    for name in tools:
        *_, cpu_ratio, rss = costs[name]
        assert float(cpu_ratio) > 1 and float(rss) > float(costs["cp -r of hf"][-1])
    # A process is charged the peak of the one that started it: that one must be small.
    assert float(costs["cp -r of hf"][-1]) < 64

    bars = rows(result.stdout, "bar")
    assert len(bars) == 12
    assert {cells[0] for cells in bars if cells[1] == "not measured"} >= {
        "cast: >= 8 x faster than slime's",
        "torch_dist -> HF: >= 3 x less CPU than slime's",
    }
    kernel = rows(result.stdout, "cast | GB/s of input by CPU time")
    assert kernel and all(float(rate) > 0 for _, rate, *_ in kernel)

    assert sorted(path.name for path in (work / "tiny").iterdir()) == ["hf", "torch_dist"]


def test_a_tool_that_fails_is_named_and_leaves_no_output(made, tmp_path):
    shutil.copytree(made, tmp_path / "tiny" / "hf")
    (tmp_path / "tiny" / "torch_dist").mkdir()
    result = run(sys.executable, SCRIPT, "--size", "tiny", "--repeats", "1", "--peer-repeats", "0", "--work", tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "exit status 1" in result.stderr and "convert_torch_dist_to_hf.py" in result.stderr
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["hf", "torch_dist"]


def test_ctrl_c_keeps_the_inputs_only(tmp_path):
    command = [sys.executable, SCRIPT, "--size", "tiny", "--work", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("warm up" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130 and errors.endswith("error: interrupted\n")
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["hf", "torch_dist"]
