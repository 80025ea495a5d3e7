"""Threads: the first error is raised, what has not begun is dropped, buffers are each thread's own."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.checkpoint.parallel import PIECE, Later, bands, buffer, for_each


def test_every_unit_is_worked_on_once():
    seen: list[int] = []
    for_each(range(200), seen.append, 4)
    assert sorted(seen) == list(range(200))


def test_the_first_error_is_raised_and_cancels_the_rest():
    seen: list[int] = []

    def work(unit: int) -> None:
        seen.append(unit)
        if unit == 3:
            raise ValueError("the third")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="the third"):
        for_each(range(5000), work, 2)
    assert len(seen) < 5000


def test_later_waits_and_raises():
    gate = threading.Event()
    late = Later(lambda: gate.wait(10) and "made")
    assert not gate.is_set()
    gate.set()
    assert late.get() == late.get() == "made"

    def fail() -> None:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        Later(fail).get()


def test_buffers_belong_to_a_thread_and_a_slot():
    mine = buffer(10, np.uint16)
    mine[:] = 7
    other = buffer(10, np.uint16, "other")
    other[:] = 1
    thread = threading.Thread(target=lambda: buffer(10, np.uint16).fill(9))
    thread.start()
    thread.join()
    assert (mine == 7).all() and (buffer(10, np.uint16) == 7).all()
    assert buffer(PIECE + 1, np.uint8).nbytes == PIECE + 1


@given(start=st.integers(0, 10**6), count=st.integers(0, 5000), width=st.integers(0, 3 * PIECE))
def test_bands_cover_the_rows_in_order(start, count, width):
    found = list(bands(start, start + count, width))
    assert [row for first, last in found for row in (first, last)][1:-1:2] == [first for first, _ in found[1:]]
    if count:
        assert found[0][0] == start and found[-1][1] == start + count
    assert all((last - first) * width <= PIECE or last - first == 1 for first, last in found)
