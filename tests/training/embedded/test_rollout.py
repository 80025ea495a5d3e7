"""The rollout side in one process: the FP8 engine, dynamic sampling, evaluation, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2Config

from tests.training.embedded import tiny
from tests.training.embedded.tiny import on_the_cpu  # noqa: F401
from tools.checkpoint.block_fp8 import ROW_BLOCK, BlockFP8, quantize
from tools.data import DataError, chat
from tools.data.check import Rules
from training.embedded import attention, generation, train_arguments
from training.embedded.errors import TrainingError
from training.embedded.learner import Learner
from training.embedded.rollout import Engine, RolloutManager, is_fp8, read, stop_tokens

FILTER = ["--dynamic-sampling-filter-path", train_arguments.NONZERO_STD]
GROUPS = ["--n-samples-per-prompt", 8, "--global-batch-size", 8, "--rollout-max-response-len", 8]
GROUPS += ["--rollout-temperature", 2]  # more answers


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """RolloutManager sets those of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """hf and hf_bf16, data of 16 questions, start."""
    made = tiny.run_folder(tmp_path_factory.mktemp("rollout") / "a run", fp8=True)
    tiny.hf_dir(made / "hf_bf16")
    return made


@pytest.fixture(scope="module")
def learner(folder) -> Learner:
    """With biases that are not zero, so that a wrong one would show."""
    made = Learner(tiny.parse(tiny.argv(folder, precision="fp8")))
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return made


def manager(folder: Path, learner: Learner, *flags: object) -> RolloutManager:
    made = RolloutManager(tiny.parse(tiny.argv(folder, *flags)), threads=1)
    made.start()
    made.update_weights(learner.rollout_weights(fp8=made.fp8()))
    return made


# ---------------------------------------------------------------- weights


def by_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """blockwise_cast_to_fp8_triton of slime/utils/fp8_kernel.py, a block at a time. Returns (codes, scales)."""
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            block = weight[place].float()
            scale = block.abs().max().maximum(torch.tensor(1e-10)) / torch.tensor(448.0)
            inverse = torch.tensor(1.0) / scale
            codes[place] = (block * inverse).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
            scales[i, j] = scale
    return codes, scales


def test_the_weights_are_cast_as_slime_casts_them(learner):
    """Linear layers of the decoder as 128x128 blocks with float32 scales, everything else as it is."""
    sent = learner.rollout_weights(fp8=True)
    parameters = dict(learner.model.named_parameters())
    assert sent.keys() == parameters.keys()
    for name, weight in sent.items():
        cast = name.startswith("model.layers.") and name.endswith("proj.weight")
        assert isinstance(weight, BlockFP8) is cast, name
        if cast:
            codes, scales = by_blocks(parameters[name].detach())
            assert torch.equal(weight.codes, codes) and torch.equal(weight.scale_inv, scales), name
        else:
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, parameters[name]), name
    assert sum(isinstance(weight, BlockFP8) for weight in sent.values()) == 14
    plain = learner.rollout_weights(fp8=False)
    assert all(torch.equal(plain[name], parameter) for name, parameter in parameters.items())


