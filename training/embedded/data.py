"""Megatron's data: `.bin/.idx` files, blended, split and shuffled by megatron-core's own GPTDataset."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from torch import Tensor
from transformers import AutoTokenizer

from training.embedded.errors import TrainingError


class HuggingFaceTokenizer:
    """What GPTDataset reads of a tokenizer (megatron/training/tokenizer/tokenizer.py:131).

    Like upstream's it has no `pad`: with one equal to the end-of-text token, GPTDataset would mask the end of every
    document, and in the loss mask that all samples share (megatron/core/datasets/gpt_dataset.py:211).
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_dir():
            raise TrainingError(
                f"--tokenizer-model: expected a directory with a HuggingFace tokenizer, found none at {path}"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"--tokenizer-model: {path} does not load as a HuggingFace tokenizer: {reason}"
            ) from error
        self.vocab_size = len(self.tokenizer)
        self.eod = self.tokenizer.eos_token_id
        if self.eod is None:
            raise TrainingError(
                f"--tokenizer-model: the tokenizer at {path} has no eos token, which ends every document"
            )
        self.unique_identifiers = {"class": type(self).__name__, "path": path}


@dataclass(frozen=True)
class Batch:
    """A micro batch on the device, (micro batch size, sequence length): tokens, labels int64; loss_mask float32."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class Datasets:
    """The three splits; None where --split gives one nothing or no samples of it are needed."""

    train: GPTDataset | None
    valid: GPTDataset | None
    test: GPTDataset | None


def build(args: argparse.Namespace, tokenizer: HuggingFaceTokenizer) -> Datasets:
    """Train, validation and test samples for the whole run (get_train_valid_test_num_samples, training.py:2561).

    The indices are cached under --data-cache-path, next to the data if that is not given.
    """
    evaluations = args.train_iters // args.eval_interval + 1
    sizes = [
        args.train_iters * args.global_batch_size,
        evaluations * args.eval_iters * args.global_batch_size,
        args.eval_iters * args.global_batch_size,
    ]
    blend, per_split = _blends(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=args.split if per_split is None else None,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    with _one_rank():
        train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return Datasets(train, valid, test)


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """A process group of this process alone: a blend of several prefixes asks for its rank
    (megatron/core/datasets/blended_dataset.py:126), though nothing is communicated.
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def micro_batches(dataset: GPTDataset, consumed: int, size: int, rows: int, device: torch.device) -> Iterator[Batch]:
    """Samples in order from `consumed` on, `size` at a time (MegatronPretrainingSampler; drops the last batch).

    Raises TrainingError on a token that the embedding, of `rows` rows, does not have.
    """
    for start in range(consumed, len(dataset) - size + 1, size):
        samples = [dataset[index] for index in range(start, start + size)]
        tokens, labels, loss_mask = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples])
            for key in ("tokens", "labels", "loss_mask")
        )
        largest = max(tokens.max().item(), labels.max().item())
        if largest >= rows:
            raise TrainingError(
                f"--tokenizer-model: the data has token {largest}, expected less than the {rows} embedding rows; "
                "prepare the data with this tokenizer"
            )
        yield Batch(tokens.to(device), labels.to(device), loss_mask.to(device))


def _blends(args: argparse.Namespace):
    """The blend of all splits, or one blend per split (get_blend_and_blend_per_split, utils.py:434)."""
    paths = args.data_path
    if args.data_args_path is not None:
        paths = Path(args.data_args_path).read_text().split()
    splits = [args.train_data_path, args.valid_data_path, args.test_data_path]
    if paths is None and not any(splits):
        raise TrainingError(
            "--data-path: expected the prefix of a .bin/.idx pair (see scripts/CPT/prepare_data.sh), found none"
        )
    blend = get_blend_from_list(paths)
    per_split = None if paths is not None else [get_blend_from_list(split) for split in splits]
    for prefixes, _ in filter(None, [blend, *(per_split or [])]):
        for prefix in prefixes:
            for suffix in (".idx", ".bin"):
                if not Path(prefix + suffix).is_file():
                    raise TrainingError(f"--data-path: expected {prefix}{suffix}, found no such file")
    return blend, per_split
