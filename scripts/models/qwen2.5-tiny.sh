# shellcheck shell=bash disable=SC2034
# A Qwen2.5 for one small machine, chosen here: the family's architecture with the heads of the 0.5B, all of its linear
# layers whole 128x128 FP8 blocks, embeddings tied. With 2 heads of 128 it hardly learns to read a second digit.
MODEL_ARGS=(
  --num-layers 4 --hidden-size 256 --ffn-hidden-size 768
  --num-attention-heads 4 --group-query-attention --num-query-groups 2
  --swiglu --add-qkv-bias --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 10000 --max-position-embeddings 512
  --make-vocab-size-divisible-by 128
)
# Rows of the HF weights. pretrain_gpt.py counts the tokenizer itself; slime sends this many rows to its rollout engine.
VOCAB_ARGS=(--vocab-size 2048)
