# SPDX-License-Identifier: Apache-2.0
"""Attention of one KV head: two linear layers whose weights are the cache, and the softmax between them.

One row is one query head of one token. Rows are independent of each other. The sums over the head and over the
positions of a chunk are exact integers, and chunks are added in ascending order. So results do not depend on tile, on
lanes, or on how many rows run at once.

On the array, a mantissa is an unsigned weight with the constant zero point ``2**(bits - 1)``, cut into planes of
:data:`PLANE_BITS` bits (:mod:`hw.spec.numerics.planes`). The integer result is the same.
"""

from typing import NamedTuple

import numpy as np

from hw.spec.config import SCALE_BITS, AcceleratorConfig
from hw.spec.numerics.block_float import BLOCK, BlockFloat, quantize
from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.functions import UNIT_BITS, exp
from hw.spec.numerics.linear import quantize_activations, to_float32
from hw.spec.numerics.reciprocal import reciprocal_of_integer
from hw.spec.numerics.vector import maximum

CHUNK = 256
"""Positions whose values are summed exactly. Chunks are added as float32."""
VALUE_BITS = 8
"""Bits of a value's mantissa in the cache."""
PLANE_BITS = 4
"""Bits of a plane of the cache on the array."""


def key_spread(key_bits: int) -> int:
    """The largest difference between exponents of one key for which a scale mantissa holds each power of two exactly.

    The largest power of two in a scale mantissa is ``2**(SCALE_BITS - 2)``, and each plane after the first takes
    ``PLANE_BITS`` of this exponent: 10 remain for keys of 8 bits, 2 for 16 bits.
    """
    return SCALE_BITS - 2 - (key_bits - PLANE_BITS)


def cache_keys(keys: np.ndarray, centre: np.ndarray, key_bits: int) -> BlockFloat:
    """Rotated keys, float32 [..., D], minus the KV head's ``centre`` (float32 [D]), as the cache holds them.

    The difference is rounded to float32. ``key_bits`` is 8 or 16. Raises NumericsError if a difference is not finite.
    """
    return quantize(add(keys, -centre), key_bits, spread=key_spread(key_bits))


def cache_values(values: np.ndarray) -> BlockFloat:
    """Values, float32 [..., D], as the cache holds them. Raises NumericsError if one is not finite."""
    return quantize(values, VALUE_BITS)


def scores(
    config: AcceleratorConfig, q: np.ndarray, keys: BlockFloat, scale: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """Scores of R rows and N positions: float32 [R, N].

    Parameters: float32 ``q`` [R, D], rounded to activations as those of a linear layer; ``keys`` [N, D]; float32
    ``scale``, usually ``rsqrt(D)``; bool ``visible`` [R, N], where False gives -infinity.

    ``s = float32(q k) * scale``: the sum over the head is exact and rounded once, then the product is rounded.
    Raises NumericsError as :func:`hw.spec.numerics.linear.quantize_activations`.
    """
    activations = quantize_activations(config, q)
    lowest = keys.exponents.min(axis=-1)
    shifts = keys.exponents - lowest[:, None]
    total = np.zeros((len(q), len(lowest)), np.int64)
    for group in range(keys.exponents.shape[-1]):
        part = slice(group * BLOCK, (group + 1) * BLOCK)
        total += _product(activations.mantissas[:, part], keys.mantissas[:, part].T) << shifts[:, group]
    products = to_float32(total, activations.exponents[:, None] + lowest)
    return np.where(visible, mul(products, scale), np.float32(-np.inf))


class Probabilities(NamedTuple):
    """Softmax before its division."""

    p: np.ndarray
    """int64 [R, N]: exp(s - max) in units of 2**-24."""
    total: np.ndarray
    """int64 [R]: the exact sum S of a row."""


def probabilities(s: np.ndarray) -> Probabilities:
    """``p = exp(s - m)`` of float32 scores [R, N], with m the row's maximum; the difference is rounded to float32.

    p is 0 in a row with a NaN, with +infinity, or without a visible position. Then S is 0 and the output NaN.
    """
    p = exp(add(s, -maximum(s)[:, None]))
    return Probabilities(p, p.sum(axis=-1))


def weighted_values(config: AcceleratorConfig, weights: Probabilities, values: BlockFloat) -> np.ndarray:
    """``float32(P V) / S`` for values [N, D]: float32 [R, D].

    For each chunk of 256 positions and each group of 32 columns, ``p * 2**exponent`` of the group's values is a float32
    number, zero below 2**-126. A row's numbers of one chunk become block floating point of ``activation_bits``
    (:mod:`hw.spec.numerics.block_float`). Their products with the mantissas are summed exactly and rounded once. The
    first chunk's result is the sum, to which the others are added in ascending order. The sum is multiplied by the
    correctly rounded 1/S.
    """
    output = None
    for start in range(0, values.mantissas.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        chunk = _chunk(config, weights.p[:, part], BlockFloat(values.mantissas[part], values.exponents[part]))
        output = chunk if output is None else add(output, chunk)
    assert output is not None, "attention has at least one position"
    return mul(output, reciprocal_of_integer(weights.total, -UNIT_BITS)[:, None])


def _chunk(config: AcceleratorConfig, p: np.ndarray, values: BlockFloat) -> np.ndarray:
    """The float32 sums [R, D] of one chunk."""
    columns = []
    for group in range(values.exponents.shape[-1]):
        scaled = to_float32(p, values.exponents[:, group] - UNIT_BITS)
        activations = quantize(scaled, config.activation_bits, block=CHUNK)
        total = _product(activations.mantissas, values.mantissas[:, group * BLOCK : (group + 1) * BLOCK])
        columns.append(to_float32(total, activations.exponents))
    return np.concatenate(columns, axis=-1)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The exact product of two int64 matrices. Sums stay far below 2**53, and float64 has a fast product."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def attention(
    config: AcceleratorConfig,
    q: np.ndarray,
    keys: BlockFloat,
    values: BlockFloat,
    scale: np.ndarray,
    visible: np.ndarray,
) -> np.ndarray:
    """Softmax attention of R rows over N positions of one KV head: float32 [R, D]. Parameters as :func:`scores`."""
    return weighted_values(config, probabilities(scores(config, q, keys, scale, visible)), values)
