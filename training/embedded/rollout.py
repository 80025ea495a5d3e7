"""The rollout side of SFT and RL: an actor that turns data into batches for the trainer.

For SFT it tokenises conversations. For RL it is the inference engine: it holds the weights that the trainer last sent,
in block FP8 where --hf-checkpoint is an FP8 model, draws responses, and rewards them by rule. Its place in slime is
RolloutManager (slime/ray/rollout.py) with SGLang behind it (slime/rollout/sglang_rollout.py at 8359c9a).

One difference to slime: a rollout takes groups in the order of the data, slime in the order in which they finish,
which prefers prompts with short responses and depends on timing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers  # its parts are imported where they are first used: SFT needs no model here
from torch import Tensor

from tools.checkpoint.block_fp8 import BlockFP8
from tools.data import chat
from tools.data.check import Rules
from tools.data.rows import Source
from training.embedded import fp8_linear, generation, grpo, rewards, train_arguments
from training.embedded.batch import Batch
from training.embedded.errors import TrainingError
from training.embedded.prompts import PromptSource, Row

Weights = dict[str, Tensor | BlockFP8]


@dataclass
class Group:
    """The samples of one prompt."""

    prompt: list[int]
    responses: list[generation.Response]
    texts: list[str]
    rewards: list[float]


class Engine:
    """Generates with the model that --hf-checkpoint describes and the weights of the last `load`."""

    def __init__(self, hf_checkpoint: str, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        from training.embedded import attention  # takes seconds to import

        self.path = hf_checkpoint
        self.config = _read_config(transformers.Qwen2Config, hf_checkpoint, "config.json")
        self.fp8 = is_fp8(self.config, hf_checkpoint)
        if self.fp8:
            del self.config.quantization_config  # or transformers would quantise by its own rules
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = transformers.Qwen2ForCausalLM(self.config)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.model.to(device).eval().requires_grad_(False)
        # SGLang rounds activations to 1x128 tiles with float32 scales.
        fp8_linear.convert(self.model, fp8_linear.Precision(fp8=self.fp8, pow2=False))
        self.model.set_attn_implementation(attention.WIDE)
        self.stop = stop_tokens(hf_checkpoint, self.config, tokenizer)

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Take new weights under Hugging Face's names; rows of padding beyond the vocabulary are cut off. Raises
        TrainingError where they are not of the model that config.json describes.
        """
        modules = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            weight = weights.get(name)
            found = None if weight is None else (weight.codes if isinstance(weight, BlockFP8) else weight).shape
            if found is None or not _fits(name, found, parameter.shape):
                raise TrainingError(
                    f"{self.path}/config.json: expected the model of the weights, where {name} is "
                    f"{'absent' if found is None else tuple(found)}, found {tuple(parameter.shape)}"
                )
            if isinstance(weight, BlockFP8):
                modules[name.removesuffix(".weight")].use_operand(weight.dequantize())
            else:
                parameter.copy_(weight[: parameter.shape[0]])


def _fits(name: str, found: torch.Size, wanted: torch.Size) -> bool:
    vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
    return found[1:] == wanted[1:] and (found[0] == wanted[0] or (vocabulary and found[0] > wanted[0]))


def _read_config(
    kind: type[transformers.Qwen2Config] | type[transformers.GenerationConfig], path: str, file: str
) -> Any:
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path}/{file}: expected a {kind.__name__}, found: {str(error).splitlines()[0]}"
        ) from error


