"""The quickstart's report: its numbers are those of the files; its page fits a phone and runs nothing."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests import browser
from tests.conftest import REPO, ok, run
from tests.training.embedded import quickstart_run
from training.embedded.quickstart import md, page

REPORT = REPO / "training" / "embedded" / "quickstart" / "report.py"
HOSTILE = (
    "FP8 rounding: <script>document.title = 'taken'</script><img src=http://127.0.0.1:9/a.png> | ![b](http://127.0.0.1:9/c)"
    " [d](javascript:document.title='taken') `e` <!-- f"
)


def report(folder: Path) -> tuple[str, str]:
    """Make it; its Markdown and its page."""
    ok(run(sys.executable, REPORT, "--quickstart", folder, "--output", folder / "report.html"))
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with a report; its name has what shells, Markdown and HTML take for their own."""
    folder = quickstart_run.build(tmp_path_factory.mktemp("report") / ("it's <b> `a` & *run*" + "long" * 15))
    report(folder)
    return folder


@pytest.fixture
def fresh(tmp_path) -> Path:
    return quickstart_run.build(tmp_path / "run")


# ---------------------------------------------------------------- numbers


def test_the_numbers_are_those_of_the_files(made):
    text = (made / "report.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .+ \| (\d+\.\d%)\s.*\|$", text, re.MULTILINE)
    assert [value for _, value in rows[:7]] == [f"{value:.1%}" for value in quickstart_run.SAMPLED.values()]
    assert [title for title, _ in rows[:7] if "FP8" in title] == ["SFT stage 2, cast to FP8"]
    assert "60 iterations" in text and "| pre-training, held-out loss | 2.5000 | 2.4750 | -1.00%, one pair |" in text
    assert "sampled accuracy by +39.0 points; the intervals of its start and its end do not overlap" in text
    assert "| 1 | 25 | 57.2% to 81.2% | 1.0 to 1.0 | 1.0006 | 2.0e-05 | 1.0000 |" in text
    assert "| arithmetic | 85.00 |" in text and quickstart_run.ROUNDING in text
    assert (made / "report.png").read_bytes().startswith(b"\x89PNG") and "(report.png)" in text
    assert (made / "report_fine_tuning.png").read_bytes().startswith(b"\x89PNG") and "(report_fine_tuning.png)" in text
    assert not list(made.glob(".*partial*"))


def test_what_it_says_of_the_data_is_what_the_quickstart_reads(made):
    """The blend stands in the command to go on with, and in words."""
    blend = r"--data-path (\S+) .+text_text_document\S* (\S+) .+sums_text_document"
    plan = ok(run("bash", REPO / "scripts" / "quickstart.sh", "--only", "cpt_fp8", "--dry-run")).stdout
    text = (made / "report.md").read_text()
    assert re.findall(blend, text) == re.findall(blend, plan) == [("0.2", "0.8")] and "Four fifths" in text


def test_the_head_says_what_came_out(made):
    head = (made / "report.md").read_text().split("\n## ")[0]
    said = [line for line in head.splitlines() if line.startswith("- ")]
    assert len(said) == 2
    assert "0.0% after pre-training, 48.2% after SFT, 87.4% after RL" in said[0]
    assert "loss -1.00% in pre-training, one pair of runs; accuracy after RL -3.0 points, inside noise" in said[1]


@pytest.mark.parametrize(
    ("difference", "low", "high", "said"),
    [
        (-3.0, -10.0, 3.5, "-3.0 points (-10.0 to +3.5), inside noise"),
        (-9.0, -14.0, -4.0, "-9.0 points (-14.0 to -4.0), a difference"),
        (0.0, None, None, "+0.0 points, inside noise"),  # all questions have equal scores
    ],
)
def test_verdicts(fresh, difference, low, high, said):
    quickstart_run.evaluation(fresh, difference, low, high)
    assert f"| {said} |" in report(fresh)[0].replace("\u00a0", " ")


def test_where_the_numbers_come_from(made):
    text = (made / "report.md").read_text()
    assert f"git checkout 0123456789ab\nOUT_DIR=exp/repeat {quickstart_run.COMMAND}\n```" in text
    assert "| cpt_fp8 | 2:21 |" in text and "| together | 2:27 |" in text  # both attempts
    assert f"CPython {sys.version.split()[0]}" in text and "torch 2" in text and "megatron-core 0.14.0" in text
    assert "3,674,368 parameters, on cpu" in text and f"{os.cpu_count()} CPUs" in text


