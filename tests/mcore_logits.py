"""Logits of the real megatron.core GPTModel on a checkpoint: `python mcore_logits.py DIR INPUT.npz OUTPUT.npy`.

INPUT.npz holds `input_ids` (batch, sequence). Runs as a program of its own because megatron.core needs an initialised
process group. The model has the local (CPU) layers of megatron-core 0.14.0; parameters are filled with NaN before
loading, so that one that the checkpoint does not fill is seen. Weights are upcast to float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.checkpoint import torch_dist  # noqa: E402


def build(args, rows: int) -> GPTModel:
    """A float32 GPTModel of the sizes in a checkpoint's args."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=rows,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
    ).eval()


def main() -> None:
    directory, given, output = map(Path, sys.argv[1:])
    ids = torch.from_numpy(np.load(given)["input_ids"]).long()
    with torch_dist.Reader(directory) as reader:
        args = reader.common()["args"]
        rows = reader.tensors["embedding.word_embeddings.weight"].shape[0]
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        initialize_rng_tracker(inference_rng_tracker=True)  # no dropout: no CUDA generators
        model = build(args, rows)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        wanted = model.sharded_state_dict()
        loaded = dist_checkpointing.load(wanted, str(directory))  # with everything of common.pt beside the model
        model.load_state_dict({key: loaded[key] for key in wanted})
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
        torch.cuda.current_device = lambda: "cpu"  # the rotary embedding moves itself there, GPU or not
        with torch.no_grad():
            logits = model(ids, positions, causal)
        np.save(output, logits.float().numpy())
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
