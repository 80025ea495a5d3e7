"""The training side: gradients against transformers in float64, slime's scaling of them, and a bandit whose best answer
is known before the loop is trusted on text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from tests.training.embedded import tiny
from tests.training.embedded.tiny import on_the_cpu  # noqa: F401
from tools.data import chat
from training.embedded import generation, train_arguments
from training.embedded.batch import Batch
from training.embedded.errors import TrainingError
from training.embedded.learner import Learner, Metrics
from training.embedded.model import config_from_args
from training.embedded.rollout import Engine

UNCLIPPED = ["--clip-grad", 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.run_folder(tmp_path_factory.mktemp("learner") / "a run", fp8=True)


def learner_of(folder: Path, *flags: object, kind: Sequence[object] = tiny.RL, precision: str = "bf16") -> Learner:
    return Learner(tiny.parse(tiny.argv(folder, *flags, kind=kind, precision=precision)))


def conversations(lengths: Sequence[tuple[int, int]], seed: int = 1) -> Batch:
    """Samples of random tokens. lengths: (tokens, tokens of the response); one token in four of it is not trained."""
    random = torch.Generator().manual_seed(seed)
    batch = Batch()
    for length, response in lengths:
        batch.tokens.append(torch.randint(0, 55, (length,), generator=random).tolist())
        batch.masks.append([int(place % 4 != 2) for place in range(response)])
        batch.rewards.append(0.0)
        batch.truncated.append(False)
    return batch


def answers(
    learner: Learner, rewards: Sequence[float], *, shift: float = 0.0, length: int = 12, seed: int = 1
) -> Batch:
    """Samples of random tokens with rewards, every token trained, as if an engine had drawn them whose
    log-probabilities are the trainer's and a random number of size `shift`.
    """
    batch = conversations([(length + n % 3, 5 + n % 3) for n in range(len(rewards))], seed)
    batch.masks = [[1] * len(mask) for mask in batch.masks]
    batch.rewards = list(rewards)
    random = torch.Generator().manual_seed(seed)
    batch.log_probs = [
        (values + shift * torch.randn(values.shape, generator=random)).tolist()
        for values in trainer_log_probs(learner, batch)
    ]
    return batch


@torch.no_grad()
def trainer_log_probs(learner: Learner, batch: Batch) -> list[Tensor]:
    """Of every response, by the learner's model without packing."""
    learner.model.set_attn_implementation("sdpa")
    found = []
    for number, tokens in enumerate(batch.tokens):
        count = len(batch.masks[number])
        scores = learner.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
        found.append(scores[len(tokens) - count - 1 : -1].gather(-1, torch.tensor(tokens[-count:])[:, None])[:, 0])
    learner.model.set_attn_implementation("packed")
    return found


class Exact:
    """The learner's model in float64, by transformers alone, a sample at a time."""

    def __init__(self, learner: Learner) -> None:
        config = config_from_args(learner.args, learner.vocab_rows)
        config._attn_implementation = "eager"
        self.model = Qwen2ForCausalLM(config).double()
        self.model.load_state_dict({name: weight.double() for name, weight in learner.model.state_dict().items()})

    def distributions(self, batch: Batch) -> list[Tensor]:
        """Log-probabilities of the vocabulary before every response token: (response, vocabulary) of each sample."""
        found = []
        for number, tokens in enumerate(batch.tokens):
            scores = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
            found.append(scores[len(tokens) - len(batch.masks[number]) - 1 : len(tokens) - 1])
        return found

    def log_probs(self, batch: Batch) -> list[Tensor]:
        """Of every response token."""
        return [
            scores.gather(-1, torch.tensor(batch.response(number), dtype=torch.int64)[:, None])[:, 0]
            for number, scores in enumerate(self.distributions(batch))
        ]

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def gradients_of(learner: Learner, batch: Batch) -> tuple[list[dict[str, Tensor]], list[Metrics]]:
    """Trains on a batch. Returns the main gradients of every step, before clipping, and what was logged."""
    found: list[dict[str, Tensor]] = []
    optimizer = learner.optimizer
    step = optimizer.step

    def recorded() -> float:
        found.append({n: main.grad.clone() for n, main in zip(optimizer.names, optimizer.main, strict=True)})
        return step()

    optimizer.step = recorded
    metrics = list(learner.train(batch))
    optimizer.step = step
    return found, metrics


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    whole = norm(expected)
    for name, gradient in expected.items():
        difference = (found[name].double() - gradient.double()).norm().item()
        assert difference < tolerance * (gradient.norm().item() + 0.02 * whole), name


