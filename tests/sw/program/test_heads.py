# SPDX-License-Identifier: Apache-2.0
"""Padding of heads: the weights are the same at their new places, and zero or unused elsewhere."""

import numpy as np
import pytest

from sw.program.heads import pad_columns, pad_keys, pad_rows, padded_size
from sw.program.keys import KeyHeads
from tests.sw.fixtures.linears import random_linear


@pytest.mark.parametrize(("size", "padded"), [(16, 32), (32, 32), (80, 96), (112, 128), (240, 256), (256, 256)])
def test_sizes(size, padded):
    assert padded_size(size) == padded


def with_zeros(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Zeros after each head along an axis, one head after the other."""
    parts = np.split(values, values.shape[axis] // size, axis)
    shape = list(parts[0].shape)
    shape[axis] = padded_size(size) - size
    return np.concatenate([np.concatenate([part, np.zeros(shape, values.dtype)], axis) for part in parts], axis)


@pytest.mark.parametrize("zero_point", ["integer", "fixed"])
@pytest.mark.parametrize("size", [16, 80])
def test_rows(size, zero_point):
    rng = np.random.default_rng(size)
    layer = random_linear(rng, 3 * size, 96, 32, zero_point=zero_point)
    padded = pad_rows(layer, size)
    assert np.array_equal(padded.dequantize(), with_zeros(layer.dequantize(), size, 0))
    assert layer.bias is None or padded.bias is not None


@pytest.mark.parametrize(
    ("size", "group", "tile", "expected"),
    [
        (80, 128, 16, 16),
        (80, 32, 8, 16),
        (80, 160, 16, 32),
        (80, 80, 16, 16),
        (80, 80, 4, 20),
        (80, 128, 32, 16),
        (112, 64, 16, 16),
        (48, 96, 16, 32),
        (48, 144, 16, 48),
        (16, 128, 16, 128),
        (16, 32, 8, 32),
    ],
)
@pytest.mark.parametrize("zero_point", ["integer", "fixed"])
def test_columns(size, group, tile, expected, zero_point):
    """Each column keeps its weight, scale and zero point; those of the padding multiply zeros."""
    rng = np.random.default_rng(size + group)
    layer = random_linear(rng, 5, 6 * size, group, zero_point=zero_point)
    padded = pad_columns(layer, size, tile)
    assert padded.group_size == expected
    assert padded.k == 6 * padded_size(size)
    used = with_zeros(np.ones((1, layer.k)), size, 1)[0] > 0
    assert np.array_equal(padded.dequantize()[:, used], layer.dequantize())
    assert padded.dequantize()[:, ~used].any() == (zero_point == "fixed")


def test_keys():
    bias, ones = np.arange(10, dtype=np.float32).reshape(2, 5), np.ones((2, 5))
    keys = pad_keys(KeyHeads(bias, ones, 2 * ones, 4 * ones.astype(np.float32)), 5)
    for values, first, rest in zip(keys, (bias, ones, 2 * ones, 4 * ones), (0, 0, 0, 1), strict=True):
        assert values is not None and values.shape == (2, 32)
        assert np.array_equal(values[:, :5], first) and (values[:, 5:] == rest).all()
    assert pad_keys(KeyHeads(None, ones, ones, ones.astype(np.float32)), 5).bias is None
