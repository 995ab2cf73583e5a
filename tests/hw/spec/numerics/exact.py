# SPDX-License-Identifier: Apache-2.0
"""binary32 with Python's integers, to check the definitions in numpy. It shares no code with hw.spec."""

from fractions import Fraction
from math import isqrt

import numpy as np

NAN, INFINITY = 0x7FC00000, 0x7F800000


def array(*values) -> np.ndarray:
    """float32 numbers, or rows of them."""
    return np.array(values, np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    assert values.dtype == np.float32
    return values.view(np.uint32)


def parts(number: int) -> tuple[int, int, int]:
    """Sign, significand and exponent of the lowest bit, from the bits of a finite number. Subnormals are zero."""
    sign, field, fraction = number >> 31, number >> 23 & 255, number & 0x7FFFFF
    return (sign, 0, 0) if field == 0 else (sign, fraction | 1 << 23, field - 150)


def is_nan(number: int) -> bool:
    return number & 0x7FFFFFFF > INFINITY


def is_infinite(number: int) -> bool:
    return number & 0x7FFFFFFF == INFINITY


def nearest(sign: int, magnitude: int, exponent: int) -> int:
    """Bits of ``magnitude * 2**exponent`` rounded to 24 bits, half to even; zero below 2**-126, or infinity."""
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
    # One more bit says whether there is a remainder. Rounding needs no more than that.
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
