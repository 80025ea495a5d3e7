"""A model, a tokenizer and data so small that a rollout and a step take milliseconds; all of it real files.

The tokenizer is of Qwen2.5's kind, with few characters and with every answer, \\boxed{0} to \\boxed{7}, as one token: a
random model is right now and then, by slime's own rules.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from training.contract import contract
from training.embedded import checkpointing, fp8_linear, model, optimization, train_arguments

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWERS = [f"\\boxed{{{number}}}" for number in range(8)]
MERGED = ("user", "assistant", "hm")  # from left to right
VOCABULARY = list(
    dict.fromkeys(
        [
            *(END_OF_TEXT, TURN_START, TURN_END, *ANSWERS),
            *("Ċ", "Ġ", *"01234567", *"FORTESTINGONLY", *"userassistantqhm"),  # a line feed, a space
            *(word[: n + 1] for word in MERGED for n in range(1, len(word))),
        ]
    )
)
TOKEN = {text: number for number, text in enumerate(VOCABULARY)}
STOP = (TOKEN[END_OF_TEXT], TOKEN[TURN_END])
ROWS = 64  # of the embedding: the vocabulary, and a few that mean nothing
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

MODEL = [
    *("--num-layers", 2, "--hidden-size", 128, "--ffn-hidden-size", 256, "--num-attention-heads", 2),
    *("--group-query-attention", "--num-query-groups", 1, "--max-position-embeddings", 256),
    *("--swiglu", "--add-qkv-bias", "--disable-bias-linear", "--normalization", "RMSNorm", "--norm-epsilon", 1e-6),
    *("--use-rotary-position-embeddings", "--rotary-base", 10000, "--untie-embeddings-and-output-weights"),
    *("--make-vocab-size-divisible-by", ROWS, "--vocab-size", ROWS, "--init-method-std", 0.1),
    *("--hidden-dropout", 0, "--attention-dropout", 0, "--bf16"),
]
PRECISION = {"bf16": [], "fp8": ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]}
SFT = [
    *("--rollout-function-path", train_arguments.SFT_ROLLOUT, "--input-key", "messages", "--loss-type", "sft_loss"),
    *("--calculate-per-token-loss", "--disable-compute-advantages-and-returns", "--debug-train-only"),
]
RL = [
    *("--input-key", "prompt", "--label-key", "label", "--apply-chat-template", "--rm-type", "math"),
    *("--advantage-estimator", "grpo", "--rollout-max-response-len", 4),
]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """For modules that import it: no GPU is there, where these sizes make no sense and sums come in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def words(*values: object) -> list[str]:
    return [str(value) for value in values]


def tokenizer() -> PreTrainedTokenizerFast:
    """What Qwen2.5's class makes of it: transformers puts its cutting of text and its bytes around any vocabulary."""
    merges = [(word[:n], word[n]) for word in MERGED for n in range(1, len(word))]
    inner = Tokenizer(models.BPE(TOKEN, merges))
    inner.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    inner.add_tokens([AddedToken(answer, normalized=False) for answer in ANSWERS])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT
    return fast


def hf_dir(folder: Path, *, fp8: bool = False, **changes: Any) -> Path:
    """The directory that --hf-checkpoint names: configuration and tokenizer, no weights, as they come from the
    trainer.
    """
    tokenizer().save_pretrained(folder)
    config = {
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": ROWS},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
        **{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        **({"quantization_config": FP8} if fp8 else {}),
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": TOKEN[TURN_END]}))
    return folder


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path: Path, count: int) -> Path:
    """SFT data: answers of one to four tokens."""
    rows = []
    for number in range(count):
        answer = "hm" * (number % 4) + ANSWERS[number % 8]
        question = {"role": "user", "content": f"q{number % 8}"}
        rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    return jsonl(path, rows)


def questions(path: Path, count: int) -> Path:
    """RL data: the answer to q3 is 3."""
    asked = ({"prompt": [{"role": "user", "content": f"q{n % 8}"}], "label": str(n % 8)} for n in range(count))
    return jsonl(path, asked)


def argv(folder: Path, *flags: object, kind: Sequence[object] = RL, precision: str = "bf16") -> list[str]:
    """A command line of train.py on the files of `folder`: hf, data.jsonl, start; later flags win."""
    return words(
        *(*MODEL, *PRECISION[precision], *kind, "--lr", 1e-3, "--lr-decay-style", "constant", "--weight-decay", 0),
        *("--hf-checkpoint", folder / "hf", "--ref-load", folder / "start", "--prompt-data", folder / "data.jsonl"),
        *("--num-rollout", 4, "--rollout-batch-size", 4, "--global-batch-size", 4, "--seed", 1),
        *("--use-dynamic-batch-size", "--max-tokens-per-gpu", 512, *flags),
    )


def parse(command: Sequence[str]) -> argparse.Namespace:
    """Parsed, with its length and start settled as train.py does it for a first run."""
    args = train_arguments.parse(command, tell=lambda line: None)
    train_arguments.choose_start(args)
    train_arguments.set_length(args, rollouts_per_epoch=0)
    return args


def save_start(args: argparse.Namespace, root: Path, seed: int = 1) -> Path:
    """A checkpoint of random weights in `root`."""
    first = argparse.Namespace(**{**vars(args), "save": str(root), "seed": seed, "fp8": None, "train_iters": 1})
    rows = model.padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, 1)
    built = model.build(first, rows, torch.device("cpu"), fp8_linear.Precision())
    optimizer = optimization.MainParamOptimizer(built, first)
    scheduler = optimization.build_scheduler(optimizer, first)
    checkpointing.save(first, rows, built, optimizer, scheduler, checkpointing.Progress(iteration=1))
    return root


def run_folder(folder: Path, *, fp8: bool = False, **changes: Any) -> Path:
    """hf, data.jsonl with questions, and a start of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_dir(folder / "hf", fp8=fp8, **changes)
    questions(folder / "data.jsonl", 16)
    save_start(parse(argv(folder)), folder / "start")
    return folder


def without(command: list[str], *flags: str) -> list[str]:
    """A command line without some flags and their values."""
    pieces = contract.split(contract.load("slime"), command)
    return [word for piece in pieces if piece[0] not in flags for word in piece]
