# SPDX-License-Identifier: Apache-2.0
"""exp and sigma in integers: a table of quadratic polynomials that a lane evaluates with two multipliers.

Both take float32 and give multiples of 2**-24 in [0, 1], which are float32 numbers, too. The argument becomes a
fixed-point number T. Its upper bits choose an interval, the lower ``OFFSET_BITS`` bits, with the highest one inverted,
are the signed offset from the interval's centre. In units of ``2**-VALUE_BITS``, with ``/`` rounding half up::

    y = constant + (slope + curvature * offset / 2**OFFSET_BITS) * offset / 2**OFFSET_BITS

Widths, for multipliers of 27 x 18 signed bits (DSP48E2): ``curvature`` and ``offset`` on the 18-bit side, the sum with
``slope`` on the 27-bit side, ``constant`` with the rounding bit below it on the 48-bit side. exp multiplies by log2(e)
before that: 24 x 34 bits, two multipliers.

A row of either table has 61 bits: exp 27 + 21 + 13 (slopes are negative, curvatures positive), sigma 27 + 20 + 14
(signed curvatures). exp has 64 rows, which are 61 LUT6; sigma has 512 rows, which are one block RAM of 512 x 72.

Each value depends on its own argument only, so results are the same for any number of lanes.
"""

from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hw.spec.numerics.float32 import FRACTION_BITS, flush

UNIT_BITS = 24
"""Results are multiples of ``2**-UNIT_BITS``."""
ONE = 1 << UNIT_BITS
"""The result 1."""
VALUE_BITS = 27
"""Polynomials are evaluated in units of ``2**-VALUE_BITS``: three bits below the result's lowest."""
OFFSET_BITS = 18
"""Bits of the offset within an interval."""
EXP_INDEX_BITS = 6
"""The interval [0, 1) of powers of two is cut into ``2**EXP_INDEX_BITS`` intervals."""
EXP_RANGE_BITS = 5
"""exp of ``-2**EXP_RANGE_BITS`` and below is 0."""
LOG2E_BITS = 33
"""Fraction bits of log2(e)."""
SIGMA_INDEX_BITS = 9
"""The interval of magnitudes [0, 16) is cut into ``2**SIGMA_INDEX_BITS`` intervals."""
SIGMA_RANGE_BITS = 4
"""sigma of ``2**SIGMA_RANGE_BITS`` and above is 1."""
_DECIMAL = Context(prec=50)


class Table(NamedTuple):
    """Quadratic polynomials, one per interval, as integers in units of ``2**-VALUE_BITS``. Each array is int64 [R]."""

    constants: np.ndarray
    """Value at the centre; up to ``2**VALUE_BITS``."""
    slopes: np.ndarray
    """Change over one whole interval."""
    curvatures: np.ndarray
    """Second-order coefficient, for an offset of one whole interval."""

    def evaluate(self, position: np.ndarray) -> np.ndarray:
        """int64 values at ``position``, int64 in units of an interval / ``2**OFFSET_BITS``."""
        row = position >> OFFSET_BITS
        offset = (position & ((1 << OFFSET_BITS) - 1)) - (1 << (OFFSET_BITS - 1))
        slope = self.slopes[row] + _scaled(self.curvatures[row] * offset)
        return self.constants[row] + _scaled(slope * offset)


def _scaled(product: np.ndarray) -> np.ndarray:
    """``product / 2**OFFSET_BITS``, half up."""
    return (product + (1 << (OFFSET_BITS - 1))) >> OFFSET_BITS


def quadratics(function: Callable[[Decimal], Decimal], rows: int, width: Decimal) -> Table:
    """The table of ``function`` from 0 on, in ``rows`` intervals of ``width``.

    Each polynomial passes through the three Chebyshev nodes of its interval. The arithmetic is decimal with 50 digits,
    so the integers are the same on every machine, which those from a C library's exp would not have to be.
    """
    columns = []
    with localcontext(_DECIMAL):
        node = Decimal(3).sqrt() / 4
        for row in range(rows):
            below, middle, above = (function((row + Decimal("0.5") + at) * width) for at in (-node, Decimal(0), node))
            slope, curvature = (above - below) / (2 * node), (above + below - 2 * middle) / (2 * node * node)
            columns.append(
                [int((value * (1 << VALUE_BITS)).to_integral_value()) for value in (middle, slope, curvature)]
            )
    return Table(*np.array(columns, np.int64).T)