class Reference(nn.Module):
    """A linear layer of dequantised weights whose input is rounded to 1x128 tiles with float32 scales."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, fp8: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.fp8 = weight.double(), bias, fp8

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        seen = quantize(rows, ROW_BLOCK, pow2=False).dequantize().double() if self.fp8 else rows.double()
        y = seen @ self.weight.t() + (0 if self.bias is None else self.bias.double())
        return y.to(x.dtype).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_the_engine_computes_with_the_weights_it_was_sent(folder, learner, fp8):
    """Against transformers' model with every linear layer replaced by plain float64 products."""
    path = str(folder / ("hf" if fp8 else "hf_bf16"))
    engine = Engine(path, chat.load_tokenizer(path))
    assert engine.fp8 is fp8 and engine.model.config._attn_implementation == attention.WIDE
    sent = learner.rollout_weights(fp8=fp8)
    engine.load(sent)
    expected = Engine(path, chat.load_tokenizer(path)).model
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if not isinstance(sent[name], BlockFP8):
                parameter.copy_(sent[name])
    for name, module in list(expected.named_modules()):
        if isinstance(module, nn.Linear):
            weight = sent[f"{name}.weight"]
            dequantised = weight.dequantize() if isinstance(weight, BlockFP8) else weight
            parent, _, leaf = name.rpartition(".")
            made = Reference(dequantised, module.bias, fp8=isinstance(weight, BlockFP8))
            setattr(expected.get_submodule(parent), leaf, made)
    tokens = torch.randint(0, tiny.ROWS, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (model(input_ids=tokens, use_cache=False).logits.float() for model in (engine.model, expected))
        trainer = learner.model
        trainer.set_attn_implementation("sdpa")
        other = trainer(input_ids=tokens, use_cache=False).logits.float()
        trainer.set_attn_implementation("packed")
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.01
    assert ((ours - other).norm() / other.norm()).item() > 0.02  # the trainer rounds in another way


def test_new_weights_replace_the_old_ones(folder, learner):
    path = str(folder / "hf")
    engine = Engine(path, chat.load_tokenizer(path))
    tokens = torch.arange(10)[None]

    def logits() -> Tensor:
        with torch.no_grad():
            return engine.model(input_ids=tokens, use_cache=False).logits

    engine.load(learner.rollout_weights(fp8=True))
    first = logits()
    changed = learner.rollout_weights(fp8=True)
    name = "model.layers.1.mlp.down_proj.weight"
    changed[name] = BlockFP8(changed[name].codes, 2 * changed[name].scale_inv, changed[name].block)
    engine.load(changed)
    assert not torch.equal(logits(), first)
    engine.load(learner.rollout_weights(fp8=True))
    assert torch.equal(logits(), first)


def test_rows_of_padding_are_cut_off(tmp_path, folder, learner):
    """The trainer pads its vocabulary; the engine has that of config.json, and never draws another token."""
    path = str(tiny.hf_dir(tmp_path / "hf", fp8=True, vocab_size=len(tiny.VOCABULARY)))
    small, whole = (Engine(p, chat.load_tokenizer(p)) for p in (path, str(folder / "hf")))
    for engine in (small, whole):
        engine.load(learner.rollout_weights(fp8=True))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        ours, theirs = (engine.model(input_ids=tokens, use_cache=False).logits for engine in (small, whole))
    assert ours.shape[-1] == len(tiny.VOCABULARY) and torch.equal(ours, theirs[..., : len(tiny.VOCABULARY)])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"vocab_size": 65}, "where model.embed_tokens.weight is (64, 128), found (65, 128)"),
        ({"intermediate_size": 128}, "where model.layers.0.mlp.gate_proj.weight is (256, 128), found (128, 128)"),
        ({"intermediate_size": 384}, "where model.layers.0.mlp.gate_proj.weight is (256, 128), found (384, 128)"),
        ({"num_hidden_layers": 3}, "where model.layers.2.self_attn.q_proj.weight is absent, found (128, 128)"),
        ({"num_attention_heads": 4}, "where model.layers.0.self_attn.k_proj.weight is (64, 128), found (32, 128)"),
        ({"num_key_value_heads": 2}, "where model.layers.0.self_attn.k_proj.weight is (64, 128), found (128, 128)"),
    ],
)
def test_another_model_is_refused(tmp_path, learner, changes, what):
    path = str(tiny.hf_dir(tmp_path / "hf", fp8=True, **changes))
    engine = Engine(path, chat.load_tokenizer(path))
    with pytest.raises(TrainingError) as error:
        engine.load(learner.rollout_weights(fp8=True))
    assert str(error.value) == f"{path}/config.json: expected the model of the weights, {what}"


# ---------------------------------------------------------------- what the directory says


@pytest.mark.parametrize(
    ("generation_eos", "config_eos", "expected"),
    [
        ([2, 5], None, (0, 2, 5)),
        (7, 3, (0, 3, 7)),
        (None, [4, 4], (0, 4)),
        ("no file", 6, (0, 6)),
        ("no file", None, (0,)),  # the tokenizer's
    ],
)
def test_stop_tokens(tmp_path, generation_eos, config_eos, expected):
    path = tiny.hf_dir(tmp_path / "hf", eos_token_id=config_eos)
    settings = path / "generation_config.json"
    settings.unlink()
    if generation_eos != "no file":
        settings.write_text(json.dumps({"eos_token_id": generation_eos}))
    assert stop_tokens(str(path), Qwen2Config.from_pretrained(path), chat.load_tokenizer(path)) == expected


def test_the_flag_adds_stop_tokens(folder, learner):
    made = manager(folder, learner, "--rollout-stop-token-ids", 9, 10)
    assert made._sampling("rollout").stop == (0, 2, 9, 10)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("quant_method", "awq", "awq"),
        ("fmt", "e5m2", "e5m2"),
        ("activation_scheme", "static", "static"),
        ("weight_block_size", None, "None"),
        ("weight_block_size", [64, 64], "[64, 64]"),
    ],
)
def test_other_quantisations_are_refused(key, value, found):
    config = Qwen2Config()
    config.quantization_config = {**tiny.FP8, key: value}
    with pytest.raises(TrainingError) as error:
        is_fp8(config, "/models/q")
    expected = {"weight_block_size": "[128, 128]", **{k: v for k, v in tiny.FP8.items() if k != "weight_block_size"}}
    assert str(error.value) == (
        f"/models/q/config.json: quantization_config.{key}: expected {expected[key]}, found {found}"
    )


