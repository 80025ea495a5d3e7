"""The model: transformers' Qwen2ForCausalLM, shaped and initialised by Megatron's arguments."""

from __future__ import annotations

import argparse
import math

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from training.embedded import attention, fp8_linear


def padded_vocab_size(tokens: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows of the embedding: `tokens` rounded up to a multiple (_vocab_size_with_padding, tokenizer.py:112)."""
    multiple = divisible_by * tensor_parallel
    return -(-tokens // multiple) * multiple


def config_from_args(args: argparse.Namespace, vocab_rows: int) -> Qwen2Config:
    """The HF config that the Megatron arguments describe. vocab_rows: rows of the embedding, padding included."""
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=vocab_rows,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
        max_position_embeddings=args.max_position_embeddings,
        rms_norm_eps=args.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        initializer_range=args.init_method_std,
        attention_dropout=args.attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )


def build(
    args: argparse.Namespace, vocab_rows: int, device: torch.device, precision: fp8_linear.Precision
) -> Qwen2ForCausalLM:
    """A BF16 model with Megatron's initial weights, drawn from args.seed on the CPU so that every device starts equal.

    Megatron draws N(0, std) everywhere, N(0, std / sqrt(2 layers)) for the two projections that write to the residual
    stream, zeros for biases and ones for norms (megatron/core/transformer/transformer_config.py, init_method and
    output_layer_init_method, at core_v0.14.0).
    """
    config = config_from_args(args, vocab_rows)
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(args.seed)
    residual_std = args.init_method_std / math.sqrt(2.0 * args.num_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else args.init_method_std
                parameter.normal_(0.0, std, generator=generator)
    # Rotary frequencies are a float32 buffer: only parameters are BF16.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    fp8_linear.convert(model, precision)
    model.set_attn_implementation(attention.WIDE)
    return model.to(device)
