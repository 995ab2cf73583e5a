# SPDX-License-Identifier: Apache-2.0
"""exp and sigma: the tables, one value at a time with Python's integers, and the error against float64."""

from decimal import Decimal, getcontext, localcontext

import numpy as np
import pytest

from hw.spec.numerics import functions
from hw.spec.numerics.functions import OFFSET_BITS, ONE, VALUE_BITS, Table, exp, exp_table, sigma, sigma_table
from sim.bench.floats import extremes, floats
from tests.hw.spec.numerics import exact
from tests.hw.spec.numerics.exact import array, bits

SLICE = 1 << 22
EXP_POSITIONS = 1 << 24
SIGMA_POSITIONS = 1 << 27


def numbers(seed: int, count: int, largest: float) -> np.ndarray:
    """Positive float32, half of them uniform and half in every binade, with the largest."""
    random = np.random.default_rng(seed)
    uniform, binades = (
        random.uniform(0, largest, count // 2),
        np.exp2(random.uniform(-40, np.log2(largest), count // 2)),
    )
    return np.concatenate([uniform, binades, [largest]]).astype(np.float32)


def polynomial(table: Table, position: int) -> int:
    """The definition, with Python's integers."""
    row, low = divmod(position, 1 << OFFSET_BITS)
    offset, half = low - (1 << (OFFSET_BITS - 1)), 1 << (OFFSET_BITS - 1)
    constant, slope, curvature = (int(column[row]) for column in table)
    inner = slope + (curvature * offset + half) // (1 << OFFSET_BITS)
    return constant + (inner * offset + half) // (1 << OFFSET_BITS)


def halves_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def exact_exp(number: int) -> int:
    if exact.is_nan(number) or exact.is_infinite(number):
        return 0
    _, significand, exponent = exact.parts(number)
    if significand * 2 ** max(exponent, 0) >= 32 << max(-exponent, 0):
        return 0
    product = significand * functions.log2e()
    right = 9 - exponent
    whole, fraction = divmod(product >> right if right >= 0 else product << -right, 1 << 24)
    return halves_up(polynomial(exp_table(), fraction), 8 << whole)


def exact_sigma(number: int) -> int:
    sign, significand, exponent = exact.parts(number)
    if exact.is_nan(number) or exact.is_infinite(number) or exact.value(number & 0x7FFFFFFF) >= 16:
        result = ONE
    else:
        position = significand << (exponent + 23) if exponent >= -23 else significand >> -(exponent + 23)
        result = halves_up(polynomial(sigma_table(), position), 8)
    return ONE - result if sign else result


def test_exp_is_the_definition():
    given = np.concatenate([extremes(), bits(-numbers(1, 20_000, 40.0))])
    given = given[(given >> 31 == 1) | (given == 0)]
    results = exp(floats(given)).tolist()
    assert results == [exact_exp(n) for n in given.tolist()]


def test_sigma_is_the_definition():
    positive = bits(numbers(2, 20_000, 20.0))
    given = np.concatenate([extremes(), positive, positive | np.uint32(1 << 31)])
    assert sigma(floats(given)).tolist() == [exact_sigma(n) for n in given.tolist()]


def test_special_values():
    assert exp(array(0, -0.0, -1e-40, -31.999, -32, -np.inf, np.nan)).tolist() == [ONE, ONE, ONE, 0, 0, 0, 0]
    assert sigma(array(0, -0.0, 1e-40, 16, -16, np.inf, -np.inf)).tolist() == [ONE // 2] * 3 + [ONE, 0] * 2
    with pytest.raises(ValueError, match=r"not 1\.5"):
        exp(array(0, 1.5))


def test_error_of_exp():
    """The error is at most 2**-23 of the value plus the rounding to 2**-24, in the whole range of arguments."""
    difference = numbers(3, 1_000_000, 20.0)
    truth = np.exp(-difference.astype(np.float64))
    error = np.abs(exp(-difference) / ONE - truth)
    relative = ((error - 2.0**-25) / truth).max()
    print(f"exp: largest relative error 2**{np.log2(relative):.2f} beside the rounding")
    assert 2.0**-25 < relative <= 2.0**-23


def test_error_of_sigma():
    g = numbers(4, 1_000_000, 20.0)
    g = np.concatenate([g, -g])
    error = np.abs(sigma(g) / ONE - 1 / (1 + np.exp(-g.astype(np.float64)))).max()
    print(f"sigma: largest error 2**{np.log2(error):.2f}")
    assert 2.0**-24 < error < 2.0**-23


def slices(positions: int, stride: int) -> list:
    """One slice of the positions that strides over all, and as many as cover all for the full run."""
    starts = range(0, positions, SLICE)
    return [(0, positions, stride), *(pytest.param(s, s + SLICE, 1, marks=pytest.mark.full) for s in starts)]


@pytest.mark.parametrize(("start", "stop", "stride"), slices(EXP_POSITIONS, 23))
def test_polynomial_of_exp(start: int, stop: int, stride: int):
    """Every fraction f: 2**-f within 2**-25, never above 1, and never rising."""
    f = np.arange(start, stop, stride)
    value = exp_table().evaluate(f)
    assert (value <= 1 << VALUE_BITS).all()
    assert (value > 1 << (VALUE_BITS - 1)).all()
    assert (np.diff(value) <= 0).all()
    assert np.abs(np.ldexp(value.astype(np.float64), -VALUE_BITS) * np.exp2(f / EXP_POSITIONS) - 1).max() <= 2.0**-25


@pytest.mark.parametrize(("start", "stop", "stride"), slices(SIGMA_POSITIONS, 173))
def test_polynomial_of_sigma(start: int, stop: int, stride: int):
    g = np.arange(start, stop, stride)
    value = sigma_table().evaluate(g)
    assert (value < 1 << VALUE_BITS).all()
    # The largest error of all positions is 0.44 % above 2**-25.
    error = np.abs(np.ldexp(value.astype(np.float64), -VALUE_BITS) - 1 / (1 + np.exp(-g / 2**23))).max()
    assert error <= 1.005 * 2.0**-25


def widths(column: np.ndarray) -> int:
    """Bits of a column: one sign for all is not stored."""
    magnitude = int(np.abs(column).max()).bit_length()
    return magnitude + int((column < 0).any() and (column >= 0).any())


def test_widths():
    """Table rows and multipliers have the widths that the docstring states."""
    assert [widths(column) for column in exp_table()] == [27, 21, 13]
    assert [widths(column) for column in sigma_table()] == [27, 20, 14]
    assert functions.log2e().bit_length() == 34
    for table in (exp_table(), sigma_table()):
        assert np.abs(table.curvatures).max() < 1 << 17
        assert (np.abs(table.slopes) + np.abs(table.curvatures)).max() < 1 << 26


def test_tables_are_generated():
    """The decimal context of the caller has no effect, and the values at the nodes are exact to one unit."""
    with localcontext() as context:
        context.prec = 5
        assert [
            c.tolist() for c in functions.quadratics(lambda f: (-f * Decimal(2).ln()).exp(), 64, Decimal(2) ** -6)
        ] == [c.tolist() for c in exp_table()]
    assert getcontext().prec == 28
    assert len(exp_table().constants) == 64
    assert len(sigma_table().constants) == 512
    middle = np.exp2(27 - (np.arange(64) + 0.5) / 64)
    assert np.abs(exp_table().constants - middle).max() <= 0.5 + 1e-6
