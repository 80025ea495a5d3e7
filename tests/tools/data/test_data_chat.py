"""Token ids and loss masks are slime's: as recorded from its own code, and as properties."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.tools.data.samples import assistant, conversations, user
from tools.data import DataError, chat

GOLDEN = json.loads((Path(__file__).parent / "slime_masks.json").read_text())


@pytest.fixture(params=GOLDEN["templates"])
def recorded(request) -> tuple[PreTrainedTokenizerFast, dict]:
    """A tokenizer with the chat template, and what slime made of the conversations with it."""
    golden = GOLDEN["templates"][request.param]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(GOLDEN["tokenizer"])))
    tokenizer.chat_template = golden["template"]
    return tokenizer, golden


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return chat.load_tokenizer(tiny_data / "tokenizer")


def test_conversations_as_recorded_from_slime(recorded):
    tokenizer, golden = recorded
    assert chat.lengths(tokenizer) == tuple(golden["lengths"])
    expected = [(ids, [int(bit) for bit in mask]) for ids, mask in golden["conversations"]]
    assert chat.encode_conversations(tokenizer, GOLDEN["conversations"]) == expected
    assert [chat.encode_conversation(tokenizer, messages) for messages in GOLDEN["conversations"]] == expected


def test_prompts_as_recorded_from_slime(recorded):
    tokenizer, golden = recorded
    prompts = [messages[:-1] for messages in GOLDEN["conversations"]]
    assert chat.encode_prompts(tokenizer, prompts, True) == golden["prompts"]
    assert [chat.encode_prompt(tokenizer, prompt, True) for prompt in prompts] == golden["prompts"]


def test_a_prompt_of_text_gets_no_special_tokens(tokenizer):
    ids = chat.encode_prompt(tokenizer, "2 + 2 =", False)
    assert tokenizer.decode(ids) == "2 + 2 =" and chat.encode_prompts(tokenizer, [], False) == []


def composed(text: str) -> str:
    """As Qwen's tokenizer takes it."""
    return unicodedata.normalize("NFC", text)


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_learned_is_what_the_assistant_says_and_its_end(tokenizer, messages):
    ids, mask = chat.encode_conversation(tokenizer, messages)
    assert len(ids) == len(mask)
    whole = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    assert tokenizer.decode(ids) == composed(whole)
    learned: list[list[int]] = []
    for token, bit, before in zip(ids, mask, [0, *mask], strict=False):
        if bit:
            learned.append([*learned.pop(), token] if before else [token])
    said = [composed(f"{message['content']}<|im_end|>\n") for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(tokens) for tokens in learned] == said


def test_a_step_without_loss_keeps_its_tokens(tokenizer):
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    masked = [user("a"), assistant("b", step_loss_mask=0), user("c"), assistant("d", step_loss_mask=1)]
    (ids, mask), (same, less) = chat.encode_conversations(tokenizer, [messages, masked])
    assert ids == same and sum(less) == sum(mask) / 2 > 0


def test_another_template_on_the_same_tokenizer_is_noticed(recorded):
    tokenizer, golden = recorded
    assert chat.lengths(tokenizer) == tuple(golden["lengths"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    assert chat.lengths(tokenizer) == (0, 1)


def test_a_tokenizer_that_cuts_or_fills_for_others_does_not_here(recorded):
    tokenizer, golden = recorded
    texts = ["a long text " * 30, "short", ""]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cut = tokenizer("a long text " * 30, truncation=True, max_length=3)["input_ids"]
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert chat.encode_prompts(tokenizer, texts, False) == expected and len(cut) == 3
    assert tokenizer("a long text " * 30, truncation=True, max_length=3)["input_ids"] == cut
    tokenizer.split_special_tokens = True
    assert (
        chat.encode_prompt(tokenizer, "<|im_end|>", False)
        == tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    )


def test_a_tokenizer_without_a_fast_backend(recorded):
    """Only what is asked of every tokenizer is asked of one that is not fast."""
    tokenizer, golden = recorded

    class Slow:
        name_or_path, get_chat_template, get_added_vocab, apply_chat_template = (
            *("", tokenizer.get_chat_template, tokenizer.get_added_vocab, tokenizer.apply_chat_template),
        )
        __call__ = staticmethod(tokenizer.__call__)

    expected = [(ids, [int(bit) for bit in mask]) for ids, mask in golden["conversations"]]
    assert chat.encode_conversations(Slow(), GOLDEN["conversations"]) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no lone message') }}", "its chat template fails on these messages: no lone message"),
        ("{% for m in messages %}{{ m.content.lower() }}{% endfor %}", "found 'FOR TESTING ONLY' 0 times"),
        ("{{ messages[0].content + 1 }}", "its chat template fails on these messages"),
    ],
)
def test_a_template_that_does_not_fit_is_an_error(recorded, template, says):
    tokenizer, _ = recorded
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=says):
        chat.encode_conversation(tokenizer, [user("a"), assistant("b")])


def test_the_tokenizer_of_a_distilled_model_is_refused(recorded):
    tokenizer, _ = recorded
    tokenizer.add_tokens(["<｜Assistant｜>"])
    with pytest.raises(DataError, match="in another way"):
        chat.encode_conversation(tokenizer, [user("a"), assistant("b")])


def test_no_tokenizer(tiny_data, tmp_path):
    with pytest.raises(DataError, match="expected the directory of a Hugging Face tokenizer, found none"):
        chat.load_tokenizer(tmp_path / "no where")
    with pytest.raises(DataError, match="expected a Hugging Face tokenizer, found"):
        chat.load_tokenizer(tmp_path)
    for file in (tiny_data / "tokenizer").iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="expected a tokenizer with a chat template, found none"):
        chat.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="expected a Hugging Face tokenizer, found"):
        chat.load_tokenizer(tmp_path)
