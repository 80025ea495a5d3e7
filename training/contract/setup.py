"""The sizes and switches that a pretrain_gpt command line implies, as the pinned Megatron-LM derives them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setup:
    """A parsed command line, what it implies, and where it runs.

    Attributes that are not defined here are those of `args`: `setup.lr` is `setup.args.lr`.
    """

    args: argparse.Namespace
    world_size: int | None = None  # None: one data parallel rank, divisibility of the world not checked
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def __getattr__(self, name: str) -> Any:
        if name == "args":  # not yet set while being copied
            raise AttributeError(name)
        return getattr(self.args, name)

    @property
    def tp(self) -> int:
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        return self.context_parallel_size

    @property
    def dp(self) -> int:
        return 1 if self.world_size is None else max(1, self.world_size // (self.tp * self.pp * self.cp))

    @property
    def layers(self) -> int:
        return self.num_layers or self.encoder_num_layers

    @property
    def seq(self) -> int:
        return self.seq_length or self.encoder_seq_length

    @property
    def global_batch(self) -> int:
        default = self.micro_batch_size * self.dp
        return default if self.global_batch_size is None else self.global_batch_size

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        grouped = self.group_query_attention
        return self.num_query_groups if grouped else self.num_attention_heads

    @property
    def ffn(self) -> int:
        """FFN width; upstream's default for SwiGLU keeps the parameter count of a 4h MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        hidden = self.hidden_size
        return int((4 * hidden * 2 / 3) / 64) * 64 if self.swiglu else 4 * hidden

    @property
    def sequence_split(self) -> bool:
        """Whether tensor parallel ranks share out a sequence: upstream drops the flag without them."""
        return self.args.sequence_parallel and self.tp > 1

    @property
    def dist_checkpoint(self) -> bool:
        return self.ckpt_format != "torch"

    @property
    def rope(self) -> bool:
        return self.use_rotary_position_embeddings or self.position_embedding_type == "rope"

    @property
    def decay_iters(self) -> int | None:
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def warmup_iters(self) -> float:
        """Warm-up in iterations (iteration-based training)."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * (self.decay_iters or 0)
        return self.lr_warmup_iters

    @property
    def recompute(self) -> str | None:
        return "selective" if self.recompute_activations else self.recompute_granularity

    @property
    def virtual_stages(self) -> int | None:
        """Virtual pipeline size, or None where interleaving is off or cannot be computed."""
        if self.num_virtual_stages_per_pipeline_rank is not None:
            size = self.num_virtual_stages_per_pipeline_rank
        elif self.num_layers_per_virtual_pipeline_stage:
            size = self.split_layers // self.pp // self.num_layers_per_virtual_pipeline_stage
        else:
            return None
        return None if size <= 1 else size

    @property
    def split_layers(self) -> int:
        """Layers that are dealt to pipeline stages, the embedding and the loss counted where asked."""
        ends = self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split
        return self.layers + ends

    @property
    def local_matrices(self) -> dict[str, int]:
        """Widths of the FP8 linear layers that tensor parallelism cuts, on one rank."""
        return {
            "query rows": self.num_attention_heads * self.head_dim // self.tp,
            "key and value rows": self.query_groups * self.head_dim // self.tp,
            "FFN rows": self.ffn // self.tp,
        }
