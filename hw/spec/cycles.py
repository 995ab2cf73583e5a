# SPDX-License-Identifier: Apache-2.0
"""The performance model: how many cycles the core takes for a layer, before any hardware is built."""

from .config import AcceleratorConfig
from .layout import LayerLayout, ceil_div, fit_layer

_COMMAND_CYCLES = 2
"""From the command to the first beat and to the first activations: fork and walker."""


def pipeline_latency(config: AcceleratorConfig) -> int:
    """Cycles from the sequencer's decision on the last slice of an output tile to the tile's first result."""
    array = config.tile + 2
    columns, drain = 7, config.tile + 1
    float_out = 3 + (max(config.sum_bits - 1, 24) - 1).bit_length()
    return 1 + 2 + array + columns + drain + float_out + 1


def tile_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles per output tile in the steady state, also from one layer to the next: the slowest of three.

    The beats of the stream; the array, one token slice or one word per cycle; the drain. Where array and drain take
    equally long and M is max_tokens, the real figure is about 2 % higher: the ring of sums holds two output tiles, and
    the third one waits until the first has left.
    """
    array = layer.slices * max(tokens, layer.stream.words_per_slice)
    drain = tokens * layer.config.tile // layer.config.drain_lanes
    return max(layer.tile_beats, array, drain)


def layer_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles from the command to the last result of a layer that finds the core idle and its memory unlimited."""
    config, stream = layer.config, layer.stream
    words = stream.words_per_slice
    lanes = config.drain_lanes
    first_words = words * stream.beats_per_word
    first_slice = _COMMAND_CYCLES + max(layer.header_beats + first_words, tokens)
    one_tile = layer.slices * max(tokens, words)
    to_last_slice = max(layer.tile_beats - layer.header_beats - first_words, one_tile - max(tokens, words))
    drain = (tokens - 1) * config.tile // lanes + ceil_div(layer.last_columns, lanes)
    steady = (layer.out_tiles - 1) * tile_cycles(layer, tokens)
    return first_slice + steady + to_last_slice + pipeline_latency(config) + drain


def cycles(config: AcceleratorConfig, tokens: int, k: int, n: int, group_size: int = 128) -> int:
    """Cycles of a whole layer: M = ``tokens``, in_features ``k``, out_features ``n``.

    Raises
    ------
    ConfigError : the layer does not fit the config
    """
    return layer_cycles(fit_layer(config, k, n, group_size), tokens)
