# SPDX-License-Identifier: Apache-2.0
"""The int8 head: its error is half a step, values that fit int8 are exact, and special tables work."""

import numpy as np
import pytest

from sw.common.arrays import ROWS_AT_ONCE
from sw.common.errors import UserError
from sw.model.linear import FloatLinear, QuantizedLinear
from sw.model.lm_head import head_layer, narrowest_exact, quantize_int8


@pytest.mark.parametrize(("k", "group"), [(896, 128), (128, 128), (576, 64), (64, 64), (96, 32), (72, 32), (8, 32)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_error_is_half_a_step(k, group, dtype):
    rng = np.random.default_rng(1)
    # Groups of very different magnitude, within float16's range.
    weight = (rng.standard_normal((40, k)) * np.exp(rng.uniform(-4, 4, (40, k)))).astype(dtype)
    layer = quantize_int8(weight)
    assert (layer.bits, layer.group_size, layer.has_integer_zero_points) == (8, group, True)
    assert np.all(layer.zero_points == 128)
    assert layer.q.min() >= 1
    assert layer.q.max() == 255
    for g in range(layer.groups):
        part = slice(g * group, (g + 1) * group)
        values = weight[:, part].astype(np.float64)
        peak = np.abs(values).max(axis=1)
        assert np.allclose(layer.scales[:, g], peak / 127, rtol=2e-7)
        error = np.abs(layer.dequantize()[:, part] - values).max(axis=1)
        assert np.all(error <= layer.scales[:, g] * (0.5 + 1e-4))
        # The bound is reached, so the test is sharp: rounding down would give an error of a whole step.
        assert error.max() > 0.4 * layer.scales[:, g].max() or k < 64


def test_values_that_fit_int8_are_exact():
    rng = np.random.default_rng(2)
    steps = rng.integers(-127, 128, (5000, 192))
    steps[:, ::64] = 127 * rng.choice([-1, 1], (5000, 3))
    scales = np.exp2(rng.integers(-20, 20, (5000, 3))).astype(np.float32)
    weight = steps * np.repeat(scales, 64, axis=1)
    layer = quantize_int8(weight.astype(np.float32))
    assert len(weight) > ROWS_AT_ONCE
    assert np.array_equal(layer.q, steps + 128)
    assert np.array_equal(layer.scales, scales)
    assert np.array_equal(layer.dequantize(), weight)


def test_zeros_and_the_smallest_numbers():
    weight = np.zeros((4, 64), np.float32)
    weight[1, 5] = 1e-45
    weight[2, :3] = (185 * 1.4e-45, -185 * 1.4e-45, 1.4e-45)
    weight[3, 0] = 1e38
    layer = quantize_int8(weight)
    assert np.all(layer.q[0] == 128)
    assert np.all(layer.q[1] == 128)
    assert list(layer.q[2, :4]) == [255, 1, 129, 128]
    assert np.isfinite(layer.dequantize()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value):
    weight = np.ones((4, 64), np.float16)
    weight[3, 63] = value
    with pytest.raises(UserError, match="layer lm_head: a weight is not finite"):
        quantize_int8(weight)


def test_policy():
    rng = np.random.default_rng(3)
    table, other = (rng.standard_normal((8, 64)).astype(np.float16) for _ in range(2))
    quantized = quantize_int8(table)
    for mode in ("int8", "float"):
        assert head_layer(quantized, None, mode) is quantized
        assert head_layer(table, quantized, mode) is quantized
    for head, source in ((None, table), (other, other)):
        layer = head_layer(table, head, "int8")
        assert isinstance(layer, QuantizedLinear)
        assert np.array_equal(layer.q, quantize_int8(source).q)
        layer = head_layer(table, head, "float")
        assert isinstance(layer, FloatLinear)
        assert layer.weight.dtype == np.float32
        assert np.array_equal(layer.weight, source)


def test_narrowest_exact():
    halves = np.random.default_rng(4).standard_normal((5000, 4)).astype(np.float16)
    assert narrowest_exact(halves) is halves
    wide = halves.astype(np.float32)
    assert narrowest_exact(wide).dtype == np.float16
    assert np.array_equal(narrowest_exact(wide), halves)
    for value in (1 + 2**-11, 1e-9, 7e4):
        odd = wide.copy()
        odd[-1, -1] = value
        assert narrowest_exact(odd) is odd
