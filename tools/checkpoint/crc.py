"""CRC-32 of a concatenation, from the CRC-32 of its parts.

A CRC is the remainder of a polynomial over GF(2); appending n bytes multiplies it by x**(8n). So one pass over each
piece of a tensor serves two checks: that of the archive it comes from and that of the file it goes to. The arithmetic
is zlib's (crc32_combine_op in crc32.c of zlib 1.2.12), which Python's zlib module does not offer.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is the coefficient of x**0


def combine(first: int, second: int, second_length: int) -> int:
    """zlib.crc32(a + b) of first = zlib.crc32(a), second = zlib.crc32(b), second_length = len(b)."""
    return _multiply(_shift(second_length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """x**(8 * length) modulo the polynomial."""
    result, power, exponent = 1 << 31, 1 << 30, 8 * length  # 1 and x
    while exponent:
        if exponent & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        exponent >>= 1
    return result
