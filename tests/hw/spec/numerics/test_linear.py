# SPDX-License-Identifier: Apache-2.0
"""The numerics against Python's own integers and fractions: independent code without numpy."""

from fractions import Fraction

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.linear import (
    Activations,
    NumericsError,
    Weights,
    accumulate,
    group_sums,
    linear,
    quantize_activations,
    quantize_scales,
    quantize_zero_points,
    to_float32,
)

CONFIG = AcceleratorConfig()
FIXED = AcceleratorConfig(zero_point="fixed")


def rounded(value: Fraction) -> int:
    """Rounded to the nearest integer, half to even, as Python's round does with a fraction."""
    return round(value)


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def float32_bits(value: Fraction, negative_zero: bool) -> int:
    """Bits of the nearest binary32, half to even; subnormal results are zero, too large ones infinite."""
    if value == 0:
        return 0x80000000 if negative_zero else 0
    sign, size = (1, -value) if value < 0 else (0, value)
    exponent = 0
    while size >= power(exponent + 1):
        exponent += 1
    while size < power(exponent):
        exponent -= 1
    significand = rounded(size / power(exponent - 23))
    if significand == 1 << 24:
        significand, exponent = 1 << 23, exponent + 1
    if exponent < -126:
        return sign << 31
    if exponent > 127:
        return sign << 31 | 0xFF << 23
    return sign << 31 | (exponent + 127) << 23 | (significand - (1 << 23))