def weights_of(learner: Learner) -> list[Tensor]:
    return [main.clone() for main in learner.optimizer.main]


# ---------------------------------------------------------------- SFT

MIXED = [(40, 12), (9, 3), (33, 30), (20, 5), (60, 1), (17, 8), (25, 20), (12, 4)]
SFT8 = ["--rollout-batch-size", 8, "--global-batch-size", 8, *UNCLIPPED]


@pytest.mark.parametrize("limit", [512, 64], ids=["one micro batch", "several"])
def test_an_sft_step_is_that_of_transformers_in_float64(folder, limit):
    """Loss: the mean over trained tokens. Gradient: of the sum over trained tokens, times micro batches / samples /
    tokens, as slime's loss_function and Megatron make it.
    """
    learner = learner_of(folder, *SFT8, "--max-tokens-per-gpu", limit, kind=tiny.SFT)
    batch = conversations(MIXED)
    exact = Exact(learner)
    trained = [(x * torch.tensor(mask)).sum() for x, mask in zip(exact.log_probs(batch), batch.masks, strict=True)]
    tokens = sum(map(sum, batch.masks))
    parts = 1 if limit == 512 else 4  # first-fit: 40 + 9 + 12, 33 + 20, 60, 17 + 25
    assert len(learner._micro_batches(batch, list(range(8)))) == parts
    expected = exact.gradients(-sum(trained) * parts / 8 / tokens)
    (found,), (metrics,) = gradients_of(learner, batch)
    assert metrics["train/loss"] == pytest.approx(-sum(trained).item() / tokens, rel=2e-3)
    assert metrics["train/grad_norm"] == pytest.approx(norm(found), rel=1e-5)
    assert norm(found) == pytest.approx(norm(expected), rel=0.01)
    assert_same_gradients(found, expected, 0.04)
    assert metrics["rollout/response_lengths"] == sum(response for _, response in MIXED) / 8
    assert metrics["rollout/total_lengths"] == sum(length for length, _ in MIXED) / 8


def test_fp8_is_near_float64_and_not_bf16(folder):
    learner = learner_of(folder, *SFT8, kind=tiny.SFT, precision="fp8")
    batch = conversations(MIXED)
    exact = Exact(learner)
    trained = [(x * torch.tensor(mask)).sum() for x, mask in zip(exact.log_probs(batch), batch.masks, strict=True)]
    expected = exact.gradients(-sum(trained) / 8 / sum(map(sum, batch.masks)))
    (found,), _ = gradients_of(learner, batch)
    assert_same_gradients(found, expected, 0.35)
    with pytest.raises(AssertionError):
        assert_same_gradients(found, expected, 0.04)


def test_twice_the_micro_batches_double_the_gradient_of_a_per_token_loss(folder):
    """Measured on slime itself: 0.970 with one micro batch, 1.940 with two, the same loss 6.13185."""
    batch = conversations([(32, 10), (32, 20), (32, 7), (32, 31)])
    found = []
    for limit in (128, 64, 32):
        learner = learner_of(folder, *UNCLIPPED, "--max-tokens-per-gpu", limit, kind=tiny.SFT)
        (metrics,) = learner.train(batch)
        found.append((metrics["train/loss"], metrics["train/grad_norm"]))
    (loss, one), (loss2, two), (loss4, four) = found
    assert loss2 == pytest.approx(loss, rel=1e-3) and loss4 == pytest.approx(loss, rel=1e-3)
    assert two / one == pytest.approx(2.0, rel=2e-3) and four / one == pytest.approx(4.0, rel=2e-3)


