# SPDX-License-Identifier: Apache-2.0
"""The precision of cached keys: factors of pairs, a centre that is the mean of the rotated bias, and bits."""

import numpy as np
import pytest

from hw.spec.numerics.attention import cache_keys
from hw.spec.numerics.vector import rotary
from sw.model.linear import QuantizedLinear
from sw.program.keys import AUTO_BITS, LIMIT, KeyHeads, key_forms, key_heads, pair_factors, scale_rows
from sw.program.weights import rotary_rows

HEAD, CONTEXT = 64, 500
ZEROS = np.zeros(2 * HEAD, np.float32)


def table() -> np.ndarray:
    angles = np.arange(CONTEXT)[:, None] * 10_000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    return rotary_rows(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), HEAD)


def turned(x: np.ndarray) -> np.ndarray:
    """float32 [CONTEXT, HEAD] as the device rotates them."""
    rows, pairs = table(), x.reshape(CONTEXT, -1, 2)
    both = rotary(pairs[..., 0], pairs[..., 1], rows[:, ::2], rows[:, 1::2])
    return np.stack(both, axis=-1).reshape(CONTEXT, HEAD)


def layer(rng: np.random.Generator, bias: np.ndarray | None) -> QuantizedLinear:
    q = rng.integers(0, 16, (2 * HEAD, 96)).astype(np.uint8)
    scales = np.repeat([0.5, 2.0], HEAD)[:, None] * np.ones((1, 3), np.float32) / 50
    return QuantizedLinear("k", q, scales.astype(np.float32), np.full((2 * HEAD, 3), 8, np.uint8), 32, 4, bias)


def test_deviation():
    """That of the products with inputs whose elements have a mean square of 1 before the norm's weight."""
    rng = np.random.default_rng(3)
    norm = rng.uniform(0.5, 1.5, 96).astype(np.float32)
    keys = layer(rng, None)
    queries = layer(rng, np.repeat([1.0, 3.0], HEAD).astype(np.float32))
    found = key_heads(keys, queries, norm, 1, False)
    inputs = rng.standard_normal((4000, 96)) * norm
    measured = (inputs @ keys.dequantize().T).std(axis=0)
    assert found.bias is None and (found.factors == 1).all()
    assert found.deviation[0] == pytest.approx(measured, rel=0.1)
    assert found.deviation[0].mean() == pytest.approx(measured.mean(), rel=0.01)
    assert queries.bias is not None
    squares = np.square(inputs @ queries.dequantize().T + queries.bias).mean(axis=0)
    assert found.queries[0] == pytest.approx(squares, rel=0.15)
    # Two heads of queries for each head of keys.
    few = key_heads(keys.with_rows(slice(HEAD)), queries, norm, 1, False)
    assert few.queries == pytest.approx(found.queries.reshape(2, HEAD).mean(axis=0)[None])


@pytest.mark.parametrize(
    ("bias", "head_norm", "kept"),
    [(None, False, False), (ZEROS, False, False), (1 + ZEROS, True, False), (1 + ZEROS, False, True)],
    ids=["none", "zeros", "norm", "bias"],
)
def test_which_biases_count(bias, head_norm, kept):
    """None, zeros, and one before a norm of every head have no centre."""
    keys = layer(np.random.default_rng(1), bias)
    heads = key_heads(keys, keys, np.ones(96, np.float32), 2, head_norm)
    assert (pair_factors(heads, table(), CONTEXT) is not None) == kept
    forms = key_forms(heads, table(), CONTEXT, AUTO_BITS)
    assert [form.centre is not None for form in forms] == [kept, kept]
    assert [form.bits for form in forms] == [8, 8]
    assert [form.bits for form in key_forms(heads, table(), CONTEXT, "16")] == [16, 16]


def heads_of(bias: np.ndarray) -> KeyHeads:
    """Heads whose other numbers are all 1."""
    ones = np.ones(bias.shape)
    return KeyHeads(bias, ones, ones.copy(), ones.astype(np.float32))


