"""The quickstart's accuracy of a checkpoint: its intervals, whole runs on checkpoints of the project's own tools, and
what is refused.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import REPO, ok, run
from tests.training.embedded import tiny
from tests.training.embedded.tiny import on_the_cpu  # noqa: F401
from tools.data import chat
from training.embedded import generation, rollout
from training.embedded.quickstart import accuracy

QUESTIONS = 24

# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Solutions p of |share - p| = z sqrt(p (1 - p) / total), Wilson (1927).
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 20, 0.0089, 0.2361),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(correct, total, low, high):
    assert accuracy.wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_solves_its_equation_and_stays_within_0_and_1(case):
    correct, total = case
    low, high = accuracy.wilson(correct, total)
    assert 0.0 <= low and high <= 1.0 and math.copysign(1.0, low) == 1.0  # not -0.0 %
    assert low - 1e-12 <= correct / total <= high + 1e-12
    for bound in (low, high):
        distance = accuracy.Z * math.sqrt(bound * (1 - bound) / total)
        assert abs(correct / total - bound) == pytest.approx(distance, abs=1e-6)
    mirrored = accuracy.wilson(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("total", "share"), [(20, 0.5), (50, 0.1), (200, 0.02), (200, 0.9)])
def test_wilson_covers_the_truth_in_19_of_20_cases(total, share):
    """Exactly, over all outcomes: its coverage swings around 95 %, as that of every interval of a count."""
    covered = 0.0
    for correct in range(total + 1):
        low, high = accuracy.wilson(correct, total)
        chance = math.comb(total, correct) * share**correct * (1 - share) ** (total - correct)
        covered += chance * (low <= share <= high)
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("spread", "questions"), [(0.0, 200), (0.3, 200), (0.3, 50), (0.5, 100)])
def test_the_interval_of_samples_covers_the_truth_where_questions_differ(spread, questions):
    """Eight samples of each question, whose own chances lie between 0.5 - spread and 0.5 + spread: an interval for
    independent answers would be too narrow.
    """
    random = torch.Generator().manual_seed(questions)
    runs, covered, naive = 400, 0, 0
    for _ in range(runs):
        chances = 0.5 + spread * (2 * torch.rand(questions, generator=random) - 1).sign()
        right = torch.bernoulli(chances[:, None].expand(-1, 8), generator=random)
        means = right.mean(1).tolist()
        low, high = accuracy.of_means(means)
        covered += low <= 0.5 <= high
        naive += (lambda bounds: bounds[0] <= 0.5 <= bounds[1])(accuracy.wilson(right.sum().item(), right.numel()))
    assert 0.92 < covered / runs < 0.985
    assert (naive / runs < 0.85) is (spread > 0)


def test_an_interval_of_means_by_hand():
    mean, deviation = 0.5, math.sqrt((0.25**2 + 0.25**2) / 2)
    half = accuracy.Z * deviation / math.sqrt(3)
    assert accuracy.of_means([0.25, 0.5, 0.75]) == pytest.approx((mean - half, mean + half))
    assert accuracy.of_means([0.0, 1.0]) == (0.0, 1.0)  # cut at both ends
    assert accuracy.of_means([1.0] * 10) == accuracy.wilson(10, 10)  # nothing to estimate from
    low, high = accuracy.of_means([0.5])
    assert low < 0.5 < high


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """bf16 and fp8 of one model by the project's tools, and the data."""
    folder = tiny.run_folder(tmp_path_factory.mktemp("accuracy") / "it's one")
    tools = REPO / "tools"
    ok(
        run(
            *(sys.executable, tools / "convert_torch_dist_to_hf.py", "--input-dir", folder / "start"),
            *("--output-dir", folder / "bf16", "--origin-hf-dir", folder / "hf"),
        )
    )
    ok(
        run(
            *(sys.executable, tools / "bf16_cast_fp8.py", "--input-bf16-hf-path", folder / "bf16"),
            *("--output-fp8-hf-path", folder / "fp8", "--force-pow-2-scale", "False"),
        )
    )
    data = tiny.questions(folder / "questions.jsonl", QUESTIONS)
    return {"bf16": folder / "bf16", "fp8": folder / "fp8", "data": data}


