# SPDX-License-Identifier: Apache-2.0
"""The core's command: every field in its place, wide enough for every legal layer, and refusals that say why."""

import re
from dataclasses import asdict, replace

import pytest

from hw.spec.config import ATTENTION_K, MAX_N, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops.command import LayerCommand, command_fields, is_short, max_header_beats, stored_slices
from hw.spec.ops.epilogue import MAX_HEAD

CONFIGS = [
    AcceleratorConfig(),
    AcceleratorConfig(tile=4, ports=1, port_width=32, max_tokens=1, max_k=32768),
    AcceleratorConfig(tile=8, weight_bits=3, zero_point="fixed", max_tokens=64),
    AcceleratorConfig(tile=16, operators="decoder", score_words=8192),
    AcceleratorConfig(tile=32, weight_bits=8, max_group_size=256, max_k=1024),
]


def fields_of(config: AcceleratorConfig, word: int) -> dict[str, int]:
    out = {}
    for name, width in command_fields(config).items():
        out[name], word = word & ((1 << width) - 1), word >> width
    assert word == 0
    # Without attention two fields do not exist, and are 0.
    return {"paired": 0, "spare_records": 0} | out


@pytest.mark.parametrize("config", CONFIGS)
def test_longest_layers_fit(config: AcceleratorConfig):
    """The command of the most extreme layers survives the round trip through its number."""
    for k, n, size in ((config.max_k, MAX_N, 128), (config.tile, 1, config.tile), (config.max_k, 77, 32)):
        try:
            layer = fit_layer(config, k, n, size)
        except ConfigError:
            continue
        for tokens in {1, config.max_tokens}:
            for reuse in (False, True):
                command = LayerCommand.from_layer(layer, tokens, reuse)
                assert fields_of(config, command.to_int(config)) == asdict(command)
                assert (command.tokens, command.reuse) == (tokens, int(reuse))


def test_counts():
    config = AcceleratorConfig()
    command = LayerCommand.from_layer(LayerLayout(config, k=896, n=1150, group_size=128), tokens=3)
    assert asdict(command) == {
        "tokens": 3,
        "groups": 7,
        "group_slices": 8,
        "out_tiles": 72,
        "last_columns": 14,
        # 16 exponents and 7 records of 16 * 20 bits are 2,368 bits; a slice is two words.
        "header_beats": 5,
        "body_words": 112,
        "reuse": 0,
        "paired": 0,
        "spare_records": 0,
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_no_header_is_longer(config: AcceleratorConfig):
    for size in range(config.tile, config.max_group_size + 1, config.tile):
        try:
            layer = LayerLayout(config, config.max_k // size * size, 1, size)
        except ConfigError:
            continue
        assert layer.header_beats <= max_header_beats(config)


@pytest.mark.parametrize("tokens", [0, 17, -1])
def test_tokens_are_checked(tokens: int):
    layer = LayerLayout(AcceleratorConfig(), k=128, n=16, group_size=128)
    with pytest.raises(ConfigError, match=re.escape(f"M is 1 to max_tokens (16), not {tokens}")):
        LayerCommand.from_layer(layer, tokens)


def test_a_field_that_overflows_is_named():
    config = AcceleratorConfig()
    command = LayerCommand.from_layer(LayerLayout(config, k=128, n=16, group_size=128), 1)
    width = command_fields(config)["groups"]
    with pytest.raises(ConfigError, match=f"^command field groups holds {width} bits, not {1 << width}$"):
        replace(command, groups=1 << width).to_int(config)


def test_short_layers_take_half():
    config = AcceleratorConfig(tile=16, max_tokens=3, max_k=1008)
    assert stored_slices(config) == 189
    assert is_short(config, 2, 47) and not is_short(config, 3, 32) and is_short(config, 3, 31)
    assert not is_short(AcceleratorConfig(tile=32, max_tokens=1, max_k=32), 1, 1)


@pytest.mark.parametrize("tile", [4, 8, 16, 32])
def test_layers_of_attention_are_short(tile: int):
    """Also in the smallest hardware that has attention, with the longest head and a whole chunk of positions."""
    smallest = AcceleratorConfig(operators="decoder", tile=tile, max_tokens=7, max_k=2 * ATTENTION_K, score_words=512)
    for k in (CHUNK, MAX_HEAD):
        assert k <= ATTENTION_K and is_short(smallest, smallest.max_tokens, k // tile)
    with pytest.raises(ConfigError, match=f"^max_k is at least 512 with score_words, not {512 - tile}$"):
        replace(smallest, max_k=2 * ATTENTION_K - tile)
