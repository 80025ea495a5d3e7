# shellcheck shell=bash disable=SC2034
# Qwen2.5-7B. Source of the numbers: config.json of Qwen/Qwen2.5-7B.
# 1188 = 152064 / 128: the 151665 tokens are padded to the 152064 rows of the HF weights for TP 1, 2 and 4.
MODEL_ARGS=(
  --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28
  --group-query-attention --num-query-groups 4 --untie-embeddings-and-output-weights
  --swiglu --add-qkv-bias --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --max-position-embeddings 32768
  --make-vocab-size-divisible-by 1188
)
# Rows of the HF weights. pretrain_gpt.py counts the tokenizer itself; slime sends this many rows to its rollout engine.
VOCAB_ARGS=(--vocab-size 152064)
