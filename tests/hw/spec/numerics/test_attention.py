# SPDX-License-Identifier: Apache-2.0
"""Attention against the definition in Python's integers, and against softmax in float64."""

from fractions import Fraction
from math import frexp

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.attention import (
    CHUNK,
    Probabilities,
    attention,
    cache_keys,
    cache_values,
    key_spread,
    probabilities,
    scores,
    weighted_values,
)
from hw.spec.numerics.block_float import quantize
from hw.spec.numerics.functions import ONE, exp
from hw.spec.numerics.linear import quantize_activations
from hw.spec.numerics.planes import plane_count
from hw.spec.numerics.reciprocal import rsqrt
from sim.bench.floats import floats
from tests.hw.spec.numerics import exact
from tests.hw.spec.numerics.exact import array, bits

CONFIG = AcceleratorConfig()
ROWS, HEAD = 3, 64
SCALE = rsqrt(np.array([HEAD], np.float32))


def case(positions: int, key_bits: int = 8, seed: int = 1, head: int = HEAD, spread: int = 3):
    """Queries, keys and values [.., head], with groups of different size."""
    random = np.random.default_rng([positions, key_bits, seed])

    def vectors(count: int) -> np.ndarray:
        groups = random.integers(-spread, spread, (count, head // 32), endpoint=True)
        return np.ldexp(random.standard_normal((count, head)), groups.repeat(32, axis=1)).astype(np.float32)

    return vectors(ROWS), vectors(positions), vectors(positions)


def causal(positions: int) -> np.ndarray:
    return np.arange(positions) <= np.arange(positions - ROWS, positions)[:, None]


def exact_bits(value: Fraction) -> int:
    """The bits of a number whose denominator is a power of two."""
    return exact.nearest(int(value < 0), abs(value.numerator), -(value.denominator.bit_length() - 1))


@pytest.mark.parametrize("key_bits", [8, 16])
def test_scores(key_bits: int):
    """The exact sum over all groups, rounded once, then one product."""
    q, k, _ = case(40, key_bits, spread=9)
    keys, visible = cache_keys(k, np.zeros(HEAD, np.float32), key_bits), causal(40)
    result = bits(scores(CONFIG, q, keys, SCALE, visible))
    activations = quantize_activations(CONFIG, q)
    stored = [[Fraction(v) for v in row] for row in keys.to_float().tolist()]
    for m in range(ROWS):
        x = [int(v) * Fraction(2) ** int(activations.exponents[m]) for v in activations.mantissas[m]]
        for n in range(40):
            product = exact_bits(sum((a * b for a, b in zip(x, stored[n])), Fraction(0)))
            expected = exact.mul(product, int(bits(SCALE)[0])) if visible[m, n] else 1 << 31 | exact.INFINITY
            assert result[m, n] == expected


@pytest.mark.parametrize(("key_bits", "spread"), [(8, 10), (16, 2)])
def test_spread_of_keys(key_bits: int, spread: int):
    """All powers of two of a key fit the scale mantissas of its planes."""
    assert key_spread(key_bits) == spread
    _, k, _ = case(200, key_bits, spread=30)
    keys = cache_keys(k, np.zeros(HEAD, np.float32), key_bits)
    differences = keys.exponents.max(axis=1) - keys.exponents.min(axis=1)
    assert differences.max() == spread
    planes = key_bits // 4
    assert 1 << (spread + 4 * (planes - 1)) <= CONFIG.scale_max < 1 << (spread + 4 * (planes - 1) + 1)
    assert plane_count(CONFIG, 8) == 2


def test_centre_is_subtracted():
    _, k, _ = case(20)
    centre = np.linspace(-50, 50, HEAD, dtype=np.float32)
    keys = cache_keys(k + centre, centre, 8)
    expected = [
        [exact.add(a, b ^ 1 << 31) for a, b in zip(row, bits(centre).tolist())] for row in bits(k + centre).tolist()
    ]
    assert np.array_equal(keys.mantissas, quantize(floats(expected), 8, spread=10).mantissas)


def test_probabilities():
    q, k, _ = case(300)
    s = scores(CONFIG, q, cache_keys(k, np.zeros(HEAD, np.float32), 8), SCALE, causal(300))
    p, total = probabilities(s)
    for row, got, sum_ in zip(s, p.tolist(), total.tolist()):
        largest = int(bits(row.max()))
        differences = [exact.add(v, largest ^ 1 << 31) for v in bits(row).tolist()]
        assert got == exp(floats(differences)).tolist()
        assert sum_ == sum(got)
        assert max(got) == ONE
    assert (p[~causal(300)] == 0).all()


@pytest.mark.parametrize("positions", [1, 40, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
@pytest.mark.parametrize("spread", [3, 60])
def test_weighted_values(positions: int, spread: int):
    """Chunk by chunk and group by group, with fractions."""
    random = np.random.default_rng(positions)
    p = random.integers(0, ONE, (2, positions), endpoint=True) >> random.integers(0, 25, (2, positions))
    weights = Probabilities(p, p.sum(axis=1))
    values = cache_values(case(positions, spread=spread)[2])
    result = bits(weighted_values(CONFIG, weights, values))
    for m in range(2):
        inverse = exact.nearest_quotient(0, 1, int(weights.total[m]), 24)
        for group in range(HEAD // 32):
            sums = [exact_chunk(p[m], values, group, start) for start in range(0, positions, CHUNK)]
            for j in range(32):
                total = sums[0][j]
                for chunk in sums[1:]:
                    total = exact.add(total, chunk[j])
                assert result[m, 32 * group + j] == exact.mul(total, inverse)


def exact_chunk(p: np.ndarray, values, group: int, start: int) -> list[int]:
    """Bits of the 32 sums of one chunk."""
    part = range(start, min(start + CHUNK, len(p)))
    scaled = [exact.nearest(0, int(p[t]), int(values.exponents[t, group]) - 24) for t in part]
    numbers = [exact.value(v) for v in scaled]
    largest = max(numbers)
    # Search upwards from an exponent that is too low.
    exponent = max(-128, frexp(float(largest))[1] - CONFIG.activation_bits - 2)
    while round(largest / Fraction(2) ** exponent) > CONFIG.activation_max:
        exponent += 1
    mantissas = [round(number / Fraction(2) ** exponent) for number in numbers]
    return [
        exact_bits(
            Fraction(2) ** exponent * sum(a * int(values.mantissas[t, 32 * group + j]) for a, t in zip(mantissas, part))
        )
        for j in range(32)
    ]


def test_rows_are_independent():
    q, k, v = case(300)
    keys, values, visible = cache_keys(k, np.zeros(HEAD, np.float32), 8), cache_values(v), causal(300)
    whole = attention(CONFIG, q, keys, values, SCALE, visible)
    for m in range(ROWS):
        row = attention(CONFIG, q[m : m + 1], keys, values, SCALE, visible[m : m + 1])
        assert np.array_equal(row[0], whole[m])


def softmax(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    s = np.where(visible, q.astype(np.float64) @ k.T.astype(np.float64) / np.sqrt(q.shape[1]), -np.inf)
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    return weights @ v.astype(np.float64) / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("key_bits", "bound"), [(8, 2.0**-6), (16, 2.0**-7)])
def test_error_of_attention(key_bits: int, bound: float):
    """Compared with float64 on the original keys and values. With 16-bit keys, the 8-bit values cause the error."""
    worst = 0.0
    for seed in range(5):
        q, k, v = case(700, key_bits, seed, spread=0)
        keys, values, visible = cache_keys(k, np.zeros(HEAD, np.float32), key_bits), cache_values(v), causal(700)
        error = np.abs(attention(CONFIG, q, keys, values, SCALE, visible) - softmax(q, k, v, visible))
        worst = max(worst, error.max())
    print(f"attention, keys of {key_bits} bits: largest error {worst:.5f} of values with deviation 1")
    assert 2.0**-12 < worst < bound


def test_error_beside_the_cache():
    """Compared with float64 on the keys and values in the cache: the error of q, p and exp only."""
    worst = 0.0
    for seed in range(5):
        q, k, v = case(700, 8, seed, spread=0)
        keys, values, visible = cache_keys(k, np.zeros(HEAD, np.float32), 8), cache_values(v), causal(700)
        error = np.abs(
            attention(CONFIG, q, keys, values, SCALE, visible) - softmax(q, keys.to_float(), values.to_float(), visible)
        )
        worst = max(worst, error.max())
    print(f"attention beside the cache: largest error 2**{np.log2(worst):.2f} of values with deviation 1")
    assert 2.0**-24 < worst < 2.0**-14


def test_a_head_with_a_shorter_group():
    """A head of 80: groups of 32, 32 and 16."""
    random = np.random.default_rng(4)
    q, k, v = (random.standard_normal((n, 80)).astype(np.float32) for n in (ROWS, 50, 50))
    keys, values = cache_keys(k, np.zeros(80, np.float32), 16), cache_values(v)
    scale = rsqrt(np.array([80], np.float32))
    result = attention(CONFIG, q, keys, values, scale, causal(50))
    truth = softmax(q, keys.to_float(), values.to_float(), causal(50))
    assert result.shape == (ROWS, 80)
    assert np.abs(result - truth).max() < 2.0**-13


def test_rows_without_a_maximum():
    """NaN, +infinity, or no visible position: the output is NaN, so the next operation detects it."""
    s = array([1, np.nan, 2], [1, np.inf, 2], [-np.inf] * 3, [-np.inf, 4, -np.inf])
    weights = probabilities(s)
    assert weights.p.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, ONE, 0]]
    values = cache_values(np.ones((3, 32), np.float32))
    result = bits(weighted_values(CONFIG, weights, values))
    assert (result[:3] == exact.NAN).all()
    assert (result[3] == bits(array(1))).all()


def test_tiny_values_are_legal():
    """Zero values have the lowest exponent, so they take no bits from the others; tiny values give zero results."""
    v = np.zeros((4, 32), np.float32)
    v[1] = 1.0
    v[2] = 2.0**-120
    weights = Probabilities(np.array([[ONE, ONE, ONE, ONE]]), np.array([4 * ONE]))
    assert (weighted_values(CONFIG, weights, cache_values(v)) == 0.25).all()
    assert (weighted_values(CONFIG, weights, cache_values(v * 0)) == 0).all()
    small = weighted_values(CONFIG, weights, cache_values(v * (np.arange(4) == 2)[:, None].astype(np.float32)))
    assert np.abs(small / 2.0**-122 - 1).max() < 2.0**-5
