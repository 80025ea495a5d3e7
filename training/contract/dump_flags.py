#!/usr/bin/env python3
"""Record what the pinned command line parsers accept: writes the JSON files of this folder.

    dump_flags.py                    Megatron-LM and slime, from the populated submodules
    dump_flags.py --check            write nothing; exit 1 and name what differs from the recorded files
    dump_flags.py --sglang DIR --router DIR
                                     sglang and its router, too, from their unpacked wheels
                                     (pip download --no-deps sglang==0.5.3.post1 sglang-router==0.2.1)

Runs on a CPU box with the packages of requirements.txt. Megatron's and slime's options come from their real argparse
parsers. Those of the sglang server are read from its source, because importing it needs a GPU stack; slime then puts
its real `--sglang-` prefix on them. Without --sglang the recorded server options are used for that.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
REPO = FOLDER.parents[1]
SGLANG, ROUTER = "0.5.3.post1", "0.2.1"
KINDS = {
    "_StoreAction": "store",
    "_StoreTrueAction": "store_true",
    "_StoreFalseAction": "store_false",
    "_StoreConstAction": "store_const",
    "_AppendAction": "append",
    "_HelpAction": "help",
    "BooleanOptionalAction": "boolean_optional",
}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: enum members by name, anything foreign by its repr."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    try:
        json.dumps(value)
    except TypeError:
        return repr(value)
    return value


def describe(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Every option of a parser, in the order of its declaration, without help texts."""
    groups = {id(a): g.title for g in parser._action_groups for a in g._group_actions}
    rows = []
    for action in parser._actions:
        if not action.option_strings:
            continue
        kind = KINDS.get(type(action).__name__, type(action).__name__)
        name = None if action.type is None else getattr(action.type, "__name__", repr(action.type))
        rows.append(
            {
                "options": list(action.option_strings),
                "dest": action.dest,
                "action": kind,
                "nargs": plain(action.nargs),
                "type": "lambda" if name == "<lambda>" else name,
                "choices": None if action.choices is None else plain(list(action.choices)),
                "default": plain(action.default),
                "required": bool(action.required),
                "const": plain(action.const) if kind == "store_const" else None,
                "group": groups.get(id(action)),
            }
        )
    return rows


