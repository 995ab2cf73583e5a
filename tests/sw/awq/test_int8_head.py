# SPDX-License-Identifier: Apache-2.0
"""The head of a quantized model: Q8_0 is recovered from its floats; other tables get sw.model.lm_head's int8."""

import gguf
import numpy as np
import pytest

from sw.awq.int8_head import quantize_head
from sw.checkpoints.gguf.blocks import unpack_groups
from sw.common.arrays import ROWS_AT_ONCE
from sw.common.errors import UserError
from sw.model.lm_head import quantize_int8

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def test_q8_0_is_recovered():
    """Integers and scales of numbers of every magnitude, with blocks of zeros and more rows than one slice."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((ROWS_AT_ONCE + 40, 96)) * np.exp(rng.uniform(-9, 7, (ROWS_AT_ONCE + 40, 1)))
    weight[5, 32:64] = 0
    blocks = gguf.quants.quantize(weight.astype(np.float32), Q8_0)
    groups = unpack_groups(blocks, "Q8_0")
    layer = quantize_head(gguf.quants.dequantize(blocks, Q8_0), "head")
    assert (layer.name, layer.bits, layer.group_size) == ("head", 8, 32)
    assert np.array_equal(layer.q, groups.q)
    assert np.array_equal(layer.scales, groups.scales)
    assert np.all(layer.zero_points == groups.zero)


@pytest.mark.parametrize("k", [64, 72, 128])
def test_other_tables_are_int8(k):
    """A single weight that is not a whole number of steps is enough."""
    rng = np.random.default_rng(2)
    values = gguf.quants.dequantize(gguf.quants.quantize(rng.standard_normal((50, 128)).astype(np.float32), Q8_0), Q8_0)
    values = np.ascontiguousarray(values[:, :k])
    values[49, 3] *= np.float32(1.001)
    layer, expected = quantize_head(values), quantize_int8(values)
    assert layer.group_size == expected.group_size
    assert np.array_equal(layer.q, expected.q)
    assert np.array_equal(layer.scales, expected.scales)


def test_not_finite():
    for value in (np.nan, np.inf):
        weight = np.ones((4, 64), np.float32)
        weight[3, 63] = value
        with pytest.raises(UserError, match="layer lm_head: a weight is not finite"):
            quantize_head(weight)
