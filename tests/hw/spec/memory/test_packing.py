# SPDX-License-Identifier: Apache-2.0
"""The weight stream: every bit equals that of a slow packer, which is written from the contract; and a round trip."""

import re
from itertools import product

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.packing import pack, stripe, unpack, unstripe
from hw.spec.numerics.linear import Weights


def random_weights(layer: LayerLayout, random: np.random.Generator) -> Weights:
    config, shape = layer.config, (layer.n, layer.groups)
    low, high = (0, config.weight_max) if config.zero_point == "integer" else (-(1 << 15), (1 << 15) - 1)
    return Weights(
        random.integers(0, config.weight_max, (layer.n, layer.k), endpoint=True).astype(np.uint8),
        random.integers(low, high, shape, endpoint=True),
        random.integers(-32767, 32767, shape, endpoint=True),
        random.integers(-128, 127, layer.n, endpoint=True),
    )


class SlowPacker:
    """It packs one bit after the other.

    Each output tile has a header: the tile's row exponents; per group the tile's scale mantissas, then its zero
    points; padded to a beat. Then comes the body: per group, per K-slice, the rows along K, each with ``tile`` weights
    in ascending n. As many whole rows as fit share a beat. A slice starts with a new beat, unless a beat holds several
    whole slices. A row that is longer than a beat takes whole beats. Rows of N beyond the last one are zeros.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.beat = config.ports * config.port_width

    def put(self, value: int, width: int) -> None:
        for place in range(width):
            self.bits.append(value >> place & 1)

    def fill(self, width: int) -> None:
        while len(self.bits) % width:
            self.bits.append(0)

    def pack(self, weights: Weights, group_size: int) -> np.ndarray:
        tile, n = self.config.tile, len(weights.q)
        groups = weights.scale_mantissas.shape[1]
        z_bits = 16 if self.config.zero_point == "fixed" else self.config.weight_bits
        self.bits: list[int] = []

        def at(values: np.ndarray, row: int, *place: int) -> int:
            return int(values[(row, *place)]) if row < n else 0

        for first in range(0, n, tile):
            rows = range(first, first + tile)
            for row in rows:
                self.put(at(weights.exponents, row), 8)
            for group in range(groups):
                for row in rows:
                    self.put(at(weights.scale_mantissas, row, group), 16)
                for row in rows:
                    self.put(at(weights.zero_points, row, group), z_bits)
            self.fill(self.beat)
            self.body(weights, rows, at)
        bits = np.array(self.bits, np.uint8).reshape(-1, self.beat)
        return np.packbits(bits, axis=1, bitorder="little")

    def body(self, weights: Weights, rows: range, at) -> None:
        tile, width = self.config.tile, self.config.weight_bits
        fitting = self.beat // (tile * width)  # K rows in a beat
        start = len(self.bits)
        in_beat = 0
        for k in range(weights.q.shape[1]):
            # A beat with room for whole slices holds only whole slices; a smaller beat holds rows of one slice.
            room = fitting // tile * tile if fitting >= tile else fitting
            if fitting == 0 or in_beat == room or (fitting < tile and k % tile == 0):
                self.fill_from(start)
                in_beat = 0
            for row in rows:
                self.put(at(weights.q, row, k), width)
            in_beat += 1
        self.fill_from(start)

    def fill_from(self, start: int) -> None:
        while (len(self.bits) - start) % self.beat:
            self.bits.append(0)


CONFIGS = [
    AcceleratorConfig(),
    AcceleratorConfig(zero_point="fixed"),
    AcceleratorConfig(tile=32, ports=1, port_width=32, weight_bits=8),
    AcceleratorConfig(tile=32, ports=2, port_width=64, weight_bits=5),
    AcceleratorConfig(tile=16, ports=4, weight_bits=5, zero_point="fixed"),
    AcceleratorConfig(tile=16, ports=1, port_width=64, weight_bits=6),
    AcceleratorConfig(tile=8, ports=4, weight_bits=3),
    AcceleratorConfig(tile=8, ports=2, port_width=32, weight_bits=7, zero_point="fixed"),
    AcceleratorConfig(tile=4, ports=4, weight_bits=2),
    AcceleratorConfig(tile=4, ports=1, port_width=32, weight_bits=4),
    AcceleratorConfig(tile=4, ports=4, weight_bits=6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.tile}-{c.weight_bits}-{c.beat_bits}-{c.zero_point}")
def test_every_bit(config: AcceleratorConfig):
    random = np.random.default_rng(config.tile)
    for k, n in ((2, config.tile), (1, 1), (3, 2 * config.tile + 3)):
        for size in (64, 96):
            layer = LayerLayout(config, k * size, n, size)
            weights = random_weights(layer, random)
            packed, expected = pack(layer, weights), SlowPacker(config).pack(weights, size)
            assert packed.shape == expected.shape == (layer.beats, config.beat_bytes)
            wrong = np.argwhere(packed != expected)
            assert not len(wrong), f"K {k * size}, N {n}: first difference in beat {wrong[0][0]}, byte {wrong[0][1]}"


SWEEP = [
    AcceleratorConfig(tile=tile, weight_bits=bits, ports=ports, port_width=width, zero_point=zero_point)
    for tile, bits, (ports, width), zero_point in product(
        (4, 8, 16, 32), range(2, 9), ((1, 32), (2, 64), (4, 128)), ("integer", "fixed")
    )
    if bits < 8 or zero_point == "integer"
]


def test_round_trip_over_the_sweep():
    random = np.random.default_rng(5)
    for config in SWEEP:
        n = int(random.integers(1, 3 * config.tile))
        layer = LayerLayout(config, 256, n, int(random.choice([64, 128])))
        weights = random_weights(layer, random)
        for got, put in zip(unpack(layer, pack(layer, weights)), weights):
            assert np.array_equal(got, put), config


@pytest.mark.parametrize("ports", [1, 2, 4])
def test_stripes(ports: int):
    """Port p holds the port_bytes of every beat that start at p * port_bytes, one beat after the other."""
    config = AcceleratorConfig(ports=ports, port_width=64)
    beats = np.random.default_rng(6).integers(0, 256, (37, config.beat_bytes), dtype=np.uint8)
    regions = stripe(config, beats)
    assert regions.shape == (ports, 37 * 8)
    for port, beat, byte in product(range(ports), range(37), range(8)):
        assert regions[port, beat * 8 + byte] == beats[beat, port * 8 + byte]
    assert np.array_equal(unstripe(config, regions), beats)


def test_pack_checks_its_arrays():
    config = AcceleratorConfig()
    layer = LayerLayout(config, 128, 16, 64)
    weights = random_weights(layer, np.random.default_rng(8))
    with pytest.raises(ConfigError, match=re.escape("the layer is [16, 128] in 2 groups, not [15, 128] in 2")):
        pack(layer, weights._replace(q=weights.q[:15]))
    with pytest.raises(ConfigError, match=re.escape("the layer is [16, 128] in 2 groups, not [16, 128] in 1")):
        pack(layer, weights._replace(scale_mantissas=weights.scale_mantissas[:, :1]))
    with pytest.raises(ConfigError, match=r"^a weight is at most 15, not 16$"):
        pack(layer, weights._replace(q=np.full_like(weights.q, 16)))
    with pytest.raises(ConfigError, match=r"^the layer's stream is uint8 \[\d+, 64\], not int64 "):
        unpack(layer, pack(layer, weights).astype(np.int64))
    with pytest.raises(ConfigError, match=r"^the layer's stream is uint8 \[\d+, 64\], not uint8 \[2, 64\]"):
        unpack(layer, pack(layer, weights)[:2])
