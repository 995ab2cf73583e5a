# SPDX-License-Identifier: Apache-2.0
"""binary32 with Python's integers: what numpy's definitions are compared with. Nothing here is shared with hw.spec."""

from fractions import Fraction
from math import isqrt

import numpy as np

NAN, INFINITY = 0x7FC00000, 0x7F800000
EXTREMES = (
    0x00000000,  # zero
    0x00000001,  # smallest subnormal
    0x00400000,
    0x007FFFFF,  # largest subnormal
    0x00800000,  # smallest normal
    0x00800001,
    0x00FFFFFF,
    0x01000000,
    0x0C000000,  # its square is far below the smallest normal
    0x1FFFFFFF,  # its square is just below it
    0x20000000,  # its square is the smallest normal
    0x33800000,  # 2**-24
    0x34000000,  # 2**-23
    0x3F000000,
    0x3F7FFFFF,  # below one
    0x3F800000,
    0x3F800001,
    0x3FFFFFFF,
    0x40490FDB,
    0x4B7FFFFF,  # odd integer of 24 bits
    0x4B800000,  # 2**24
    0x4B800001,
    0x5F7FFFFF,  # the largest whose square is finite
    0x5F800000,
    0x7E800000,
    0x7EFFFFFF,
    0x7F000000,
    0x7F7FFFFE,
    0x7F7FFFFF,  # largest
    0x7F800000,  # infinity
    0x7F800001,  # NaNs
    0x7FC00000,
    0x7FFFFFFF,
)
"""Bits of positive numbers. Use them with both signs."""


def extremes() -> np.ndarray:
    """:data:`EXTREMES` of both signs: uint32."""
    bits = np.array(EXTREMES, np.uint32)
    return np.concatenate([bits, bits | np.uint32(1 << 31)])


def floats(bits) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def array(*values) -> np.ndarray:
    """float32 numbers, or rows of them."""
    return np.array(values, np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    assert values.dtype == np.float32
    return values.view(np.uint32)


def parts(number: int) -> tuple[int, int, int]:
    """Sign, significand and exponent of its lowest bit, of the bits of a finite number; subnormal ones are zero."""
    sign, field, fraction = number >> 31, number >> 23 & 255, number & 0x7FFFFF
    return (sign, 0, 0) if field == 0 else (sign, fraction | 1 << 23, field - 150)


def is_nan(number: int) -> bool:
    return number & 0x7FFFFFFF > INFINITY


def is_infinite(number: int) -> bool:
    return number & 0x7FFFFFFF == INFINITY


def nearest(sign: int, magnitude: int, exponent: int) -> int:
    """Bits of ``magnitude * 2**exponent`` to 24 bits, half to even; below 2**-126 zero, too large infinite."""
    cut = magnitude.bit_length() - 24
    if cut > 0:
        kept, rest = divmod(magnitude, 1 << cut)
        kept += 2 * rest > 1 << cut or (2 * rest == 1 << cut and kept % 2 == 1)
        magnitude, exponent = kept, exponent + cut
    top = magnitude.bit_length() - 1 + exponent
    if magnitude == 0 or top < -126:
        return sign << 31
    if top > 127:
        return sign << 31 | INFINITY
    shift = 24 - magnitude.bit_length()
    significand = magnitude << shift if shift >= 0 else magnitude >> -shift
    return sign << 31 | (top + 127) << 23 | significand & 0x7FFFFF


def mul(a: int, b: int) -> int:
    sign = (a ^ b) >> 31
    if is_nan(a) or is_nan(b):
        return NAN
    if is_infinite(a) or is_infinite(b):
        other = b if is_infinite(a) else a
        return NAN if not is_infinite(other) and parts(other)[1] == 0 else sign << 31 | INFINITY
    (_, x, e), (_, y, f) = parts(a), parts(b)
    return nearest(sign, x * y, e + f)


def add(a: int, b: int) -> int:
    if is_nan(a) or is_nan(b):
        return NAN
    if is_infinite(a) or is_infinite(b):
        if is_infinite(a) and is_infinite(b):
            return a if a == b else NAN
        return a if is_infinite(a) else b
    (s, x, e), (t, y, f) = parts(a), parts(b)
    low = min(e, f)
    total = (-x if s else x) * (1 << (e - low)) + (-y if t else y) * (1 << (f - low))
    if total == 0:
        return (1 << 31) if s and t else 0
    return nearest(int(total < 0), abs(total), low)


def nearest_quotient(sign: int, numerator: int, denominator: int, exponent: int) -> int:
    """Bits of ``numerator / denominator * 2**exponent``, both positive."""
    shift = max(0, denominator.bit_length() - numerator.bit_length() + 40)
    quotient, rest = divmod(numerator << shift, denominator)
    # One more bit says whether something is left, which is all that rounding has to know.
    return nearest(sign, 2 * quotient + (rest > 0), exponent - shift - 1)


def reciprocal(number: int) -> int:
    sign, x, e = parts(number) if not is_infinite(number) else (number >> 31, 0, 0)
    if is_nan(number):
        return NAN
    if is_infinite(number):
        return sign << 31
    return sign << 31 | INFINITY if x == 0 else nearest_quotient(sign, 1, x, -e)


def rsqrt(number: int) -> int:
    if is_nan(number):
        return NAN
    if not is_infinite(number) and parts(number)[1] == 0:
        return number & (1 << 31) | INFINITY
    if number >> 31:
        return NAN
    if is_infinite(number):
        return 0
    _, x, e = parts(number)
    if e % 2:
        x, e = 2 * x, e - 1
    square = (1 << 140) // x
    root = isqrt(square)
    return nearest(0, 2 * root + 1, -70 - e // 2 - 1)


def value(number: int) -> Fraction:
    """The exact value of a finite number."""
    sign, x, e = parts(number)
    return Fraction(-x if sign else x) * Fraction(2) ** e