def test_context_parallel_gpus_share_a_micro_batch(folder):
    batch = conversations(MIXED)
    found = []
    for limit, ranks in ((64, 1), (32, 2), (16, 4), (32, 1)):
        flags = ["--max-tokens-per-gpu", limit, "--context-parallel-size", ranks]
        found.append(learner_of(folder, *SFT8, *flags, kind=tiny.SFT)._micro_batches(batch, list(range(8))))
    assert found[0] == found[1] == found[2] != found[3] and len(found[0]) == 4


def test_micro_batches_of_a_fixed_size(folder):
    argv = tiny.argv(folder, *SFT8, "--micro-batch-size", 2, kind=tiny.SFT)
    learner = Learner(tiny.parse(tiny.without(argv, "--use-dynamic-batch-size", "--max-tokens-per-gpu")))
    batch = conversations(MIXED)
    assert learner._micro_batches(batch, [4, 5, 6, 7]) == [[4, 5], [6, 7]]
    (metrics,) = learner.train(batch)
    dynamic = learner_of(folder, *SFT8, kind=tiny.SFT)
    (one,) = dynamic.train(batch)
    assert metrics["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
    assert metrics["train/grad_norm"] == pytest.approx(4 * one["train/grad_norm"], rel=0.01)


@pytest.mark.parametrize("limit", [512, 1], ids=["one micro batch", "each alone"])
def test_a_sample_without_a_trained_token_teaches_nothing(folder, limit):
    """It counts as a token and as a sample, as in slime, and its micro batch may be empty."""
    batch = conversations([(20, 10), (15, 0), (18, 9), (30, 2)])
    batch.masks[3] = [0, 0]
    learner = learner_of(folder, *UNCLIPPED, "--max-tokens-per-gpu", limit, kind=tiny.SFT)
    exact = Exact(learner)
    log_probs = exact.log_probs(batch)
    summed = sum((x * torch.tensor(mask)).sum() for x, mask in zip(log_probs, batch.masks, strict=True) if mask)
    tokens = sum(max(1, sum(mask)) for mask in batch.masks)
    assert tokens == sum(map(sum, batch.masks)) + 2
    (found,), (metrics,) = gradients_of(learner, batch)
    assert metrics["train/loss"] == pytest.approx(-summed.item() / tokens, rel=2e-3)
    parts = 1 if limit == 512 else 4
    assert_same_gradients(found, exact.gradients(-summed * parts / 4 / tokens), 0.04)


def test_a_step_is_adamw_with_clipping(folder):
    """By hand, from the gradient: the first step moves by lr * g / (|g| + eps), after decay by lr * weight_decay."""
    flags = ["--weight-decay", 0.1, "--clip-grad", 0.01, "--lr", 1e-2, "--adam-eps", 1e-5]
    learner = learner_of(folder, *flags, kind=tiny.SFT)
    before = weights_of(learner)
    (found,), (metrics,) = gradients_of(learner, conversations(MIXED[:4]))
    assert metrics["train/grad_norm"] > 0.1 and metrics["train/lr-pg_0"] == metrics["train/lr-pg_1"] == 1e-2
    factor = 0.01 / (metrics["train/grad_norm"] + 1e-6)
    for name, old, new in zip(learner.optimizer.names, before, learner.optimizer.main, strict=True):
        gradient = found[name] * factor
        decay = 0.0 if name.endswith(".bias") or old.dim() == 1 else 0.1
        expected = old * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-5)
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-7, msg=name)
        assert torch.equal(dict(learner.model.named_parameters())[name], new.bfloat16())


def test_several_steps_of_a_rollout(folder):
    """Eight samples are two steps of four, in order, with the schedule going on."""
    flags = ["--rollout-batch-size", 8, "--lr-decay-style", "linear", "--min-lr", 0]
    learner = learner_of(folder, *flags, kind=tiny.SFT)
    batch = conversations(MIXED)
    metrics = list(learner.train(batch))
    assert [m["train/lr-pg_0"] for m in metrics] == pytest.approx([1e-3 * 7 / 8, 1e-3 * 6 / 8])
    assert "rollout/response_lengths" in metrics[1] and "rollout/response_lengths" not in metrics[0]
    half = learner_of(folder, *flags, kind=tiny.SFT)
    for part in (slice(0, 4), slice(4, 8)):
        list(half.train(Batch(batch.tokens[part], batch.masks[part], batch.rewards[part], batch.truncated[part])))
    assert all(map(torch.equal, weights_of(half), weights_of(learner)))


