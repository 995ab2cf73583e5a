# SPDX-License-Identifier: Apache-2.0
"""1/sqrt and 1/x against Python's integers, and all significands against a second vectorised comparison."""

from fractions import Fraction

import numpy as np
import pytest

from hw.spec.numerics.reciprocal import reciprocal, reciprocal_of_integer, rsqrt
from sim.bench.floats import extremes, floats, ties_of_rsqrt
from tests.hw.spec.numerics import exact
from tests.hw.spec.numerics.exact import bits


@pytest.mark.parametrize(("function", "oracle"), [(rsqrt, exact.rsqrt), (reciprocal, exact.reciprocal)])
def test_against_integers(function, oracle):
    random = np.random.default_rng(1)
    numbers = np.concatenate(
        [extremes(), random.integers(0, 1 << 32, 10_000, dtype=np.uint32), ties_of_rsqrt(random, 2_000)]
    )
    results = bits(function(floats(numbers)))
    for number, result in zip(numbers.tolist(), results.tolist()):
        assert result == oracle(number), f"{number:#010x} gave {result:#010x}, not {oracle(number):#010x}"


SIXTEENTH = 1 << 20
STARTS = [0, *(pytest.param(start, marks=pytest.mark.full) for start in range(SIXTEENTH, 1 << 24, SIXTEENTH))]


def significands(start: int) -> tuple[np.ndarray, np.ndarray]:
    """A sixteenth of the numbers of [1, 4): their bits, and the numbers in units of 2**-23 (uint64)."""
    numbers = np.arange(start, start + SIXTEENTH, dtype=np.uint32) + np.uint32(0x3F800000)
    exponent = (numbers >> np.uint32(23)).astype(np.uint64) - np.uint64(127)
    return numbers, (numbers & np.uint32(0x7FFFFF) | np.uint32(0x800000)).astype(np.uint64) << exponent


def shifted_product(a: np.ndarray, b: np.ndarray, right: int) -> np.ndarray:
    """``a * b >> right`` of uint64 arrays; a below 2**64, b and a's upper half times b below 2**32."""
    low = (a & np.uint64(0xFFFFFFFF)) * b
    return ((a >> np.uint64(32)) * b + (low >> np.uint64(32))) >> np.uint64(right - 32)


@pytest.mark.parametrize("start", STARTS)
def test_rsqrt_of_every_significand(start: int):
    """The two binades that matter: the exact value lies between the ties below and above the result."""
    numbers, n = significands(start)
    result = bits(rsqrt(floats(numbers))).astype(np.uint64)
    assert ((result >= 0x3F000000) & (result <= 0x3F800000)).all()
    # In units of 2**-25 the result is 2r, and the exact value is 2**25 / sqrt(n / 2**23).
    r = np.where(result == 0x3F800000, 1 << 24, result & np.uint64(0x7FFFFF) | np.uint64(0x800000))
    one = np.uint64(1)
    assert (shifted_product((2 * r - one) ** 2, n, 73) == 0).all()
    assert (shifted_product((2 * r + one) ** 2, n, 73) > 0).all()


@pytest.mark.parametrize("start", STARTS)
def test_reciprocal_of_every_significand(start: int):
    numbers, n = significands(start)
    result = bits(reciprocal(floats(numbers))).astype(np.uint64)
    assert ((result > 0x3E800000) & (result <= 0x3F800000)).all()
    # In units of 2**-26 the exact value is 2**26 / (n / 2**23), and half a unit of the result is 1, 2 or 4.
    unit = np.uint64(1) << ((result >> np.uint64(23)) - np.uint64(125))
    r = (result & np.uint64(0x7FFFFF) | np.uint64(0x800000)) * unit
    assert ((2 * r - unit) * n < 1 << 49).all()
    assert ((2 * r + unit) * n > 1 << 49).all()


def test_reciprocal_of_integers():
    random = np.random.default_rng(2)
    values = [1, 2, 3, 5, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, (1 << 41) - 1, (1 << 53) - 1, 1 << 52, (1 << 52) + 1]
    values += [int(random.integers(1, 1 << 53)) >> int(random.integers(0, 53)) or 1 for _ in range(5_000)]
    # Next to ties: 2**76 / n just below and above an odd multiple of a half.
    values += [(1 << 77) // int(2 * r + 1) + d for r in random.integers(1 << 23, 1 << 24, 1_000) for d in (0, 1)]
    values = [v for v in values if v < 1 << 53]
    results = bits(reciprocal_of_integer(np.array(values), -24))
    for value, result in zip(values, results.tolist()):
        assert result == exact.nearest_quotient(0, 1, value, 24)


@pytest.mark.parametrize("error", [-1, 1])
def test_the_estimate_is_corrected(monkeypatch: pytest.MonkeyPatch, error: int):
    """The float64 estimate decides nothing: one that is off by one gives the same results."""
    random = np.random.default_rng(4)
    numbers = floats(random.integers(0x00800000, 0x7E000000, 2_000, dtype=np.uint32))
    integers = random.integers(1, 1 << 53, 2_000) >> random.integers(0, 53, 2_000)
    expected = rsqrt(numbers), reciprocal_of_integer(integers)
    rint = np.rint
    monkeypatch.setattr(np, "rint", lambda x: rint(x) + error)
    assert np.array_equal(rsqrt(numbers), expected[0])
    assert np.array_equal(reciprocal_of_integer(integers), expected[1])


def test_reciprocal_of_integers_at_the_ends():
    exponents = np.array([124, 125, 126, 127, 128, -124, -125, -126, -127, -128, -129])
    results = bits(reciprocal_of_integer(np.int64(1), exponents)).tolist()
    assert results == [exact.nearest(0, 1, -int(e)) for e in exponents]
    assert bits(reciprocal_of_integer(np.array([0]), 3)).tolist() == [exact.INFINITY]
    for bad in (-1, 1 << 53):
        with pytest.raises(ValueError, match="integers from 0 to 2"):
            reciprocal_of_integer(np.array([1, bad]))


def test_error_is_half_a_unit():
    random = np.random.default_rng(3)
    x = floats(random.integers(0x00800000, 0x7E000000, 2_000, dtype=np.uint32))
    for function, true in ((reciprocal, lambda v: 1 / v), (rsqrt, lambda v: v**-0.5)):
        error = np.abs(function(x).astype(np.float64) / true(x.astype(np.float64)) - 1)
        assert 2.0**-25 < error.max() <= 2.0**-24
    assert Fraction(float(reciprocal(np.float32(3)))) == Fraction(0xAAAAAB, 1 << 25)