def is_fp8(config: transformers.Qwen2Config, path: str) -> bool:
    """Whether a checkpoint is block FP8. Raises TrainingError for another quantisation, as slime's weight sync would
    fail on it (slime/backends/megatron_utils/megatron_to_hf/__init__.py:41).
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    wanted: dict[str, Any] = {
        **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"},
        "weight_block_size": [128, 128],
    }
    for key, value in wanted.items():
        found = settings.get(key)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise TrainingError(f"{path}/config.json: quantization_config.{key}: expected {value}, found {found}")
    return True


def stop_tokens(
    path: str, config: transformers.Qwen2Config, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """What ends a response: the eos tokens of generation_config.json, config.json and tokenizer, as SGLang has them."""
    ids: set[int] = set()
    if (Path(path) / "generation_config.json").is_file():
        ids |= _ids(_read_config(transformers.GenerationConfig, path, "generation_config.json").eos_token_id)
    return tuple(sorted(ids | _ids(config.eos_token_id) | _ids(tokenizer.eos_token_id)))


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


class RolloutManager:
    """The actor. threads: of torch, as Ray gives an actor one."""

    def __init__(self, args: argparse.Namespace, threads: int) -> None:
        torch.set_num_threads(threads)
        self.args = args

    def start(self) -> int:
        """Read the data and build the engine. Returns the whole rollouts in one pass over the data.

        Not done at construction, where Ray would make a long text of an error.
        """
        args = self.args
        self.tokenizer = chat.load_tokenizer(args.hf_checkpoint)
        self.source = PromptSource(
            read(args.prompt_data, self._rules(args.input_key, args.label_key)),
            shuffle=args.rollout_shuffle,
            seed=args.rollout_seed,
            samples=args.n_samples_per_prompt,
        )
        self.evaluations: dict[str, list[Row]] = {}
        self.engine = None if train_arguments.is_sft(args) else Engine(args.hf_checkpoint, self.tokenizer)
        return len(self.source.rows) // args.rollout_batch_size

    def _rules(self, input_key: str, label_key: str | None) -> Rules:
        """What a row must be."""
        args = self.args
        return Rules(
            kind="sft" if train_arguments.is_sft(args) else "rl",
            input_key=input_key,
            label_key=label_key or "label",
            metadata_key=args.metadata_key,
            apply_chat_template=args.apply_chat_template,
            rm_type=args.rm_type or "",
        )

    def save(self, root: str, rollout_id: int) -> None:
        """Keep the data position after a rollout."""
        self.source.save(Path(root), rollout_id)

    def load(self, root: str, rollout_id: int) -> None:
        """Go on after a rollout."""
        self.source.load(Path(root), rollout_id)

    def fp8(self) -> bool:
        """Whether the engine runs on block FP8 weights."""
        return self.engine.fp8

    def update_weights(self, weights: Weights) -> None:
        """Take the trainer's weights."""
        self.engine.load(weights)

    def generate(self, rollout_id: int) -> tuple[Batch, dict[str, float]]:
        """The batch of a rollout and what is logged of making it."""
        start = time.perf_counter()
        batch, metrics = self._conversations() if self.engine is None else self._responses(rollout_id)
        seconds = time.perf_counter() - start
        metrics["perf/rollout_time"] = seconds
        if self.engine is not None:
            metrics["perf/tokens_per_gpu_per_sec"] = sum(batch.responses) / seconds
        return batch, metrics

    # ------------------------------------------------------------ SFT

    def _conversations(self) -> tuple[Batch, dict[str, float]]:
        batch = Batch()
        taken = self.source.take(self.args.rollout_batch_size)
        conversations = [row[self.args.input_key] for row in taken]
        for tokens, mask in chat.encode_conversations(self.tokenizer, conversations):
            batch.tokens.append(tokens)
            batch.masks.append(mask[mask.index(1) :] if 1 in mask else [])
            batch.rewards.append(0.0)
            batch.truncated.append(False)
        return batch, {}

    # ------------------------------------------------------------ RL

    def _responses(self, rollout_id: int) -> tuple[Batch, dict[str, float]]:
        """--rollout-batch-size groups, drawing --over-sampling-batch-size prompts whenever there are too few.

        Groups without signal are dropped where the dynamic sampling filter is on; prompts that are not needed any more
        are not generated, and as in slime not drawn again.
        """
        args = self.args
        kept: list[Group] = []
        dropped: dict[float, int] = {}
        drawn = 0
        while len(kept) < args.rollout_batch_size:
            if drawn > 2 * len(self.source.rows):
                raise TrainingError(
                    f"--dynamic-sampling-filter-path: after {drawn} prompts, twice the data, only {len(kept)} of "
                    f"{args.rollout_batch_size} groups have rewards that differ: there is nothing left to learn"
                )
            prompts = self.source.take(args.over_sampling_batch_size)
            for group in self._groups("rollout", prompts, (args.rollout_seed, rollout_id, drawn)):
                drawn += 1
                if args.dynamic_sampling_filter_path is None or grpo.has_signal(group.rewards):
                    kept.append(group)
                else:
                    dropped[group.rewards[0]] = dropped.get(group.rewards[0], 0) + 1
                if len(kept) == args.rollout_batch_size:
                    break  # before the next ones are generated
        batch = Batch(log_probs=[])
        for group in kept:
            for response, reward in zip(group.responses, group.rewards, strict=True):
                batch.tokens.append(group.prompt + response.tokens)
                batch.masks.append([1] * len(response.tokens))
                batch.rewards.append(reward)
                batch.truncated.append(response.truncated)
                batch.log_probs.append(response.log_probs)
        everything = sum(dropped.values())
        print(f"First rollout sample: {kept[0].texts[0]!r}, reward {kept[0].rewards[0]}", flush=True)
        return batch, {
            "rollout/dropped_groups": float(everything),
            "rollout/raw_reward_drawn": (
                sum(batch.rewards) / args.n_samples_per_prompt + sum(value * count for value, count in dropped.items())
            )
            / (len(kept) + everything),
        }

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Mean reward and share of truncated responses on every set of --eval-prompt-data."""
        args, metrics = self.args, {}
        for name, path in zip(args.eval_prompt_data[::2], args.eval_prompt_data[1::2], strict=True):
            if name not in self.evaluations:
                self.evaluations[name] = read(path, self._rules(args.eval_input_key, args.eval_label_key))
            groups = list(self._groups("eval", self.evaluations[name], (args.rollout_seed, "eval", name)))
            scores = [reward for group in groups for reward in group.rewards]
            cut = [response.truncated for group in groups for response in group.responses]
            metrics[f"eval/{name}"] = sum(scores) / len(scores)
            metrics[f"eval/{name}-truncated_ratio"] = sum(cut) / len(cut)
        return metrics

    def _sampling(self, kind: str) -> generation.Sampling:
        value = {
            name: getattr(self.args, f"{kind}_{name}") for name in ("temperature", "top_p", "top_k", "max_response_len")
        }
        return generation.Sampling(
            temperature=value["temperature"],
            top_p=value["top_p"],
            top_k=value["top_k"],
            max_new_tokens=value["max_response_len"],
            stop=(*self.engine.stop, *(self.args.rollout_stop_token_ids or ())),
        )

    def _groups(self, kind: str, prompts: Sequence[Row], seed: tuple[object, ...]) -> Iterator[Group]:
        """Groups in the order of the prompts, as many at a time as --sglang-max-running-requests allows. kind:
        "rollout" or "eval", which decides the flags.
        """
        args, sampling = self.args, self._sampling(kind)
        input_key, label_key, samples = args.input_key, args.label_key, args.n_samples_per_prompt
        if kind == "eval":
            input_key, label_key, samples = args.eval_input_key, args.eval_label_key, args.n_samples_per_eval_prompt
        together = max(1, (args.sglang_max_running_requests or 128) // samples)
        for start in range(0, len(prompts), together):
            part = prompts[start : start + together]
            tokens = chat.encode_prompts(self.tokenizer, [row[input_key] for row in part], args.apply_chat_template)
            self._check_length(tokens, sampling.max_new_tokens, kind)
            repeated = [prompt for prompt in tokens for _ in range(samples)]
            drawn = generation.generate(self.engine.model, repeated, sampling, generation.seed_of(*seed, start))
            for number, row in enumerate(part):
                responses = drawn[number * samples : (number + 1) * samples]
                texts = [
                    self.tokenizer.decode(response.tokens, skip_special_tokens=args.rollout_skip_special_tokens)
                    for response in responses
                ]
                scores = [rewards.reward(args.rm_type, text, row[label_key]) for text in texts]
                yield Group(tokens[number], responses, texts, scores)

    def _check_length(self, prompts: Sequence[Sequence[int]], response: int, kind: str) -> None:
        longest, limit = max(map(len, prompts)), self.engine.config.max_position_embeddings
        if longest + response > limit:
            raise TrainingError(
                f"--{kind}-max-response-len: expected at most {limit - longest}, since a prompt has {longest} tokens "
                f"and the model {limit} positions, found {response}"
            )


def read(path: str, rules: Rules) -> list[Row]:
    """All rows of a .jsonl or .parquet file. Raises TrainingError that names the first bad one."""
    source, found = Source(Path(path)), []
    for number, row in source:
        problem = rules.problem(row)
        if problem:
            raise TrainingError(f"{source.where(number)}: {problem}")
        found.append(row)
    if not found:
        raise TrainingError(f"{path}: expected samples, found none")
    return found