# ---------------------------------------------------------------- the policy loss

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
GROUPS = ["--rollout-batch-size", 2, "--n-samples-per-prompt", 4, "--global-batch-size", 8, *UNCLIPPED]


def advantages_of(rewards: Sequence[float], size: int = 4) -> list[float]:
    """In plain Python: over the unbiased standard deviation of each group."""
    found = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = sum(group) / size
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (size - 1))
        found += [(reward - mean) / (deviation + 1e-6) for reward in group]
    return found


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["on policy", "another policy drew"])
@pytest.mark.parametrize("tis", [False, True], ids=["no TIS", "TIS"])
def test_a_policy_step_is_that_of_float64(folder, tis, shift):
    """The mean over samples of -advantage * weight over each one's tokens, less 2 times the entropy: at the old policy
    the ratio is 1 and its gradient that of the log-probability. Weights of truncated importance sampling by hand.
    """
    flags = [*GROUPS, "--entropy-coef", 2, *(["--use-tis", "--tis-clip", 1.5, "--tis-clip-low", 0.5] if tis else [])]
    learner = learner_of(folder, *flags)
    batch = answers(learner, REWARDS, shift=shift)
    exact = Exact(learner)
    scores, log_probs = exact.distributions(batch), exact.log_probs(batch)
    loss = torch.zeros((), dtype=torch.float64)
    weights, cut = [], []
    for number, advantage in enumerate(advantages_of(REWARDS)):
        weight = (log_probs[number].detach() - torch.tensor(batch.log_probs[number])).exp()
        truncated = weight.clamp(0.5, 1.5) if tis else torch.ones_like(weight)
        ratio = (log_probs[number] - log_probs[number].detach()).exp()
        entropy = -(scores[number].exp() * scores[number]).sum(-1)
        loss = loss + (-advantage * truncated * ratio - 2 * entropy).mean() / 8
        weights.append(weight.mean().item())
        cut.append((truncated != weight).double().mean().item())
    expected = exact.gradients(loss)
    (found,), (metrics,) = gradients_of(learner, batch)
    assert_same_gradients(found, expected, 0.05)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=2e-3)
    assert metrics["train/ois" if tis else "train/grad_norm"] == pytest.approx(1.0 if tis else norm(found))
    if tis:
        assert metrics["train/tis"] == pytest.approx(sum(weights) / 8, rel=0.02)
        assert metrics["train/tis_clipfrac"] == pytest.approx(sum(cut) / 8 if shift else 0.0, abs=0.03)
    else:
        assert "train/tis" not in metrics


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_policy_gradient_does_not_depend_on_the_micro_batches(folder, precision):
    """Without a per-token loss Megatron takes the factor back that doubles the gradient of SFT."""
    found = []
    for limit in (512, 30, 1):
        learner = learner_of(folder, *GROUPS, "--use-tis", "--max-tokens-per-gpu", limit, precision=precision)
        (gradients,), (metrics,) = gradients_of(learner, answers(learner, REWARDS, shift=0.2))
        found.append((gradients, metrics["train/loss"]))
    for gradients, loss in found[1:]:
        assert_same_gradients(gradients, found[0][0], 0.02 if precision == "bf16" else 0.1)
        assert loss == pytest.approx(found[0][1], abs=1e-3)


