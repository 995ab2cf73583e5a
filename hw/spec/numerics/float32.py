# SPDX-License-Identifier: Apache-2.0
"""float32: its fields, and addition, multiplication and order of numbers, bit-identical to the vector unit.

The numbers are those of IEEE 754 binary32 with round to nearest, half to even, and these rules:

- A subnormal operand counts as a zero of its sign.
- A result is rounded to 24 bits as if the exponent had no lower bound. If it is then below 2**-126, it becomes a zero
  of its sign. :func:`hw.spec.numerics.linear.to_float32` has the same rule.
- Overflow gives infinity. Infinities are operands as in IEEE 754.
- Every NaN result is :data:`NAN`, for any NaN operand. ``inf - inf`` and ``0 * inf`` give it.
- A sum that is exactly zero is +0, unless both operands are -0.

Every function works on each element alone. So a result does not depend on how many elements are computed in a cycle.
"""

import numpy as np
from numpy.typing import ArrayLike

FRACTION_BITS = 23
SIGNIFICAND_BITS = FRACTION_BITS + 1
"""Bits of the significand with its leading one."""
EXPONENT_FIELD_BITS = 8
EXPONENT_SPECIAL = (1 << EXPONENT_FIELD_BITS) - 1
"""The exponent field of infinities and NaNs."""
EXPONENT_BIAS = (1 << (EXPONENT_FIELD_BITS - 1)) - 1
EXPONENT_MIN, EXPONENT_MAX = 1 - EXPONENT_BIAS, EXPONENT_BIAS
"""Exponents of normal numbers."""

NAN_FRACTION = 1 << (FRACTION_BITS - 1)
NAN = np.uint32(EXPONENT_SPECIAL << FRACTION_BITS | NAN_FRACTION).view(np.float32)
"""The one NaN that operators produce: 0x7FC00000."""
SMALLEST = np.float32(2.0**EXPONENT_MIN)
"""The smallest normal number."""
_ROUNDS_TO_SMALLEST = 2.0**EXPONENT_MIN - 2.0 ** (EXPONENT_MIN - SIGNIFICAND_BITS - 1)
"""The smallest magnitude that 24 bits round to :data:`SMALLEST`: a tie, and the even neighbour is the upper one."""


def flush(x: ArrayLike) -> np.ndarray:
    """float32 of any shape, in which each subnormal number becomes a zero of the same sign."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def mul(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """``a * b``: float32, the operands broadcast together."""
    with np.errstate(all="ignore"):
        # float64 holds the product of two float32 exactly, so the conversion is the only rounding.
        exact = flush(a).astype(np.float64) * flush(b)
        rounded = np.where(np.isnan(exact), NAN, exact.astype(np.float32))
        return np.where(np.abs(exact) < _ROUNDS_TO_SMALLEST, np.copysign(np.float32(0), rounded), rounded)


def add(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """``a + b``: float32, the operands broadcast together. ``add(a, -b)`` is the difference."""
    with np.errstate(all="ignore"):
        # Sums of normal numbers are multiples of 2**-149, so those below 2**-126 are exact: numpy does not round them.
        rounded = flush(a) + flush(b)
        return flush(np.where(np.isnan(rounded), NAN, rounded))


def order(x: ArrayLike) -> np.ndarray:
    """int64 keys of float32 ``x`` that compare as the numbers do.

    Both zeros and the subnormal numbers have key 0. A NaN, of either sign, is larger than +infinity, so a maximum
    shows it.
    """
    x = flush(x)
    bits = x.view(np.int32).astype(np.int64)
    magnitude = bits & 0x7FFFFFFF
    return np.where(np.isnan(x), 0x7FFFFFFF, np.where(bits < 0, -magnitude, magnitude))
