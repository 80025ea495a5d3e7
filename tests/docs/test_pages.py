"""What every document says: its links, the files and flags that it names, the languages of its code blocks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.conftest import REPO
from tests.docs import flags, pages

NAMES = [str(page.relative_to(REPO)) for page in pages.PAGES]
every_page = pytest.mark.parametrize("name", NAMES)

FILES = pages.files()
TOP = {path.relative_to(REPO).parts[0] for path in FILES}
SUBMODULES = re.findall(r"path = (\S+)", (REPO / ".gitmodules").read_text())
# What looks like a file of this repository: a program of slime, a metric, what a program writes.
SLIME = {"docker/patch/latest/megatron.patch", "docker/patch/latest/sglang.patch", "docker/patch"}  # the original's too
ELSEWHERE = {"train_async.py", "eval/aime", "summary.md", "report.md", "eval/NAME_eval.sh", *SLIME}

# The first words of commands: a block that begins a line with one of them is a bash block, and says so.
COMMANDS = r"\$|(\w+=\S* )*(bash|sh|python3?|git|docker|sbatch|srun|pip|ray|torchrun|cd|export|tail|\.venv/bin/\w+)"


# ------------------------------------------------------------------------------------------- links


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links and anchors that lead nowhere."""
    broken = []
    for target in pages.links(text):
        path, _, anchor = unquote(target).partition("#")
        if re.match(r"https?://|mailto:", target):
            continue
        found = page.parent / path
        if not found.exists() or (anchor and anchor not in pages.anchors(found.read_text() if path else text)):
            broken.append(target)
    return broken


@every_page
def test_links_lead_somewhere(name):
    assert broken_links(REPO / name, (REPO / name).read_text()) == []


def test_broken_links_are_found():
    text = """# One [thing](LICENSE), `two` & three
## Same
## Same
[a](#one-thing-two--three) [b](#same-1) [c](docs/CPT.md#decay "title") ![d](docs/pipeline.svg) [e](https://x.org/#y)
[f](nowhere.md) [g](#same-2) [h](docs/CPT.md#nowhere) <img src="no.png">
`[not](a-link)` <!-- [nor](this) -->
```text
[nor](that)
```
"""
    assert broken_links(REPO / "README.md", text) == ["nowhere.md", "#same-2", "docs/CPT.md#nowhere", "no.png"]


# ------------------------------------------------------------------------------------- code blocks


def misnamed_blocks(text: str) -> list[int]:
    """Lines of the fences without a language, or with another one than bash around commands."""
    return [
        block.line
        for block in pages.blocks(text)
        if not block.language or (block.language != "bash" and re.search(rf"^({COMMANDS}) ", block.text, re.MULTILINE))
    ]


@every_page
def test_code_blocks_name_their_language(name):
    assert misnamed_blocks((REPO / name).read_text()) == []


def test_bash_in_disguise_is_found():
    text = "```bash\ngit x\n```\n```text\nA=1 bash x.sh\n```\n```\nx\n```\n```text\nsome git\n```\n"
    assert misnamed_blocks(f"{text}````text\n$ ls\n````\n") == [4, 7, 13]


# ------------------------------------------------------------------------------------------- files


def expanded(word: str) -> list[str]:
    """a{1,2}b as a1b and a2b."""
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", word)
    choices = [part.split(",") if n % 2 else [part] for n, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def missing_files(text: str) -> list[str]:
    """Words of code spans that look like files of this repository, and are none."""
    words = [word for span in pages.spans(text) for word in span.split()]
    missing = []
    for word in itertools.chain.from_iterable(expanded(re.sub(r"[:,;]?(\d+(-\d+)?)?$", "", word)) for word in words):
        upstream = any(word.startswith(f"{path}/") for path in SUBMODULES)
        if upstream or word in ELSEWHERE or re.search(r"[<>()=$|\"']|\.\.\.", word):
            continue
        if "/" in word.rstrip("/"):
            if word.partition("/")[0] in TOP and not list(REPO.glob(word)):
                missing.append(word)
        elif re.fullmatch(r"[\w.*-]+\.(sh|py|md)", word):
            if not any(path.match(f"*{word}") for path in FILES):  # tables leave out what their recipes share
                missing.append(word)
    return missing


@every_page
def test_files_exist(name):
    assert missing_files((REPO / name).read_text()) == []


def test_missing_files_are_found():
    text = """`tools/bf16_cast_fp8.py:12` `eval/*_eval.sh` `recipe.sh` `docs/` `InfiR2_RL_FP8_tiny_stage{1,2}.sh`
`megatron/training/arguments.py:1` `exp/run/x.sh` `training/slime/train.py` `bash scripts/test.sh -k x` `A=b/c.sh`
`tools/nothing.py` `eval/*_none.sh` `InfiR2_RL_FP8_tiny_stage{2,3}.sh` `bash scripts/tests.sh` `nothing.md`
"""
    missing = ["tools/nothing.py", "eval/*_none.sh", "InfiR2_RL_FP8_tiny_stage3.sh", "scripts/tests.sh", "nothing.md"]
    assert missing_files(text) == missing


# ------------------------------------------------------------------------------------------- flags


def unknown_flags(name: str, text: str) -> list[str]:
    """Flags that no program has, but for those that the page names for that reason."""
    absent = flags.ABSENT.get(name, [])
    return [flag for line in flags.of_page(text) for flag in flags.unknown(line) if flag not in absent]


@every_page
def test_flags_exist(name):
    assert unknown_flags(name, (REPO / name).read_text()) == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`--lr-wsd-decay-iters`, `--rollout-temperature`, `--tp-size`, `--worker-urls`", []),
        ("`--lr-wsd-decay-itters`, `--rollout-temprature`", ["--lr-wsd-decay-itters", "--rollout-temprature"]),
        ("| `--force-pow-2-scale` | `--force-pow2-scale` |", ["--force-pow2-scale"]),
        ("```bash\npython tools/bf16_cast_fp8.py \\\n  --check-tp 2 \\\n  --check_tp 2\n```", ["--check_tp"]),
        # a flag of another program
        ("```bash\npython tools/bf16_cast_fp8.py --chunk-size 1\n```", ["--chunk-size"]),
        ("`bash scripts/CPT/InfiR2_CPT_FP8_7B.sh --from-scratch --lr 1 --num-rollout 1`", ["--num-rollout"]),
        ("`bash scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh --rollout-batch-size 1 --from-scratch`", ["--from-scratch"]),
        ("`bash scripts/SFT/prepare_data.sh --input a --prompt-key b --promptkey c`", ["--promptkey"]),
        # a program of others, named and not
        ("`sbatch --gres=gpu:4 --gers=gpu:4 eval/gpqa_eval.sh`", ["--gers"]),
        ("`--gres=gpu:4`", ["--gres"]),
        ("a sentence with --no-such-flag and -- a dash, a--b, <!-- and a comment -->", ["--no-such-flag"]),
    ],
)
def test_misspelt_flags_are_found(text, unknown):
    assert unknown_flags("README.md", text) == unknown