def test_both_steps_of_a_rollout_use_the_policy_before_the_first(folder):
    """The second step's ratios, clipping and KL by hand: between the policy after one step and the first one."""
    two = [*GROUPS, "--global-batch-size", 4, "--lr", 5e-3, "--eps-clip", 0.1, "--eps-clip-high", 0.3]
    learner = learner_of(folder, *two)
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    batch = answers(learner, rewards)
    start = weights_of(learner)
    old = trainer_log_probs(learner, batch)
    only_first = Batch(batch.tokens[:4], batch.masks[:4], batch.rewards[:4], batch.truncated[:4], batch.log_probs[:4])
    list(learner.train(only_first))
    new = trainer_log_probs(learner, batch)
    whole = learner_of(folder, *two)
    assert all(map(torch.equal, weights_of(whole), start))
    first, second = whole.train(batch)
    ratios = [(new[number] - old[number]).exp() for number in range(4, 8)]
    below, above, loss = 0.0, 0.0, 0.0
    for ratio, advantage in zip(ratios, advantages_of(rewards)[4:], strict=True):
        below += ((ratio < 0.9) & (advantage < 0)).float().mean().item() / 4
        above += ((ratio > 1.3) & (advantage > 0)).float().mean().item() / 4
        loss += torch.maximum(-ratio * advantage, -ratio.clamp(0.9, 1.3) * advantage).mean().item() / 4
    kl = -sum(ratio.log().mean().item() for ratio in ratios) / 4
    assert below > 0.05 and above > 0.05 and abs(kl) > 0.003
    assert first["train/ppo_kl"] == pytest.approx(0.0, abs=1e-5) and first["train/pg_clipfrac"] == 0.0
    assert second["train/ppo_kl"] == pytest.approx(kl, rel=0.05, abs=5e-3)
    assert second["train/pg_clipfrac"] == pytest.approx(below + above, abs=0.03)
    assert second["train/pg_loss"] == pytest.approx(loss, abs=0.02)