def measured(monkeypatch, capsys, output: Path, checkpoint: Path, data: Path, *flags: object) -> dict:
    """The file that a run writes; what it prints must say the same."""
    places = ("--checkpoint", checkpoint, "--data", data, "--output", output, "--rm-type", "math")
    monkeypatch.setattr(sys, "argv", tiny.words("accuracy.py", *places, "--max-new-tokens", 12, *flags))
    assert accuracy.main() == 0
    result = json.loads(output.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4  # how far it is, from the first question on
    questions = len(data.read_text().splitlines())
    progress = re.compile(rf"{output.stem}: temperature [01], (\d+) of {questions} questions")
    started = [progress.fullmatch(line) for line in lines[:-2]]
    assert all(started) and [match[1] for match in started].count("0") == 2
    lines = lines[-2:]
    for kind, line in zip(("greedy", "sampled"), lines, strict=True):
        (low, high), share = result[kind]["interval"], result[kind]["accuracy"]
        assert line.startswith(f"{output.stem}: {kind} accuracy {share:.1%} ({low:.1%} to {high:.1%}), ")
        assert (
            0.0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1.0 and "-" not in line.removeprefix(output.stem)
        )
    return result


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_whole_run(checkpoints, precision, tmp_path, monkeypatch, capsys):
    """Greedy accuracy by hand, a question at a time; samples within their bounds, and the same for the same seed."""
    checkpoint, data = checkpoints[precision], checkpoints["data"]
    output = tmp_path / "a" / "new folder" / f"{precision}.json"
    result = measured(monkeypatch, capsys, output, checkpoint, data)
    tokenizer = chat.load_tokenizer(checkpoint)
    engine = rollout.Engine(str(checkpoint), tokenizer)
    engine.load(accuracy.read_weights(checkpoint))
    right = tokens = 0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        (prompt,) = chat.encode_prompts(tokenizer, [row["prompt"]], True)
        sampling = generation.Sampling(0.0, max_new_tokens=12, stop=tiny.STOP)
        (response,) = generation.generate(engine.model, [prompt], sampling, 0)
        boxes = [token - tiny.TOKEN[tiny.ANSWERS[0]] for token in response.tokens]
        boxes = [number for number in boxes if 0 <= number < 8]
        right += bool(boxes) and str(boxes[-1]) == row["label"]
        tokens += len(response.tokens)
    assert result["format"] == precision.upper() and result["questions"] == QUESTIONS
    assert result["checkpoint"] == str(checkpoint)
    assert result["greedy"]["accuracy"] == pytest.approx(right / QUESTIONS)
    assert result["greedy"]["interval"] == list(accuracy.wilson(right, QUESTIONS))
    assert result["greedy"]["tokens"] == pytest.approx(tokens / QUESTIONS)
    assert result["sampled"]["samples"] == 4 and result["sampled"]["temperature"] == 1.0
    assert 0.0 < result["sampled"]["accuracy"] < 0.5  # an untrained model that is right now and then
    count = result["sampled"]["accuracy"] * QUESTIONS * 4
    assert count == pytest.approx(round(count), abs=1e-6)
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    again = measured(monkeypatch, capsys, output, checkpoint, data)
    assert again == result
    other = measured(monkeypatch, capsys, output, checkpoint, data, "--seed", 2)
    assert other["greedy"] == result["greedy"] and other["sampled"] != result["sampled"]


def test_few_at_a_time_change_nothing_of_greedy_decoding(checkpoints, tmp_path, monkeypatch, capsys):
    found = [
        measured(monkeypatch, capsys, tmp_path / "o.json", checkpoints["bf16"], checkpoints["data"], "--batch", batch)
        for batch in (256, 5)
    ]
    assert found[0]["greedy"] == found[1]["greedy"]


def test_several_checkpoints_one_after_another(checkpoints, tmp_path, monkeypatch, capsys):
    """Each as if it were alone; those before one that is refused are written."""
    bf16, fp8, data = (checkpoints[name] for name in ("bf16", "fp8", "data"))
    alone = [measured(monkeypatch, capsys, tmp_path / "o.json", checkpoint, data) for checkpoint in (fp8, bf16)]
    outputs = [tmp_path / f"{name}.json" for name in ("first", "second", "third")]
    common = ("--data", data, "--rm-type", "math", "--max-new-tokens", 12, "--output", *outputs)
    argv = ("accuracy.py", "--checkpoint", fp8, bf16, tmp_path / "none", *common)
    monkeypatch.setattr(sys, "argv", tiny.words(*argv))
    assert accuracy.main() == 1 and "none: expected the directory" in capsys.readouterr().err
    assert [json.loads(path.read_text()) for path in outputs[:2]] == alone and not outputs[2].exists()


def test_the_weights_of_a_checkpoint(checkpoints):
    bf16, fp8 = (accuracy.read_weights(checkpoints[precision]) for precision in ("bf16", "fp8"))
    assert bf16.keys() == fp8.keys()
    for name, weight in fp8.items():
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, bf16[name]), name
        else:
            error = (weight.dequantize() - bf16[name].float()).norm() / bf16[name].float().norm()
            assert 0.01 < error < 0.04, name
    assert sum(not isinstance(weight, torch.Tensor) for weight in fp8.values()) == 14


