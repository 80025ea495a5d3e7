"""Sampling from a model, with the log-probability of every token that was drawn: what a rollout engine is for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

SHRINK = 0.75  # finished sequences leave the batch when the share of running ones falls below


@dataclass(frozen=True)
class Sampling:
    """How to draw. temperature 0: always the likeliest token. top_k -1: no limit (SGLang's sampling parameters)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 1024
    stop: tuple[int, ...] = ()


@dataclass
class Response:
    """What was drawn after one prompt: the token that stopped it is the last one, unless it was cut off (truncated).

    log_probs: of each token under the distribution softmax(logits / temperature), before top_p and top_k, nats. At
    temperature 0 those of temperature 1.
    """

    tokens: list[int]
    log_probs: list[float]
    truncated: bool


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts: the same draw of the same rollout is the same whatever happened before."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


@torch.inference_mode()
def generate(
    model: transformers.Qwen2ForCausalLM, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> list[Response]:
    """Responses to tokenised prompts, all at once. The result is a function of the arguments."""
    device = model.device
    random = torch.Generator(device).manual_seed(seed)
    longest = max(map(len, prompts))
    # Left-padded, so that every sequence draws its next token in the same column.
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position = mask.cumsum(1) - 1
    position.clamp_(min=0)
    cache = transformers.DynamicCache()
    responses = [Response([], [], truncated=True) for _ in prompts]
    running = list(range(len(prompts)))
    stop = torch.tensor(sampling.stop, dtype=torch.int64, device=device)
    for _ in range(sampling.max_new_tokens):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        drawn, log_probs = draw(output.logits[:, -1].float(), sampling, random)
        stopped = torch.isin(drawn, stop).tolist()
        for row, token, log_prob in zip(running, drawn.tolist(), log_probs.tolist(), strict=True):
            response = responses[row]
            if response.truncated:  # still running
                response.tokens.append(token)
                response.log_probs.append(log_prob)
        for row, ended in zip(running, stopped, strict=True):
            responses[row].truncated &= not ended
        alive = [index for index, row in enumerate(running) if responses[row].truncated]
        if not alive:
            break
        tokens, position = drawn[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if len(alive) < SHRINK * len(running):
            kept = torch.tensor(alive, device=device)
            cache.batch_select_indices(kept)
            tokens, position, mask = tokens[kept], position[kept], mask[kept]
            running = [running[index] for index in alive]
    return responses


def draw(logits: Tensor, sampling: Sampling, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability. logits: (rows, vocabulary) float32. Returns two (rows,) tensors."""
    scores = torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        tokens = scores.argmax(dim=-1)
    else:
        tokens = torch.multinomial(_restrict(scores.exp(), sampling), 1, generator=random).squeeze(-1)
    return tokens, scores.gather(-1, tokens[:, None]).squeeze(-1)


def _restrict(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Zero what top_k and top_p leave out: the smallest set of likeliest tokens that holds top_p of the probability."""
    if sampling.top_k > 0:
        least = probabilities.topk(min(sampling.top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if sampling.top_p < 1.0:
        ordered, indices = (probabilities / probabilities.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(-1, indices, ordered.where(before < sampling.top_p, 0.0))
    return probabilities
