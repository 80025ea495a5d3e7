"""GRPO's arithmetic, as slime computes it at 8359c9a: advantages, the clipped objective, and what is logged of it.

One update of a policy on groups of samples, every group answering one prompt:

    advantage   a = (r - mean of its group) / (std of its group + 1e-6), the same for every token of a sample
    ratio       p = exp(log pi(token) - log pi_old(token)), pi_old being the trainer's own policy before the update
    objective   max(-p a, -clip(p, 1 - low, 1 + high) a); high > low leaves rare tokens more room to grow (DAPO)
    TIS         times clip(pi_old / pi_rollout, 0, 2): the samples came from another engine, here with FP8 weights,
                whose probabilities differ from the trainer's; the weight carries no gradient
    KL, entropy optional terms against a reference policy and for exploration

Sources: slime/utils/ppo_utils.py, slime/backends/megatron_utils/loss.py (policy_loss_function, get_responses) and
slime/ray/rollout.py (_post_process_rewards) at the pin; GRPO, arXiv 2402.03300; clip-higher and dynamic sampling, DAPO,
arXiv 2503.14476; KL estimators, J. Schulman, "Approximating KL divergence" (2020).

Per-token tensors are 1-D and hold the responses of several samples one after another, `lengths` giving each one's
share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["kl", "k2", "k3", "low_var_kl"]
Reduction = Callable[[Tensor], Tensor]

STD_EPSILON = 1e-6
KL_LIMIT = 10.0  # of low_var_kl, per token


# ---------------------------------------------------------------- advantages


def group_advantages(rewards: Tensor, *, normalize_std: bool = True) -> Tensor:
    """Rewards relative to their group, divided by its standard deviation (unbiased) unless `normalize_std` is false.

    rewards: (prompts, samples of a prompt), float. Returns the same shape. A group of equal rewards gives zeros. A
    group of one sample has no deviation: dividing by it gives NaN, as in slime; --disable-grpo-std-normalization
    avoids it.
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if not normalize_std:
        return centred
    return centred / (centred.std(dim=-1, keepdim=True) + STD_EPSILON)


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: rewards that differ (slime's check_reward_nonzero_std, DAPO's dynamic
    sampling).
    """
    return bool(torch.tensor(rewards, dtype=torch.float32).std() > 0)


# ---------------------------------------------------------------- log-probabilities


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of the distribution that it was drawn from.

    logits: (n, vocabulary) float32, row i predicting tokens[i]. tokens: (n,) int64. temperature: that of the rollout,
    so that trainer and rollout speak of one distribution. Returns two (n,) tensors, nats.
    """
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(-1, tokens[:, None]).squeeze(-1), entropy


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: KlKind) -> Tensor:
    """Per-token estimate of KL(pi || reference) from tokens drawn from pi.

    "kl": the log-ratio, unbiased. "k2": half its square, biased, small variance. "k3" and "low_var_kl": unbiased and
    never negative; the second is limited to 10. Raises ValueError for another kind.
    """
    log_ratio = log_probs.float() - reference.float()
    if kind == "kl":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind in ("k3", "low_var_kl"):
        k3 = torch.expm1(-log_ratio) + log_ratio
        return k3.clamp(-KL_LIMIT, KL_LIMIT) if kind == "low_var_kl" else k3
    raise ValueError(f"kl_loss_type {kind!r}")


# ---------------------------------------------------------------- from tokens to one number


def reduction(lengths: Sequence[int], masks: Sequence[Tensor], *, per_token: bool) -> Reduction:
    """How per-token values of a batch become one number: the sum over samples of each sample's mean over its masked
    tokens, or with `per_token` (--calculate-per-token-loss) the sum over all of them; the caller divides by samples or
    by tokens. masks: one (length,) tensor of 0 and 1 a sample.
    """

    def reduce(values: Tensor) -> Tensor:
        total = values.new_zeros(())
        for part, mask in zip(values.split(list(lengths)), masks, strict=True):
            summed = (part * mask).sum()
            total = total + (summed if per_token else summed / mask.sum().clamp(min=1))
        return total

    return reduce


# ---------------------------------------------------------------- the objective


@dataclass(frozen=True)
class Objective:
    """The numbers of the policy loss. tis_clip: None switches truncated importance sampling off."""

    eps_clip: float = 0.2
    eps_clip_high: float = 0.28
    tis_clip: float | None = 2.0
    tis_clip_low: float = 0.0
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_loss_type: KlKind = "low_var_kl"


def clipped_loss(log_ratio: Tensor, advantages: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Per-token loss and whether it is clipped (1.0 or 0.0). log_ratio: log pi - log pi_old."""
    ratio = log_ratio.exp()
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - objective.eps_clip, 1 + objective.eps_clip_high) * advantages
    return torch.maximum(free, clipped), (clipped > free).float()


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor,
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    objective: Objective,
    reduce: Reduction,
    rollout_log_probs: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro batch and what is logged of it, reduced by `reduce` (a sum: see `reduction`).

    All tensors (tokens,). The gradient flows through `log_probs` and `entropy` only. rollout_log_probs: of the engine
    that sampled, needed for TIS. reference_log_probs: needed where kl_loss_coef is not zero; without them no KL is
    logged. Raises ValueError if one that is needed is missing.
    """
    old_log_probs, advantages = old_log_probs.detach(), advantages.detach()
    log_ratio = log_probs - old_log_probs
    loss, clipped = clipped_loss(log_ratio, advantages, objective)
    metrics = {"pg_clipfrac": reduce(clipped), "ppo_kl": reduce(-log_ratio)}
    if objective.tis_clip is not None:
        if rollout_log_probs is None:
            raise ValueError("truncated importance sampling needs the log-probabilities of the rollout")
        weight = (old_log_probs - rollout_log_probs.detach()).exp()
        truncated = weight.clamp(objective.tis_clip_low, objective.tis_clip)
        loss = loss * truncated
        metrics |= {
            "tis": reduce(weight),
            "ois": reduce(log_ratio.exp()),
            "tis_clipfrac": reduce((truncated != weight).float()),
        }
    metrics["pg_loss"] = reduce(loss)
    metrics["entropy_loss"] = reduce(entropy)
    total = metrics["pg_loss"] - objective.entropy_coef * metrics["entropy_loss"]
    if reference_log_probs is not None:
        kl = kl_estimate(log_probs, reference_log_probs.detach(), objective.kl_loss_type)
        metrics["kl_loss"] = reduce(kl)
        total = total + objective.kl_loss_coef * metrics["kl_loss"]
    elif objective.kl_loss_coef:
        raise ValueError("a KL term needs the log-probabilities of the reference policy")
    metrics["loss"] = total
    return total, {name: value.detach() for name, value in metrics.items()}


# ---------------------------------------------------------------- trainer against rollout


def mismatch(train_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the trainer's policy is from the one that sampled, over the masked tokens.

    "rollout_kl": the k3 estimate of KL(rollout || trainer), nats a token. "mult_prob_error": mean of
    exp(|log pi_train - log pi_rollout|), 1 where they agree (NeMo-RL's token_mult_prob_error; above about 1.05 its
    authors stop a run). All tensors (tokens,). No tokens give 0 and 1.
    """
    chosen = mask.bool()
    difference = (train_log_probs.detach().float() - rollout_log_probs.detach().float())[chosen].double()
    if not difference.numel():
        return {"rollout_kl": 0.0, "mult_prob_error": 1.0}
    k3 = torch.expm1(difference) - difference
    return {"rollout_kl": k3.mean().item(), "mult_prob_error": difference.abs().exp().mean().item()}