def test_what_is_logged_of_a_rollout_by_hand(folder):
    learner = learner_of(folder, *GROUPS)
    batch = answers(learner, REWARDS, shift=0.3)
    batch.truncated[2] = True
    trainer = trainer_log_probs(learner, batch)
    (metrics,) = learner.train(batch)
    drawn = [torch.tensor(values) for values in batch.log_probs]
    difference = torch.cat(trainer) - torch.cat(drawn)
    expected = {
        "rollout/raw_reward": 3 / 8,
        "rollout/truncated": 1 / 8,
        "rollout/rewards": 0.0,
        "rollout/response_lengths": sum(map(len, batch.masks)) / 8,
        "rollout/total_lengths": sum(map(len, batch.tokens)) / 8,
        "rollout/log_probs": sum(values.mean().item() for values in trainer) / 8,
        "rollout/rollout_log_probs": sum(values.mean().item() for values in drawn) / 8,
        "rollout/kl_to_trainer": (difference.expm1() - difference).mean().item(),
        "rollout/mult_prob_error": difference.abs().exp().mean().item(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("right", [0, 1])
def test_a_rewarded_response_becomes_likelier_and_the_other_one_rarer(folder, right):
    flags = ["--rollout-batch-size", 1, "--n-samples-per-prompt", 2, "--global-batch-size", 2, "--lr", 1e-4]
    learner = learner_of(folder, *flags)
    batch = answers(learner, [1.0 - right, float(right)])
    before = [values.sum() for values in trainer_log_probs(learner, batch)]
    list(learner.train(batch))
    after = [values.sum() for values in trainer_log_probs(learner, batch)]
    assert after[right] > before[right] + 0.05 and after[1 - right] < before[1 - right] - 0.05


@pytest.mark.parametrize("flags", [[], ["--disable-grpo-std-normalization"]])
def test_equal_rewards_change_nothing(folder, flags):
    learner = learner_of(folder, *GROUPS, *flags, "--use-tis")
    before = weights_of(learner)
    (metrics,) = learner.train(answers(learner, [1.0] * 4 + [0.0] * 4, shift=0.5))
    assert metrics["train/grad_norm"] == 0.0 and metrics["train/pg_loss"] == 0.0
    assert all(map(torch.equal, weights_of(learner), before))


def test_the_temperature_of_the_rollout_is_the_trainers(folder):
    """Log-probabilities of both sides are those of softmax(logits / temperature)."""
    learner = learner_of(folder, *GROUPS, "--rollout-temperature", 2)
    batch = answers(learner, REWARDS)
    engine = Engine(str(tiny.hf_dir(folder / "hf_bf16")), learner_tokenizer(folder))
    engine.load(learner.rollout_weights(fp8=False))
    drawn = generation.generate(engine.model, [[1, 2, 3]] * 8, generation.Sampling(2.0, max_new_tokens=5), 1)
    batch.tokens = [[1, 2, 3, *response.tokens] for response in drawn]
    batch.masks, batch.log_probs = [[1] * 5] * 8, [response.log_probs for response in drawn]
    (metrics,) = learner.train(batch)
    assert metrics["rollout/mult_prob_error"] < 1.01
    assert metrics["rollout/log_probs"] == pytest.approx(metrics["rollout/rollout_log_probs"], abs=0.01)


def test_a_first_run_needs_weights_to_start_from(folder, tmp_path):
    with pytest.raises(TrainingError) as error:
        learner_of(folder, "--load", tmp_path, "--ref-load", tmp_path / "none")
    assert str(error.value) == f"--ref-load: expected a checkpoint, found none in {tmp_path}/none"


# ---------------------------------------------------------------- the reference policy

KL = ["--use-kl-loss", "--kl-loss-coef", 0.1, "--kl-loss-type", "low_var_kl"]


def test_the_kl_term_is_to_the_previous_stage(folder, tmp_path):
    """0 before the first step; by hand after some, and after a resume, where the policy comes from --load and the
    reference still from --ref-load.
    """
    saved = ["--save", tmp_path, "--save-interval", 2, "--load", tmp_path, "--lr", 3e-3]
    learner = learner_of(folder, *GROUPS, *KL, *saved)
    batch = answers(learner, REWARDS)
    reference = trainer_log_probs(learner, batch)
    (first,) = learner.train(batch)
    assert first["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    learner.save(1)
    argv = tiny.argv(folder, *GROUPS, *KL, *saved, "--start-rollout-id", 2)
    resumed = Learner(tiny.parse(argv))
    policy = trainer_log_probs(resumed, batch)
    expected = 0.0
    for ours, theirs in zip(policy, reference, strict=True):
        ratio = theirs - ours
        expected += (ratio.exp() - 1 - ratio).clamp(-10, 10).mean().item() / 8
    for made in (learner, resumed):
        (second,) = made.train(batch)
        assert second["train/kl_loss"] == pytest.approx(expected, rel=0.03) and expected > 1e-3
        assert second["train/loss"] == pytest.approx(second["train/pg_loss"] + 0.1 * second["train/kl_loss"], abs=1e-6)
    assert all(map(torch.equal, weights_of(learner), weights_of(resumed)))  # a resume is exact


def test_the_gradient_of_the_kl_term(folder, tmp_path):
    """Rewards that are equal leave the KL term alone; its gradient in float64, from two different policies."""
    tiny.save_start(tiny.parse(tiny.argv(folder)), tmp_path / "other", seed=2)
    learner = learner_of(folder, *GROUPS, *KL)
    reference = learner_of(folder, *GROUPS, "--ref-load", tmp_path / "other")
    learner.reference = reference.model
    batch = answers(learner, [1.0] * 8)
    exact, fixed = Exact(learner), Exact(reference)
    loss = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(exact.log_probs(batch), fixed.log_probs(batch), strict=True):
        ratio = theirs.detach() - ours
        loss = loss + 0.1 * (ratio.exp() - 1 - ratio).clamp(-10, 10).mean() / 8
    (found,), (metrics,) = gradients_of(learner, batch)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=0.02)
    assert_same_gradients(found, exact.gradients(loss), 0.08)


def test_a_reference_is_only_loaded_for_a_kl_term(folder):
    assert learner_of(folder).reference is None
    assert not any(p.requires_grad for p in learner_of(folder, *KL).reference.parameters())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(folder, kind, value):
    learner = learner_of(folder, *(GROUPS if kind == "rl" else []), kind=tiny.RL if kind == "rl" else tiny.SFT)
    batch = answers(learner, REWARDS) if kind == "rl" else conversations(MIXED[:4])
    before = weights_of(learner)
    with torch.no_grad():
        learner.model.model.norm.weight[3] = value
    with pytest.raises(TrainingError) as error:
        list(learner.train(batch))
    assert str(error.value).startswith("the loss is not finite: {'train/") and "\n" not in str(error.value)
    assert str(error.value).endswith("nothing was saved since the last checkpoint")
    assert all(map(torch.equal, weights_of(learner), before))


def test_a_gradient_that_is_not_finite_stops_the_run(folder):
    learner = learner_of(folder, kind=tiny.SFT)
    learner.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="^the gradient is not finite; nothing was saved since the last"):
        list(learner.train(conversations(MIXED[:4])))


def test_the_checkpoint_of_another_model_is_refused(folder):
    with pytest.raises(TrainingError, match="--ffn-hidden-size: the checkpoint .* was trained with 256, found 128"):
        learner_of(folder, "--ffn-hidden-size", 128)


def test_the_log_says_what_is_trained(folder):
    text = learner_of(folder, precision="fp8").describe()
    assert f"started from {folder}/start/iter_0000001, weights only" in text
    assert "FP8 rounding: 14 of 15 linear layers in E4M3 blocks" in text
    assert "linear layers: 15 in BF16" in learner_of(folder).describe()


# ---------------------------------------------------------------- the bandit

PROMPTS = [[3, 10, 4], [5, 6], [9, 20, 21, 22], [30]]


class Bandit:
    """A response is one token, and every token of every prompt has a reward: 1 for the best one, up to 1/2 for others.

    Rollouts by the FP8 engine, from a policy that begins near the uniform one.
    """

    def __init__(self, folder: Path, prompts: int, samples: int, *flags: object, seed: int = 1) -> None:
        sizes = ["--rollout-batch-size", prompts, "--n-samples-per-prompt", samples]
        self.learner = learner_of(
            *(folder, *sizes, "--global-batch-size", prompts * samples, "--ref-load", folder / "uniform"),
            *("--lr", 8e-4, "--eps-clip-high", 0.28, "--use-tis", "--max-tokens-per-gpu", 4096, *flags),
            precision="fp8",
        )
        self.engine = Engine(str(folder / "hf"), learner_tokenizer(folder))
        assert self.engine.fp8
        random = torch.Generator().manual_seed(seed)
        self.prompts, self.samples, self.seed = PROMPTS[:prompts], samples, seed
        self.rewards = torch.rand(prompts, tiny.ROWS, generator=random) / 2
        self.best = torch.randperm(tiny.ROWS, generator=random)[:prompts]
        self.rewards[torch.arange(prompts), self.best] = 1.0

    def draw(self, step: int) -> Batch:
        """A rollout with the weights as they are now."""
        self.engine.load(self.learner.rollout_weights(fp8=True))
        repeated = [prompt for prompt in self.prompts for _ in range(self.samples)]
        sampling = generation.Sampling(max_new_tokens=1)
        drawn = generation.generate(self.engine.model, repeated, sampling, generation.seed_of(self.seed, step))
        batch = Batch(log_probs=[])
        for number, (prompt, response) in enumerate(zip(repeated, drawn, strict=True)):
            batch.tokens.append(prompt + response.tokens)
            batch.masks.append([1])
            batch.rewards.append(self.rewards[number // self.samples, response.tokens[0]].item())
            batch.truncated.append(True)
            batch.log_probs.append(response.log_probs)
        return batch

    def policy(self) -> Tensor:
        """Probability of every token: (prompts, vocabulary)."""
        every = Batch([[*prompt, 0] for prompt in self.prompts], [[1]] * len(self.prompts))
        with torch.no_grad():
            return torch.cat(Exact(self.learner).distributions(every)).exp()

    def expected_reward(self) -> list[float]:
        return (self.policy() * self.rewards).sum(-1).tolist()


def learner_tokenizer(folder: Path):
    return chat.load_tokenizer(folder / "hf")


@pytest.fixture(scope="module")
def bandits(folder) -> Iterator[Path]:
    tiny.save_start(tiny.parse(tiny.argv(folder, "--init-method-std", 0.02)), folder / "uniform")
    yield folder


@pytest.mark.parametrize("prompts", [1, 4])
def test_the_loop_finds_the_best_answer_of_every_prompt(bandits, prompts):
    """60 updates, from a chance of 1/64 and a reward of about 1/4 to the optimum, 1."""
    bandit = Bandit(bandits, prompts, 128 // prompts if prompts > 1 else 64)
    at_start = bandit.policy()[torch.arange(prompts), bandit.best]
    assert at_start.max() < 0.05 and max(bandit.expected_reward()) < 0.35
    rewards = []
    for step in range(60):
        (metrics,) = bandit.learner.train(bandit.draw(step))
        rewards.append(metrics["rollout/raw_reward"])
        assert 0.9 < metrics["train/tis"] < 1.1 and metrics["rollout/mult_prob_error"] < 1.1
    assert bandit.policy()[torch.arange(prompts), bandit.best].min() > 0.9
    assert min(bandit.expected_reward()) > 0.93
    assert sum(rewards[-5:]) / 5 > 0.9 and sum(rewards[:5]) / 5 < 0.4


def test_a_constant_reward_teaches_nothing(bandits):
    bandit = Bandit(bandits, 4, 8)
    bandit.rewards = torch.ones_like(bandit.rewards)
    before = weights_of(bandit.learner)
    for step in range(3):
        (metrics,) = bandit.learner.train(bandit.draw(step))
        assert metrics["train/grad_norm"] == 0.0 and metrics["rollout/raw_reward"] == 1.0
    assert all(map(torch.equal, weights_of(bandit.learner), before))


def test_importance_weights_correct_for_another_policy_that_draws(bandits):
    """Answers drawn by a policy that hardly ever gives some of them: with the weights the gradient is that of the
    trainer's own policy, computed over all answers; without them it is another one.
    """
    bandit = Bandit(bandits, 1, 1024, "--tis-clip", 100, "--disable-grpo-std-normalization", *UNCLIPPED)
    behaviour = bandit.learner.rollout_weights(fp8=True)
    head = behaviour["lm_head.weight"].clone()
    head[:32] *= 8
    behaviour["lm_head.weight"] = head
    bandit.engine.load(behaviour)
    sampling = generation.Sampling(max_new_tokens=1)
    drawn = generation.generate(bandit.engine.model, bandit.prompts * 1024, sampling, 5)
    tokens = [response.tokens[0] for response in drawn]
    batch = Batch(
        [[*PROMPTS[0], token] for token in tokens],
        [[1]] * 1024,
        [bandit.rewards[0, token].item() for token in tokens],
        [True] * 1024,
        [response.log_probs for response in drawn],
    )
    policy = bandit.policy()[0]
    weights = torch.tensor(
        [policy[token] / math.exp(response.log_probs[0]) for token, response in zip(tokens, drawn, strict=True)]
    )
    assert weights.min() < 0.8 and weights.max() > 1.25
    baseline = sum(batch.rewards) / 1024
    exact = Exact(bandit.learner)
    (scores,) = exact.distributions(Batch([[*PROMPTS[0], 0]], [[1]]))
    on_policy = exact.gradients(-(scores[0].exp() * (bandit.rewards[0].double() - baseline)).sum())["lm_head.weight"]
    (found,), (metrics,) = gradients_of(bandit.learner, batch)
    assert metrics["train/tis"] == pytest.approx(weights.mean().item(), rel=0.02)

    def cosine(gradient: Tensor) -> float:
        return torch.cosine_similarity(gradient.double().flatten(), on_policy.flatten(), dim=0).item()

    plain = learner_of(bandits, "--ref-load", bandits / "uniform", *UNCLIPPED, *same_batch(bandit.learner.args))
    (uncorrected,), _ = gradients_of(plain, batch)
    assert cosine(found["lm_head.weight"]) > cosine(uncorrected["lm_head.weight"]) + 0.2
    assert found["lm_head.weight"].norm().item() == pytest.approx(on_policy.norm().item(), rel=0.1)


def same_batch(args) -> list[object]:
    return [
        *("--rollout-batch-size", 1, "--n-samples-per-prompt", train_arguments.samples_per_rollout(args)),
        *("--global-batch-size", args.global_batch_size, "--max-tokens-per-gpu", 65536),
        "--disable-grpo-std-normalization",
    ]
