r"""Public formats of SFT and RL data into what slime reads: {"messages"} or {"prompt", "label"}. All else is left out.

SFT, formats `messages`, `sharegpt`, `alpaca`, and `infialign`, which takes whichever of the three each row has:

    messages     "messages": [{"role", "content"}]
    sharegpt     "conversations": [{"from": "human" | "gpt" | "system", "value"}], or with role and content;
                 "system" beside it
    alpaca       "instruction", "output"; "input", "system" and "history" [[question, answer], ...] where present

sharegpt and alpaca are as LLaMA-Factory's data/README.md defines them; slime's own SFT example converts the former
(docs/en/examples/qwen3-4b-base-openhermes.md at 8359c9a). The files of InfiX-ai/InfiAlign-SFT-72k and -165k could not
be looked at when this was written: their card was not at hand. `infialign` therefore accepts the layouts in use, and
names the keys it found when it meets another one.

RL, formats `dapo-math` and `prompt-label`:

    dapo-math      "prompt": [{"role", "content"}], "reward_model": {"ground_truth"}: verl's layout. The file of
                   BytedTsinghua-SIA/DAPO-Math-17k (also "data_source", "ability", "extra_info") repeats its questions
                   about a hundred times; each is kept once, with its first answer, in the order of first appearance.
                   By question, not by extra_info.index, as the conversions open-r1/DAPO-Math-17k-Processed and
                   zhuzilin/dapo-math-17k do: 17,398 rows (by index there would be 17,917).
    prompt-label   "prompt" (text or messages) and "label", or the keys that are named

The questions of DAPO end in "Answer: $Answer", which `--rm-type dapo` looks for. The recipe's deepscaler reads \boxed{}
after `</think>` and gives 0 for any other form. slime's own data for it, zhuzilin/dapo-math-17k, therefore asks for
"Answer: \boxed{$Answer}" (docs/en/get_started/usage.md at 8359c9a). `boxed` makes exactly that change, `keep` none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.checkpoint.cli import Progress
from tools.data.errors import MISSING, DataError, shown
from tools.data.rows import Source
from tools.data.schema import conversation_problem, label_problem, prompt_problem

READABLE = (".jsonl", ".parquet", ".json")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ASKS_FOR_A_LINE = "Answer: $Answer (without quotes) where $Answer is the answer to the problem."
ASKS_FOR_A_BOX = r"Answer: \boxed{$Answer} where $Answer is the answer to the problem."

Row = dict[str, Any]
_CONFLICT = b""  # in place of an answer: reported already


class _Invalid(Exception):
    """A row that cannot be converted; the text says why."""


@dataclass(frozen=True)
class Job:
    """What to convert, and how."""

    inputs: tuple[Path, ...]
    format: str
    instruction: str = "boxed"  # dapo-math: boxed | keep
    prompt_key: str = "prompt"  # prompt-label
    label_key: str = "label"
    drop_invalid: bool = False

    @property
    def kind(self) -> str:
        return "sft" if self.format in SFT else "rl"

    @property
    def boxes(self) -> bool:
        """Are the questions to ask for a box?"""
        return self.format == "dapo-math" and self.instruction == "boxed"

    @property
    def key(self) -> str:
        """The key of the messages in the output."""
        return "messages" if self.kind == "sft" else "prompt"


@dataclass
class Tally:
    """What happened to the rows."""

    read: int = 0
    written: int = 0
    repeated: int = 0
    boxed: int = 0
    asked_otherwise: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: set[str] = field(default_factory=set)  # keys
    conflicts: int = 0  # questions that came again with another answer
    first_conflict: str = ""

    def lines(self, job: Job) -> Iterator[str]:
        """For people, one a line: everything that was not simply copied."""
        yield f"rows: {self.read:,} read, {self.written:,} written"
        if self.repeated:
            yield f"repeated questions left out: {self.repeated:,}"
        if self.conflicts:
            yield f"questions again with another answer, the first kept: {self.conflicts:,}, {self.first_conflict}"
        if job.boxes:
            changed = f"{self.boxed:,}, left as it was: {self.asked_otherwise:,}"
            yield f'instruction made "Answer: \\boxed{{$Answer}}": {changed}'
        for reason, count in sorted(self.dropped.items()):
            yield f"dropped: {count:,}: {reason}"
        if self.left_out:
            yield f"keys left out: {', '.join(sorted(self.left_out))}"


def convert(job: Job, tally: Tally) -> Iterator[Row]:
    """The converted rows, in the order of the inputs. Raises DataError at the first invalid one, unless dropped."""
    return _rows([Source(path, suffixes=READABLE) for path in job.inputs], job, tally)


def _rows(sources: list[Source], job: Job, tally: Tally) -> Iterator[Row]:
    progress = Progress(sum(source.size for source in sources), "converting")
    answers: dict[bytes, bytes] = {}
    try:
        for source in sources:
            done = 0
            for number, row in source:
                progress.add(source.position - done)
                done = source.position
                tally.read += 1
                try:
                    converted = _convert(row, job, tally)
                except _Invalid as error:
                    if not job.drop_invalid:
                        raise DataError(f"{source.where(number)}: {error}; --drop-invalid leaves it out") from None
                    tally.dropped[_reason(str(error))] += 1
                    continue
                if job.format == "dapo-math" and _seen(converted, answers, source.where(number), tally):
                    continue
                if job.boxes:
                    _ask_for_a_box(converted["prompt"][-1], tally)
                tally.written += 1
                yield converted
    finally:
        progress.close()
    if not tally.written:
        raise DataError(f"{sources[0].path}: expected at least one valid row, found none in {tally.read:,}")


def _convert(row: Row, job: Job, tally: Tally) -> Row:
    used = _Keys(row)
    converted: Row
    if job.kind == "sft":
        converted = {"messages": SFT[job.format](used, tally)}
        problem = conversation_problem(converted["messages"], "messages")
    else:
        prompt, label = RL[job.format](used, job)
        prompt = _messages(prompt, "prompt", tally)
        problem = prompt_problem(prompt, "prompt", True) or label_problem(label, "label")
        converted = {"prompt": prompt, "label": label}
    if problem:
        raise _Invalid(problem)
    if job.kind == "rl":
        converted["label"] = str(converted["label"])
    tally.left_out.update(used.left())
    return converted


class _Keys:
    """A row that knows which of its keys have been used."""

    def __init__(self, row: Row):
        self._row, self._used = row, set()

    def get(self, key: str) -> Any:
        """The value; a null counts as nothing, as .parquet has one wherever a key is missing."""
        self._used.add(key)
        value = self._row.get(key)
        return MISSING if value is None else value

    def has(self, *keys: str) -> bool:
        return all(self._row.get(key) is not None for key in keys)

    def left(self) -> list[str]:
        return [key for key, value in self._row.items() if key not in self._used and value is not None]

    def __str__(self) -> str:
        return ", ".join(key for key, value in self._row.items() if value is not None) or "none"


# ---------------------------------------------------------------- SFT


def _from_messages(row: _Keys, tally: Tally) -> Any:
    return _messages(row.get("messages"), "messages", tally)


def _from_sharegpt(row: _Keys, tally: Tally) -> Any:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise _Invalid(f"conversations: expected a list, found {shown(turns)}")
    messages = []
    for index, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("from") is not None:
            role = turn["from"]
            if not isinstance(role, str) or role not in ROLES:
                raise _Invalid(f"conversations[{index}].from: expected one of {', '.join(ROLES)}, found {shown(role)}")
            renamed = {"from": "role", "value": "content"}
            turn = {renamed.get(key, key): value for key, value in turn.items()} | {"role": ROLES[role]}
        messages.append(turn)
    return _with_system(row, _messages(messages, "conversations", tally))


def _from_alpaca(row: _Keys, tally: Tally) -> Any:
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _Invalid(f"history: expected a list of [question, answer], found {shown(history)}")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question, more = row.get("instruction"), row.get("input")
    for key, value in (("instruction", question), ("input", more)):
        if not isinstance(value, str) and value is not MISSING:
            raise _Invalid(f"{key}: expected text, found {shown(value)}")
    parts = [part for part in (question, more) if isinstance(part, str) and part.strip()]
    messages.append({"role": "user", "content": "\n".join(parts)})
    messages.append({"role": "assistant", "content": row.get("output")})
    return _with_system(row, messages)


def _from_infialign(row: _Keys, tally: Tally) -> Any:
    if row.has("messages"):
        return _from_messages(row, tally)
    if row.has("conversations"):
        return _from_sharegpt(row, tally)
    if row.has("instruction", "output"):
        return _from_alpaca(row, tally)
    raise _Invalid(f"expected messages, conversations, or instruction and output, found the keys: {row}")


def _with_system(row: _Keys, messages: Any) -> Any:
    """With the row's own system prompt in front; an empty one means none."""
    system = row.get("system")
    if system is MISSING or system == "":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(messages: Any, key: str, tally: Tally) -> Any:
    """Messages with the keys that slime knows. What is no list of objects is left for the check that follows."""
    if not isinstance(messages, list):
        return messages
    kept = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return messages
        if message.get("tool_calls"):
            raise _Invalid(f"{key}[{index}].tool_calls: expected none, found some, which have no place in the output")
        known = {name: message[name] for name in ("role", "content", "step_loss_mask") if message.get(name) is not None}
        tally.left_out.update(f"{key}[].{name}" for name, value in message.items() if name not in known and value)
        kept.append(known)
    return kept


