"""Every command that a document of the repository shows is run: as it stands, or in the form that its row below names.

What else the documents say is checked in tests/docs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import REPO, ok, run
from tests.docker.dockerfile import COMMANDS, arguments
from tests.docker.versions import read
from tests.docs import pages
from tests.scripts.launch import recipe

BIN = Path(sys.executable).parent


def commands() -> list[str]:
    """The commands of all bash blocks, each once."""
    return list(dict.fromkeys(command for page in pages.PAGES for command in pages.commands(page.read_text())))


def launch(line: str, folder: Path) -> None:
    """A recipe, as a dry run; its paths need not exist."""
    dry = line if "--dry-run" in line else f"{line} --dry-run"
    result = ok(run("bash", "-c", dry, env={"OUT_DIR": str(folder / "out")}, cwd=REPO))
    assert re.search(r"(pretrain_gpt|preprocess_data|slime/train|embedded/train)\.py", result.stdout)
    assert list(folder.iterdir()) == []


def quickstart(line: str, folder: Path) -> None:
    """tests/scripts/test_quickstart.py runs it for real."""
    dry = line.replace("quickstart.sh", "quickstart.sh --dry-run")
    ok(run("bash", "-c", dry, env={"OUT_DIR": str(folder / "out"), "VENV_NAME": ".venv-none"}, cwd=REPO))
    assert list(folder.iterdir()) == [] and not (REPO / ".venv-none").exists()


def suite(line: str, folder: Path) -> None:
    """This is running inside it; what it is told to select is there."""
    ok(run("bash", "scripts/test.sh", "--help", cwd=REPO))
    words = shlex.split(line.split("scripts/test.sh")[1])
    if words[:1] == ["-k"]:
        files = [str(path.relative_to(REPO)) for path in (REPO / "tests").rglob("test_*.py")]
        assert all(any(name in file for file in files) for name in words[1].split(" or "))
    elif words and words != ["--lint"]:
        assert words[1:] == ["-n", "0"] and list((REPO / words[0]).glob("test_*.py"))


def hooks(line: str, folder: Path) -> None:
    """Installed for real, in a repository of its own; tests/test_contributing.py runs them."""
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    shutil.copy(REPO / ".pre-commit-config.yaml", folder)
    subprocess.run([sys.executable, "-m", "pre_commit", *line.split()[1:]], cwd=folder, check=True)
    assert "pre-commit" in (folder / ".git" / "hooks" / "pre-commit").read_text()


def recipes(line: str, folder: Path) -> None:
    """Run for real."""
    assert len(ok(run("bash", "-c", line, cwd=REPO)).stdout.splitlines()) > 1


def contract(line: str, folder: Path) -> None:
    """It says what it lacks where the submodules are not filled."""
    result = run(sys.executable, *line.split()[1:2], "--check", cwd=REPO)
    assert result.returncode == 0 or "training/Megatron-LM: not initialised" in result.stderr


def search(line: str, folder: Path) -> None:
    """Run for real."""
    assert "README.md:" in ok(run("bash", "-c", line, cwd=REPO)).stdout


def strict(line: str, folder: Path) -> None:
    """It installs a gigabyte: tests/eval/test_strict.py works where that was done."""
    ok(run("bash", "-c", f"{line} --help", cwd=REPO))


def clone(line: str, folder: Path) -> None:
    """Cloning needs a network: the address must be that of CITATION.cff."""
    assert f'repository-code: "{line.split()[-1]}"\n' in (REPO / "CITATION.cff").read_text()


def submodule(line: str, folder: Path) -> None:
    """Fetching needs a network: the path must be one of .gitmodules."""
    path = line.split()[-1]
    assert f"path = {path}\n" in (REPO / ".gitmodules").read_text()


def tail(line: str, folder: Path) -> None:
    """The log is where the launcher writes it."""
    name = line.split("exp/")[1].split("/")[0]
    assert recipe(name).exists()
    if "_CPT_" not in name:
        assert line.endswith("/logs/train.log")
        assert "LOG=$OUT_DIR/logs/train.log" in (REPO / "scripts" / "lib" / "slime.sh").read_text()
        return
    assert line.endswith("/logs/train_node0.log")
    assert (
        "LOG=$OUT_DIR/logs/train_node${NODE_RANK:-$( ((NNODES == 1)) && echo 0"
        in (REPO / "scripts" / "CPT" / "recipe.sh").read_text()
    )


def tensorboard(line: str, folder: Path) -> None:
    """Started for real, on a free port, until it says where it listens."""
    words = [str(BIN / "tensorboard"), *line.split()[1:], "--port", "0"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert any("http://127.0.0.1:" in text for text in server.stdout)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, megatron_checkpoint) -> Path:
    """A folder with small checkpoints under every path that the documents name."""
    folder = tmp_path_factory.mktemp("docs")
    source = megatron_checkpoint("tp1_untied")
    for name in ("InfiR2_SFT_FP8_7B_stage2", "InfiR2_RL_FP8_7B_stage2_4node"):
        shutil.copytree(source, folder / "exp" / name / "checkpoints")
    (folder / "models").mkdir()
    for name in ("qwen2.5-7B", "qwen2.5-7B-Instruct"):
        shutil.copytree(source / "hf", folder / "models" / name, dirs_exist_ok=True)
    for line in commands():  # in the order of the page: each makes what the next one reads
        if line.startswith("python tools/convert_torch_dist_to_hf.py"):
            tool(line, folder)
            for file in (folder / "models" / "InfiR2-7B").glob("model.safetensors*"):
                shutil.copy(file, folder / "models" / "qwen2.5-7B")
        elif line.startswith("python tools/bf16_cast_fp8.py"):
            tool(line, folder)
    return folder


def tool(line: str, folder: Path) -> None:
    """Run for real, on a small model where the line says a large one."""
    words = line.replace("python tools/", f"{sys.executable} {REPO / 'tools'}/").split()
    for flag in ("--output-dir", "--output-fp8-hf-path"):
        if flag in words:
            shutil.rmtree(folder / words[words.index(flag) + 1], ignore_errors=True)
    ok(run(*words, cwd=folder))


def prepare(line: str, folder: Path) -> None:
    """Run for real, on one row of the public format."""
    source = folder / line.split("--input ")[1].split()[0]
    question = [{"role": "user", "content": "What is 1+1?"}]
    row = {"prompt": question, "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "math_dapo"}
    if "scripts/SFT" in line:
        row = {"messages": [*question, {"role": "assistant", "content": "2"}]}
    elif "--format prompt-label" in line:
        row = {"prompt": question, "label": "2"}
    if source.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), source)
    else:
        source.write_text(json.dumps(row) + "\n")
    result = ok(run("bash", *line.replace("bash scripts", f"{REPO}/scripts").split(), cwd=folder))
    written = folder / line.split("--output ")[1]
    assert len(written.read_text().splitlines()) == 1 and f"DATA_DIR={written}" in result.stdout


def check_data(line: str, folder: Path) -> None:
    """Run for real, on as few rows as the numbers of the line allow."""
    (folder / "data").mkdir()
    question = [{"role": "user", "content": "What is 1+1?"}]
    rows = {"messages": [*question, {"role": "assistant", "content": "2"}], "prompt": question, "label": "2"}
    (folder / line.split("--data ")[1].split()[0]).write_text((json.dumps(rows) + "\n") * 128)
    assert "rollouts" in ok(run(sys.executable, REPO / "tools" / "check_data.py", *line.split()[2:], cwd=folder)).stdout


def ray(line: str, folder: Path) -> None:
    """As a dry run: tests/scripts/test_ray.py starts and stops clusters for real."""
    env = {"RAY_TEMP_DIR": str(folder)[:30]}
    stdout = ok(run("bash", "-c", f"{line} --dry-run", env=env, cwd=REPO)).stdout
    assert "ray start" in stdout or "ray_stop" in line


def packages(line: str, folder: Path) -> None:
    """The packages are those that tests/tools/test_converters.py runs the tools with, and numba."""
    assert line == "pip install numpy safetensors tqdm numba"


def benchmark(line: str, folder: Path) -> None:
    """tests/benchmarks runs it for real."""
    words = line.split()
    ok(run(sys.executable, REPO / words[1], "--help", cwd=folder))


def evaluate(line: str, folder: Path) -> None:
    """A job's script as a dry run, with a model of the 7B's sizes; tests/eval runs them for real, in Slurm too."""
    model = re.search(r"MODEL_PATH=(\S+)", line)[1]
    (folder / model).mkdir(parents=True)
    config = {
        "max_position_embeddings": 32768,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_size": 3584,
    }
    (folder / model / "config.json").write_text(json.dumps(config))
    dry = re.sub(r"sbatch( --\S+)* eval/", "bash eval/", line).replace("bash eval/", f"bash {REPO}/eval/")
    dry = dry if "--dry-run" in dry else f"{dry} --dry-run"
    env = {"OUT_DIR": str(folder / "out"), "SERVER": "sglang"}
    result = ok(run("bash", "-c", dry, env=env, cwd=folder))
    assert "sglang.launch_server" in result.stdout and "evalscope" in result.stdout and not (folder / "out").exists()


def summarize(line: str, folder: Path) -> None:
    """Run for real, on two samples of one question."""
    for number, path in enumerate(re.findall(r"(?<= )exp/eval/InfiR2\S+", line)):
        if (folder / path).exists():
            continue
        reviews = folder / path / "aime24" / "evalscope" / "reviews" / "m" / "aime24_default.jsonl"
        reviews.parent.mkdir(parents=True)
        settings = {"benchmark": "aime24", "model": f"m{number}", "samples": "2", "questions": "1"}
        (folder / path / "aime24" / "run.json").write_text(json.dumps(settings))
        for sample in range(2):
            scored = {"score": {"value": {"acc": 1.0}}, "sample_id": sample, "group_id": 0, "generation_index": sample}
            with reviews.open("a") as file:
                file.write(json.dumps({"index": sample, "sample_score": scored}) + "\n")
    ok(run(sys.executable, REPO / "eval" / "summarize.py", *line.split()[2:], cwd=folder))
    assert (folder / line.split("--output ")[1] / "summary.md").exists()


def export(line: str, folder: Path) -> None:
    """A variable that the scripts read."""
    name = line.split()[1].split("=")[0]
    readers = (REPO / "scripts" / "lib" / "venv.sh", REPO / "scripts" / "ray_start.sh")
    assert any(name in path.read_text() for path in readers)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def build_image(line: str, folder: Path) -> None:
    """No Docker engine here: the file is there, the context is the root, every build argument is one that it has."""
    words = shlex.split(line)
    assert option(words, "--file") == "docker/Dockerfile" and words[-1] == "." and option(words, "-t") == IMAGE
    predefined = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}  # by Docker
    passed = {words[n + 1].split("=")[0] for n, word in enumerate(words) if word == "--build-arg"}
    assert passed <= predefined | set(arguments(COMMANDS))
    assert {word for word in words if word.startswith("-")} <= {"--no-cache", "--file", "--build-arg", "-t"}


def base_image(line: str, folder: Path) -> None:
    """Needs a registry: the tag is the pinned one."""
    assert line.split()[-1] == f"lmsysorg/sglang:v{read()['SGLANG_VERSION']}"


def convert_image(line: str, folder: Path) -> None:
    """Needs the image: its name is the one that was built, the file the one that later lines use."""
    assert shlex.split(line)[-1].split("://")[1] == IMAGE and re.search(r" infir2\.(sif|sqsh) ", line)


def in_image(line: str, folder: Path) -> None:
    """What the line would run in the image, from the copy there or from a mounted checkout, is run here."""
    words = shlex.split(line)
    command = words[words.index("bash") :]
    assert words[words.index("bash") - 1] == IMAGE or "infir2." in line
    assert ("/workspace" in line) == ('"$PWD":/workspace' in line)
    if command == ["bash"]:
        return
    command[1] = command[1].removeprefix("/opt/InfiR2/")
    if command == ["bash", "docker/selftest.sh"]:  # tests/docker/test_selftest.py runs it
        ok(run(*command, "--help", cwd=REPO))
    else:
        launch(shlex.join(command), folder)


IMAGE = "infir2-training:latest"
RUNNERS = {
    r"docker build ": build_image,
    r"docker buildx imagetools inspect ": base_image,
    r"(apptainer build|enroot import) ": convert_image,
    r"(docker run|apptainer exec|srun) ": in_image,
    r"(\w+=\S+ )*bash scripts/quickstart\.sh( |$)": quickstart,
    r"(\w+=\S+ )*bash scripts/test\.sh( |$)": suite,
    r"\.venv/bin/pre-commit install$": hooks,
    r"bash scripts/list\.sh": recipes,
    r"\.venv/bin/python training/contract/dump_flags\.py": contract,
    r"git grep ": search,
    r"bash eval/setup_strict\.sh$": strict,
    r"(\w+=\S+ )*bash scripts/CPT/\S+\.sh": launch,
    r"(\w+=\S+ )*bash scripts/(SFT|RL)/InfiR2\S+\.sh": launch,
    r"bash scripts/(SFT|RL)/prepare_data\.sh": prepare,
    r"python tools/check_data\.py": check_data,
    r"(MASTER_ADDR=\S+ )?bash scripts/ray_(start|stop)\.sh": ray,
    r"git clone --recursive \S+$": clone,
    r"git submodule update --init \S+$": submodule,
    r"tail -f ": tail,
    r"\.venv/bin/tensorboard ": tensorboard,
    r"\.venv/bin/python benchmarks/fp8_gap\.py --data exp/quickstart ": lambda line, folder: None,  # below, with data
    r"pip install ": packages,
    r"\.venv/bin/python benchmarks/(checkpoint_tools|fp8_gemm|fp8_rollout)\.py ": benchmark,
    r"(\w+=\S+ )+(bash|sbatch)( --\S+)* eval/\w+_eval\.sh": evaluate,
    r"\.venv/bin/python eval/summarize\.py ": summarize,
    r"export ": export,
}


# Each reads what another line wrote.
CHECKPOINT_TOOLS = [line for line in commands() if re.match(r"python tools/(?!check_data)", line)]


@pytest.mark.parametrize("line", CHECKPOINT_TOOLS)
def test_checkpoint_tool(line, checkpoints):
    tool(line, checkpoints)


@pytest.mark.parametrize("line", [line for line in commands() if line not in CHECKPOINT_TOOLS])
def test_command(line, tmp_path):
    runners = [runner for pattern, runner in RUNNERS.items() if re.match(pattern, line)]
    assert len(runners) == 1, f"no way to run: {line}"
    runners[0](line, tmp_path)


def test_fp8_gap(tiny_data, tmp_path):
    (tmp_path / "quickstart" / "data").mkdir(parents=True)
    (tmp_path / "quickstart" / "tokenizer").symlink_to(tiny_data / "tokenizer")
    for suffix in ("bin", "idx"):
        name = f"text_text_document.{suffix}"
        (tmp_path / "quickstart" / "data" / name).symlink_to(tiny_data / name)
    short = "--lr-warmup-iters 1 --lr-wsd-decay-iters 2 --eval-iters 2".split()
    result = ok(
        run(
            *(sys.executable, REPO / "benchmarks" / "fp8_gap.py", "--data", tmp_path / "quickstart"),
            *("--output", tmp_path / "gap", "--train-iters", 6, "--seeds", 1, 2, "--", *short),
        )
    )
    assert re.search(r"BF16 against BF16, another seed: \d+\.\d+% apart on average; ratio \d", result.stdout)
    assert "FP8 rounding: 28 of 29" in result.stdout and "| 1 | " in result.stdout and "| 2 | " in result.stdout
