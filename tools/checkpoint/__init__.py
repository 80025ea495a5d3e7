"""Checkpoint formats: Megatron's `torch_dist`, read without trusting it and written without Megatron.

`safe_pickle`   pickles and torch.save archives as inert data; imports and calls nothing
`torch_dist`    the checkpoint directory: tracker file, row-range reader (numpy only), atomic writer (torch)
`qwen2_layout`  Hugging Face Qwen2 names and shapes <-> Megatron's
"""

from tools.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError"]