# ---------------------------------------------------------------- RL


def _from_dapo_math(row: _Keys, job: Job) -> tuple[Any, Any]:
    reward = row.get("reward_model")
    if not isinstance(reward, dict):
        raise _Invalid(f"reward_model: expected an object with ground_truth, found {shown(reward)}")
    return row.get("prompt"), reward.get("ground_truth", MISSING)


def _from_prompt_label(row: _Keys, job: Job) -> tuple[Any, Any]:
    prompt = row.get(job.prompt_key)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return prompt, row.get(job.label_key)


def _ask_for_a_box(message: Row, tally: Tally) -> None:
    if ASKS_FOR_A_LINE in message["content"]:
        message["content"] = message["content"].replace(ASKS_FOR_A_LINE, ASKS_FOR_A_BOX)
        tally.boxed += 1
    else:
        tally.asked_otherwise += 1


def _seen(row: Row, answers: dict[bytes, bytes], where: str, tally: Tally) -> bool:
    """Has the question been there before? Memory: 40 bytes of digests for each one."""
    question = hashlib.sha256(json.dumps(row["prompt"]).encode()).digest()
    answer = hashlib.sha256(row["label"].encode()).digest()[:8]
    if question not in answers:
        answers[question] = answer
        return False
    tally.repeated += 1
    if answers[question] not in (answer, _CONFLICT):
        answers[question] = _CONFLICT
        tally.conflicts += 1
        tally.first_conflict = tally.first_conflict or where
    return True


def _reason(problem: str) -> str:
    """A problem without what was found and where in the row: the same for many rows."""
    return re.sub(r"\[\d+\]", "[]", problem.partition(", found")[0])


SFT: dict[str, Callable[[_Keys, Tally], Any]] = {
    "infialign": _from_infialign,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
}
RL: dict[str, Callable[[_Keys, Job], tuple[Any, Any]]] = {
    "dapo-math": _from_dapo_math,
    "prompt-label": _from_prompt_label,
}