def test_a_plain_model_is_not_fp8():
    config = Qwen2Config()
    assert is_fp8(config, "/models/q") is False
    config.quantization_config = {**tiny.FP8, "weight_block_size": (128, 128), "more": 1}
    assert is_fp8(config, "/models/q") is True


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_damaged_directory(tmp_path, file):
    path = str(tiny.hf_dir(tmp_path / "hf"))
    tokenizer = chat.load_tokenizer(path)
    (tmp_path / "hf" / file).write_text("{")
    with pytest.raises(TrainingError) as error:
        Engine(path, tokenizer)
    kind = (Qwen2Config if file == "config.json" else GenerationConfig).__name__
    assert str(error.value).startswith(f"{path}/{file}: expected a {kind}, found: ")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- SFT


def test_conversations_become_tokens_and_masks(tmp_path):
    folder = tiny.run_folder(tmp_path / "run")
    tiny.conversations(folder / "data.jsonl", 6)
    args = tiny.parse(tiny.argv(folder, "--global-batch-size", 4, kind=tiny.SFT))
    made = RolloutManager(args, threads=1)
    assert made.start() == 1 and made.engine is None  # six conversations are one rollout of four
    batch, metrics = made.generate(0)
    for number in range(4):
        asked = [tiny.TURN_START, "user", "Ċ", "q", str(number), tiny.TURN_END, "Ċ", tiny.TURN_START, "assistant", "Ċ"]
        said = [tiny.TOKEN[text] for text in (*["hm"] * number, tiny.ANSWERS[number], tiny.TURN_END, "Ċ")]
        assert batch.tokens[number] == [*(tiny.TOKEN[text] for text in asked), *said]
        assert batch.masks[number] == [1] * len(said) and batch.response(number) == said
    assert batch.log_probs is None and metrics.keys() == {"perf/rollout_time"}
    again, _ = made.generate(1)  # the last two, then the next epoch
    assert len(again) == 4 and made.source.position.epoch_id == 1 and again.tokens[2:] == batch.tokens[:2]


# ---------------------------------------------------------------- dynamic sampling


def last_answer(said: list[int]) -> int | None:
    """The number in the last box of a response, by its tokens."""
    numbers = [token - tiny.TOKEN[tiny.ANSWERS[0]] for token in said]
    return next((number for number in reversed(numbers) if 0 <= number < 8), None)


def rewards_of(batch, samples: int = 8) -> list[list[float]]:
    return [batch.rewards[start : start + samples] for start in range(0, len(batch), samples)]


@pytest.fixture(scope="module")
def all_groups(folder, learner) -> list[list[float]]:
    """The rewards of every group of rollout 3, the filter off."""
    threads = torch.get_num_threads()
    made = manager(folder, learner, *GROUPS, "--rollout-batch-size", 8, "--over-sampling-batch-size", 8)
    batch, metrics = made.generate(3)
    torch.set_num_threads(threads)
    assert metrics["rollout/dropped_groups"] == 0
    assert metrics["rollout/raw_reward_drawn"] == pytest.approx(sum(batch.rewards) / len(batch))
    found = rewards_of(batch)
    assert 3 <= sum(len(set(group)) > 1 for group in found) < 7  # the tests below need both kinds
    return found


def test_only_groups_with_signal_are_kept(folder, learner, all_groups):
    """The first three of them, and the mean reward of all that were drawn until then, by hand."""
    flags = [*GROUPS, *FILTER, "--rollout-batch-size", 3, "--over-sampling-batch-size", 8]
    made = manager(folder, learner, *flags)
    batch, metrics = made.generate(3)
    signal = [number for number, group in enumerate(all_groups) if len(set(group)) > 1][:3]
    assert rewards_of(batch) == [all_groups[number] for number in signal]
    drawn = all_groups[: signal[-1] + 1]
    assert metrics["rollout/dropped_groups"] == len(drawn) - 3
    mean = sum(sum(group) / 8 for group in drawn) / len(drawn)
    assert metrics["rollout/raw_reward_drawn"] == pytest.approx(mean)
    assert made.source.position.sample_offset == 8  # as in slime, what was not needed is not drawn again
    assert (made.source.position.sample_group_index, made.source.position.sample_index) == (8, 64)