def exact_sum(weights: Weights, activations: Activations, fraction_bits: int, m: int, n: int) -> int:
    """Y[m, n], directly from the definition."""
    size = weights.q.shape[1] // weights.scale_mantissas.shape[1]
    total = 0
    for k in range(weights.q.shape[1]):
        centred = (int(weights.q[n, k]) << fraction_bits) - int(weights.zero_points[n, k // size])
        total += int(weights.scale_mantissas[n, k // size]) * centred * int(activations.mantissas[m, k])
    return total


def layer(config: AcceleratorConfig, random: np.random.Generator, tokens=3, n=5, k=64, groups=4, spread=60):
    low, high = (0, config.weight_max) if config.zero_point == "integer" else (-(1 << 15), (1 << 15) - 1)
    weights = Weights(
        random.integers(0, config.weight_max, (n, k), endpoint=True).astype(np.uint8),
        random.integers(low, high, (n, groups), endpoint=True),
        random.integers(-config.scale_max, config.scale_max, (n, groups), endpoint=True),
        random.integers(-spread, spread, n),
    )
    mantissas = random.integers(-config.activation_max, config.activation_max, (tokens, k), endpoint=True)
    return weights, Activations(mantissas, random.integers(-spread, spread, tokens))


@pytest.mark.parametrize("config", [CONFIG, FIXED, AcceleratorConfig(weight_bits=7, activation_bits=9)])
def test_linear_is_exact(config: AcceleratorConfig):
    random = np.random.default_rng(1)
    for _ in range(5):
        weights, activations = layer(config, random)
        sums, y = accumulate(config, weights, activations), linear(config, weights, activations)
        for m in range(3):
            for n in range(5):
                exact = exact_sum(weights, activations, config.fraction_bits, m, n)
                assert sums[m, n] == exact
                exponent = int(weights.exponents[n] + activations.exponents[m]) - 15 - config.fraction_bits
                assert int(y.view(np.uint32)[m, n]) == float32_bits(exact * power(exponent), False)


def test_linear_at_the_bound():
    """K = 32,768 with all values at their extremes: no intermediate value overflows."""
    config = AcceleratorConfig(max_k=32768, weight_bits=4, zero_point="fixed", max_group_size=256)
    for sign in (1, -1):
        weights = Weights(
            np.full((1, 32768), 15, np.uint8),
            np.full((1, 128), -(1 << 15)),
            np.full((1, 128), sign * 32767),
            np.zeros(1, np.int64),
        )
        activations = Activations(np.full((1, 32768), 32767), np.zeros(1, np.int64))
        exact = sign * 32768 * ((15 << 11) + (1 << 15)) * 32767 * 32767
        assert int(accumulate(config, weights, activations)[0, 0]) == exact
        assert abs(exact) < 1 << (config.sum_bits - 1)


def test_group_sums():
    activations = Activations(np.arange(24).reshape(2, 12), np.zeros(2, np.int64))
    assert group_sums(activations, 4).tolist() == [[6, 22, 38], [54, 70, 86]]


def test_splitting_a_group_changes_nothing():
    weights, activations = layer(CONFIG, np.random.default_rng(2))
    split = weights._replace(
        zero_points=np.repeat(weights.zero_points, 4, axis=1),
        scale_mantissas=np.repeat(weights.scale_mantissas, 4, axis=1),
    )
    assert np.array_equal(linear(CONFIG, weights, activations), linear(CONFIG, split, activations))


@pytest.mark.parametrize("bits", range(8, 17))
def test_activations(bits: int):
    """The exponent is the smallest that fits, and every mantissa is rounded half to even."""
    config, random = AcceleratorConfig(activation_bits=bits), np.random.default_rng(bits)
    limit = 2 ** (bits - 1) - 1
    x = random.normal(size=(40, 9)) * 2.0 ** random.integers(-90, 90, (40, 1))
    x[0] = [limit, -limit, limit + 0.5, limit + 0.25, 0.5, 1.5, 2.5, -0.5, -1.5]
    x[1] = [2 * limit + 1, 1, 3, 5, -1, -3, 0, 2 * limit + 1, 7]
    x[2] = 0
    x[3, :] = 2.0**-100
    result = quantize_activations(config, x)
    for m, token in enumerate(x.tolist()):
        exponent = int(result.exponents[m])
        mantissas = [rounded(Fraction(v) / power(exponent)) for v in token]
        assert result.mantissas[m].tolist() == mantissas
        if any(token):
            assert max(map(abs, mantissas)) <= limit
            smaller = [rounded(Fraction(v) / power(exponent - 1)) for v in token]
            assert max(map(abs, smaller)) > limit, "a smaller exponent would do"
        else:
            assert exponent == 0


def test_scales():
    random = np.random.default_rng(3)
    scales = random.normal(size=(200, 4)) * 2.0 ** random.integers(-90, 90, (200, 1))
    scales[0] = [1, -1, 0.5, 0]
    scales[1] = [32767 / 32768, -32767 / 32768, 0, 0.25]
    scales[2] = [32767.5 / 32768, 0, 0, 0]
    scales[3] = 0
    mantissas, exponents = quantize_scales(scales)
    for n, row in enumerate(scales.tolist()):
        exponent, largest = int(exponents[n]), Fraction(max(map(abs, row)))
        assert mantissas[n].tolist() == [rounded(Fraction(s) * power(15 - exponent)) for s in row]
        if largest:
            assert largest <= 32767 * power(exponent - 15)
            assert largest > 32767 * power(exponent - 1 - 15), "a smaller exponent would do"
            assert max(map(abs, mantissas[n].tolist())) <= 32767
        else:
            assert exponent == 0


def test_zero_points():
    assert quantize_zero_points(CONFIG, np.array([[0, 8, 15.0]])).tolist() == [[0, 8, 15]]
    values = [0, 8.5, -8.25, 15.99951171875, 1 / 4096, 3 / 4096, -1 / 4096, -16]
    expected = [rounded(Fraction(v) * 2048) for v in values]
    assert quantize_zero_points(FIXED, np.array([values])).tolist() == [expected]


@pytest.mark.slow
def test_float32():
    """Every alignment with ties and their neighbours, near both ends of the range and in the middle."""
    random = np.random.default_rng(4)
    values = [0, 1, -1, 3, (1 << 62) - 1, -(1 << 62), (1 << 63) - 1, -(1 << 63) + 1, (1 << 53) + 1, (1 << 54) - 1]
    for length in range(1, 63):
        values += [int(random.integers(1 << (length - 1), 1 << length)) * int(random.choice([-1, 1]))]
    for length in range(25, 63):
        for significand in (0x800000, 0x800001, 0xFFFFFE, 0xFFFFFF):
            middle = (2 * significand + 1) << (length - 25)
            values += [middle, middle - 1, middle + 1, -middle]
    for base in (-300, -149 - 40, -126 - 40, -150, -126, 0, 64, 127 - 40, 128 - 62, 104, 127, 250):
        for shift in (0, 1, 17):
            exponents = np.full(len(values), base + shift)
            seen = to_float32(np.array(values), exponents).view(np.uint32)
            for value, bits in zip(values, seen.tolist()):
                assert bits == float32_bits(value * power(base + shift), False), f"{value} * 2**{base + shift}"


def test_float32_flushes_to_a_zero_of_the_same_sign():
    bits = to_float32(np.array([1, -1, 0, (1 << 24) - 1, (1 << 25) - 1]), np.array([-127, -127, 5, -150, -151]))
    expected = [0, 0x80000000, 0, 0, 0x00800000]  # the last one rounds up to the smallest normal number
    assert bits.view(np.uint32).tolist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize_activations(CONFIG, np.array([[1, np.nan]])),
            r"finite numbers, not nan \(token 0, element 1\)",
        ),
        (
            lambda: quantize_activations(CONFIG, np.array([[1, 2], [-np.inf, 1]])),
            r"finite .* not -inf \(token 1, element 0\)",
        ),
        (
            lambda: quantize_activations(CONFIG, np.array([[1.0], [2.0**200]])),
            r"exponent of token 1 is 186, .* -128 to 127",
        ),
        (lambda: quantize_activations(CONFIG, np.array([[2.0**-200]])), r"exponent of token 0 is -214, .* -128 to 127"),
        (lambda: quantize_scales(np.array([[1, np.inf]])), r"scales are finite numbers, not inf \(row 0, group 1\)"),
        (lambda: quantize_scales(np.array([[1.0], [2.0**130]])), r"exponent of row 1 is 131, .* -128 to 127"),
        (lambda: quantize_scales(np.array([[2.0**-140]])), r"exponent of row 0 is -139, .* -128 to 127"),
        (
            lambda: quantize_zero_points(CONFIG, np.array([[7.5]])),
            r'^zero point 7.5 has a fraction: .* zero_point="fixed"',
        ),
        (lambda: quantize_zero_points(CONFIG, np.array([[16]])), r"zero point 16 is outside the field's 0 to 15"),
        (lambda: quantize_zero_points(CONFIG, np.array([[-1]])), r"zero point -1 is outside the field's 0 to 15"),
        (lambda: quantize_zero_points(FIXED, np.array([[16]])), r"zero point 16 is outside the field's -16 to 15.9995"),
        (lambda: quantize_zero_points(FIXED, np.array([[np.nan]])), r"zero point nan is outside every field"),
    ],
)
def test_refusal_names_rule_and_value(call, message: str):
    with pytest.raises(NumericsError, match=message):
        call()
