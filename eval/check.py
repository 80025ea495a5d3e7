#!/usr/bin/env python3
"""What an evaluation script must know before it starts a server: sizes, data, the run that is there, evalscope's JSON.

    check.py sizes      prints the context length to serve with
    check.py dataset    prints the number of questions in a local dataset
    check.py arguments  prints evalscope's dataset name, --dataset-args and --generation-config, a line each
    check.py view       makes a directory with the files of a checkpoint that samples by default
    check.py run        compares a run's settings with those that its directory holds

An error is one line, exit status 1. `dataset` needs the packages of the evalscope release that it checks for.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import pickle
import sys
import zlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CODE = "livecodebenchv5"
FILES = (".jsonl", ".json", ".parquet", ".csv")


class Refused(Exception):
    """One line for the user."""


# ---------------------------------------------------------------- sizes


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: expected a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def context_length(config: dict[str, Any], asked: int | None, prompt: int, generated: int) -> int:
    """Tokens to serve with: as asked, or what the model was made for, if prompt and answer fit into it."""
    limit = int(config.get("max_position_embeddings", 0))
    if asked is not None and asked > limit:
        raise Refused(f"CONTEXT_LENGTH: expected at most the model's max_position_embeddings, {limit}, found {asked}")
    length = asked or limit
    if length < prompt + generated:
        raise Refused(
            f"MAX_NEW_TOKENS: {generated} beside PROMPT_TOKENS={prompt} need a context of {prompt + generated} tokens, "
            f"{'CONTEXT_LENGTH is' if asked else 'the model has'} {length}"
        )
    return length


def check_tensor_parallel(config: dict[str, Any], parts: int) -> None:
    """Heads and, in an FP8 checkpoint, whole scale blocks for each of `parts` GPUs.

    SGLang and vLLM split the rows of q, k, v, gate and up, the columns of o and down, and stop where a part is not a
    whole number of blocks (fp8.py of both).
    """
    heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    if heads % parts or (kv_heads % parts and parts % kv_heads):
        raise Refused(f"TP_SIZE: {parts} does not divide the model's {heads} attention heads and {kv_heads} KV heads")
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    if parts == 1 or not block:
        return
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    rows, columns = (int(size) for size in block)
    kv = head_dim * max(kv_heads // parts, 1)
    sizes = {
        "q_proj rows": (heads * head_dim // parts, rows),
        "k_proj rows": (kv, rows),
        "gate_proj rows": (config["intermediate_size"] / parts, rows),
        "o_proj columns": (heads * head_dim // parts, columns),
        "down_proj columns": (config["intermediate_size"] / parts, columns),
    }
    for name, (size, unit) in sizes.items():
        if size % unit:
            raise Refused(
                f"TP_SIZE: with {parts}, {name} are {size:g} per GPU, expected a multiple of the FP8 block of {unit}; "
                "use a smaller TP_SIZE and DP_SIZE for the rest"
            )


def sizes(options: argparse.Namespace) -> str:
    config = read_json(options.model / "config.json")
    check_tensor_parallel(config, options.tensor_parallel)
    return str(context_length(config, options.context_length, options.prompt_tokens, options.max_tokens))


# ---------------------------------------------------------------- the view of a checkpoint


def view(options: argparse.Namespace) -> str:
    """Links to the files of a checkpoint, beside a generation_config.json that samples.

    transformers serve takes the temperature of a request, but whether it samples at all from this file.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.model.iterdir():
        link = options.output / path.name
        if path.name == "generation_config.json" or (link.is_symlink() and link.resolve() == path.resolve()):
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    source = options.model / "generation_config.json"
    config = read_json(source) if source.exists() else {}
    config |= {"do_sample": options.temperature > 0, "top_k": 0}
    write_whole(options.output / "generation_config.json", config)
    return str(options.output)


def write_whole(path: Path, value: object) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------- evalscope's arguments


def benchmark(name: str, release: str) -> dict[str, Any]:
    return read_json(HERE / "evalscope.json")[release][name]


def arguments(options: argparse.Namespace) -> str:
    data = benchmark(options.benchmark, options.evalscope)
    args = dict(data["args"])
    if options.path is not None:
        # A directory of files has the one subset `default`, and evalscope without a list would take its own.
        args |= {"local_path": str(options.path), "subset_list": ["default"]}
    if options.few_shot is not None:
        args["few_shot_num"] = options.few_shot
    if options.system_prompt is not None:
        args["system_prompt"] = options.system_prompt
        if not options.system_prompt:
            del args["system_prompt"]
    if options.window:
        args["extra_params"] = dict(zip(("start_date", "end_date"), options.window, strict=True))
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "max_tokens": options.max_tokens}
    # 0.17.1 asks for all samples of a question at once, and takes the timeout as a flag.
    sampling |= {"n": options.samples} if options.evalscope == "0.17.1" else {"timeout": options.timeout}
    return "\n".join([data["dataset"], json.dumps({data["dataset"]: args}), json.dumps(sampling)])


# ---------------------------------------------------------------- local data


class TextOnly(pickle.Unpickler):
    """The pickles of LiveCodeBench's private tests are one string, which needs no class."""

    def find_class(self, module: str, name: str) -> Any:
        raise Refused(f"a pickle that asks for {module}.{name}")