def test_a_run_under_several_commands(fresh):
    with (fresh / "stages.tsv").open("a") as file:
        file.write("accuracy\t9\tba9876543210-dirty\tSEED=7 bash scripts/quickstart.sh -- --lr 1\n")
    text = report(fresh)[0]
    assert "git checkout ba9876543210\nOUT_DIR=exp/repeat SEED=7 bash scripts/quickstart.sh -- --lr 1\n" in text
    assert "the last made: `accuracy`" in text and "differed from that commit" in text


def test_a_run_without_a_record(fresh):
    (fresh / "stages.tsv").unlink()
    text = report(fresh)[0]
    assert "not recorded" in text and "git checkout" not in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("accuracy/rl_stage2.json", None, "expected what this stage measured, found no such file"),
        ("evaluation/summary.md", None, "expected what this stage measured, found no such file"),
        ("stages.tsv", "cpt_fp8\tlong\n", "stages.tsv:1: expected stage, seconds, commit and command"),
    ],
)
def test_what_is_missing_is_named_and_nothing_written(fresh, file, content, message):
    (fresh / file).unlink()
    if content is not None:
        (fresh / file).write_text(content)
    result = run(sys.executable, REPORT, "--quickstart", fresh, "--output", fresh / "report.html")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert file.split("/")[-1] in result.stderr and message in result.stderr
    assert not list(fresh.glob("report*"))


# ---------------------------------------------------------------- text that stays text

PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")


def words(text: str) -> str:
    return " ".join(text.split())


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" `|*_<>[]()&\\~$")))
def test_plain_text_and_code_come_out_as_they_went_in(text):
    if not words(text):
        return
    cells = [f"x {md.plain(text)}", md.code(text)]
    _, _, plain, code = [token for token in PARSER.parse(md.table(["a", "b"], [cells])) if token.type == "inline"]
    assert "".join(child.content for child in plain.children) == f"x {words(text)}"
    assert [(child.type, child.content) for child in code.children] == [("code_inline", words(text))]


@given(st.lists(st.text(st.sampled_from("a`~ <$")), min_size=1))
def test_blocks_of_code_come_out_as_they_went_in(lines):
    (token,) = PARSER.parse(md.block(lines))
    assert (token.type, token.content) == ("fence", "\n".join(lines) + "\n")


# ---------------------------------------------------------------- the page


def test_the_page_is_one_small_file(made):
    text = (made / "report.html").read_text()
    assert len(text) < 500_000
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", text) + re.findall(r"url\(([^)]*)\)", text)
    assert addresses and all(address.startswith(("#", "data:,")) for address in addresses), addresses
    assert "<script" not in text and f'content="{page.POLICY}"' in text


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@browser.needed
def test_a_browser_shows_it(made, chromium):
    browser.check_page(chromium, made / "report.html", figures=6)
    with browser.opened(chromium, made / "report.html") as opened:
        shown = words(" ".join(opened.locator("table").all_inner_texts()))
        for file in (made / "accuracy").iterdir():
            for kind in ("greedy", "sampled"):
                assert f"{json.loads(file.read_text())[kind]['accuracy']:.1%} (" in shown
        assert str(made) in opened.locator("main").inner_text()
        assert opened.locator("h1 ~ ul").first.locator("li").count() == 2
        opened.emulate_media(media="print")
        assert opened.locator(".box").first.evaluate("box => getComputedStyle(box).overflowX") == "visible"


@browser.needed
def test_what_a_log_says_does_nothing(tmp_path, chromium):
    folder = quickstart_run.build(tmp_path / "run", rounding=HOSTILE)
    report(folder)
    browser.check_page(chromium, folder / "report.html", figures=6)
    with browser.opened(chromium, folder / "report.html") as opened:
        assert words(HOSTILE) in words(opened.locator("main").inner_text())
        assert opened.locator("img, a").count() == 0


@browser.needed
def test_the_policy_stops_what_gets_past(tmp_path, chromium):
    """Were HTML in the Markdown not shown as text, no script would run and nothing be fetched."""
    text = page.render("# A title\n\nHere.\n", {}).replace("Here.", HOSTILE)
    (tmp_path / "page.html").write_text(text)
    opened = chromium.new_page()
    refused: list[str] = []
    failed: list[str] = []
    opened.on("console", lambda message: refused.append(message.text))
    opened.on("requestfailed", lambda request: failed.append(str(request.failure)))
    opened.goto((tmp_path / "page.html").as_uri())
    assert opened.title() == "A title"
    assert len(refused) == 2 and all("Content Security Policy" in text for text in refused)
    assert all("csp" in text.lower() for text in failed)
