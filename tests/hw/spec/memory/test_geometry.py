# SPDX-License-Identifier: Apache-2.0
"""How many beats a layer takes: what is not weights, padding and splitting of groups, and what is refused."""

import re
from itertools import product

import numpy as np
import pytest

from hw.spec.config import MAX_N, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, StreamLayout, fit_layer
from hw.spec.numerics.linear import Activations, Weights, linear


def test_overhead_is_below_one_per_cent():
    """At K >= 896 and tile >= 16, over weights, scales and zero points alone; dense widths."""
    for tile, (ports, width), zero_point in product((16, 32), ((1, 32), (2, 64), (4, 128)), ("integer", "fixed")):
        config = AcceleratorConfig(tile=tile, ports=ports, port_width=width, zero_point=zero_point)
        for k, size in ((896, 128), (4864, 128), (896, 64), (960, 64)):
            layer = LayerLayout(config, k, config.tile, size)
            ideal = config.tile * (k * config.weight_bits + k // size * (16 + config.zero_point_bits))
            overhead = layer.beats * config.beat_bits / ideal - 1
            assert 0 <= overhead < 0.01, f"{config}: {overhead:.4f} at K {k}, group {size}"
        assert StreamLayout(config).overhead == pytest.approx(
            LayerLayout(config, 896, config.tile, 128).beats
            * config.beat_bits
            / (config.tile * (896 * 4 + 7 * (16 + config.zero_point_bits)))
            - 1
        )


@pytest.mark.parametrize("max_k", [32, 64, 512])
def test_overhead_of_short_layers_is_known_too(max_k: int):
    """A config that holds no K of 896 and no groups of 128 is a config like any other."""
    config = AcceleratorConfig(tile=8, max_k=max_k, max_group_size=32)
    assert StreamLayout(config).overhead >= 0


def test_padding_and_splitting_change_no_result():
    """fit_layer pads K and splits groups; the result is that of the layer as it was given."""
    config, random = AcceleratorConfig(max_group_size=64), np.random.default_rng(7)
    for k, n, size in ((300, 5, 128), (300, 5, 300), (64, 3, 64), (96, 3, 96)):
        layer = fit_layer(config, k, n, size)
        assert layer.k >= k and layer.k % layer.group_size == 0
        assert layer.group_size <= 64
        assert size >= k or size % layer.group_size == 0
        groups = -(-k // size)
        q = random.integers(0, 16, (n, k)).astype(np.uint8)
        zeros, scales = random.integers(0, 16, (n, groups)), random.integers(-32767, 32768, (n, groups))
        exponents, x = random.integers(-9, 9, n), random.integers(-32767, 32768, (2, k))
        e = np.zeros(2, np.int64)
        whole = np.minimum(np.arange(layer.groups) * layer.group_size // size, groups - 1)
        fitted = Weights(
            np.pad(q, ((0, 0), (0, layer.k - k)), constant_values=9), zeros[:, whole], scales[:, whole], exponents
        )
        padded = Activations(np.pad(x, ((0, 0), (0, layer.k - k))), e)
        # The layer as given, as one group per weight: nothing is padded or split.
        each = np.arange(k) // size
        given = Weights(q, zeros[:, each], scales[:, each], exponents)
        assert np.array_equal(linear(config, fitted, padded), linear(config, given, Activations(x, e)))


def test_fit_layer_takes_the_cheapest():
    config = AcceleratorConfig()
    assert fit_layer(config, 896, 16, 128) == LayerLayout(config, 896, 16, 128)
    # One group over all of K: any size will do, and the longest that divides K costs least.
    assert fit_layer(config, 1024, 16, 1024).group_size == 128
    # Groups of 128 would need padding to 384; halves of them do not.
    assert fit_layer(config, 320, 16, 128) == LayerLayout(config, 320, 16, 64)


_NARROW = AcceleratorConfig(tile=4, weight_bits=2, ports=1, port_width=32, zero_point="fixed")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: LayerLayout(c, 128, 0, 128), "N is 1 to 262,144, not 0"),
        (lambda c: LayerLayout(c, 128, MAX_N + 1, 128), "N is 1 to 262,144, not 262,145"),
        (lambda c: LayerLayout(c, 128, 16, 40), "group_size is a multiple of the tile (16), not 40"),
        (lambda c: LayerLayout(c, 128, 16, 0), "group_size is a multiple of the tile (16), not 0"),
        (lambda c: LayerLayout(c, 256, 16, 256), "group_size is at most max_group_size (128), not 256"),
        (lambda c: LayerLayout(c, 100, 16, 64), "K is a whole number of groups of 64, not 100"),
        (lambda c: LayerLayout(c, 0, 16, 64), "K is a whole number of groups of 64, not 0"),
        (
            lambda c: LayerLayout(c, 8320, 16, 128),
            "K is at most max_k (8,192), not 8,320; hardware built with --max-k 8320 takes it",
        ),
        (
            lambda c: LayerLayout(_NARROW, 64, 4, 4),
            "group_size is at least 20 at tile 4, so that a group's scales are read in the time that its weights take,"
            " not 4",
        ),
        (lambda c: fit_layer(c, 0, 16, 64), "K and group_size are at least 1, not 0 and 64"),
        (lambda c: fit_layer(c, 64, 16, -1), "K and group_size are at least 1, not 64 and -1"),
        (lambda c: fit_layer(c, 200, 16, 24), "group_size is a multiple of the tile (16), not 24"),
        (lambda c: fit_layer(c, 9000, 16, 128), "K is at most max_k (8,192), not "),
    ],
)
def test_refusal_names_rule_and_value(call, message: str):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        call(AcceleratorConfig())
