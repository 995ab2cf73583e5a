# SPDX-License-Identifier: Apache-2.0
"""The numerics in numpy: every configuration of the hardware computes these results bit for bit.

``y[m, n] = sum_k x[m, k] * w[n, k]`` with ``w[n, k] = (q[n, k] - z[n, g]) * s[n, g]`` and ``g = k // group_size``.
Activations and scales become integers with power-of-two exponents. The rest of the computation is exact, until a single
rounding to float32. So a result does not depend on tile, ports or the order of accumulation.
"""

from typing import NamedTuple

import numpy as np

from hw.spec.config import EXPONENT_BITS, SCALE_BITS, AcceleratorConfig
from hw.spec.numerics import float32

EXPONENT_MIN = -(1 << (EXPONENT_BITS - 1))
EXPONENT_MAX = (1 << (EXPONENT_BITS - 1)) - 1


class NumericsError(ValueError):
    """A value that the number formats cannot hold. The message names the rule and the value."""


class Activations(NamedTuple):
    """Block floating point: ``x[m, k] ~ mantissas[m, k] * 2**exponents[m]``."""

    mantissas: np.ndarray
    """int64 [M, K], at most ``config.activation_max`` in magnitude."""
    exponents: np.ndarray
    """int64 [M], within ``EXPONENT_MIN..EXPONENT_MAX``."""


class Weights(NamedTuple):
    """A layer's weights as integers: ``w[n, k] = (q * 2**f - z) * sm * 2**(E - 15 - f)``."""

    q: np.ndarray
    """uint8 [N, K]: quantized weights."""
    zero_points: np.ndarray
    """int64 [N, G]: zero points, in units of ``2**-f``."""
    scale_mantissas: np.ndarray
    """int64 [N, G]."""
    exponents: np.ndarray
    """int64 [N]: row exponents E."""

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.q.shape[1] // self.scale_mantissas.shape[1]


def _check_exponents(exponents: np.ndarray, what: str) -> None:
    bad = (exponents < EXPONENT_MIN) | (exponents > EXPONENT_MAX)
    if bad.any():
        index = int(np.argmax(bad))
        raise NumericsError(
            f"the exponent of {what} {index} is {int(exponents[index])}, and the {EXPONENT_BITS}-bit field holds"
            f" {EXPONENT_MIN} to {EXPONENT_MAX}"
        )


def smallest_exponents(largest: np.ndarray, bits: int) -> np.ndarray:
    """The smallest int64 ``e`` with ``rint(largest / 2**e) <= 2**(bits - 1) - 1``, half to even.

    ``largest``: positive float64 of any shape. A magnitude that would round up to ``2**(bits - 1)`` gets the next
    exponent, so a mantissa never wraps. For 0 the exponent has no meaning.
    """
    exponents = np.frexp(largest)[1].astype(np.int64) - (bits - 1)
    return exponents + (np.rint(np.ldexp(largest, -exponents)) >= 1 << (bits - 1))


