"""The command lines that the pinned engines accept, parsed without the engines.

Megatron-LM and slime can only be imported beside a GPU software stack, so their argparse options are
recorded as JSON (`dump_flags.py` writes it) and rebuilt here into a real `argparse` parser.  The same
argv therefore means the same thing here as in the engine, except that every problem is collected and
named instead of ending the process at the first one.

    contract = load("pretrain_gpt")
    args, seen, problems = parse(contract, ["--num-layers", "28", "--lr", "1e-4"])

Standard library only, Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(__file__).resolve().parent
FILES = {"pretrain_gpt": "megatron-core_v0.14.0.json", "slime": "slime-8359c9a.json"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a command line; `str(problem)` is the one line a user reads."""

    level: str  # "error" or "warning"
    flag: str  # "--num-layers", or "argument 'x'" where no flag is involved
    message: str
    source: str = ""  # where upstream decides this: "Megatron-LM megatron/training/arguments.py:615"

    def __str__(self) -> str:
        where = f" [{self.source}]" if self.source else ""
        return f"{self.level}: {self.flag}: {self.message}{where}"


@dataclass(frozen=True)
class Contract:
    """The options of one pinned program, in the order in which it declares them."""

    name: str  # "pretrain_gpt" or "slime"
    project: str
    pin: str
    options: tuple[dict[str, Any], ...]

    @property
    def source(self) -> str:
        """Project and version for a message: "Megatron-LM core_v0.14.0", "slime 8359c9a"."""
        version = self.pin.split()[0]
        return f"{self.project} {version[:7] if re.fullmatch('[0-9a-f]{40}', version) else version}"

    @functools.cached_property
    def option_strings(self) -> dict[str, dict[str, Any]]:
        """Every option string ("--lr") -> the option it belongs to."""
        return {text: option for option in self.options for text in option["options"]}


@functools.cache
def load(name: str) -> Contract:
    """The recorded contract of a program: "pretrain_gpt" (Megatron-LM) or "slime" (its train.py).

    Raises KeyError for another name.
    """
    data = json.loads((FOLDER / FILES[name]).read_text(encoding="utf-8"))
    return Contract(name, data["project"], data["pin"], tuple(data["options"]))


def _frequency(text: str) -> int | list[int]:
    """moe_freq_type and no_rope_freq_type, megatron/training/arguments.py:217-270: "3" or "([0]*3+[1])*2"."""
    if "[" not in text:
        return int(text)
    if re.search(r"[^,\d\[\]()+*]", text):
        raise ValueError(f"invalid pattern {text}")
    return eval(text, {"__builtins__": {}})  # noqa: S307  only digits and list arithmetic get here


def _nullable(text: str) -> str | None:
    """nullable_str, sglang/srt/server_args.py."""
    return None if text in ("", "None") else text


# Types by their recorded name.  A name that is not here (the lambda of --attention-backend, which looks an
# enum up by name) keeps the text: choices are recorded by name too.
TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,  # as upstream: any non-empty text is True
    "moe_freq_type": _frequency,
    "no_rope_freq_type": _frequency,
    "loads": json.loads,
    "json_list_type": json.loads,
    "nullable_str": _nullable,
}
EXPECTED = {"int": "an integer", "float": "a number", "loads": "JSON", "json_list_type": "a JSON list"}


class _Rejected(Exception):
    """argparse refused a piece of the command line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Rejected(message)


@functools.cache
def _parser(name: str) -> _Parser:
    """The program's own parser, rebuilt.  Required options are checked in `parse`, not here."""
    parser = _Parser(prog=name, allow_abbrev=False, add_help=False)
    for option in load(name).options:
        settings: dict[str, Any] = {"dest": option["dest"], "action": option["action"]}
        if option["action"] == "help":
            settings = {"dest": "help", "action": "store_true", "default": argparse.SUPPRESS}
        else:
            # A default that upstream computes is recorded as {"expr": source}: unknown here, so None.
            default = option["default"]
            computed = isinstance(default, dict) and "expr" in default
            settings["default"] = None if computed else default
        if option["action"] in ("store", "append"):
            settings["nargs"] = option["nargs"]
            settings["type"] = TYPES.get(option["type"], str)
            settings["choices"] = option["choices"]
        parser.add_argument(*option["options"], **settings)
    return parser


NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # as argparse decides that "-1" is a value


def _starts_option(contract: Contract, token: str) -> bool:
    """Whether argparse takes `token` for an option rather than for a value."""
    if not token.startswith("-") or len(token) == 1:
        return False
    if token in contract.option_strings or token.partition("=")[0] in contract.option_strings:
        return True
    return not NEGATIVE_NUMBER.fullmatch(token) and " " not in token


def split(contract: Contract, argv: Sequence[str]) -> list[list[str]]:
    """argv cut before each option: [["--lr", "1e-4"], ["--bf16"], ...].

    Neither program has positional arguments, so the pieces can be parsed one by one with the meaning
    they have together.  Only the first piece can start with something that is not an option.
    """
    pieces: list[list[str]] = []
    for token in argv:
        if _starts_option(contract, token) or not pieces:
            pieces.append([token])
        else:
            pieces[-1].append(token)
    return pieces


def flag_of(piece: Sequence[str]) -> str:
    """The option string of a piece: "--lr" for both ["--lr", "1"] and ["--lr=1"]."""
    return piece[0].partition("=")[0] if piece[0].startswith("-") else piece[0]


def _quoted(values: Sequence[str]) -> str:
    return " ".join(repr(value) for value in values) if values else "nothing"


def _diagnose(contract: Contract, piece: Sequence[str], extras: Sequence[str]) -> str:
    """What was expected and what was found, for a piece of a known flag that argparse refused."""
    option = contract.option_strings[flag_of(piece)]
    values = list(piece[1:]) if "=" not in piece[0] else [piece[0].partition("=")[2]]
    if option["nargs"] == 0:
        return f"expected no value, found {_quoted(extras or values)}"
    if not values or extras:
        wanted = {None: "one value", "?": "at most one value", "+": "one or more values"}
        count = wanted.get(option["nargs"], f"{option['nargs']} values")
        return f"expected {count}, found {_quoted([*values, *extras] if '=' in piece[0] else values)}"
    convert = TYPES.get(option["type"], str)
    for value in values:
        try:
            converted = convert(value)
        except (TypeError, ValueError, SyntaxError):
            return f"expected {EXPECTED.get(option['type'], option['type'])}, found {value!r}"
        if option["choices"] is not None and converted not in option["choices"]:
            return f"expected one of {', '.join(map(str, option['choices']))}, found {value!r}"
    return f"not accepted as {_quoted(piece)}"


def _unknown(contract: Contract, flag: str) -> str:
    near = difflib.get_close_matches(flag, list(contract.option_strings), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{contract.project} does not know this flag{hint}"


def parse(contract: Contract, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str], list[Problem]]:
    """Parse argv as the pinned program does: no abbreviations, last one wins, append accumulates.

    Returns the namespace with every default by dest, `seen` (dest -> the option string that set it last)
    and the problems, in the order of argv.  A flag with a problem leaves its default (or earlier value).
    """
    parser = _parser(contract.name)
    namespace = copy.deepcopy(parser.parse_args([]))  # list defaults are shared inside the parser
    seen: dict[str, str] = {}
    problems: list[Problem] = []

    def reject(flag: str, message: str) -> None:
        problems.append(Problem("error", flag, message, contract.source))

    for piece in split(contract, argv):
        flag = flag_of(piece)
        if flag not in contract.option_strings:
            if piece[0].startswith("-") and piece[0] != "-" and piece[0] != "--":
                reject(flag, _unknown(contract, flag))
            else:
                reject(f"argument {piece[0]!r}", "belongs to no flag")
            continue
        option = contract.option_strings[flag]
        before = copy.copy(namespace)
        try:
            namespace, extras = parser.parse_known_args(piece, namespace)
        except (_Rejected, SyntaxError):
            extras, refused = [], True
        else:
            refused = bool(extras)
        if refused:
            namespace = before
            reject(flag, _diagnose(contract, piece, extras))
        elif option["action"] == "help":
            del namespace.help
            reject(flag, "prints the help of the program and runs nothing")
        else:
            seen[option["dest"]] = flag
    for option in contract.options:
        if option["required"] and option["dest"] not in seen:
            reject(option["options"][0], "is required and missing")
    return namespace, seen, problems
