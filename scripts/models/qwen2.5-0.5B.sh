# shellcheck shell=bash disable=SC2034
# Qwen2.5-0.5B. Source of the numbers: config.json of Qwen/Qwen2.5-0.5B. Embeddings are tied.
# Heads of 64 rows are half a block, so in FP8 there is no TP but 1.
# 1187 = 151936 / 128: the 151665 tokens are padded to the 151936 rows of the HF weights.
MODEL_ARGS=(
  --num-layers 24 --hidden-size 896 --ffn-hidden-size 4864 --num-attention-heads 14
  --group-query-attention --num-query-groups 2
  --swiglu --add-qkv-bias --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --max-position-embeddings 32768
  --make-vocab-size-divisible-by 1187
)
# Rows of the HF weights. pretrain_gpt.py counts the tokenizer itself; slime sends this many rows to its rollout engine.
VOCAB_ARGS=(--vocab-size 151936)
