# SPDX-License-Identifier: Apache-2.0
"""GGUF tensors as layers: the hardware's integers against the gguf package's weights, and distant minimums."""

import gguf
import numpy as np
import pytest

from hw.spec.config import FIXED_FRACTION_BITS, SCALE_BITS, AcceleratorConfig
from hw.spec.numerics.planes import quantize_weights
from sw.checkpoints.gguf.blocks import FORMATS
from sw.checkpoints.gguf.header import GgufTensor
from sw.checkpoints.gguf.layers import quantized_layer
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear
from tests.sw.fixtures.gguf_quantizer import quantize

FIXED = AcceleratorConfig(zero_point="fixed")


def layer_of(rows: np.ndarray, kind: str, folder) -> tuple[QuantizedLinear, np.ndarray]:
    """The layer of raw rows, and its weights by the gguf package."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    path = folder / "rows"
    path.write_bytes(b"head" + rows.tobytes())
    tensor = GgufTensor(path, "w.weight", kind, (len(rows), rows.shape[1] // size * block), 4)
    return quantized_layer("w", tensor), gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])


def hardware_weights(layer: QuantizedLinear, config: AcceleratorConfig) -> tuple[np.ndarray, np.ndarray]:
    """The weights that the hardware's integers are, float64 [N, K], and the bound of the contract's two roundings."""
    planes = quantize_weights(config, layer.bits, layer.q, layer.scales, layer.zero_points)
    fraction, total = config.fraction_bits, np.zeros(layer.q.shape)
    for plane in planes:
        group = np.arange(layer.k) // layer.group_size
        steps = (plane.q.astype(np.int64) << fraction) - plane.zero_points[:, group]
        unit = np.exp2(plane.exponents.astype(np.float64) - (SCALE_BITS - 1) - fraction)
        total += steps * plane.scale_mantissas[:, group] * unit[:, None]
    group = np.arange(layer.k) // layer.group_size
    scale_error = 0.5 * np.exp2(planes[0].exponents - (SCALE_BITS - 1.0)) * (1 if len(planes) == 1 else 16)
    zero_error = 0.5 ** (FIXED_FRACTION_BITS + 1) if fraction else 0.0
    steps = np.abs(layer.q - layer.zero_points.astype(np.float64)[:, group]) + zero_error
    return total, steps * scale_error[:, None] + zero_error * np.abs(layer.scales)[:, group]


@pytest.mark.parametrize("kind", FORMATS)
def test_hardware_holds_the_weights(kind, tmp_path):
    """The integers differ from llama.cpp's weights by no more than the contract's roundings of s and z."""
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((48, 1024)) * np.exp(rng.standard_normal((48, 1)))).astype(np.float32)
    values[5], values[6], values[7, :300] = 0, -0.125, 0
    layer, expected = layer_of(quantize(values, kind), kind, tmp_path)
    assert (layer.group_size, layer.bits) == (FORMATS[kind].group_size, FORMATS[kind].bits)
    assert np.abs(layer.dequantize() - expected).max() <= 1e-6 * np.abs(expected).max()
    if not FORMATS[kind].has_minimums:
        assert np.array_equal(layer.dequantize(), expected)
        assert layer.has_integer_zero_points
    for config in (FIXED, *([AcceleratorConfig()] if layer.has_integer_zero_points else [])):
        weights, bound = hardware_weights(layer, config)
        assert np.all(np.abs(weights - expected) <= bound + 1e-6 * np.abs(expected).max(axis=1, keepdims=True))
        # The bound is meaningful: it is far below the step of the format.
        assert np.sqrt(np.mean(bound**2)) < 0.01 * np.sqrt(np.mean(expected**2))


def q4_k_rows(scales, minimums, q, d=1.0, dmin=1.0) -> np.ndarray:
    """One row of one Q4_K block: 6-bit scales and minimums [8], q [256]."""
    s, m, q = (np.asarray(v, np.uint8) for v in (scales, minimums, q))
    packed = np.concatenate([s[:4] | s[4:] >> 4 << 6, m[:4] | m[4:] >> 4 << 6, s[4:] & 15 | m[4:] << 4])
    runs = q.reshape(4, 2, 32)
    halves = np.array([d, dmin], "<f2").view(np.uint8)
    return np.concatenate([halves, packed, (runs[:, 0] | runs[:, 1] << 4).reshape(-1)])[None]


@pytest.mark.parametrize(
    ("minimum", "scale", "bits"),
    [
        (15, 1, 4),
        (16, 1, 4),  # mirrored
        (31, 1, 4),  # the last one that 4 bits hold, at -16
        (32, 1, 8),
        (63, 1, 8),
        (63, 63, 4),
        (40, 0, 4),  # equal weights
        (0, 0, 4),
    ],
)
def test_minimum_in_steps(minimum, scale, bits, tmp_path):
    q = np.random.default_rng(1).integers(0, 16, 256)
    scales, minimums = np.full(8, 5), np.full(8, 30)
    scales[3], minimums[3] = scale, minimum
    layer, expected = layer_of(q4_k_rows(scales, minimums, q), "Q4_K", tmp_path)
    assert layer.bits == bits
    assert np.array_equal(layer.dequantize(), expected)
    weights, bound = hardware_weights(layer, FIXED)
    assert np.all(np.abs(weights - expected) <= bound)


@pytest.mark.parametrize(
    ("dmin", "error"), [(4.0, 0), (7.9, 0), (8.2, 1 / 1022), (1000.0, 1 / 1022), (-30.0, 1 / 1022)]
)
def test_distant_minimums(dmin, error, tmp_path):
    """Beyond 8 bits (z from 512 on, or below -256), a weight is rounded to 1/511 of the group's largest."""
    q = np.random.default_rng(1).integers(0, 16, 256)
    layer, expected = layer_of(q4_k_rows(np.full(8, 1), np.full(8, 63), q, dmin=dmin), "Q4_K", tmp_path)
    assert layer.bits == 8
    difference = np.abs(layer.dequantize() - expected)
    assert difference.max() <= (error + 1e-6) * np.abs(expected).max()
    weights, bound = hardware_weights(layer, FIXED)
    assert np.all(np.abs(weights - expected) <= bound + (error + 1e-6) * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 6e-8])
