"""Output appears whole or not at all, and what is there is never replaced."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.tools.data.samples import assistant, chat, conversations, question, user
from tools.data import DataError
from tools.data.rows import Source
from tools.data.writer import whole, write_rows

SUFFIXES = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])


@settings(max_examples=20, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=5), st.sampled_from(["jsonl", "parquet"]))
def test_round_trip(tmp_path_factory, chats, suffix):
    path = tmp_path_factory.mktemp("it's out") / f"a.{suffix}"
    rows = [{"messages": messages} for messages in chats]
    assert write_rows(rows, path, "messages") is True
    found = [row for _, row in Source(path)]
    if suffix == "parquet":  # 1 is what no step_loss_mask means; a null would mean 0
        assert all(message.pop("step_loss_mask") == 1 for row in found for message in row["messages"])
    assert found == rows
    assert write_rows(rows, path, "messages") is False


def test_masks_and_labels_in_parquet(tmp_path):
    masked = {"messages": [user("q"), assistant("a", step_loss_mask=0), user("r"), assistant("b")]}
    write_rows([masked], tmp_path / "a.parquet", "messages")
    ((_, row),) = Source(tmp_path / "a.parquet")
    assert [message["step_loss_mask"] for message in row["messages"]] == [1, 0, 1, 1]
    write_rows([question(1)], tmp_path / "b.parquet", "prompt")
    assert [row for _, row in Source(tmp_path / "b.parquet")] == [question(1)]


def broken(rows: list) -> Iterator[dict]:
    yield from rows
    raise DataError("broken")


@SUFFIXES
def test_nothing_is_left_of_what_fails(tmp_path, suffix):
    for path in (tmp_path / f"a.{suffix}", tmp_path / "new" / "folder" / f"a.{suffix}"):
        with pytest.raises(DataError, match="broken"):
            write_rows(broken([chat(0)] * 2000), path, "messages")
        assert list(tmp_path.iterdir()) == []


@SUFFIXES
def test_another_output_is_refused_and_stays(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_rows([chat(0), chat(1)], path, "messages")
    before = path.read_bytes()
    for rows in ([chat(0)], [chat(0), chat(2)], [chat(0), chat(1), chat(2)]):
        with pytest.raises(DataError, match="exists and holds something else; remove it, or choose another --output"):
            write_rows(rows, path, "messages")
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="exists and holds something else"):
        write_rows([chat(0)], path, "messages")
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="exists and holds something else"):
        write_rows([chat(0)], path, "messages")


def test_a_parquet_file_of_another_writer_with_the_same_rows_is_the_same(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [question(index) for index in range(2500)]
    write_rows(rows, path, "prompt")
    table = parquet.read_table(path)
    parquet.write_table(table, path, compression="gzip", row_group_size=1000)
    assert write_rows(rows, path, "prompt") is False


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    (tmp_path / ".a.jsonl.partial").write_text("half a row and more than what will be written " * 99)
    write_rows([chat(0)], tmp_path / "a.jsonl", "messages")
    assert [row for _, row in Source(tmp_path / "a.jsonl")] == [chat(0)]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


def test_two_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    with whole(path) as file:
        with pytest.raises(DataError, match="a.jsonl: another process is writing it"):
            write_rows([chat(0)], path, "messages")
        file.write(b"mine")
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def test_the_file_system_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: File exists"):
        write_rows([chat(0)], tmp_path / "file" / "a.jsonl", "messages")
    (tmp_path / ".a.jsonl.partial").mkdir()
    with pytest.raises(DataError, match="partial: Is a directory"), whole(tmp_path / "a.jsonl"):
        pass


def test_a_lock_that_came_with_a_rename_is_noticed(tmp_path, monkeypatch):
    """Between opening and locking, the other writer may have given the file its name."""
    path, real = tmp_path / "a.jsonl", fcntl.flock

    def late(file, how) -> None:
        os.replace(file.name, path)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="another process has just written it"), whole(path):
        pass
    assert path.exists()
