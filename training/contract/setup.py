"""The sizes and switches that a command line implies, as the pinned Megatron-LM and slime derive them."""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"
SGLANG_ROLLOUT = "slime.rollout.sglang_rollout.generate_rollout"


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


@dataclass(frozen=True)
class SlimeSetup(Setup):
    """A parsed slime command line, as given.  `megatron` is what slime makes of it for Megatron."""

    entrypoint: str = "train.py"  # or "train_async.py"

    @classmethod
    def of(cls, args: argparse.Namespace, env: Mapping[str, str], entrypoint: str = "train.py") -> SlimeSetup:
        """The trainer's world is in the flags: slime/utils/arguments.py:1043."""
        return cls(args, args.actor_num_nodes * args.actor_num_gpus_per_node, env, entrypoint)

    @property
    def global_batch(self) -> int | None:
        """Samples of an optimizer step, None where nothing says it."""
        if self.num_steps_per_rollout:
            return self.samples // self.num_steps_per_rollout
        return self.global_batch_size

    @property
    def samples(self) -> int:
        """Samples of a rollout."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, None where --num-epoch makes them depend on the data."""
        return None if self.num_rollout is None else self.num_rollout * self.samples // self.global_batch

    @property
    def train_only(self) -> bool:
        """Whether no inference engine is started."""
        return self.debug_train_only or self.load_debug_rollout_data is not None

    @property
    def sft(self) -> bool:
        return self.loss_type == "sft_loss"

    @property
    def reads_samples(self) -> bool:
        """Whether rollouts are the samples of the data themselves."""
        return self.rollout_function_path == SFT_ROLLOUT

    @property
    def generates(self) -> bool:
        """Whether slime's own rollout function asks the engines for responses and grades them."""
        return self.rollout_function_path == SGLANG_ROLLOUT and self.load_debug_rollout_data is None

    @property
    def reference(self) -> bool:
        """Whether a reference model is loaded, slime/ray/placement_group.py:155."""
        return self.kl_coef != 0 or self.use_kl_loss

    @property
    def critic(self) -> bool:
        return self.advantage_estimator == "ppo"

    @property
    def critic_gpus(self) -> int:
        if not self.critic:
            return 0
        nodes = self.critic_num_nodes or self.actor_num_nodes
        return nodes * (self.critic_num_gpus_per_node or self.actor_num_gpus_per_node)

    @property
    def engine_gpus(self) -> int | None:
        """GPUs of all inference engines, slime/utils/arguments.py:1171.  None where nothing says it."""
        if self.train_only:
            return 0
        return self.world_size + self.critic_gpus if self.colocate else self.rollout_num_gpus

    @property
    def engine_attention_ranks(self) -> int:
        """GPUs of an engine that share out the attention heads."""
        ranks = self.rollout_num_gpus_per_engine
        return max(1, ranks // self.sglang_data_parallel_size) if self.sglang_enable_dp_attention else ranks

    @property
    def cluster_gpus(self) -> int:
        """GPUs that the run reserves in Ray, slime/ray/placement_group.py:71."""
        if self.debug_rollout_only:
            return self.engine_gpus or 0
        return self.world_size + self.critic_gpus + (0 if self.colocate else self.engine_gpus or 0)

    @functools.cached_property
    def tracker(self) -> str | None:
        """The text of --load's tracker file; without one slime starts from --ref-load."""
        if self.load is None:
            return None
        try:
            return (Path(self.load) / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    @functools.cached_property
    def megatron(self) -> Setup:
        """What Megatron's validation, configurations and checkpoint code are given.

        slime/backends/megatron_utils/arguments.py:7 and slime/utils/arguments.py:1094.  train_iters stays as given:
        slime sets it after the validation.
        """
        args = copy.copy(self.args)
        args.use_distributed_optimizer = args.bf16 = True
        args.seq_length = args.max_position_embeddings = 4096  # placeholders, sequences have their own lengths
        args.rope_type = args.rope_type or ("yarn" if args.multi_latent_attention else "rope")
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        if args.vocab_size and not args.padded_vocab_size and multiple > 0:
            args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
        if not args.tokenizer_model and not args.tokenizer_type:
            args.tokenizer_model = args.hf_checkpoint
        args.tokenizer_type = args.tokenizer_type or "HuggingFaceTokenizer"  # a model without a type is an error
        args.global_batch_size = self.global_batch
        if self.tracker is None:
            args.no_load_optim = args.no_load_rng = args.finetune = True
            args.load = args.ref_load
            args.ckpt_step = args.ckpt_step if args.ref_ckpt_step is None else args.ref_ckpt_step
        return Setup(args, self.world_size, self.env)
