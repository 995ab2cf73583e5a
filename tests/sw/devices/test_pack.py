# SPDX-License-Identifier: Apache-2.0
"""Packing: the stream holds the model's own integers for all group sizes; layers that do not fit are refused."""

import time
from dataclasses import replace

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.memory.packing import unpack
from hw.spec.numerics.linear import linear as numpy_linear
from hw.spec.numerics.linear import quantize_activations
from sw.common.errors import UserError
from sw.devices.pack import integer_weights, pack_layer, plan_layer, prepare
from sw.runtime.hardware import LayerShape
from tests.sw.fixtures.linears import expected, random_activations, random_linear, same_bits

CONFIGS = {
    "tile16": AcceleratorConfig(tile=16),
    "tile16 fixed": AcceleratorConfig(tile=16, zero_point="fixed"),
    "tile8 narrow": AcceleratorConfig(tile=8, weight_bits=5, activation_bits=11, ports=1, port_width=32, max_k=1024),
    "tile4 fixed": AcceleratorConfig(tile=4, zero_point="fixed", ports=2, port_width=64, max_k=1024),
    "tile32": AcceleratorConfig(tile=32, max_group_size=256),
}
SHAPES = [
    # n, k, group_size
    (33, 576, 64),
    (16, 896, 128),
    (7, 352, 32),  # eleven groups
    (5, 352, 128),  # a short last group
    (9, 200, 64),  # a short last group, and K is not a multiple of the tile
    (3, 20, 32),  # less than one group
    (20, 512, 512),  # one group, longer than the accumulators hold
    (20, 500, 1024),  # longer than K
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stream_holds_the_layer(config, shape):
    """The unpacked stream has the model's q in the right places, and its results equal those of the model's groups."""
    rng = np.random.default_rng(1)
    linear = random_linear(rng, *shape, zero_point=config.zero_point)
    layer = prepare(config, linear)
    assert layer.beats.shape == (layer.layout.beats, config.beat_bytes)
    assert layer.layout.k >= layer.k == linear.k
    weights = unpack(layer.layout, layer.beats)
    assert np.array_equal(weights.q[:, : linear.k], linear.q)
    assert not weights.q[:, linear.k :].any()
    x = random_activations(rng, 3, linear.k)
    y = numpy_linear(config, weights, quantize_activations(config, layer.pad(x)))
    assert same_bits(y, expected(config, linear, x))


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["tile16", "tile16 fixed", "tile4 fixed"])
def test_two_planes(name, shape, bits):
    """Weights of up to twice the hardware's bits: the result equals that of 8-bit weights with scales of 12 bits."""
    config, rng = CONFIGS[name], np.random.default_rng(11)
    if 2 * shape[1] > config.max_k:
        pytest.skip("two planes are too long")
    linear = random_linear(rng, *shape, bits=bits, zero_point=config.zero_point)
    if config.zero_point == "fixed":
        linear = replace(linear, zero_points=rng.uniform(-250, 255.9, linear.zero_points.shape).astype(np.float32))
    layer = prepare(config, linear)
    assert layer.planes == 2
    weights = unpack(layer.layout, layer.beats)
    high, low = np.split(weights.q, 2, axis=1)
    assert np.array_equal((high << 4 | low)[:, : linear.k], linear.q)
    x = random_activations(rng, 3, linear.k)
    y = numpy_linear(config, weights, quantize_activations(config, layer.pad(x)))
    assert same_bits(y, expected(config, linear, x))


def test_rows_at_once(monkeypatch):
    """Packing some rows at a time makes the same stream; the message for a bad row says where it is."""
    config, linear = AcceleratorConfig(), random_linear(np.random.default_rng(12), 100, 64, 32, bits=8)
    whole = prepare(config, linear).beats
    monkeypatch.setattr("sw.common.arrays.ROWS_AT_ONCE", 32)
    assert np.array_equal(prepare(config, linear).beats, whole)
    scales = linear.scales.copy()
    scales[70] = 1e-42
    with pytest.raises(UserError, match=r"^layer layer, rows from 64 on: the exponent of row 6 is -\d+, and"):
        prepare(config, replace(linear, scales=scales))


def test_groups_are_split_and_padded():
    config = AcceleratorConfig(tile=16, max_group_size=128)
    assert prepare(config, random_linear(np.random.default_rng(2), 4, 512, 512)).layout.groups == 4
    padded = prepare(config, random_linear(np.random.default_rng(2), 4, 500, 100 * 16)).layout
    assert (padded.k, padded.k % 16) == (512, 0)


