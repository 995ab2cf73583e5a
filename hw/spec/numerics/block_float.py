# SPDX-License-Identifier: Apache-2.0
"""Block floating point: groups of numbers that share one power of two. Keys and values are cached in it.

``x[n] ~ mantissas[n] * 2**exponents[n // block]``. Mantissas are signed and symmetric: at most ``2**(bits - 1) - 1`` in
magnitude. The exponent of a group is the smallest one for which no mantissa is larger, and at least
:data:`EXPONENT_MIN`.

- Mantissas are rounded half to even. If the largest would round up to ``2**(bits - 1)``, the exponent is one higher, so
  no mantissa wraps or saturates.
- A group of zeros has the lowest exponent. Very small groups have it, too, and lose bits.
- The largest float32 number needs less than the highest exponent of the field, so every finite number is legal.

A group is independent of all others, unless ``spread`` limits how far the exponents of one vector differ.
"""

from typing import NamedTuple

import numpy as np

from hw.spec.numerics.float32 import flush
from hw.spec.numerics.linear import EXPONENT_MIN, NumericsError, smallest_exponents

BLOCK = 32
"""Numbers that share an exponent in the cache, along the head."""


class BlockFloat(NamedTuple):
    """Numbers in groups: ``x[..., n] ~ mantissas[..., n] * 2**exponents[..., n // block]``."""

    mantissas: np.ndarray
    """int64 [..., N]."""
    exponents: np.ndarray
    """int64 [..., ceil(N / block)], within the 8-bit field ``EXPONENT_MIN..EXPONENT_MAX``."""

    def to_float(self, block: int = BLOCK) -> np.ndarray:
        """The values, exactly: float64 [..., N]."""
        return np.ldexp(
            self.mantissas.astype(np.float64), _per_element(self.exponents, block, self.mantissas.shape[-1])
        )


def quantize(x: np.ndarray, bits: int, block: int = BLOCK, spread: int | None = None) -> BlockFloat:
    """Round float32 ``x`` [..., N] to mantissas of ``bits`` bits, in groups of ``block`` along N.

    The last group may be shorter. Subnormal numbers count as zero. With ``spread``, an exponent below the largest one
    of the same vector minus ``spread`` is raised to that bound. Error: at most half of ``2**exponent``. In a group that
    neither ``spread`` nor the lowest exponent limits, that is at most the largest magnitude divided by
    ``2**(bits - 1) - 1``.

    Raises
    ------
    NumericsError : a value is not finite
    """
    x = flush(x)
    if not np.isfinite(x).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise NumericsError(f"block floating point holds finite numbers, not {x[index]} (element {index})")
    count = x.shape[-1]
    groups = -(-count // block)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, groups * block - count)]
    padded = np.pad(x.astype(np.float64), padding).reshape(*x.shape[:-1], groups, block)
    largest = np.abs(padded).max(axis=-1)
    exponents = np.where(largest > 0, smallest_exponents(largest, bits), EXPONENT_MIN)
    exponents = np.maximum(exponents, EXPONENT_MIN)
    if spread is not None:
        exponents = np.maximum(exponents, exponents.max(axis=-1, keepdims=True) - spread)
    mantissas = np.rint(np.ldexp(x.astype(np.float64), -_per_element(exponents, block, count)))
    return BlockFloat(mantissas.astype(np.int64), exponents)


def _per_element(exponents: np.ndarray, block: int, count: int) -> np.ndarray:
    return np.repeat(exponents, block, axis=-1)[..., :count]