@pytest.mark.parametrize(("pair", "bits"), [(31, 8), (0, 16)], ids=["slow", "fast"])
def test_centre_and_bits(pair, bits):
    """In a pair that turns slowly a centre removes nearly all; otherwise 16 bits keep the error small."""
    rng = np.random.default_rng(5)
    bias = rng.standard_normal(HEAD).astype(np.float32)
    bias[2 * pair : 2 * pair + 2] += 60
    heads = heads_of(np.stack([bias, bias / 60]))
    form, other = key_forms(heads, table(), CONTEXT, AUTO_BITS)
    assert (form.bits, other.bits) == (bits, 8)
    assert form.centre is not None
    rest = turned(np.broadcast_to(bias, (CONTEXT, HEAD))) - form.centre
    assert np.abs(rest.mean(axis=0)).max() < 1e-4
    assert (np.abs(rest).max() > LIMIT) == (bits == 16)
    keys = turned(bias + rng.standard_normal((CONTEXT, HEAD)).astype(np.float32))

    def error(centre: np.ndarray, width: int) -> float:
        cached = cache_keys(keys, centre, width).to_float() + centre.astype(np.float64)
        return float((cached - keys)[:, pair // 16 * 32 :][:, :32].std())

    assert error(form.centre, form.bits) < 0.03 < error(np.zeros(HEAD, np.float32), 8)


def test_without_a_rotation():
    """The bias is the same at all positions, so the centre is the bias."""
    bias = np.random.default_rng(2).standard_normal((1, HEAD)).astype(np.float32) * 100
    (form,) = key_forms(heads_of(bias), None, CONTEXT, AUTO_BITS)
    assert form.bits == 8 and form.centre is not None
    assert np.array_equal(form.centre, bias[0])


def test_factors():
    """Powers of two, the same for both elements of a pair, that make the pairs about as large; 1 in padding."""
    rng = np.random.default_rng(4)
    bias = np.zeros((2, HEAD), np.float32)
    bias[0, 6:8] = 30, -40
    heads = heads_of(bias)
    heads.deviation[:] = rng.uniform(0.8, 1.2, bias.shape)
    heads.deviation[1, 60:] = 0
    heads.deviation[1, 58:60] = 20
    factors = pair_factors(heads, table(), CONTEXT)
    assert factors is not None and factors.dtype == np.float32
    assert np.array_equal(factors[:, ::2], factors[:, 1::2])
    assert np.array_equal(np.log2(factors), np.rint(np.log2(factors)))
    expected = np.ones((2, HEAD // 2))
    # 50 + 3 deviations of the pair, and 60, against 3.
    expected[0, 3], expected[1, 29] = 16, 16
    assert np.array_equal(factors[:, ::2], expected)
    folded = heads.folded(factors).bias
    assert folded is not None and np.array_equal(folded, bias / factors)


def test_factors_change_no_score():
    """Layers whose rows are scaled, and scores of their results, in exact arithmetic."""
    rng = np.random.default_rng(6)
    keys = layer(rng, rng.standard_normal(2 * HEAD).astype(np.float32))
    factors = np.repeat(2.0 ** rng.integers(-10, 11, HEAD), 2).astype(np.float32)
    scaled = scale_rows(keys, factors)
    assert np.array_equal(scaled.dequantize(), keys.dequantize() * factors[:, None])
    assert scaled.bias is not None and keys.bias is not None and np.array_equal(scaled.bias, keys.bias * factors)
    k, q = (rng.standard_normal((CONTEXT, HEAD)).astype(np.float32) for _ in range(2))
    folded = turned(k / factors[:HEAD]).astype(np.float64) @ (turned(q * factors[:HEAD]).astype(np.float64)).T
    assert np.array_equal(turned(q * factors[:HEAD]), turned(q) * factors[:HEAD])
    assert np.allclose(folded, turned(k).astype(np.float64) @ turned(q).astype(np.float64).T, rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "query", "bits"), [(5, 1, 8), (15, 1, 8), (150, 1, 16), (15, 1000, 16)], ids=["small", "one", "large", "q"]
)
def test_factors_and_bits(size, query, bits):
    """With factors a pair with a larger bias is left to 8 bits, unless queries are large in the same pair."""
    bias = np.zeros((1, HEAD), np.float32)
    bias[0, 0] = size
    heads = heads_of(bias)
    heads.queries[0, :2] = query
    factors = pair_factors(heads, table(), CONTEXT)
    assert factors is not None
    (plain,), (form,) = (key_forms(one, table(), CONTEXT, AUTO_BITS) for one in (heads, heads.folded(factors)))
    assert (plain.bits, form.bits) == (16 if size > LIMIT else 8, bits)
    assert np.array_equal(form.factors, factors[0])
