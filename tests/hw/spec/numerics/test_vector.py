# SPDX-License-Identifier: Apache-2.0
"""The operators between linear layers, one float32 operation after the other, and their errors against float64."""

import numpy as np
import pytest

from hw.spec.numerics.functions import sigma
from hw.spec.numerics.vector import (
    argmax,
    maximum,
    norm_scale,
    piece_maxima,
    rms_norm,
    rotary,
    silu_mul,
    sum_of_squares,
)
from tests.hw.spec.numerics import exact
from tests.hw.spec.numerics.exact import array, bits, floats

UNIT = 2.0**-24


def exact_sum_of_squares(x: list[int]) -> int:
    partial = [0] * 16
    for n, value in enumerate(x):
        partial[n % 16] = exact.add(partial[n % 16], exact.mul(value, value))
    for distance in (8, 4, 2, 1):
        partial = [exact.add(partial[i], partial[i + distance]) for i in range(distance)]
    return partial[0]


def exact_scale(x: list[int], eps: float) -> int:
    inverse = exact.nearest_quotient(0, 1, len(x), 0)
    mean = exact.mul(exact_sum_of_squares(x), inverse)
    return exact.rsqrt(exact.add(mean, int(bits(array(eps))[0])))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 100, 576, 896])
@pytest.mark.parametrize("spread", [0, 30])
def test_sums_of_squares_and_scales(count: int, spread: int):
    """Spread exponents make the order matter, and squares that are flushed."""
    random = np.random.default_rng(count)
    x = np.ldexp(random.standard_normal((3, count)), random.integers(-3 * spread, spread, (3, count), endpoint=True))
    x = x.astype(np.float32)
    for eps in (1e-6, 1e-5, 0.0):
        rows = bits(x).tolist()
        assert bits(sum_of_squares(x)).tolist() == [exact_sum_of_squares(row) for row in rows]
        assert bits(norm_scale(x, eps)).tolist() == [exact_scale(row, eps) for row in rows]


def test_special_sums():
    x = np.zeros((4, 20), np.float32)
    x[1, 3] = np.inf
    x[2, 19] = np.nan
    x[3, :] = 1e30
    assert bits(sum_of_squares(x)).tolist() == [0, exact.INFINITY, exact.NAN, exact.INFINITY]
    assert bits(norm_scale(x, 0.0)).tolist() == [exact.INFINITY, 0, exact.NAN, 0]


@pytest.mark.parametrize("count", [64, 576, 896, 4864])
def test_error_of_the_scale(count: int):
    x = np.random.default_rng(count).standard_normal((200, count)).astype(np.float32)
    squares = (x.astype(np.float64) ** 2).sum(axis=1)
    error = np.abs(sum_of_squares(x) / squares - 1).max() / UNIT
    print(f"sum of squares, K {count}: largest relative error {error:.2f} * 2**-24")
    assert 0.1 < error <= count / 16 + 4
    truth = 1 / np.sqrt(squares / count + 1e-6)
    error = np.abs(norm_scale(x, 1e-6) / truth - 1).max() / UNIT
    print(f"scale, K {count}: largest relative error {error:.2f} * 2**-24")
    assert 0.1 < error <= count / 32 + 5


def test_norm_scales_after_the_weight():
    random = np.random.default_rng(1)
    x, weight = random.standard_normal((2, 48)).astype(np.float32), random.standard_normal(48).astype(np.float32)
    result = bits(rms_norm(x, weight, 1e-5)).tolist()
    w = bits(weight).tolist()
    for row, got in zip(bits(x).tolist(), result):
        r = exact_scale(row, 1e-5)
        assert got == [exact.mul(exact.mul(a, b), r) for a, b in zip(row, w)]


def test_rotary():
    random = np.random.default_rng(2)
    a, b, angle = random.standard_normal((3, 5_000)).astype(np.float32)
    c, s = np.cos(angle), np.sin(angle)
    first, second = rotary(a, b, c, s)
    ab, bb, cb, sb = (bits(v).tolist() for v in (a, b, c, s))
    minus = 1 << 31
    assert bits(first).tolist() == [
        exact.add(exact.mul(p, t), exact.mul(q, u) ^ minus) for p, q, t, u in zip(ab, bb, cb, sb)
    ]
    assert bits(second).tolist() == [exact.add(exact.mul(q, t), exact.mul(p, u)) for p, q, t, u in zip(ab, bb, cb, sb)]
    a, b, c, s = (v.astype(np.float64) for v in (a, b, c, s))
    for result, x, y in ((first, a * c, -b * s), (second, b * c, a * s)):
        error = (np.abs(result - (x + y)) / (np.abs(x) + np.abs(y))).max()
        assert UNIT / 2 < error <= 2 * UNIT * (1 + UNIT)


def test_silu():
    random = np.random.default_rng(3)
    gate, up = (4 * random.standard_normal((2, 20_000))).astype(np.float32)
    result = silu_mul(gate, up)
    weights = sigma(gate).tolist()
    for g, u, weight, got in zip(bits(gate).tolist(), bits(up).tolist(), weights, bits(result).tolist()):
        assert got == exact.mul(exact.mul(g, exact.nearest(0, weight, -24)), u)
    g, u = gate.astype(np.float64), up.astype(np.float64)
    truth = g / (1 + np.exp(-g)) * u
    error = (np.abs(result - truth) - 2 * UNIT * np.abs(truth)) / np.abs(g * u)
    print(f"SiLU: largest error beside two roundings 2**{np.log2(error.max()):.2f} of gate * up")
    assert 2.0**-26 < error.max() <= 2.0**-23


def test_silu_of_special_values():
    one = array(1)
    result = bits(silu_mul(array(0, -0.0, 20, -20, np.inf, -np.inf, np.nan), one)).tolist()
    twenty = int(bits(array(20))[0])
    assert result == [0, 1 << 31, twenty, 1 << 31, exact.INFINITY, exact.NAN, exact.NAN]


def test_argmax():
    """The first of equal numbers, whatever the sign of a zero; a NaN before everything."""
    x = array(
        [1, 3, 3, 2],
        [-0.0, 0, 1e-40, -1],
        [-1, -1e-40, 0, -0.0],
        [-np.inf, -np.inf, -3e38, -3e38],
        [np.inf, np.nan, 1, np.nan],
    )
    x[4, 1] = floats(np.uint32(0xFFC00001))
    assert argmax(x).tolist() == [1, 0, 1, 2, 1]
    assert bits(maximum(x))[[0, 3, 4]].tolist() == [int(bits(array(3))[0]), int(bits(array(-3e38))[0]), exact.NAN]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_pieces(count: int):
    """Few different values, so that ties cross pieces: the whole argmax follows from the pieces'."""
    x = np.random.default_rng(count).integers(-3, 3, (4, count)).astype(np.float32)
    values, indices = piece_maxima(x)
    assert values.shape == indices.shape == (4, -(-count // 256))
    for row in range(4):
        parts = [x[row, start : start + 256].tolist() for start in range(0, count, 256)]
        assert values[row].tolist() == [max(part) for part in parts]
        assert indices[row].tolist() == [part.index(max(part)) for part in parts]
    piece = argmax(values)
    assert (piece * 256 + np.take_along_axis(indices, piece[:, None], axis=1)[:, 0] == argmax(x)).all()
