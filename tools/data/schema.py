"""What a row of training data must be. Every function returns what is wrong with a value, or None.

Where slime 8359c9a would stop in the middle of a job, or silently train on something else, the text says so. Roles
and step_loss_mask follow slime/utils/mask_utils.py: it formats every message of a conversation by itself, learns from
those of the assistant, and handles the result of a tool like a question.
"""

from __future__ import annotations

import math
from typing import Any

from tools.data.errors import MISSING, shown

_NEXT = {  # role -> roles that may follow
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def conversation_problem(messages: Any, key: str) -> str | None:
    """SFT: a conversation that ends with an answer to learn from."""
    problem = _messages_problem(messages, key, "assistant")
    if problem:
        return problem
    trained = False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        mask = message.get("step_loss_mask", 1)
        if mask not in (0, 1):  # a null is what .parquet puts where other rows have the key
            return (
                f"{key}[{index}].step_loss_mask: expected 0 or 1, found {shown(mask)}: the answer would not be trained"
            )
        trained |= mask == 1
    # slime asks for the last 0 tokens of the mask, gets all of them, and fails on their number.
    return None if trained else f"{key}: expected an answer with step_loss_mask 1, found none: slime would stop here"


def prompt_problem(prompt: Any, key: str, apply_chat_template: bool) -> str | None:
    """RL: a question, as messages if a chat template is applied, otherwise as text."""
    if apply_chat_template:
        if isinstance(prompt, str):
            return (
                f"{key}: expected a list of messages, found text {shown(prompt)}: --apply-chat-template would render a "
                "conversation without it"
            )
        return _messages_problem(prompt, key, "user")
    if isinstance(prompt, list):
        return f"{key}: expected text, found a list: messages need --apply-chat-template"
    return _text_problem(prompt, key)


def label_problem(label: Any, key: str) -> str | None:
    """RL: the answer that a rule compares with."""
    number = isinstance(label, (int, float)) and not isinstance(label, bool) and math.isfinite(label)
    if number or (isinstance(label, str) and _text_problem(label, key) is None):
        return None
    found = "a text without an answer" if isinstance(label, str) and not label.strip() else shown(label)
    return f"{key}: expected text or a number, found {found}"


def metadata_problem(metadata: Any, key: str) -> str | None:
    """slime looks for keys of its own in what is not null or empty."""
    if metadata is MISSING or metadata is None or isinstance(metadata, dict):
        return None
    return f"{key}: expected an object, found {shown(metadata)}"


def _messages_problem(messages: Any, key: str, last: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"{key}: expected a list of messages, found {shown(messages)}"
    before = None
    for index, message in enumerate(messages):
        here = f"{key}[{index}]"
        if not isinstance(message, dict):
            return f'{here}: expected an object with "role" and "content", found {shown(message)}'
        role, content = message.get("role", MISSING), message.get("content", MISSING)
        if not isinstance(role, str) or role not in _NEXT[before]:
            return f"{here}.role: expected {' or '.join(_NEXT[before])}, found {shown(role)}"
        # An answer may consist of tool calls, and a tool may return nothing.
        blank = role == "tool" or (role == "assistant" and bool(message.get("tool_calls")))
        problem = _text_problem(content, f"{here}.content", blank)
        if problem:
            return problem
        before = role
    if before != last:
        return f"{key}[{len(messages) - 1}].role: expected {last} in the last message, found {shown(before)}"
    return None


def _text_problem(text: Any, key: str, blank: bool = False) -> str | None:
    if not isinstance(text, str):
        return f"{key}: expected text, found {shown(text)}"
    if not blank and not text.strip():
        return f"{key}: expected text, found {'only white space' if text else 'an empty one'}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{key}: expected Unicode text, found half a surrogate pair at character {error.start + 1}"
    return None
