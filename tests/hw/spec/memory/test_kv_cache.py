# SPDX-License-Identifier: Apache-2.0
"""The KV cache: what is appended byte by byte is the weight stream of a linear layer, with the definition's results."""

from itertools import product

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.kv_cache import Bytes, CacheStream, KeyCache, ValueCache, check_cache
from hw.spec.memory.packing import unpack, unstripe
from hw.spec.numerics.attention import cache_keys, cache_values, scores
from hw.spec.numerics.block_float import BlockFloat
from hw.spec.numerics.linear import Weights, linear, quantize_activations

CONFIGS = [
    AcceleratorConfig(tile=tile, weight_bits=bits, ports=ports, port_width=width, zero_point=zero, max_k=1024)
    for tile, bits, ports, width, zero in [
        (4, 4, 1, 64, "integer"),
        (4, 8, 1, 64, "integer"),
        (4, 4, 4, 128, "fixed"),
        (8, 4, 1, 64, "integer"),
        (8, 4, 4, 128, "integer"),
        (16, 4, 2, 64, "fixed"),
        (16, 4, 4, 128, "integer"),
        (16, 8, 4, 128, "integer"),
        (32, 4, 4, 64, "integer"),
        (32, 4, 4, 128, "integer"),
        (32, 8, 4, 128, "integer"),
    ]
]
HEADS = (32, 96, 256)
POSITIONS = 300


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def numbers(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """float32 of very different magnitudes, with a row of zeros."""
    x = rng.standard_normal((count, size)) * np.exp(6 * rng.standard_normal((count, size)))
    x[count // 2] = 0
    return x.astype(np.float32)


def of(values: BlockFloat, index: int) -> BlockFloat:
    return BlockFloat(*(part[index] for part in values))


def write(memory: np.ndarray, some: Bytes) -> None:
    memory[some.offsets] = some.values


def stream(cache: CacheStream, layer: LayerLayout, image: np.ndarray) -> Weights:
    """The first output tiles of a cache in memory."""
    size = layer.beats * cache.config.port_width // 8
    regions = np.stack([image[port * cache.stride :][:size] for port in range(cache.config.ports)])
    return unpack(layer, unstripe(cache.config, regions), cache.paired)


@pytest.mark.parametrize(("config", "size", "bits"), list(product(CONFIGS, HEADS, (8, 16))))
def test_keys_are_a_linear_layer(config, size, bits, rng):
    cache = KeyCache(config, size, 70, bits)
    keys = cache_keys(numbers(rng, 70, size), numbers(rng, 1, size)[0], bits)
    image = cache.image()
    for slot in rng.permutation(70):
        write(image, cache.append(slot, of(keys, slot), cache.stride))
    q = rng.standard_normal((3, size)).astype(np.float32)
    used = KeyCache(config, size, 45, bits)
    products = linear(config, stream(cache, used.layer, image), quantize_activations(config, cache.repeat(q)))
    found = scores(
        config, q, BlockFloat(*(part[:45] for part in keys)), np.array(1, np.float32), np.ones((3, 45), bool)
    )
    assert np.array_equal(products.view(np.uint32), found.view(np.uint32))


@pytest.mark.parametrize(("config", "size"), list(product(CONFIGS, HEADS)))
def test_values_are_linear_layers_of_chunks(config, size, rng):
    cache = ValueCache(config, size, POSITIONS)
    values = cache_values(numbers(rng, POSITIONS, size))
    image, table = cache.image(), np.zeros(cache.exponent_bytes, np.uint8)
    for slot in rng.permutation(POSITIONS):
        one = of(values, slot)
        write(image, cache.append(slot, one, cache.stride))
        write(table, cache.append_exponents(slot, one))
    weights = stream(cache, cache.layer, image)
    assert np.array_equal(cache.mantissas(weights, 290), values.mantissas[:290])
    assert np.array_equal(cache.exponents(table, 290), values.exponents[:290])
    # The second chunk's part of the first columns, as the array computes it.
    p = rng.integers(-99, 99, (2, POSITIONS - 256)).astype(np.int64)
    padded = np.zeros((2, 256), np.int64)
    padded[:, : p.shape[1]] = p
    groups = padded.reshape(2, -1, 1, cache.group)
    x = np.broadcast_to(groups, (*groups.shape[:2], cache.planes, cache.group)).reshape(2, -1).astype(np.float64)
    one_tile = Weights(*(part[config.tile : 2 * config.tile] for part in weights))
    # Mantissas of the largest activation are 2^14 and more, so these activations are exact in 16 bits.
    products = linear(config, one_tile, quantize_activations(config, x))[:, : min(config.tile, size)]
    expected = p @ values.mantissas[256:, : min(config.tile, size)]
    assert np.array_equal(products, expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_position_writes_only_its_own_bytes(kind, rng):
    """Whole bytes, which no other position shares; so nothing is read before it is written."""
    config = AcceleratorConfig(max_k=1024)
    cache = KeyCache(config, 64, POSITIONS, 8) if kind == "keys" else ValueCache(config, 64, POSITIONS)
    make = (lambda x: cache_keys(x, np.zeros(64, np.float32), 8)) if kind == "keys" else cache_values
    one = of(make(numbers(rng, 3, 64)), 0)
    written = [cache.append(slot, one, cache.stride).offsets for slot in range(POSITIONS)]
    every = np.concatenate(written)
    assert len(np.unique(every)) == len(every)
    assert every.max() < cache.bytes
    # Mantissas; and for keys the scales of 4 groups, and a row exponent.
    assert len(written[0]) == 64 + (2 * 4 + 1 if kind == "keys" else 0)


def test_beats_of_a_part():
    """A chunk that is not full ends with its last group of 64 positions."""
    cache = ValueCache(AcceleratorConfig(), 64, 1024)
    layer = cache.layer
    assert (layer.groups, layer.header_beats, layer.tile_beats) == (8, 6, 70)
    assert [cache.beats_of(count) for count in (1, 64, 65, 256, 257)] == [4 * n for n in (22, 22, 38, 70, 92)]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"weight_bits": 5}, (64, 10), "weight_bits of 4 or 8, not 5"),
        ({"weight_bits": 8, "zero_point": "fixed"}, (64, 10), "integer zero points, not fixed ones"),
        ({}, (80, 10), "multiple of 32, not 80"),
        ({}, (64, 0), "1 to 32,768 positions, not 0"),
        ({}, (64, 32769), "1 to 32,768 positions, not 32,769"),
        ({"ports": 1, "port_width": 64}, (64, 10), "weight ports of 128 bits together, not 64"),
        ({"max_k": 512}, (256, 10), "K is at most max_k"),
    ],
)
def test_refused(changes, arguments, message):
    size, positions = arguments
    with pytest.raises(ConfigError, match=message):
        KeyCache(AcceleratorConfig(**changes), size, positions, 16)


@pytest.mark.parametrize("config", CONFIGS)
def test_hardware_with_a_cache(config):
    check_cache(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 5}, "weight_bits of 4 or 8, not 5"),
        ({"weight_bits": 8, "zero_point": "fixed"}, "integer zero points, not fixed ones"),
        ({"tile": 32, "ports": 1}, "weight ports of 256 bits together, not 128"),
        ({"max_k": 256}, "K is at most max_k"),
        ({"max_group_size": 32, "tile": 4, "ports": 1, "port_width": 32}, None),
    ],
)
def test_hardware_without_a_cache(changes, message):
    """No cache of any size exists. The width of a port is no reason."""
    config = AcceleratorConfig(**changes)
    if message is None:
        check_cache(config)
    else:
        with pytest.raises(ConfigError, match=message):
            check_cache(config)
