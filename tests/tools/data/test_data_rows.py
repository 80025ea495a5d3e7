"""What a row is: the same for every file format, and as pandas reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.tools.data.samples import TEXTS, chat, jsonl, write
from tools.data import DataError, rows
from tools.data.rows import Source

ALL = (".jsonl", ".parquet", ".json")
ROWS = st.lists(
    st.fixed_dictionaries({"text": TEXTS, "number": st.integers(-(2**63), 2**63 - 1), "list": st.lists(TEXTS)}),
    max_size=9,
)


def read(path: Path) -> list:
    return [row for _, row in Source(path, suffixes=ALL)]


def error(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


@settings(max_examples=60, deadline=None)
@given(written=ROWS.filter(bool))
def test_jsonl_parquet_and_a_json_list_give_the_same_rows(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("it's rows")
    assert read(write(folder / "a.jsonl", written)) == written
    assert read(write(folder / "a.parquet", written)) == written
    (folder / "a.json").write_text(json.dumps(written), "utf-8")
    assert read(folder / "a.json") == written


@settings(max_examples=60, deadline=None)
@given(written=ROWS, chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_a_json_list_may_be_cut_anywhere_while_it_is_read(tmp_path_factory, written, chunk, indent, ascii):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(written, indent=indent, ensure_ascii=ascii), "utf-8")
    before = rows._CHUNK
    rows._CHUNK = chunk
    try:
        assert read(path) == written
    finally:
        rows._CHUNK = before


@pytest.mark.parametrize(
    ("content", "expected"),  # pandas 2.3.3 read_json(lines=True) gives the same rows
    [
        ('{"a":1}\n\n \t \n{"a":2}', [(1, {"a": 1}), (4, {"a": 2})]),
        ('{"a":1}\r\n{"a":2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"a":"x\u2028y\u0085z\tw"}\n', [(1, {"a": "x\u2028y\u0085z\tw"})]),
        ('{"a":18446744073709551615,"b":-9223372036854775808}', [(1, {"a": 2**64 - 1, "b": -(2**63)})]),
        ('{"a":Infinity}', [(1, {"a": float("inf")})]),
        ("", []),
    ],
)
def test_lines_as_pandas_takes_them(tmp_path, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode())
    assert list(Source(path)) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a":1}\n{"a": "\xff"}\n', ":2: expected a JSON object, found the byte 0xff at byte 8, which is no UTF-8"),
        (b'{"a":1}\n{"a": [1, 2', ":2: expected a JSON object, found '{\"a\": [1, 2' (Expecting ',' delimiter at char"),
        (b"[1]\n", ":1: expected a JSON object, found a list"),
        (b"\n3\n", ":2: expected a JSON object, found 3"),
        (b'"a"\n', ":1: expected a JSON object, found 'a'"),
        (b'{"a":1,"b":2,"a":3}\n', ":1: expected a JSON object, found the key 'a' twice in one object"),
        (b'{"m":[{"role":1,"role":2}]}\n', ":1: expected a JSON object, found the key 'role' twice in one object"),
        (b'{"a":1},{"a":2}\n', ':1: expected a JSON object, found \'{"a":1},{"a":2}\' (Extra data at character 8)'),
        (b'{"a":1,}\n', ":1: expected a JSON object, found"),
        (b'{"a":1}\r{"a":2}\n', ":1: expected a JSON object, found"),
        (b'\xef\xbb\xbf{"a":1}\n', ":1: expected a JSON object, found a byte order mark, which pandas refuses"),
        (b'{"a":18446744073709551616}\n', ":1: expected a JSON object, found an integer beyond 64 bits"),
        (b'{"a":-9223372036854775809}\n', ":1: expected a JSON object, found an integer beyond 64 bits"),
        (b'{"a":' + b"[" * 100_000 + b"\n", ":1: expected a JSON object, found one nested too deep"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, says):
    path = tmp_path / "it's a.jsonl"
    path.write_bytes(content)
    text = error(path)
    assert text.startswith(says)
    assert ("cut off?" in text) == (not content.endswith(b"\n"))


def test_reading_goes_on_after_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\nx\n{"a":2}\n\xff\n{"a":3}')
    parsed = list(Source(path).parsed())
    assert [(number, row) for number, row, problem in parsed if not problem] == [
        (1, {"a": 1}),
        (3, {"a": 2}),
        (5, {"a": 3}),
    ]
    assert [number for number, _, problem in parsed if problem] == [2, 4]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ": expected a JSON list, found its end after 0 items: cut off?"),
        (b'{"a":1}', ": item 1: expected [ of a JSON list, found '{\"a\":1}'"),
        (b'[{"a":1},', ": expected a JSON list, found its end after 1 items: cut off?"),
        (b'[{"a":1}', ": expected a JSON list, found its end after 1 items: cut off?"),
        (b'[{"a":1', ": item 1: expected a JSON object, found"),
        (b'[{"a":1}{"a":2}]', ": item 2: expected , or ] of a JSON list, found"),
        (b'[{"a":1},]', ": item 2: expected an object of a JSON list, found ']'"),
        (b"[1]", ": item 1: expected an object or ] of a JSON list, found '1]'"),
        (b'[{"a":1}] x', ": expected one JSON list, found more after it"),
        (b'[{"a":"\xff"}]   ', ": item 1: expected a JSON object, found the byte 0xff, which is no UTF-8"),
        (b'[{"a":1,"a":2}]', ": item 1: expected a JSON object, found the key 'a' twice"),
    ],
)
def test_a_bad_list_is_named(tmp_path, content, says):
    path = tmp_path / "it's a.json"
    path.write_bytes(content)
    assert error(path).startswith(says)


def test_a_line_of_any_length_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 20)
    path = jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": "x" * 30}])
    assert error(path) == ":2: expected a line of at most 20 bytes, found a longer one"


def test_what_is_no_data_file(tmp_path):
    for name, says in {
        "absent.jsonl": ": No such file or directory",
        "a.txt": ": expected a file whose name ends in .jsonl or .parquet",
        "a.json": ": expected a file whose name ends in .jsonl or .parquet",
        "": ": expected a .jsonl or .parquet file, found a directory",
    }.items():
        with pytest.raises(DataError) as caught:
            Source(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}{says}"


def test_a_file_that_changes_meanwhile(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [chat(0), chat(1)])
    source = Source(path)
    reading = iter(source)
    next(reading)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        list(reading)


# ---------------------------------------------------------------- parquet


def test_progress_ends_at_the_size(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        source = Source(write(tmp_path / name, [chat(index) for index in range(700)]))
        positions = [source.position for _ in source]
        assert positions == sorted(positions) and source.position == source.size


def test_only_the_columns_that_are_asked_for(tmp_path):
    path = write(tmp_path / "a.parquet", [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    assert [row for _, row, _ in Source(path).parsed(("b", "c"))] == [{"b": 2}, {"b": 4}]
    assert [row for _, row, _ in Source(path).parsed(("c",))] == [{}, {}]


def test_a_damaged_parquet_file(tmp_path):
    path = write(tmp_path / "it's a.parquet", [{"a": "text" * 100}] * 50)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"x" + whole[1:-4] + b"PAR2"):
        path.write_bytes(damaged)
        assert error(path).startswith(": cannot be read as .parquet (")


def test_a_row_that_is_no_utf8(tmp_path):
    text = pa.array([b"fine", b"\xffbad", b"fine"], pa.binary()).cast(pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    assert error(tmp_path / "a.parquet") == ": row 2: expected UTF-8, found the byte 0xff"
