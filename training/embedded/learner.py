"""The training side of SFT and RL: optimizer steps on the batches that rollouts bring.

slime's MegatronTrainRayActor (slime/backends/megatron_utils/actor.py, model.py and loss.py at 8359c9a) on one device.
A rollout is one or more steps of --global-batch-size samples, a step is one or more packed micro batches.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from tools.checkpoint.block_fp8 import WEIGHT_BLOCK, BlockFP8, power_of_two_scales, quantize
from tools.data import chat
from training.embedded import checkpointing, fp8_linear, grpo, model, optimization, packing
from training.embedded.batch import Batch
from training.embedded.errors import TrainingError

Metrics = dict[str, float]


class Learner:
    """The policy and its optimizer. args: of train_arguments.parse, its length and start settled."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        tokens = args.vocab_size or len(chat.load_tokenizer(args.hf_checkpoint))
        self.vocab_rows = model.padded_vocab_size(
            tokens, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
        self.precision = fp8_linear.Precision(fp8=args.fp8 is not None, pow2=power_of_two_scales())
        self.model = self._build()
        self.optimizer = optimization.MainParamOptimizer(self.model, args)
        self.scheduler = optimization.build_scheduler(self.optimizer, args)
        _, self.loaded = checkpointing.load(args, self.vocab_rows, self.model, self.optimizer, self.scheduler)
        self.reference = self._load_reference() if args.use_kl_loss else None
        self.objective = grpo.Objective(
            eps_clip=args.eps_clip,
            eps_clip_high=args.eps_clip_high,
            tis_clip=args.tis_clip if args.use_tis else None,
            tis_clip_low=args.tis_clip_low,
            entropy_coef=args.entropy_coef,
            kl_loss_coef=args.kl_loss_coef,
            kl_loss_type=args.kl_loss_type,
        )

    def _build(self) -> Qwen2ForCausalLM:
        built = model.build(self.args, self.vocab_rows, self.device, self.precision)
        built.set_attn_implementation(packing.ATTENTION)
        return built

    def _load_reference(self) -> Qwen2ForCausalLM:
        reference = self._build().requires_grad_(False)
        checkpointing.load_weights(
            self.args, self.vocab_rows, reference, Path(self.args.ref_load), self.args.ref_ckpt_step
        )
        return reference

    # ------------------------------------------------------------ one rollout

    def train(self, batch: Batch) -> Iterator[Metrics]:
        """Every optimizer step of a rollout, and what slime logs of it under train/ and rollout/."""
        args = self.args
        size = args.global_batch_size
        steps = [range(start, start + size) for start in range(0, len(batch) - size + 1, size)]
        terms = self._policy_terms(batch, steps) if args.loss_type == "policy_loss" else None
        for number, step in enumerate(steps):
            metrics = self._step(batch, list(step), terms)
            if number == len(steps) - 1:
                metrics |= self._rollout_metrics(batch, terms)
            yield metrics

    def _step(self, batch: Batch, step: list[int], terms: _PolicyTerms | None) -> Metrics:
        args = self.args
        parts = self._micro_batches(batch, step)
        tokens = sum(max(1, sum(batch.masks[index])) for index in step)
        # loss_function scales by micro batches / global batch. Megatron takes the first factor back, but not with a
        # per-token loss, whose gradient it divides by the tokens of the step: there, as in slime, the gradient grows
        # with the number of micro batches.
        scale = 1.0 / args.global_batch_size
        if args.calculate_per_token_loss:
            scale *= len(parts) / tokens
        sums: dict[str, float] = defaultdict(float)
        for part in parts:
            loss, metrics = self._loss(batch, part, terms)
            (loss * scale).backward()
            for name, value in metrics.items():
                sums[name] += value.item()
        count = tokens if args.calculate_per_token_loss else len(step)
        metrics = {f"train/{name}": value / count for name, value in sums.items()}
        if not all(map(_finite, metrics.values())):
            raise TrainingError(f"the loss is not finite: {metrics}; nothing was saved since the last checkpoint")
        metrics["train/grad_norm"] = self.optimizer.step()
        if not _finite(metrics["train/grad_norm"]):
            raise TrainingError("the gradient is not finite; nothing was saved since the last checkpoint")
        self.scheduler.step(args.global_batch_size)
        for number, group in enumerate(self.optimizer.param_groups):
            metrics[f"train/lr-pg_{number}"] = self.scheduler.get_lr(group)
        return metrics

    def _micro_batches(self, batch: Batch, step: list[int]) -> list[list[int]]:
        args = self.args
        if args.use_dynamic_batch_size:
            lengths = [len(batch.tokens[index]) for index in step]
            # slime/backends/megatron_utils/data.py:262: the GPUs of a context parallel group share a micro batch.
            limit = args.max_tokens_per_gpu * args.context_parallel_size
            return [[step[i] for i in part] for part in packing.micro_batches(lengths, limit)]
        size = args.micro_batch_size
        return [step[start : start + size] for start in range(0, len(step), size)]

    def _loss(self, batch: Batch, part: list[int], terms: _PolicyTerms | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of a micro batch and its summed metrics."""
        log_probs, entropy = self._log_probs(self.model, batch, part)
        responses = [len(batch.masks[index]) for index in part]
        masks = [torch.tensor(batch.masks[index], device=self.device) for index in part]
        reduce = grpo.reduction(responses, masks, per_token=self.args.calculate_per_token_loss)
        if terms is None:
            loss = -reduce(log_probs)
            return loss, {"loss": loss.detach()}
        if terms.old is None:
            terms.seen.update(zip(part, log_probs.detach().split(responses), strict=True))
        old = terms.seen if terms.old is None else terms.old
        return grpo.policy_loss(
            log_probs,
            entropy if self.args.entropy_coef else entropy.detach(),
            old_log_probs=torch.cat([old[index] for index in part]),
            advantages=torch.cat([terms.advantages[index].expand(len(batch.masks[index])) for index in part]),
            objective=self.objective,
            reduce=reduce,
            rollout_log_probs=torch.cat([terms.rollout[index] for index in part]),
            reference_log_probs=None if terms.reference is None else torch.cat([terms.reference[i] for i in part]),
        )

    def _log_probs(self, policy: Qwen2ForCausalLM, batch: Batch, part: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every response token of a micro batch, one sample after another."""
        packed = packing.pack([batch.tokens[index] for index in part], self.device)
        responses = [len(batch.masks[index]) for index in part]
        logits = packing.logits(policy, packed, packing.response_rows(packed.lengths, responses, self.device))
        tokens = torch.tensor([token for index in part for token in batch.response(index)], device=self.device)
        return grpo.token_log_probs(logits, tokens, self.args.rollout_temperature)

    # ------------------------------------------------------------ RL

    def _policy_terms(self, batch: Batch, steps: list[range]) -> _PolicyTerms:
        args = self.args
        rewards = torch.tensor(batch.rewards, device=self.device).view(-1, args.n_samples_per_prompt)
        advantages = grpo.group_advantages(rewards, normalize_std=args.grpo_std_normalization)
        # The old policy is the one before the first step. With a single step it is the one that this step
        # differentiates, and needs no forward pass of its own.
        return _PolicyTerms(
            advantages=advantages.flatten(),
            rollout=[torch.tensor(values, device=self.device) for values in batch.log_probs],
            old=None if len(steps) == 1 else self._forward(self.model, batch, steps),
            reference=None if self.reference is None else self._forward(self.reference, batch, steps),
        )

    @torch.no_grad()
    def _forward(self, policy: Qwen2ForCausalLM, batch: Batch, steps: list[range]) -> dict[int, Tensor]:
        """Log-probabilities of every sample's response."""
        found: dict[int, Tensor] = {}
        for step in steps:
            for part in self._micro_batches(batch, list(step)):
                log_probs, _ = self._log_probs(policy, batch, part)
                found.update(zip(part, log_probs.split([len(batch.masks[i]) for i in part]), strict=True))
        return found

    def _rollout_metrics(self, batch: Batch, terms: _PolicyTerms | None) -> Metrics:
        metrics = {
            "rollout/response_lengths": _mean(batch.responses),
            "rollout/total_lengths": _mean(batch.lengths),
            "rollout/truncated": _mean(batch.truncated),
        }
        if terms is None:
            return metrics
        old = terms.seen if terms.old is None else terms.old
        indices = sorted(old)
        trainer = torch.cat([old[index] for index in indices])
        rollout = torch.cat([terms.rollout[index] for index in indices])
        mismatch = grpo.mismatch(trainer, rollout, torch.ones_like(trainer))
        return metrics | {
            "rollout/raw_reward": _mean(batch.rewards),
            "rollout/rewards": terms.advantages.mean().item(),
            "rollout/log_probs": _mean([old[index].mean().item() for index in indices]),
            "rollout/rollout_log_probs": _mean([terms.rollout[index].mean().item() for index in indices]),
            "rollout/kl_to_trainer": mismatch["rollout_kl"],
            "rollout/mult_prob_error": mismatch["mult_prob_error"],
        }

    # ------------------------------------------------------------ what leaves the trainer

    @torch.no_grad()
    def rollout_weights(self, *, fp8: bool) -> dict[str, Tensor | BlockFP8]:
        """The BF16 weights under Hugging Face's names; with `fp8` those of linear layers as 128x128 blocks.

        slime casts with float32 scales and its own formula, whatever the trainer's scales are
        (slime/backends/megatron_utils/megatron_to_hf/__init__.py and slime/utils/fp8_kernel.py at 8359c9a).
        """
        quantised = {
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, fp8_linear.Linear) and name != "lm_head"
        }
        return {
            name: quantize(parameter, WEIGHT_BLOCK, pow2=False, formula="slime")
            if fp8 and name in quantised
            else parameter.detach().cpu()
            for name, parameter in self.model.named_parameters()
        }

    def save(self, rollout_id: int) -> Path:
        """Write the checkpoint that the tracker calls `rollout_id`."""
        progress = checkpointing.Progress(iteration=rollout_id)
        return checkpointing.save(self.args, self.vocab_rows, self.model, self.optimizer, self.scheduler, progress)

    def describe(self) -> str:
        """What is trained, for the log."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"model: {count:,} parameters on {self.device}, started from {self.loaded}\n" + fp8_linear.describe(
            self.model, self.precision
        )


class _PolicyTerms:
    """Per-sample constants of the policy loss, nats: see grpo.policy_loss. seen: log-probabilities of the only step."""

    def __init__(
        self,
        advantages: Tensor,
        rollout: list[Tensor],
        old: dict[int, Tensor] | None,
        reference: dict[int, Tensor] | None,
    ) -> None:
        self.advantages, self.rollout, self.old, self.reference = advantages, rollout, old, reference
        self.seen: dict[int, Tensor] = {}


def _mean(values: list) -> float:
    return sum(values) / max(len(values), 1)


def _finite(value: float) -> bool:
    return value - value == 0.0
