"""docs/DIFFERENCES.md: complete, and true where the repository itself can tell."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import REPO, run
from tests.docs import pages
from tests.scripts.launch import GOLDEN
from tests.scripts.test_golden_slime import DROPPED

TEXT = (REPO / "docs" / "DIFFERENCES.md").read_text()
DIFFERENCES, CONFLICTS = pages.tables(TEXT)


def test_every_row_has_its_reasons():
    assert len(DIFFERENCES) > 35 and len(CONFLICTS) > 15
    for stage, original, why, here, evidence in DIFFERENCES[1:]:
        reasons = original and why and re.match(r"(run|read|computed)[:,] ", evidence)
        assert stage and here and (reasons or stage == "added")
    assert all(all(row) for row in CONFLICTS)


@pytest.mark.parametrize("file", ["differences.json", "differences_slime.json"])
def test_every_difference_of_the_golden_tests_is_named(file):
    named = {word for row in DIFFERENCES for span in pages.spans("\n".join(row)) for word in span.split()}
    assert {entry["flag"] for entry in json.loads((GOLDEN / file).read_text())} - named == set()


def test_every_variable_that_is_gone_is_named():
    assert set(DROPPED) - {span for row in DIFFERENCES for span in pages.spans("\n".join(row))} == set()


def test_evidence_names_a_line_of_a_known_source():
    """The sources are not here: only names can be checked, `d3a5456:path:line` or a path of an upstream."""
    cited = [span for span in pages.spans(TEXT) if re.search(r":\d+$", span) and "localhost" not in span]
    known = r"(d3a5456:[\w./-]+|(megatron|slime|transformer_engine)/[\w/.-]+\.py|train_async\.py)"
    assert len(cited) > 70
    assert [span for span in cited if not re.fullmatch(rf"{known}:\d+", span)] == []


def dry(script: str, *flags: str, **env: str) -> str:
    result = run("bash", REPO / "scripts" / script, *flags, "--dry-run", env=env, cwd=REPO)
    return result.stdout + result.stderr


def test_the_hyper_parameters_of_the_card_can_be_given():
    (row,) = (row for row in CONFLICTS if row[0].startswith("SFT 7B"))
    (flags,) = re.findall(r"`(--lr [^`]+)`", row[2])
    found = dry("SFT/InfiR2_SFT_FP8_7B_stage1.sh", *flags.split())
    assert "learning rate 2e-5" in dry("SFT/InfiR2_SFT_FP8_7B_stage1.sh") and "--weight-decay 0.05" in found
    assert found.rindex("--lr 1e-5") > found.index("--lr 2e-5")


def test_legal_tensor_parallel_sizes():
    for size, legal in (("7B", "124"), ("1.5B", "12")):
        for tp in "1248":
            said = dry(f"CPT/InfiR2_CPT_FP8_{size}.sh", TP=tp)
            assert ("error:" in said) == (tp not in legal), (size, tp, said)


def test_the_arithmetic_of_the_page():
    tokens = 128 * 32768
    assert f"{40000 * tokens / 1e9:.1f}B" == "167.8B" and f"{96875 * tokens / 1e9:.0f}B" == "406B"
    padded = -(-151665 // (128 * 2)) * 128 * 2
    assert padded == 151808 and 8960 // 4 % 128 != 0 and 10240 * 128 / 17500 > 70
    error = 448 * 2**-25  # half a step of float16 below 2^-14, relative to a scale of amax / 448
    assert round(100 * error / 0.02, 2) == 0.07 and round(100 * error / 0.001, 1) == 1.3
    assert round(error * 1e5, 1) == 1.3
    for number in ("167.8B", "(406B)", "151808", "0.07 %", "1.3 %", "1.3e-5", "more than 70"):
        assert number in TEXT