def test_equal_weights(kind, value, tmp_path):
    """d = 0: every weight is m exactly, although -m/d does not exist."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    block = np.full((1, size), 0xA7, np.uint8)
    block[0, :4] = np.array([0, value], "<f2").view(np.uint8)
    layer, _ = layer_of(block, kind, tmp_path)
    assert np.array_equal(layer.dequantize(), np.full((1, 32), np.float32(np.float16(value))))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_numbers_that_are_not_finite(kind, value, tmp_path):
    rows = quantize(np.random.default_rng(2).standard_normal((4, 256)).astype(np.float32), kind)
    places = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
    rows[2, places.get(kind, 0) : places.get(kind, 0) + 2] = np.array(value, "<f2")[None].view(np.uint8)
    with pytest.raises(UserError, match=r"rows: tensor w\.weight: a (scale|minimum) is not finite"):
        layer_of(rows, kind, tmp_path)


def test_large_tables_are_read_in_pieces(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    rows = quantize(rng.standard_normal((70, 256)).astype(np.float32), "Q4_K")
    whole, _ = layer_of(rows, "Q4_K", tmp_path)
    reads = []
    read = GgufTensor.read
    monkeypatch.setattr(GgufTensor, "read", lambda self, part: reads.append(part) or read(self, part))
    monkeypatch.setattr("sw.checkpoints.gguf.layers.AT_ONCE", 256 * 16)
    pieces, _ = layer_of(rows, "Q4_K", tmp_path)
    assert len(reads) == 5
    assert np.array_equal(pieces.q, whole.q)
    assert np.array_equal(pieces.zero_points, whole.zero_points)