def quantize_activations(config: AcceleratorConfig, x: np.ndarray) -> Activations:
    """Round float activations [M, K] to block floating point, one exponent per token.

    ``e[m]`` is the smallest integer with ``max_k abs(rint(x / 2**e)) <= config.activation_max``, rounding half to
    even; 0 for a token of zeros.

    Raises
    ------
    NumericsError : a value is not finite, or an exponent leaves its field
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        m, k = np.argwhere(~np.isfinite(x))[0]
        raise NumericsError(f"activations are finite numbers, not {x[m, k]} (token {m}, element {k})")
    largest = np.abs(x).max(axis=1, initial=0.0)
    exponents = smallest_exponents(largest, config.activation_bits)
    exponents[largest == 0] = 0
    _check_exponents(exponents, "token")
    return Activations(np.rint(np.ldexp(x, -exponents[:, None])).astype(np.int64), exponents)


def quantize_scales(scales: np.ndarray, bits: int = SCALE_BITS) -> tuple[np.ndarray, np.ndarray]:
    """Scale mantissas (int64 [N, G]) and row exponents (int64 [N]) of float scales [N, G]; either sign is legal.

    A scale becomes ``sm * 2**(E - 15)`` with ``sm`` of at most ``bits`` bits, its sign included. ``E[n]`` is the
    smallest integer with ``max_g abs(s) <= (2**(bits-1) - 1) * 2**(E - 15)``; 0 for a row of zeros.

    Raises
    ------
    NumericsError : a scale is not finite, or an exponent leaves its field
    """
    scales = np.asarray(scales, np.float64)
    if not np.isfinite(scales).all():
        n, g = np.argwhere(~np.isfinite(scales))[0]
        raise NumericsError(f"scales are finite numbers, not {scales[n, g]} (row {n}, group {g})")
    mantissa_max = (1 << (bits - 1)) - 1
    largest = np.abs(scales).max(axis=1, initial=0.0)
    fraction, exponents = np.frexp(largest)
    exponents = exponents.astype(np.int64) + (fraction * (mantissa_max + 1) > mantissa_max) + (SCALE_BITS - bits)
    exponents[largest == 0] = 0
    _check_exponents(exponents, "row")
    return np.rint(np.ldexp(scales, SCALE_BITS - 1 - exponents[:, None])).astype(np.int64), exponents


def quantize_zero_points(config: AcceleratorConfig, zero_points: np.ndarray) -> np.ndarray:
    """Zero points [N, G] as int64 in units of ``2**-f``. Integers are kept exactly; fixed ones round half to even.

    Raises
    ------
    NumericsError : a fraction where the hardware has integer zero points, or a value outside the field
    """
    rounded = round_zero_points(config, zero_points)
    check_zero_points(config, rounded, rounded)
    return rounded


def round_zero_points(config: AcceleratorConfig, zero_points: np.ndarray) -> np.ndarray:
    """Zero points as int64 in units of ``2**-f``, of any size. Raises NumericsError like ``quantize_zero_points``."""
    exact = np.asarray(zero_points, np.float64) * (1 << config.fraction_bits)
    rounded = np.rint(exact)
    if config.zero_point == "integer" and (rounded != exact).any():
        value = exact[rounded != exact][0]
        raise NumericsError(f'zero point {value:g} has a fraction: it takes hardware with zero_point="fixed"')
    bad = ~(np.abs(rounded) < 1 << 32)
    if bad.any():
        raise NumericsError(f"zero point {exact[bad][0] / (1 << config.fraction_bits):g} is outside every field")
    return rounded.astype(np.int64)


def check_zero_points(config: AcceleratorConfig, fields: np.ndarray, whole: np.ndarray) -> None:
    """Raises NumericsError, with the value in ``whole``, if one of ``fields`` does not fit the hardware's field."""
    bits = config.zero_point_bits
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if config.zero_point_signed else (0, (1 << bits) - 1)
    bad = (fields < low) | (fields > high)
    if bad.any():
        unit = 1 << config.fraction_bits
        value = whole[bad][0] / unit
        raise NumericsError(f"zero point {value:g} is outside the field's {low / unit:g} to {high / unit:g}")


def group_sums(activations: Activations, group_size: int) -> np.ndarray:
    """``A[m, g]``: int64 [M, G] sums of the mantissas of each group."""
    tokens, k = activations.mantissas.shape
    return activations.mantissas.reshape(tokens, k // group_size, group_size).sum(axis=2)


def accumulate(config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
    """``Y[m, n] = sum_g sm * (P * 2^f - z * A)``: int64 [M, N], exact."""
    tokens, size = len(activations.mantissas), weights.group_size
    sums = group_sums(activations, size)
    x = activations.mantissas.astype(np.float64)
    total = np.zeros((tokens, len(weights.q)), np.int64)
    for group in range(sums.shape[1]):
        part = slice(group * size, (group + 1) * size)
        # P is far below 2**53, so the product in float64 is exact, and BLAS is fast.
        value = (x[:, part] @ weights.q[:, part].T.astype(np.float64)).astype(np.int64)
        value <<= config.fraction_bits
        value -= weights.zero_points[:, group] * sums[:, group, None]
        value *= weights.scale_mantissas[:, group]
        total += value
    return total


def to_float32(values: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """``values * 2**exponents`` as float32 with one rounding, half to even, exactly like the hardware.

    Parameters: int64 ``values`` and ``exponents``, which are broadcast. A result that is too large becomes infinity. A
    result below the smallest normal number, 2**-126, becomes a zero of the same sign. An integer 0 gives +0.
    """
    values, exponents = np.broadcast_arrays(np.asarray(values, np.int64), np.asarray(exponents, np.int64))
    magnitude = np.abs(values).astype(np.uint64)
    # The conversion to float64 rounds to 53 bits, which may carry into another bit.
    length = np.frexp(magnitude.astype(np.float64))[1].astype(np.int64)
    length -= (magnitude >> np.maximum(length - 1, 0).astype(np.uint64)) == 0
    shift = np.maximum(length - float32.SIGNIFICAND_BITS, 0)
    amount = shift.astype(np.uint64)
    kept = (magnitude >> amount).astype(np.int64)
    rest = (magnitude - (kept.astype(np.uint64) << amount)).astype(np.int64)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 1)
    kept += (rest > half) | ((rest == half) & (kept & 1 == 1))
    result = np.ldexp(kept.astype(np.float64), shift + exponents)
    result = np.where(result < 2.0**float32.EXPONENT_MIN, 0.0, result)
    result = np.where(result >= 2.0 ** (float32.EXPONENT_MAX + 1), np.inf, result)
    return np.copysign(result, values).astype(np.float32)


def linear(config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
    """The complete layer: float32 [M, N], bit for bit the hardware's results."""
    exponents = weights.exponents[None, :] + activations.exponents[:, None]
    exponents = exponents - (SCALE_BITS - 1) - config.fraction_bits
    return to_float32(accumulate(config, weights, activations), exponents)
