# SPDX-License-Identifier: Apache-2.0
"""Block floating point: every rule against fractions."""

from fractions import Fraction
from math import frexp

import numpy as np
import pytest

from hw.spec.numerics.block_float import BLOCK, quantize
from hw.spec.numerics.linear import EXPONENT_MAX, EXPONENT_MIN, NumericsError
from sim.bench.floats import floats
from tests.hw.spec.numerics.exact import array


def exact_group(group: list[float], bits: int, lowest: int) -> tuple[list[int], int]:
    """Mantissas and exponent; the search for the exponent starts at one that is too low."""
    values = [Fraction(v) if abs(v) >= 2.0**-126 else Fraction(0) for v in group]
    exponent = max(lowest, frexp(max(map(abs, group)))[1] - bits - 3)
    while True:
        mantissas = [round(v / Fraction(2) ** exponent) for v in values]
        if max(abs(m) for m in mantissas) < 1 << (bits - 1):
            return mantissas, exponent
        exponent += 1


def sample(random: np.random.Generator, spread: int) -> np.ndarray:
    """Vectors of 80 whose groups have magnitudes 2**-spread to 2**spread; the third group is shorter."""
    exponents = random.integers(-spread, spread, (40, 3), endpoint=True)
    return np.ldexp(random.standard_normal((40, 80)), np.repeat(exponents, 32, axis=1)[:, :80]).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("spread", [5, 120])
def test_against_fractions(bits: int, spread: int):
    x = sample(np.random.default_rng(bits + spread), spread)
    result = quantize(x, bits)
    assert result.mantissas.shape == (40, 80)
    assert result.exponents.shape == (40, 3)
    for row, vector in enumerate(x.tolist()):
        for group in range(3):
            part = slice(BLOCK * group, BLOCK * (group + 1))
            expected = exact_group(vector[part], bits, EXPONENT_MIN)
            assert (result.mantissas[row, part].tolist(), int(result.exponents[row, group])) == expected


@pytest.mark.parametrize("bits", [8, 16])
def test_error_and_tightness(bits: int):
    x = sample(np.random.default_rng(1), 30)
    result = quantize(x, bits)
    error = np.abs(result.to_float() - x)
    unit = np.ldexp(1.0, result.exponents).repeat(32, axis=1)[:, :80]
    assert (error <= unit / 2).all()
    for part in (slice(0, 32), slice(32, 64), slice(64, 80)):
        largest = np.abs(x[:, part].astype(np.float64)).max(axis=1, keepdims=True)
        assert (error[:, part] <= largest / ((1 << (bits - 1)) - 1)).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_never_wraps(bits: int, sign: int):
    """Just below, at and above the tie at which the largest mantissa would round up to 2**(bits - 1)."""
    half = 1 << (bits - 1)
    for factor in (1, 2.0**90, 2.0**-90):
        x = np.zeros((3, 32), np.float32)
        x[:, 5] = np.float32(sign * factor) * array(half - 0.5 - 2.0**-7, half - 0.5, half - 0.25)
        result = quantize(x, bits)
        base = int(np.log2(factor))
        assert result.mantissas[:, 5].tolist() == [sign * (half - 1), sign * half // 2, sign * half // 2]
        assert result.exponents[:, 0].tolist() == [base, base + 1, base + 1]


def test_ties_are_even():
    x = array([100, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3])
    assert quantize(x, 8).mantissas.tolist() == [[100, 0, 2, 2, 0, -2, -2, 3]]


def test_the_ends_of_float32():
    """Zeros, subnormals and the smallest numbers have the lowest exponent; the largest is far from the highest."""
    x = np.zeros((4, 32), np.float32)
    x[1] = floats(np.uint32(0x007FFFFF))
    x[2] = 2.0**-126
    x[3] = -floats(np.uint32(0x7F7FFFFF))
    for bits, smallest in ((8, 4), (16, 4)):
        result = quantize(x, bits)
        assert result.exponents[:3, 0].tolist() == [EXPONENT_MIN] * 3
        assert result.mantissas[:3, 0].tolist() == [0, 0, smallest]
        assert result.mantissas[3, 0] == -(1 << (bits - 2))
        assert result.exponents[3, 0] == 128 - (bits - 2) <= EXPONENT_MAX


def test_spread():
    """Exponents of one vector are raised to the largest minus the spread, and the mantissas fit them."""
    x = sample(np.random.default_rng(2), 20)
    free, limited = quantize(x, 8), quantize(x, 8, spread=3)
    top = free.exponents.max(axis=1, keepdims=True)
    assert ((top - free.exponents) > 3).any()
    assert (limited.exponents == np.maximum(free.exponents, top - 3)).all()
    per_element = limited.exponents.repeat(32, axis=1)[:, :80]
    assert (limited.mantissas == np.rint(np.ldexp(x.astype(np.float64), -per_element))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad: float):
    x = np.zeros((2, 40), np.float32)
    x[1, 35] = bad
    with pytest.raises(NumericsError, match=r"element \(1, 35\)"):
        quantize(x, 8)
