# SPDX-License-Identifier: Apache-2.0
"""Correctly rounded 1/x and 1/sqrt(x) as float32, defined by comparisons of integers.

Let y be the exact result, scaled by a power of two into (2**23, 2**24]. The significand is the one integer R with
``2R - 1 < 2y < 2R + 1``. A tie cannot occur: it needs an odd number above 1 that divides a power of two. Both sides are
compared as exact integers of up to 80 bits. numpy's float64 only proposes R, which is then at most 1 off, so the result
is the same on every machine. Hardware finds R one bit at a time with the same comparison, or corrects an estimate with
it.
"""

import numpy as np
from numpy.typing import ArrayLike

from hw.spec.numerics.float32 import NAN, SIGNIFICAND_BITS, flush
from hw.spec.numerics.linear import to_float32

INTEGER_BITS = 53
"""Bits of the largest integer that :func:`reciprocal_of_integer` takes."""


def rsqrt(x: ArrayLike) -> np.ndarray:
    """``1 / sqrt(x)``: float32 of any shape, correctly rounded.

    1/sqrt of a zero, or of a subnormal number, is infinity of its sign. That of +infinity is +0, that of a negative
    number is NaN. A finite result is always normal. Error: at most half a unit in the last place.
    """
    x = flush(x)
    usual = np.isfinite(x) & (x > 0)
    fraction, exponent = np.frexp(np.where(usual, x, np.float32(1)).astype(np.float64))
    half = (exponent.astype(np.int64) + 1) >> 1
    # x = number * 4**(half - 13), with number in [2**24, 2**26), and y = 2**36 / sqrt(number).
    number = np.ldexp(fraction, 26 + exponent - 2 * half).astype(np.int64)
    significand = np.rint(np.ldexp(1 / np.sqrt(number.astype(np.float64)), 36)).astype(np.int64)
    significand += _root_is_above(number, 2 * significand + 1)
    significand -= ~_root_is_above(number, 2 * significand - 1)
    result = to_float32(significand, 1 - SIGNIFICAND_BITS - half)
    result = np.where(x == 0, np.copysign(np.float32(np.inf), x), np.where(x > 0, result, NAN))
    return np.where(x == np.inf, np.float32(0), result)


def _root_is_above(number: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Whether ``odd < 2 * 2**36 / sqrt(number)``, that is ``number * odd**2 < 2**74``, in 64-bit integers."""
    square = odd * odd
    low = number * (square & ((1 << 25) - 1))
    return number * (square >> 25) + (low >> 25) < 1 << 49


def reciprocal(x: ArrayLike) -> np.ndarray:
    """``1 / x``: float32 of any shape, correctly rounded.

    1/x of a zero, or of a subnormal number, is infinity of its sign; that of infinity is a zero of its sign. A result
    below 2**-126 becomes a zero of its sign. Error: at most half a unit in the last place of a normal result.
    """
    x = flush(x)
    fraction, exponent = np.frexp(np.where(np.isfinite(x), np.abs(x), 0).astype(np.float64))
    significand = np.ldexp(fraction, SIGNIFICAND_BITS).astype(np.int64)
    result = reciprocal_of_integer(significand, exponent - SIGNIFICAND_BITS)
    result = np.copysign(np.where(np.isinf(x), np.float32(0), result), x)
    return np.where(np.isnan(x), NAN, result)


def reciprocal_of_integer(values: ArrayLike, exponents: ArrayLike = 0) -> np.ndarray:
    """``1 / (values * 2**exponents)`` as float32, correctly rounded from the exact integer.

    Parameters: int64 ``values`` from 0 to ``2**53 - 1`` and ``exponents``, broadcast together. 0 gives infinity.
    Results beyond the normal numbers become infinity and zero, as :func:`hw.spec.numerics.linear.to_float32` says.
    """
    values, exponents = np.broadcast_arrays(np.asarray(values, np.int64), np.asarray(exponents, np.int64))
    if ((values < 0) | (values >> INTEGER_BITS > 0)).any():
        raise ValueError(f"reciprocal_of_integer takes integers from 0 to 2**{INTEGER_BITS} - 1")
    nonzero = np.maximum(values, 1)
    length = np.frexp(nonzero.astype(np.float64))[1].astype(np.int64)
    # number in [2**52, 2**53), and y = 2**76 / number.
    number = nonzero << (INTEGER_BITS - length)
    significand = np.rint(np.ldexp(1 / number.astype(np.float64), 76)).astype(np.int64)
    significand += _quotient_is_above(number, 2 * significand + 1)
    significand -= ~_quotient_is_above(number, 2 * significand - 1)
    result = to_float32(significand, 1 - SIGNIFICAND_BITS - length - exponents)
    return np.where(values == 0, np.float32(np.inf), result)


def _quotient_is_above(number: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Whether ``odd < 2 * 2**76 / number``, that is ``number * odd < 2**77``, in 64-bit integers."""
    low = odd * (number & ((1 << 27) - 1))
    return odd * (number >> 27) + (low >> 27) < 1 << 50