# ---------------------------------------------------------------- what is refused


def refused(monkeypatch, capsys, output: Path, **places: Path) -> str:
    argv = [word for name, path in places.items() for word in (f"--{name}", path)]
    monkeypatch.setattr(sys, "argv", tiny.words("accuracy.py", *argv, "--output", output, "--rm-type", "math"))
    assert accuracy.main() == 1 and not output.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_one_line_for_what_is_wrong(checkpoints, tmp_path, monkeypatch, capsys):
    out, data, bf16 = tmp_path / "o.json", checkpoints["data"], checkpoints["bf16"]

    def told(**places: Path) -> str:
        return refused(monkeypatch, capsys, out, **{"checkpoint": bf16, "data": data, **places})

    assert "expected the directory of a Hugging Face tokenizer, found none" in told(checkpoint=tmp_path / "no")
    bare = tiny.hf_dir(tmp_path / "bare")
    assert told(checkpoint=bare) == f"{bare}: expected .safetensors files, found none"
    damaged = tiny.hf_dir(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    assert told(checkpoint=damaged).startswith(f"{damaged}/model.safetensors: expected a .safetensors file, found: ")
    other = tmp_path / "other"
    shutil.copytree(bf16, other)
    tiny.hf_dir(other, num_hidden_layers=3)
    assert told(checkpoint=other).startswith(f"{other}/config.json: expected the model of the weights, where model.l")
    assert told(data=tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: No such file or directory"
    few = tiny.jsonl(tmp_path / "few.jsonl", [{"prompt": [{"role": "user", "content": "q1"}]}])
    assert told(data=few) == f"{few}:1: label: expected text or a number, found nothing"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--samples", "0"], "argument --samples: expected a positive integer, found '0'"),
        (["--batch", "-1"], "argument --batch: expected a positive integer, found '-1'"),
        (["--max-new-tokens", "x"], "argument --max-new-tokens: expected a positive integer, found 'x'"),
        (["--output", "a", "b"], "--output: expected 1, one for each checkpoint, found 2"),
        (["--rm-type", "f1"], "--rm-type: expected one of deepscaler, math, dapo, or boxed_ and one of them"),
    ],
)
def test_options_that_make_no_sense(tmp_path, monkeypatch, capsys, flags, line):
    argv = ["--checkpoint", tmp_path, "--data", tmp_path, "--output", tmp_path / "o.json", *flags]
    monkeypatch.setattr(sys, "argv", tiny.words("accuracy.py", *argv))
    with pytest.raises(SystemExit) as stopped:
        accuracy.main()
    assert stopped.value.code == 2 and line in capsys.readouterr().err.splitlines()[-1]
