"""Threads over independent pieces of work. Reading, writing, CRC-32 and the FP8 kernel all release the GIL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

PIECE = 2 << 20  # bytes in flight per thread: large enough for a disk, small enough for the cache
_buffers = threading.local()


def for_each(units: Iterable[T], work: Callable[[T], None], threads: int) -> None:
    """Run `work` on every unit. The first error, or Ctrl-C, cancels what has not begun and is raised."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, unit) for unit in units]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Later(Generic[T]):
    """The result of `make`, which begins now in a thread of its own. `get` waits for it and raises what it raised."""

    def __init__(self, make: Callable[[], T]):
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(make)
        self._pool.shutdown(wait=False)

    def get(self) -> T:
        return self._future.result()


def buffer(count: int, dtype: np.dtype | type, slot: str = "") -> np.ndarray:
    """`count` elements of scratch memory of this thread, good until it asks for the same `slot` again."""
    size = count * np.dtype(dtype).itemsize
    held = getattr(_buffers, f"slot_{slot}", None)
    if held is None or held.nbytes < size:
        held = np.empty(max(size, PIECE), np.uint8)
        setattr(_buffers, f"slot_{slot}", held)
    return held[:size].view(dtype)


def bands(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into ranges of at most PIECE bytes, at least one row each."""
    step = max(1, PIECE // max(1, row_bytes))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)