def test_more_prompts_are_drawn_until_there_are_enough(folder, learner, all_groups):
    flags = [*GROUPS, *FILTER, "--rollout-batch-size", 6, "--over-sampling-batch-size", 8]
    made = manager(folder, learner, *flags)
    batch, metrics = made.generate(3)
    first = [group for group in all_groups if len(set(group)) > 1]
    assert len(first) < 6, "the first draw would do"
    assert rewards_of(batch)[: len(first)] == first and all(len(set(group)) > 1 for group in rewards_of(batch))
    draws = made.source.position.sample_group_index / 8
    assert draws >= 2 and draws == int(draws)
    assert metrics["rollout/dropped_groups"] >= 8 - len(first)


def test_a_batch_is_what_was_drawn(folder, learner):
    made = manager(folder, learner, *GROUPS, "--rollout-batch-size", 4)
    batch, metrics = made.generate(0)
    prompts = chat.encode_prompts(made.tokenizer, [row["prompt"] for row in made.source.rows[:4]], True)
    assert len(batch) == 32
    for number in range(32):
        prompt, said = prompts[number // 8], batch.response(number)
        assert batch.tokens[number] == prompt + said and 1 <= len(said) <= 8
        assert len(batch.masks[number]) == len(batch.log_probs[number]) == len(said)
        stopped = said[-1] in tiny.STOP
        assert batch.truncated[number] is (not stopped) and not set(tiny.STOP) & set(said[:-1])
        assert stopped or len(said) == 8
        assert batch.rewards[number] == float(last_answer(said) == number // 8)
    assert metrics["perf/tokens_per_gpu_per_sec"] > 0


def test_a_rollout_depends_on_its_number_and_the_data_alone(folder, learner, tmp_path):
    """Not on what was generated before it: what a resumed run needs to be exact."""
    flags = [*GROUPS, *FILTER, "--rollout-batch-size", 3, "--over-sampling-batch-size", 4]
    flags += ["--eval-prompt-data", "held", folder / "data.jsonl", "--eval-interval", 1, "--rollout-shuffle"]
    one, two = manager(folder, learner, *flags), manager(folder, learner, *flags)
    one.evaluate(0)
    first, _ = one.generate(0)
    one.save(str(tmp_path), 0)
    second, _ = one.generate(1)
    two.load(str(tmp_path), 0)
    again, _ = two.generate(1)
    assert again == second and again != first
    two.load(str(tmp_path), 0)
    other, _ = two.generate(2)
    assert other.tokens != second.tokens


def test_the_seed_of_the_rollouts_counts(folder, learner):
    one, two = (manager(folder, learner, *GROUPS, "--rollout-seed", seed).generate(0)[0] for seed in (1, 2))
    assert one.tokens != two.tokens


@pytest.mark.parametrize("draw", [4, 16])
def test_nothing_is_generated_that_is_not_needed(folder, learner, monkeypatch, draw):
    """Four groups are asked for, and four prompts are generated at a time: the next four are none of them."""
    generated: list[int] = []

    def counted(model, prompts, *rest):
        generated.append(len(prompts))
        return generate(model, prompts, *rest)

    generate = generation.generate
    monkeypatch.setattr(generation, "generate", counted)
    flags = [*GROUPS, "--rollout-batch-size", 4, "--over-sampling-batch-size", draw]
    manager(folder, learner, *flags, "--sglang-max-running-requests", 32).generate(0)
    assert generated == [32]


def test_no_signal_ends_the_run_with_one_line(folder, learner, tmp_path):
    """Rewards that never differ: slime would draw for ever."""
    rows = [{"prompt": [{"role": "user", "content": "q1"}], "label": "99"}] * 5
    tiny.jsonl(tmp_path / "data.jsonl", rows)
    flags = [*GROUPS, *FILTER, "--rollout-batch-size", 2, "--prompt-data", tmp_path / "data.jsonl"]
    with pytest.raises(TrainingError) as error:
        manager(folder, learner, *flags).generate(0)
    assert str(error.value) == (
        "--dynamic-sampling-filter-path: after 12 prompts, twice the data, only 0 of 2 groups have rewards that "
        "differ: there is nothing left to learn"
    )


# ---------------------------------------------------------------- evaluation


def test_evaluation_by_hand(folder, learner, tmp_path):
    """Greedy, on two sets, of one and of several samples a prompt; the same again whatever was generated meanwhile."""
    tiny.questions(tmp_path / "few.jsonl", 5)
    files = ["all", folder / "data.jsonl", "few", tmp_path / "few.jsonl"]
    flags = ["--eval-prompt-data", *files, "--eval-temperature", 0, "--eval-max-response-len", 6]
    made = manager(folder, learner, *flags)
    metrics = made.evaluate(0)
    sampling = generation.Sampling(0.0, max_new_tokens=6, stop=tiny.STOP)
    expected = {}
    for name, path in zip(files[::2], files[1::2], strict=True):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        scores, cut = [], []
        for row in rows:
            (prompt,) = chat.encode_prompts(made.tokenizer, [row["prompt"]], True)
            (response,) = generation.generate(made.engine.model, [prompt], sampling, 0)
            scores.append(float(str(last_answer(response.tokens)) == row["label"]))
            cut.append(response.tokens[-1] not in tiny.STOP)
        expected[f"eval/{name}"] = sum(scores) / len(rows)
        expected[f"eval/{name}-truncated_ratio"] = sum(cut) / len(rows)
    assert metrics == pytest.approx(expected)
    made.generate(0)
    assert made.evaluate(5) == metrics


def test_evaluation_samples_with_its_own_flags(folder, learner, tmp_path):
    rows = [{"question": [{"role": "user", "content": f"q{n}"}], "answer": n} for n in range(8)]
    tiny.jsonl(tmp_path / "other.jsonl", rows)
    flags = [
        "--eval-prompt-data",
        tmp_path / "other.jsonl",
        "--eval-input-key",
        "question",
        "--eval-label-key",
        "answer",
    ]
    metrics = manager(folder, learner, *flags, "--n-samples-per-eval-prompt", 16).evaluate(0)
    assert metrics.keys() == {"eval/aime", "eval/aime-truncated_ratio"}
    count = metrics["eval/aime"] * 8 * 16
    assert count == pytest.approx(round(count)) and 0 < count < 128


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["rollout", "eval"])
def test_a_prompt_that_leaves_no_room(folder, learner, kind):
    flags = [f"--{kind}-max-response-len", 254, "--eval-prompt-data", folder / "data.jsonl"]
    made = manager(folder, learner, *flags)
    with pytest.raises(TrainingError) as error:
        made.generate(0) if kind == "rollout" else made.evaluate(0)
    assert str(error.value) == (
        f"--{kind}-max-response-len: expected at most 246, since a prompt has 10 tokens and the model 256 positions, "
        "found 254"
    )


RL_RULES = Rules("rl", "prompt", "label", apply_chat_template=True)
QUESTION = {"prompt": [{"role": "user", "content": "q1"}], "label": "1"}


@pytest.mark.parametrize(
    ("rules", "rows", "line"),
    [
        (RL_RULES, [], "{path}: expected samples, found none"),
        (RL_RULES, [QUESTION, {"label": "1"}], "{path}:2: prompt: expected a list of messages, found nothing"),
        (RL_RULES, [{"prompt": QUESTION["prompt"]}], "{path}:1: label: expected text or a number, found nothing"),
        (
            Rules("rl", "prompt", "label"),
            [QUESTION],
            "{path}:1: prompt: expected text, found a list: messages need --apply-chat-template",
        ),
        (
            Rules("sft", "messages", "label"),
            [{"messages": [{"role": "user", "content": "q1"}]}],
            "{path}:1: messages[0].role: expected assistant in the last message, found 'user'",
        ),
    ],
)
def test_data_that_cannot_be_used(tmp_path, rules, rows, line):
    path = tiny.jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(TrainingError) as error:
        read(str(path), rules)
    assert str(error.value) == line.format(path=path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/no.jsonl: No such file or directory$"):
        read(f"{tmp_path}/no.jsonl", RL_RULES)
    (tmp_path / "bad.jsonl").write_text(json.dumps(QUESTION) + '\n{"prompt": ')
    with pytest.raises(DataError, match="bad.jsonl:2: expected a JSON object"):
        read(f"{tmp_path}/bad.jsonl", RL_RULES)


def test_the_keys_of_the_flags_are_asked_for(folder):
    for flags, key in (
        (["--input-key", "question"], "question: expected a list of messages"),
        (["--label-key", "answer"], "answer: expected text or a number"),
    ):
        made = RolloutManager(tiny.parse(tiny.argv(folder, *flags)), threads=1)
        with pytest.raises(TrainingError, match=f"data.jsonl:1: {key}, found nothing"):
            made.start()


def test_a_directory_without_a_tokenizer(folder, tmp_path):
    with pytest.raises(DataError, match="expected the directory of a Hugging Face tokenizer, found none"):
        RolloutManager(tiny.parse(tiny.argv(folder, "--hf-checkpoint", tmp_path / "no")), threads=1).start()
