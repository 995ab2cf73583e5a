# SPDX-License-Identifier: Apache-2.0
"""Joined and ordered layers have the results of the layers that they are made of."""

from dataclasses import replace

import numpy as np
import pytest

from sw.devices import make_config
from sw.program.weights import can_join, interleave, join, rotary_rows, rotated_rows
from tests.sw.fixtures.linears import expected, random_activations, random_linear, same_bits

CONFIG = make_config(tile=8)


def layers(*shapes, seed=3):
    rng = np.random.default_rng(seed)
    return [random_linear(rng, n, 64, size, bits=bits) for n, size, bits in shapes], random_activations(rng, 3, 64)


def test_join():
    parts, x = layers((7, 32, 4), (9, 32, 2), (1, 32, 4))
    joined = join("all", parts)
    assert (joined.name, joined.n, joined.bits, joined.bias) == ("all", 17, 4, None)
    assert same_bits(expected(CONFIG, joined, x), np.concatenate([expected(CONFIG, part, x) for part in parts], axis=1))
    assert join("one", parts[:1]).name == "one"


def test_join_of_biases_and_zero_points():
    """A layer without a bias adds 0; integer zero points become floats beside float ones."""
    (first, second), _ = layers((2, 32, 4), (3, 32, 4))
    first = replace(first, bias=np.array([1, 2], np.float32))
    second = replace(second, zero_points=second.zero_points.astype(np.float32) + np.float32(0.5))
    joined = join("both", [first, second])
    assert joined.bias is not None and joined.bias.tolist() == [1, 2, 0, 0, 0]
    assert joined.zero_points.dtype == np.float32
    assert np.array_equal(joined.dequantize(), np.concatenate([first.dequantize(), second.dequantize()]))


@pytest.mark.parametrize(
    ("other", "fits"), [((5, 32, 4), True), ((5, 32, 2), True), ((5, 64, 4), False), ((5, 32, 8), False)]
)
def test_can_join(other, fits):
    parts, _ = layers((5, 32, 4), other)
    assert can_join(CONFIG, parts) == fits
    assert can_join(CONFIG, parts[::-1]) == fits


def test_interleave():
    (gate, up), x = layers((5, 32, 4), (5, 32, 4))
    both = expected(CONFIG, interleave("both", gate, up), x)
    assert same_bits(both[:, ::2].copy(), expected(CONFIG, gate, x))
    assert same_bits(both[:, 1::2].copy(), expected(CONFIG, up, x))


def test_rotated_rows():
    assert rotated_rows(2, 6, 6, False).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert rotated_rows(1, 6, 4, False).tolist() == [0, 2, 1, 3, 4, 5]
    assert rotated_rows(2, 4, 4, True).tolist() == list(range(8))


def test_rotary_rows():
    """Elements that are not rotated are turned by 0."""
    cosines, sines = np.array([[0.5, 0.25], [1, 2]]), np.array([[3, 4], [5, 6]])
    assert rotary_rows(cosines, sines, 6).tolist() == [[0.5, 3, 0.25, 4, 1, 0], [1, 5, 2, 6, 1, 0]]
    assert rotary_rows(cosines, sines, 4).dtype == np.float32
