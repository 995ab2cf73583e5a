# SPDX-License-Identifier: Apache-2.0
"""What happens between two linear layers, as compositions of :mod:`hw.spec.numerics.float32`.

Every intermediate value is a float32 that was rounded as ``add`` and ``mul`` say, in the order given here. Only
:func:`sum_of_squares` combines elements, and its order is a part of the definition. So results are the same for any
tile and any number of lanes. NaN and infinity go through all of it as ``add`` and ``mul`` say.
"""

import numpy as np

from hw.spec.numerics.float32 import NAN, add, mul, order
from hw.spec.numerics.functions import UNIT_BITS, sigma
from hw.spec.numerics.linear import to_float32
from hw.spec.numerics.reciprocal import reciprocal_of_integer, rsqrt

PARTIAL_SUMS = 16
"""Partial sums of squares: element n belongs to number ``n % PARTIAL_SUMS``. A multiple of every number of lanes."""
PIECE = 256
"""Columns that share one maximum and argmax."""


def sum_of_squares(x: np.ndarray) -> np.ndarray:
    """Q: the sum of the squares of float32 ``x`` [..., K], float32 [...].

    Each square is rounded. 16 partial sums, ``n % 16``, add them in ascending n from +0. Then a binary tree adds
    partial sum i and i + 8, then i and i + 4, i + 2, i + 1: with up to 8 lanes the first level stays within a lane.
    Error: all terms are positive, so at most ``(K / 16 + 4) * 2**-24`` of Q, plus a higher order.
    """
    squares = mul(x, x)
    count = squares.shape[-1]
    rows = -(-count // PARTIAL_SUMS)
    padding = [(0, 0)] * (squares.ndim - 1) + [(0, rows * PARTIAL_SUMS - count)]
    squares = np.pad(squares, padding).reshape(*squares.shape[:-1], rows, PARTIAL_SUMS)
    with np.errstate(over="ignore", invalid="ignore"):
        # Squares are positive and not subnormal, so numpy's addition is `add`. accumulate keeps the order.
        sums = np.add.accumulate(squares, axis=-2, dtype=np.float32)[..., -1, :]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = add(sums[..., :half], sums[..., half:])
    return sums[..., 0]


def norm_scale(x: np.ndarray, eps: float) -> np.ndarray:
    """r of RMSNorm for float32 ``x`` [..., K]: float32 [...].

    ``v = Q * float32(1 / K) + float32(eps)``, both rounded; r is the correctly rounded ``1 / sqrt(v)``.
    Error: at most ``(K / 32 + 5) * 2**-24`` of r, plus a higher order.
    """
    mean = mul(sum_of_squares(x), reciprocal_of_integer(x.shape[-1]))
    return rsqrt(add(mean, np.float32(eps)))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``(x * weight) * r``: float32 [..., K]. So a linear layer can take ``x * weight``, and r scales its results."""
    return mul(mul(x, weight), norm_scale(x, eps)[..., None])


def rotary(a: np.ndarray, b: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair turned: ``a c - b s`` and ``b c + a s``, each product and each sum rounded. All float32, any shape.

    Error of each: at most ``2**-23`` of ``abs(a c) + abs(b s)``.
    """
    return add(mul(a, cosine), -mul(b, sine)), add(mul(b, cosine), mul(a, sine))


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """``(gate * sigma(gate)) * up``: float32, two rounded products; sigma is a float32 number exactly.

    Error: at most ``2**-23 * abs(gate * up)``, which is sigma's, and two roundings of the result.
    -infinity gives NaN, because sigma of it is 0.
    """
    gate = np.asarray(gate, np.float32)
    return mul(mul(gate, to_float32(sigma(gate), np.array(-UNIT_BITS))), up)


def argmax(x: np.ndarray) -> np.ndarray:
    """Index of the first of the largest of float32 ``x`` [..., N]: int64 [...].

    Zeros of both signs and subnormal numbers are equal. A NaN is larger than every number, so the first NaN is found.
    """
    return np.argmax(order(x), axis=-1)


def maximum(x: np.ndarray) -> np.ndarray:
    """The first of the largest of float32 ``x`` [..., N]: float32 [...]; :data:`NAN` if one is a NaN."""
    largest = np.take_along_axis(np.asarray(x, np.float32), argmax(x)[..., None], axis=-1)[..., 0]
    return np.where(np.isnan(largest), NAN, largest)


def piece_maxima(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum (float32) and argmax (int64) of every piece of 256 columns of float32 ``x`` [..., N]: [..., P] each.

    The argmax counts from the piece's first column. The last piece may be shorter. The argmax of all columns lies in
    the first piece with the largest maximum.
    """
    pieces = [x[..., start : start + PIECE] for start in range(0, x.shape[-1], PIECE)]
    return np.stack([maximum(p) for p in pieces], axis=-1), np.stack([argmax(p) for p in pieces], axis=-1)