@cache
def exp_table() -> Table:
    """2**-f for f in [0, 1): 64 rows."""
    return quadratics(lambda f: (-f * Decimal(2).ln()).exp(), 1 << EXP_INDEX_BITS, Decimal(2) ** -EXP_INDEX_BITS)


@cache
def sigma_table() -> Table:
    """1 / (1 + exp(-g)) for g in [0, 16): 512 rows."""
    width = Decimal(2) ** (SIGMA_RANGE_BITS - SIGMA_INDEX_BITS)
    return quadratics(lambda g: 1 / (1 + (-g).exp()), 1 << SIGMA_INDEX_BITS, width)


@cache
def log2e() -> int:
    """log2(e) in units of ``2**-LOG2E_BITS``: 34 bits."""
    with localcontext(_DECIMAL):
        return int((Decimal(1 << LOG2E_BITS) / Decimal(2).ln()).to_integral_value())


def exp(difference: np.ndarray) -> np.ndarray:
    """e to the power of float32 ``difference``, of any shape, as int64 multiples of 2**-24 from 0 to 2**24.

    Parameters: ``difference`` is a score minus the largest one, so it is not positive. -infinity gives 0. NaN gives 0:
    then the sum of a row can be 0, and its reciprocal makes the output NaN.

    T = floor(-difference * log2(e) * 2**24); with T = 2**24 k + f, the result is 2**-k times the polynomial at f,
    rounded half up to a multiple of 2**-24. exp(0) is exactly 1.

    Error: at most ``2**-23`` of the value, plus ``2**-25`` from the last rounding.

    Raises
    ------
    ValueError : a positive difference
    """
    difference = flush(difference)
    if (difference > 0).any():
        raise ValueError(f"exp takes a score minus the largest score, not {difference[difference > 0][0]}")
    inside = difference > -(2.0**EXP_RANGE_BITS)
    significand, exponent = _significand(np.where(inside, difference, 0))
    position_bits = EXP_INDEX_BITS + OFFSET_BITS
    # The product has 58 bits. The lowest 28 are shifted out for every argument in range.
    shift = LOG2E_BITS - position_bits - exponent
    logarithm = (significand * log2e()) >> np.clip(shift, 0, 63)
    whole = logarithm >> position_bits
    value = exp_table().evaluate(logarithm & ((1 << position_bits) - 1))
    return np.where(inside, _rounded(value, whole), 0)


def sigma(g: np.ndarray) -> np.ndarray:
    """The logistic function 1 / (1 + exp(-g)) of float32 ``g``, of any shape, as int64 multiples of 2**-24, 0 to 2**24.

    T = floor(abs(g) * 2**23) is the position in the table. From 16 on the result is 1. sigma(-g) is 1 - sigma(g),
    exactly. sigma(0) is exactly 1/2. NaN counts as infinity of its sign; SiLU's product with g makes a NaN of it.

    Error: less than ``2**-23``.
    """
    g = flush(g)
    inside = np.abs(g) < 2.0**SIGMA_RANGE_BITS
    significand, exponent = _significand(np.where(inside, g, 0))
    scale = exponent + OFFSET_BITS + SIGMA_INDEX_BITS - SIGMA_RANGE_BITS
    position = (significand << np.maximum(scale, 0)) >> np.clip(-scale, 0, 63)
    value = np.where(inside, _rounded(sigma_table().evaluate(position), 0), ONE)
    return np.where(np.signbit(g), ONE - value, value)


def _significand(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``significand`` and ``exponent`` with ``abs(x) = significand * 2**exponent``; 24 bits, or 0 for zero."""
    fraction, exponent = np.frexp(np.abs(x).astype(np.float64))
    return np.ldexp(fraction, FRACTION_BITS + 1).astype(np.int64), exponent.astype(np.int64) - FRACTION_BITS - 1


def _rounded(value: np.ndarray, right: ArrayLike) -> np.ndarray:
    """``value / 2**right`` from units of ``2**-VALUE_BITS`` to those of ``2**-UNIT_BITS``, half up."""
    return ((value >> np.minimum(np.add(right, VALUE_BITS - UNIT_BITS - 1), 63)) + 1) >> 1
