# SPDX-License-Identifier: Apache-2.0
"""The precision of cached keys: the centre is the mean of the rotated bias, and bits follow from what stays."""

import numpy as np
import pytest

from hw.spec.numerics.attention import cache_keys
from hw.spec.numerics.vector import rotary
from sw.model.linear import QuantizedLinear
from sw.program.keys import AUTO_BITS, LIMIT, KeyHeads, key_forms, key_heads
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
    found = key_heads(keys, norm, 2, False)
    products = rng.standard_normal((4000, 96)) * norm @ keys.dequantize().T
    measured = products.reshape(-1, 2, HEAD).std(axis=(0, 2))
    assert found.bias is None
    assert found.deviation == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("bias", "head_norm", "kept"),
    [(None, False, False), (ZEROS, False, False), (1 + ZEROS, True, False), (1 + ZEROS, False, True)],
    ids=["none", "zeros", "norm", "bias"],
)
def test_which_biases_count(bias, head_norm, kept):
    """None, zeros, and one before a norm of every head have no centre."""
    heads = key_heads(layer(np.random.default_rng(1), bias), np.ones(96, np.float32), 2, head_norm)
    forms = key_forms(heads, table(), CONTEXT, AUTO_BITS)
    assert [form.centre is not None for form in forms] == [kept, kept]
    assert [form.bits for form in forms] == [8, 8]
    assert [form.bits for form in key_forms(heads, table(), CONTEXT, "16")] == [16, 16]


@pytest.mark.parametrize(("pair", "bits"), [(31, 8), (0, 16)], ids=["slow", "fast"])
def test_centre_and_bits(pair, bits):
    """In a pair that turns slowly a centre removes nearly all; otherwise 16 bits keep the error small."""
    rng = np.random.default_rng(5)
    bias = rng.standard_normal(HEAD).astype(np.float32)
    bias[2 * pair : 2 * pair + 2] += 60
    heads = KeyHeads(np.stack([bias, bias / 60]), np.ones(2))
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
    (form,) = key_forms(KeyHeads(bias, np.ones(1)), None, CONTEXT, AUTO_BITS)
    assert form.bits == 8 and form.centre is not None
    assert np.array_equal(form.centre, bias[0])
