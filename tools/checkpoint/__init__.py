"""Checkpoint formats: read without trusting them, written without the frameworks that define them.

Formats
`safe_pickle`        pickles and torch.save archives as inert data; imports and calls nothing
`torch_archive`      torch.save archives, written without torch
`torch_dist`         Megatron's checkpoint directory: tracker file, reader of row ranges
`torch_dist_writer`  the same, written
`safetensors_io`     Hugging Face directories: byte ranges, shards, index, companions
`block_fp8`          the arithmetic of block FP8 (torch); `block_fp8_numba` is its fast loop, `fp8_cast` the format

Model
`qwen2_layout`       Hugging Face Qwen2 names and shapes <-> Megatron's
`qwen2_config`       config.json <-> Megatron's arguments

Commands
`cli`, `parallel`, `staging`, `crc`   options and exits, threads, output that appears whole, checksums
`sources`, `compare`                  any checkpoint as Hugging Face tensors, and two of them compared
"""

from tools.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError"]