def test_cases(text: str) -> list[dict[str, str]]:
    """JSON, or the base64 of a compressed pickle of JSON (evalscope unpickles it with no such check)."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    return json.loads(TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load())


def problem_of_aime(row: dict[str, Any]) -> str | None:
    answer = str(row["answer"]).strip()
    return (
        None
        if answer.isdigit() and int(answer) <= 999
        else f"answer: expected an integer from 0 to 999, found {answer!r}"
    )


def problem_of_gpqa(row: dict[str, Any]) -> str | None:
    answers = [str(row[key]).strip() for key in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))]
    return None if all(answers) and len({*answers}) == 4 else f"answers: expected four different ones, found {answers}"


def problem_of_code(row: dict[str, Any]) -> str | None:
    date = row["contest_date"]
    if not isinstance(date, str):
        # `datasets` makes dates of the texts of a .jsonl, at which evalscope stops.
        return (
            f"contest_date: expected text, found {type(date).__name__}; keep it in a .parquet file with a text column"
        )
    try:
        datetime.fromisoformat(date)
    except ValueError:
        return f"contest_date: expected a date as 2024-08-01T00:00:00, found {date!r}"
    for key in ("public_test_cases", "private_test_cases"):
        try:
            cases = test_cases(row[key])
            if not all({"input", "output"} <= case.keys() for case in cases):
                return f"{key}: expected a list of objects with input and output"
        except Refused as error:
            return f"{key}: {error}"
        except Exception as error:
            return f"{key}: cannot be read: {error}"
    return None


PROBLEMS = {"aime24": problem_of_aime, "aime25": problem_of_aime, "gpqa": problem_of_gpqa, CODE: problem_of_code}


def in_window(date: str, window: list[str]) -> bool:
    """As evalscope has it: both midnights belong to the window."""
    first, last = (datetime.strptime(day, "%Y-%m-%d") for day in window)
    return first <= datetime.fromisoformat(date) <= last


def rows_of(path: Path, split: str) -> Iterable[dict[str, Any]]:
    """The rows as evalscope will get them."""
    import datasets

    datasets.disable_progress_bars()
    found = sorted(file.name for file in path.rglob("*") if file.suffix in FILES)
    if not found:
        raise Refused(f"DATASET_LOCAL: expected {split}.jsonl or {split}.parquet in {path}, found no data file")
    try:
        return datasets.load_dataset(str(path), split=split)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise Refused(
            f"DATASET_LOCAL: expected a split named '{split}' in {path} ({', '.join(found[:5])}): {first}"
        ) from None


def dataset(options: argparse.Namespace) -> str:
    data = benchmark(options.benchmark, options.evalscope)
    count = 0
    for number, row in enumerate(rows_of(options.path, data["split"]), 1):
        place = f"DATASET_LOCAL: {options.path}, row {number} of '{data['split']}'"
        absent = [field for field in data["fields"] if row.get(field) is None]
        if absent:
            raise Refused(f"{place}: expected the fields {', '.join(data['fields'])}, found no {absent[0]}")
        problem = PROBLEMS[options.benchmark](row)
        if problem:
            raise Refused(f"{place}: {problem}")
        count += not options.window or in_window(row["contest_date"], options.window)
    if not count:
        raise Refused(f"DATASET_LOCAL: {options.path}: no question{' in the window' if options.window else ''}")
    return str(min(count, options.limit or count))


# ---------------------------------------------------------------- the run


def run(options: argparse.Namespace) -> str:
    settings = dict(setting.split("=", 1) for setting in options.settings)
    if options.file.exists():
        there = read_json(options.file)
        for name, value in settings.items():
            if there.get(name) != value:
                raise Refused(
                    f"OUT_DIR: {options.file.parent} holds a run with {name} {there.get(name)!r}, this one has "
                    f"{value!r}; set another OUT_DIR"
                )
    elif options.write:
        write_whole(options.file, settings)
    return ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Any, of_benchmark: bool = False) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(call=call)
        if of_benchmark:
            made.add_argument("--benchmark", choices=PROBLEMS, required=True)
            made.add_argument("--evalscope", required=True, metavar="RELEASE")
            made.add_argument("--window", nargs=2, metavar=("FIRST", "LAST"))
        return made

    one = command("sizes", sizes)
    one.add_argument("--model", type=Path, required=True)
    for flag in ("--max-tokens", "--prompt-tokens", "--tensor-parallel"):
        one.add_argument(flag, type=int, required=True)
    one.add_argument("--context-length", type=int)

    one = command("view", view)
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--temperature", type=float, required=True)

    one = command("dataset", dataset, of_benchmark=True)
    one.add_argument("--path", type=Path, required=True)
    one.add_argument("--limit", type=int)

    one = command("arguments", arguments, of_benchmark=True)
    one.add_argument("--path", type=Path)
    for flag in ("--max-tokens", "--samples", "--timeout"):
        one.add_argument(flag, type=int, required=True)
    for flag in ("--temperature", "--top-p"):
        one.add_argument(flag, type=float, required=True)
    one.add_argument("--few-shot", type=int)
    one.add_argument("--system-prompt")

    one = command("run", run)
    one.add_argument("--file", type=Path, required=True)
    one.add_argument("--write", action="store_true")
    one.add_argument("settings", nargs="+", metavar="NAME=VALUE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        text = options.call(options)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if text:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
