"""The CRC-32 of a concatenation, against zlib on the bytes themselves."""

from __future__ import annotations

import zlib
from functools import reduce

from hypothesis import given, settings
from hypothesis import strategies as st

from tools.checkpoint.crc import combine

CRC = st.integers(0, 2**32 - 1)


@settings(max_examples=200, deadline=None)
@given(first=st.binary(max_size=200), second=st.binary(max_size=200))
def test_two_parts(first, second):
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.binary(max_size=50), max_size=8))
def test_many_parts_from_the_left(parts):
    joined = reduce(lambda crc, part: combine(crc, zlib.crc32(part), len(part)), parts, 0)
    assert joined == zlib.crc32(b"".join(parts))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=100))
def test_an_empty_part_changes_nothing(data):
    crc, empty = zlib.crc32(data), zlib.crc32(b"")
    assert combine(crc, empty, 0) == crc == combine(empty, crc, len(data))


@settings(max_examples=15, deadline=None)
@given(first=st.binary(max_size=50), length=st.integers(0, 5 << 20), value=st.integers(0, 255))
def test_long_parts(first, length, value):
    second = bytes([value]) * length
    assert combine(zlib.crc32(first), zlib.crc32(second), length) == zlib.crc32(first + second)


def test_lengths_beyond_32_bits():
    """32 GiB of zeros: by doubling, whose last second part has 16 GiB, and in steps that zlib itself has checked."""
    step, running = 64 << 20, zlib.crc32(bytes(64 << 20))
    mebibyte = zlib.crc32(bytes(1 << 20))
    assert running == reduce(lambda crc, _: combine(crc, mebibyte, 1 << 20), range(64), 0)
    doubled, length = running, step
    while length < 32 << 30:
        doubled, length = combine(doubled, doubled, length), 2 * length
    assert doubled == reduce(lambda crc, _: combine(crc, running, step), range(512), 0)


@settings(max_examples=100, deadline=None)
@given(a=CRC, b=CRC, c=CRC, m=st.integers(0, 2**40), n=st.integers(0, 2**40))
def test_associative_at_any_length(a, b, c, m, n):
    assert combine(combine(a, b, m), c, n) == combine(a, combine(b, c, n), m + n)