def document(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The text of a contract file."""
    names = sorted({option for row in rows for option in row["options"]})
    return json.dumps({**facts, "count": len(rows), "option_strings": names, "options": rows}, indent=1) + "\n"


# ---------------------------------------------------------------- sglang, from its source


def sglang_calls(source: str) -> list[tuple[list[str], dict[str, Any]]]:
    """(flags, keywords) of each add_argument call in ServerArgs.add_cli_args, in order.

    A value that is no constant becomes {"expr": its source}; a `type` becomes its source.
    """
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    server = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs")
    fields: dict[str, Any] = {}

    def literal(node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, SyntaxError):
            pass
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("ServerArgs", "cls") and node.attr in fields:
                return fields[node.attr]
        return {"expr": ast.unparse(node)}

    for node in server.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            fields[node.target.id] = literal(node.value)
    method = next(n for n in server.body if isinstance(n, ast.FunctionDef) and n.name == "add_cli_args")
    calls = []
    for call in ast.walk(method):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if call.func.attr != "add_argument":
            continue
        keywords = {}
        for keyword in call.keywords:
            node = keyword.value
            if keyword.arg == "choices" and isinstance(node, ast.Name):
                node = constants.get(node.id, node)
            if keyword.arg not in ("help", None):
                keywords[keyword.arg] = ast.unparse(node) if keyword.arg == "type" else literal(node)
        calls.append((call.lineno, [a.value for a in call.args if isinstance(a, ast.Constant)], keywords))
    return [(flags, keywords) for _, flags, keywords in sorted(calls, key=lambda call: call[0])]


def recorded_calls() -> list[tuple[list[str], dict[str, Any]]]:
    """The same from sglang-server.json."""
    rows = json.loads((FOLDER / "sglang-server.json").read_text())["options"]
    calls = []
    for row in rows:
        if row["action"] == "help":
            continue
        keywords = {
            "dest": row["dest"],
            "action": row["action"],
            "default": row["default"],
            "required": row["required"],
        }
        if row["action"] in ("store", "append"):
            keywords |= {"nargs": row["nargs"], "type": row["type"], "choices": row["choices"]}
        calls.append((row["options"], keywords))
    return calls


def replay(parser: argparse.ArgumentParser, calls: Iterable[tuple[list[str], dict[str, Any]]]) -> None:
    """Make the recorded add_argument calls; types become functions of the same name."""
    for flags, recorded in calls:
        keywords = dict(recorded)
        if isinstance(keywords.get("type"), str):
            keywords["type"] = {"int": int, "float": float, "str": str}.get(keywords["type"]) or _named(
                keywords["type"]
            )
        if isinstance(keywords.get("action"), dict):  # an action class of sglang's own
            keywords["action"] = "store"
        if isinstance(keywords.get("choices"), dict):
            del keywords["choices"]
        parser.add_argument(*flags, **keywords)


def _named(name: str):
    def convert(text: str) -> str:
        return text

    convert.__name__ = name
    return convert


# ---------------------------------------------------------------- the four programs


def megatron_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def slime_parser(calls: list[tuple[list[str], dict[str, Any]]]) -> argparse.ArgumentParser:
    class ServerArgs:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> None:
            replay(parser, calls)

    stub("sglang", __version__=SGLANG)
    stub("sglang.srt")
    stub("sglang.srt.server_args", ServerArgs=ServerArgs)
    from slime.utils.arguments import get_slime_extra_args_provider

    return get_slime_extra_args_provider()(megatron_parser())


def router_document(wheel: Path) -> str:
    stub("sglang_router")
    path = wheel / "sglang_router" / "router_args.py"
    spec = importlib.util.spec_from_file_location("sglang_router.router_args", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.RouterArgs.add_cli_args(parser)
    fields = {
        field.name: plain(None if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(module.RouterArgs)
    }
    facts = {"project": "sglang-router", "pin": ROUTER, "entrypoint": "python -m sglang_router.launch_router"}
    return document({**facts, "dataclass_fields": fields}, describe(parser))


def stub(name: str, **attributes: Any) -> None:
    """An importable module that is not installed here and of which the parsers need only this."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    sys.modules[name] = module


def submodule(name: str) -> tuple[Path, str]:
    """(directory, commit) of a populated submodule at the commit that this repository pins."""
    path = REPO / "training" / name
    if not (path / ".git").exists():
        sys.exit(f"training/{name}: not initialised; run: git submodule update --init training/{name}")

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", *words], check=True, capture_output=True, text=True).stdout.strip()

    pin = git(str(REPO), "ls-files", "-s", "--", f"training/{name}").split()[1]
    head = git(str(path), "rev-parse", "HEAD")
    if head != pin:
        sys.exit(f"training/{name}: at commit {head[:12]}, expected {pin[:12]}; run: git submodule update --init")
    return path, head


def documents(sglang: Path | None, router: Path | None) -> dict[str, str]:
    """Text of every contract file that can be made, by file name."""
    (megatron, megatron_head), (slime, slime_head) = submodule("Megatron-LM"), submodule("slime")
    sys.path[:0] = [str(megatron), str(slime)]
    if importlib.util.find_spec("six") is None:  # Megatron's BERT tokenizer imports it
        stub("six")
    made = {}
    rows = describe(megatron_parser())
    facts = {"project": "Megatron-LM", "pin": f"core_v0.14.0 {megatron_head}", "entrypoint": "pretrain_gpt.py"}
    made["megatron-core_v0.14.0.json"] = document({**facts, "allow_abbrev": False}, rows)
    known = {option for row in rows for option in row["options"]}

    calls = recorded_calls()
    if sglang is not None:
        calls = sglang_calls((sglang / "sglang" / "srt" / "server_args.py").read_text())
        bare = argparse.ArgumentParser(allow_abbrev=False)
        replay(bare, calls)
        facts = {"project": "sglang", "pin": SGLANG, "entrypoint": "python -m sglang.launch_server"}
        made["sglang-server.json"] = document({**facts, "source": "AST of srt/server_args.py"}, describe(bare))
    rows = describe(slime_parser(calls))
    for row in rows:
        sglang_flag = row["options"][0].startswith("--sglang-")
        row["origin"] = "megatron" if set(row["options"]) <= known else "sglang" if sglang_flag else "slime"
    facts = {
        "project": "slime",
        "pin": slime_head,
        "entrypoint": "train.py, train_async.py",
        "allow_abbrev": False,
        "sglang_prefix": "--sglang-",
        "sglang_version_used": SGLANG,
        "note": "every sglang server option except slime's skip list is accepted with the --sglang- prefix",
    }
    made["slime-8359c9a.json"] = document(facts, rows)
    if router is not None:
        made["sglang-router.json"] = router_document(router)
    return made


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", type=Path, metavar="DIR", help="unpacked wheel of sglang")
    parser.add_argument("--router", type=Path, metavar="DIR", help="unpacked wheel of sglang-router")
    parser.add_argument("--check", action="store_true", help="compare with the recorded files, write nothing")
    options = parser.parse_args()
    different = []
    for name, text in documents(options.sglang, options.router).items():
        path = FOLDER / name
        if path.read_text() == text:
            print(f"{name}: as recorded")
            continue
        different.append(name)
        if not options.check:
            partial = path.with_name(f".{name}.partial")
            partial.write_text(text)
            os.replace(partial, path)
            print(f"{name}: written")
    if options.check and different:
        print(f"differs from what is recorded: {', '.join(different)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
