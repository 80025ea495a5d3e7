#!/usr/bin/env python3
"""Train a small tokenizer of Qwen2.5's kind, and write the HuggingFace directory that the tiny model belongs to.

    python training/embedded/quickstart/tokenizer.py --input corpus.jsonl --output-dir tokenizer -- MODEL_ARGS...

Byte-level BPE, digits one by one, Qwen's three special tokens and its chat format. MODEL_ARGS are the Megatron model
flags of scripts/models/: config.json is derived from them, so the two cannot disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GenerationConfig, PreTrainedTokenizerFast  # noqa: E402

from training.contract import contract  # noqa: E402
from training.embedded.model import config_from_args, padded_vocab_size  # noqa: E402

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# How Qwen2.5 cuts text before BPE (pre_tokenizer of its tokenizer.json): words with their leading space, single
# digits, runs of punctuation, runs of white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Only what the assistant says lies between the generation marks: that is what supervised fine-tuning learns from.
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def texts(paths: list[Path]) -> Iterator[str]:
    """The documents of .jsonl files, and what is said in conversations."""
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if "text" in row:
                    yield row["text"]
                else:
                    yield from (message["content"] for message in row["messages"])


def train(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with exactly `vocab_size` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
    )
    fast.chat_template = CHAT
    return fast


def main() -> None:
    """Write the directory whole, or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help='{"text"} or {"messages"} a line')
    parser.add_argument("--output-dir", type=Path, required=True, help="directory to make")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("model_args", nargs="+", metavar="MODEL_ARGS", help="Megatron's model flags, after --")
    options = parser.parse_args()
    args, _, problems = contract.parse(contract.load("pretrain_gpt"), options.model_args)
    if problems:
        sys.exit("\n".join(map(str, problems)))
    if options.output_dir.exists():
        sys.exit(f"--output-dir: expected a path that does not exist yet, found {options.output_dir}")
    tokenizer = train(texts(options.input), options.vocab_size)
    rows = padded_vocab_size(len(tokenizer), args.make_vocab_size_divisible_by, 1)
    partial = options.output_dir.with_name(f".{options.output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    config = config_from_args(args, rows)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.save_pretrained(partial)
    # A response ends with the assistant's turn, a document with the end of text: rollout engines stop at both.
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(partial)
    os.replace(partial, options.output_dir)
    print(f"{options.output_dir}: {len(tokenizer):,} tokens, {rows:,} embedding rows")


if __name__ == "__main__":
    main()
