"""Token ids and loss mask of a conversation, and token ids of a prompt: exactly slime's at 8359c9a.

SFT (slime/utils/mask_utils.py, `--loss-mask-type qwen`, the default). Every message is formatted by itself:

    message i        ids = template([message])            the template may put its default system prompt in front
    i > 0            ids = ids[system_length:]            which only the first message keeps
    assistant        mask = 0 for the first generation_length ids ("<|im_start|>assistant\n"), then 1
    all others       mask = 0

so the end-of-turn token and what the template writes after it are learned, too. `step_loss_mask` other than 1 in a
message makes its mask 0. Both lengths are properties of tokenizer and template; here they are found once, upstream at
every start.

RL (slime/utils/data.py, slime/rollout/sglang_rollout.py): the template with its generation prompt, then the tokenizer
without special tokens.

Upstream needs transformers 4, where apply_chat_template(tokenize=True) gives a list. Formatting and tokenising are two
steps here, which is the same in transformers 4 and 5.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.data.errors import DataError

Message = dict[str, Any]
Encoded = tuple[list[int], list[int]]  # token ids, loss mask: equally long

_PROBE = "FOR TESTING ONLY"
_DISTILLED = "<｜Assistant｜>"


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory; nothing is fetched. Raises DataError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: expected the directory of a Hugging Face tokenizer, found none")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise DataError("counting tokens needs the package transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of it
        raise DataError(
            f"{directory}: expected a Hugging Face tokenizer, found {type(error).__name__}: {error}"
        ) from None
    if not tokenizer.chat_template:
        raise DataError(f"{directory}: expected a tokenizer with a chat template, found none")
    return tokenizer


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> Encoded:
    """Token ids and loss mask of one conversation, as slime's gen_multi_turn_loss_mask_qwen."""
    return encode_conversations(tokenizer, [messages])[0]


def encode_conversations(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
    """The same for many at once: a fast tokenizer shares them out among its threads. Raises DataError."""
    system_length, generation_length = lengths(tokenizer)
    messages = [message for conversation in conversations for message in conversation]
    ids = iter(_ids(tokenizer, _render(tokenizer, [[message] for message in messages], False)))
    encoded = []
    for conversation in conversations:
        tokens: list[int] = []
        mask: list[int] = []
        for index, message in enumerate(conversation):
            piece = next(ids)
            if index and message["role"] != "system":
                piece = piece[system_length:]
            if message["role"] == "assistant" and message.get("step_loss_mask", 1) == 1:
                mask += [0] * generation_length + [1] * (len(piece) - generation_length)
            else:
                mask += [0] * len(piece)
            tokens += piece
        encoded.append((tokens, mask))
    return encoded


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Message], apply_chat_template: bool) -> list[int]:
    """Token ids of a prompt of RL: text, or messages to which the chat template is applied."""
    return encode_prompts(tokenizer, [prompt], apply_chat_template)[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[Any], apply_chat_template: bool) -> list[list[int]]:
    """The same for many at once. Raises DataError."""
    return _ids(tokenizer, _render(tokenizer, prompts, True) if apply_chat_template else prompts)


def lengths(tokenizer: Any) -> tuple[int, int]:
    """(tokens of the default system prompt, tokens of the generation prompt) of a tokenizer's chat template.

    Raises DataError for a tokenizer that slime's `qwen` loss mask does not fit.
    """
    return _lengths(tokenizer, tokenizer.get_chat_template())


@functools.lru_cache(maxsize=8)
def _lengths(tokenizer: Any, _template: str) -> tuple[int, int]:
    if _DISTILLED in tokenizer.get_added_vocab():
        raise DataError(
            f"{tokenizer.name_or_path}: slime masks the loss of a tokenizer with {_DISTILLED} in another way"
        )
    twice = [{"role": "user", "content": _PROBE}] * 2
    probe, plain, prompted = _ids(
        tokenizer, [_PROBE, *_render(tokenizer, [twice], False), *_render(tokenizer, [twice], True)]
    )
    found = [start for start in range(len(plain)) if plain[start : start + len(probe)] == probe]
    if len(found) != 2:
        raise DataError(
            f"{tokenizer.name_or_path}: expected a chat template that keeps the tokens of a text, found {_PROBE!r} "
            f"{len(found)} times in two messages that say it"
        )
    first, second = found
    after = len(plain) - second - len(probe)
    before = second - first - len(probe) - after  # of a message that is not the first
    return first - before, len(prompted) - len(plain)


def _render(tokenizer: Any, conversations: Sequence[Sequence[Message]], generate: bool) -> list[str]:
    from jinja2 import TemplateError

    if not conversations:
        return []
    try:
        return tokenizer.apply_chat_template(
            [list(conversation) for conversation in conversations], tokenize=False, add_generation_prompt=generate
        )
    except (TemplateError, TypeError) as error:
        raise DataError(f"{tokenizer.name_or_path}: its chat template fails on these messages: {error}") from None


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """What tokenizer(texts, add_special_tokens=False) gives, in half the time: nothing but the ids is computed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
