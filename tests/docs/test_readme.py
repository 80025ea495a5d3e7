"""The README: the same in both languages, true to CITATION.cff, to the paper's table and to the tree."""

from __future__ import annotations

import re

import yaml

from docs import pipeline
from eval.paper import BENCHMARKS, PAPER
from tests.conftest import REPO
from tests.docs import pages

ENGLISH, CHINESE = ((REPO / name).read_text() for name in ("README.md", "README.zh-CN.md"))


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def test_both_languages_have_the_same_commands():
    assert list(pages.commands(CHINESE)) == list(pages.commands(ENGLISH)) != []
    assert [b.language for b in pages.blocks(CHINESE)] == [b.language for b in pages.blocks(ENGLISH)]


def test_both_languages_have_the_same_structure():
    assert [level for level, _ in pages.headings(CHINESE)] == [level for level, _ in pages.headings(ENGLISH)]
    assert sorted(pages.spans(CHINESE)) == sorted(pages.spans(ENGLISH))
    here = {"README.md": "README.zh-CN.md", "README.zh-CN.md": "README.md"}
    assert sorted(here.get(link, link) for link in pages.links(CHINESE)) == sorted(pages.links(ENGLISH))
    assert CHINESE.count("\n- ") == ENGLISH.count("\n- ")


def test_both_languages_have_the_same_numbers():
    for ours, theirs in zip(pages.tables(CHINESE), pages.tables(ENGLISH), strict=True):
        assert [[numbers(cell) for cell in row] for row in ours] == [[numbers(cell) for cell in row] for row in theirs]
    # "two cores" and "20 minutes" change places between the languages
    assert sorted(numbers(pages.prose(CHINESE))) == sorted(numbers(pages.prose(ENGLISH)))


def test_the_layout_is_that_of_the_tree():
    for text in (ENGLISH, CHINESE):
        (layout,) = (block.text for block in pages.blocks(text) if block.language == "text")
        folder, seen = "", []
        for line in layout.splitlines():
            names = re.split(r" {2,}", line.strip())[0].split()
            seen += [name if line[0] != " " else f"{folder}{name}" for name in names]
            folder = folder if line[0] == " " else names[0]
        assert len(seen) > 15
        for name in seen:
            assert (REPO / name).exists() and (REPO / name).is_dir() == name.endswith("/"), name


def test_the_citation_is_that_of_citation_cff():
    for text in (ENGLISH, CHINESE):
        (bibtex,) = (block.text for block in pages.blocks(text) if block.language == "bibtex")
        entry = dict(re.findall(r"(\w+)=\{(.*)\}", bibtex))
        paper = yaml.safe_load((REPO / "CITATION.cff").read_text())["preferred-citation"]
        assert entry["title"] == paper["title"] and entry["year"] == str(paper["year"])
        assert entry["author"].split(" and ") == [f"{a['given-names']} {a['family-names']}" for a in paper["authors"]]
        assert [f"arXiv:{entry['eprint']}"] == [identifier["value"] for identifier in paper["identifiers"]]
        assert entry["url"] == paper["url"]


def test_the_results_are_those_of_the_summary():
    shown = {table[0][0]: table for table in pages.tables(ENGLISH) if table[0][0] in PAPER}
    assert shown.keys() == PAPER.keys()
    for size, models in PAPER.items():
        assert shown[size][0][1:] == list(BENCHMARKS.values())
        rows = {row[0]: [float(cell) for cell in row[1:]] for row in shown[size][1:]}
        assert rows == {model: list(scores.values()) for model, scores in models.items()}


def test_the_benchmarks_are_those_of_the_scripts():
    (table,) = (table for table in pages.tables(ENGLISH) if table[0][0] == "benchmark")
    assert len(table) == 1 + len(list((REPO / "eval").glob("*_eval.sh")))
    for _, script, tokens, samples, temperature in table[1:]:
        text = (REPO / script.strip("`")).read_text()
        assert f"MAX_NEW_TOKENS:={tokens.replace(',', '')}}}" in text and f"GENERATED_NUM:={samples}}}" in text
        assert f"TEMPERATURE:={temperature}}}" in (REPO / "eval" / "run.sh").read_text()


def test_the_efficiency_table_adds_up():
    """The published ratios come from numbers that are not rounded: 461 / 409 is 1.127, and 1.14 was published."""
    (table,) = (table for table in pages.tables(ENGLISH) if "TFLOPS" in str(table))
    for (_, low, *bf16), (_, high, *fp8) in zip(table[1::2], table[2::2], strict=True):
        assert (low, high) == ("BF16", "FP8")
        for row in (bf16, fp8):
            forward, backward, total = (float(cell.split()[0]) for cell in row[:3])
            assert forward + backward == total
        for column in (2, 4, 6):
            ratio = float(fp8[column].split()[0]) / float(bf16[column].split()[0])
            assert abs(ratio - float(fp8[column + 1])) < 0.015


def test_the_picture_is_that_of_its_description():
    folder = REPO / "docs"
    drawn = pipeline.draw((folder / "pipeline.txt").read_text("utf-8"))
    assert (folder / "pipeline.svg").read_text("utf-8") == drawn, "run: python docs/pipeline.py"
    assert "<title id=" in drawn and "<desc id=" in drawn