def test_fewer_bits_run_as_they_are():
    config = AcceleratorConfig(tile=8, weight_bits=8)
    linear = random_linear(np.random.default_rng(3), 10, 64, 32, bits=3)
    assert unpack(prepare(config, linear).layout, prepare(config, linear).beats).q.max() == 7


def test_pad():
    layer = prepare(AcceleratorConfig(), random_linear(np.random.default_rng(4), 4, 20, 32))
    x = np.arange(40, dtype=np.float64).reshape(2, 20)
    padded = layer.pad(x)
    assert padded.shape == (2, 32)
    assert padded.dtype == np.float32
    assert padded.flags.c_contiguous
    assert np.array_equal(padded[:, :20], x)
    assert not padded[:, 20:].any()
    with pytest.raises(UserError, match=r"layer layer: activations are \[M, 20\], not \[2, 19\]"):
        layer.pad(x[:, :19])


@pytest.mark.parametrize(
    ("shape", "bits", "options", "message"),
    [
        ((4, 64, 32), 8, dict(weight_bits=3), r"its weights have 8 bits, and two planes of weight_bits \(3\) hold 6"),
        ((4, 4128, 32), 8, {}, r"K is at most max_k \(8,192\), not 8,256; hardware built with --max-k 8256 takes it"),
        ((4, 8224, 32), 4, {}, r"K is at most max_k \(8,192\), not 8,224; hardware built with --max-k 8224 takes it"),
        (
            (4, 80, 40),
            4,
            {},
            r"group_size is .* the tile \(16\), not 40; hardware built with --tile 8 takes it",
        ),
        (
            (4, 64, 16),
            4,
            dict(tile=32),
            r"group_size is .* the tile \(32\), not 16; hardware built with --tile 16 takes it",
        ),
    ],
)
def test_layer_that_does_not_fit(shape, bits, options, message):
    config = AcceleratorConfig(**options)
    linear = random_linear(np.random.default_rng(5), *shape, bits=bits, name="/model/q_proj")
    with pytest.raises(UserError, match=r"^layer /model/q_proj: " + message + "$"):
        prepare(config, linear)
    n, k, group_size = shape
    shape = LayerShape(linear.name, k, n, group_size, bits, linear.zero_points[:1, :1], False)
    with pytest.raises(UserError, match=r"^layer /model/q_proj: " + message + "$"):
        plan_layer(config, shape)


@pytest.mark.parametrize(
    ("zero_point", "values", "message"),
    [
        ("integer", 7.5, 'zero point 7.5 has a fraction: it takes hardware with zero_point="fixed"'),
        ("integer", -1.0, "zero point -1 is outside the field's 0 to 15"),
        ("fixed", 16.0, "zero point 16 is outside the field's -16 to 15.9995"),
        ("fixed", 1e30, "zero point 1e+30 is outside every field"),
    ],
)
def test_zero_point_that_does_not_fit(zero_point, values, message):
    config = AcceleratorConfig(zero_point=zero_point)
    linear = random_linear(np.random.default_rng(6), 4, 64, 32)
    linear = replace(linear, zero_points=np.full((4, 2), values, np.float32))
    with pytest.raises(UserError) as refused:
        prepare(config, linear)
    assert str(refused.value) == f"layer layer: {message}"
    with pytest.raises(UserError) as refused:
        plan_layer(config, LayerShape("layer", 64, 4, 32, 4, linear.zero_points[0], False))
    assert str(refused.value) == f"layer layer: {message}"


def test_scale_that_does_not_fit():
    linear = random_linear(np.random.default_rng(7), 4, 64, 32)
    linear = replace(linear, scales=np.full((4, 2), 1e-42, np.float32))
    with pytest.raises(UserError, match=r"^layer layer: the exponent of row 0 is -139, and the 8-bit field holds"):
        prepare(AcceleratorConfig(), linear)


def test_weights_are_packed_once():
    """Packing from integers that the caller passes gives the same stream."""
    config = AcceleratorConfig()
    linear = random_linear(np.random.default_rng(8), 40, 352, 128)
    layer = prepare(config, linear)
    plan = plan_layer(config, linear)
    weights = integer_weights(plan, linear)
    assert np.array_equal(pack_layer(plan, linear, weights).beats, layer.beats)


@pytest.mark.full
def test_speed():
    """The layers of Qwen2.5-0.5B, its head included, pack in under 30 s."""
    config, rng = AcceleratorConfig(), np.random.default_rng(9)
    block = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]
    layers = [random_linear(rng, n, k, 128) for n, k in block]
    head = random_linear(rng, 151936, 896, 128)
    start = time.process_time()
    for linear in [*layers * 24, head]:
        prepare(config, linear)
    assert time.process_time() - start < 30
