# SPDX-License-Identifier: Apache-2.0
"""The performance model: predicts a layer's cycles before any hardware is built.

The memory is the simulated one named `ideal`: a fixed latency, then a beat per cycle on every port. The hardware's own
latencies are in :mod:`hw.spec.latencies`.
"""

from collections.abc import Sequence

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.latencies import Latencies
from hw.spec.memory.access import CHUNK_BYTES, CHUNKS_AHEAD, IDEAL_READ_LATENCY, IDEAL_WRITE_LATENCY, PIECE_FLOATS
from hw.spec.memory.geometry import LayerLayout, ceil_div, fit_layer
from hw.spec.memory.operands import activation_beats

_COUNTED_TWICE = 2
"""The sequencer's decision and the read of a slice: in the time until the slice is stored, and in `Latencies.core`."""


def command_cycles(config: AcceleratorConfig) -> int:
    """Cycles from the core's command to the first beat and to the first activations."""
    latencies = Latencies(config)
    return latencies.fork + latencies.walker


def dispatch_cycles(config: AcceleratorConfig) -> int:
    """Cycles from the push to the first block of activations."""
    latencies = Latencies(config)
    return latencies.queue + latencies.check


def pipeline_latency(config: AcceleratorConfig) -> int:
    """Cycles from the sequencer's decision on the last slice of an output tile to the tile's first result."""
    return Latencies(config).core


def tile_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles per output tile in the steady state, also from one layer to the next: the slowest of four.

    They are the beats of the stream; the reading of the header, which is the slowest only if K is a few tiles; the
    array, with one token slice or one word per cycle; and the drain. If array and drain take the same time and M is
    max_tokens, the real figure is about 2 % higher: the ring of sums holds two output tiles, and the third one waits
    until the first has left.
    """
    array = layer.slices * max(tokens, layer.stream.words_per_slice)
    drain = tokens * layer.config.tile // layer.config.lanes
    return max(layer.tile_beats, layer.header_cycles, array, drain)


def core_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles from the command to the last result of an idle core that never waits for its streams."""
    config, words, lanes = layer.config, layer.stream.words_per_slice, layer.config.lanes
    first_words = words * layer.stream.beats_per_word
    first_slice = command_cycles(config) + max(layer.header_beats + first_words, tokens)
    one_tile = layer.slices * max(tokens, words)
    to_last_slice = max(layer.tile_beats - layer.header_beats - first_words, one_tile - max(tokens, words))
    drain = (tokens - 1) * config.tile // lanes + ceil_div(layer.last_columns, lanes)
    steady = (layer.out_tiles - 1) * tile_cycles(layer, tokens)
    return first_slice + steady + to_last_slice + pipeline_latency(config) + drain


def activation_cycles(config: AcceleratorConfig, tokens: int, slices: int) -> tuple[int, int]:
    """Cycles from the push to the last row of activations in the unit, and to their last beat on any port."""
    row_beats = config.tile * FLOAT_BITS // config.port_width
    chunk_rows = CHUNK_BYTES * 8 // config.port_width // row_beats
    whole, rest = divmod(activation_beats(config, tokens, slices) // row_beats, chunk_rows)
    return rows_cycles(config, [chunk_rows] * whole + [rest] * (rest > 0), dispatch_cycles(config))


def rows_cycles(
    config: AcceleratorConfig, chunks: Sequence[int], begin: int, ahead: int | None = None
) -> tuple[int, int]:
    """When the last row of chunks of activations is in the unit, and their last beat on its port.

    chunks : rows of each. Ports take turns, chunk by chunk. begin : the cycle of the first block. ahead : chunks that
    are requested at most, if there is another limit than the room on chip
    """
    row_beats = config.tile * FLOAT_BITS // config.port_width
    window = min(CHUNKS_AHEAD * config.ports, ahead or CHUNKS_AHEAD * config.ports)
    latencies = Latencies(config)
    latency = latencies.activation_fetch + latencies.read + IDEAL_READ_LATENCY
    arrived, merged = [0] * config.ports, []
    for rows in chunks:
        port = len(merged) % config.ports
        # A chunk is requested when there is room for it, and comes after the previous one on its port.
        asked = merged[-window] if len(merged) >= window else begin
        begins = max(arrived[port], asked + latency)
        arrived[port] = begins + rows * row_beats
        begun = max(merged[-1] if merged else 0, begins + row_beats + latencies.row - 1)
        merged.append(max(begun + rows, arrived[port] + latencies.row))
    return merged[-1], max(arrived)


def slices_cycles(layer: LayerLayout, tokens: int, ahead: int, writes: bool = True) -> int:
    """Cycles from the array's first slice of a layer to its last one.

    ahead : beats that came before the first slice; only as many as the header's ring and the words' FIFO hold count
    writes : the results go to memory

    A slice starts when its last word is there. So if the stream is the slowest, the last slice starts with the last
    beat.
    """
    config, stream = layer.config, layer.stream
    one_slice = max(tokens, stream.words_per_slice)
    array, drain = layer.slices * one_slice, tokens * config.tile // config.lanes
    room = layer.header_beats + stream.word_fifo_depth * stream.beats_per_word
    # A single piece is written after its last result, so its writing delays no slice.
    writing = _tile_write_cycles(config, tokens) if writes and layer.n > PIECE_FLOATS else 0
    steady = (layer.out_tiles - 1) * max(layer.header_cycles, array, drain, writing)
    return max(steady + array - one_slice, layer.beats - min(max(0, ahead), room, layer.beats) - 1)


def result_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles from the sequencer's decision on a layer's last slice to the last result of the core."""
    lanes = layer.config.lanes
    last_tile = (tokens - 1) * layer.config.tile // lanes + ceil_div(layer.last_columns, lanes)
    return pipeline_latency(layer.config) + last_tile


def first_slice_cycles(config: AcceleratorConfig, tokens: int) -> int:
    """Cycles from the last row of activations in the unit to the sequencer's decision on the first slice."""
    return Latencies(config).activation_unit - _COUNTED_TWICE + tokens


def layer_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles from the push of a descriptor to its completion, on an idle accelerator."""
    rows_done, ports_free = activation_cycles(layer.config, tokens, layer.slices)
    first_slice = rows_done + first_slice_cycles(layer.config, tokens)
    # The weights come after the activations, if there is room for them before the first slice.
    ahead = first_slice - ports_free - Latencies(layer.config).beat
    to_results = slices_cycles(layer, tokens, ahead) + result_cycles(layer, tokens)
    return first_slice + to_results + write_cycles(layer, tokens)


def write_cycles(layer: LayerLayout, tokens: int) -> int:
    """Cycles from the last result to the completion: writing of the last piece, and its acknowledgement by memory.

    The last piece waits until the previous piece is written. This matters if the last piece has few columns.
    """
    config, latencies = layer.config, Latencies(layer.config)
    columns = layer.n % PIECE_FLOATS or PIECE_FLOATS
    waiting = 0
    if layer.n > PIECE_FLOATS:
        tile_period = max(tile_cycles(layer, tokens), _tile_write_cycles(config, tokens))
        since_last_piece = ceil_div(columns, config.tile) * tile_period
        waiting = max(0, tokens * _row_beats(config, PIECE_FLOATS) - since_last_piece)
    # One more cycle to count the completion.
    around = latencies.gatherer + latencies.write_data + latencies.write_complete + 1
    return waiting + around + tokens * _row_beats(config, columns) + IDEAL_WRITE_LATENCY


def _tile_write_cycles(config: AcceleratorConfig, tokens: int) -> int:
    """Cycles that the first port needs to write the results of an output tile."""
    return tokens * config.tile * FLOAT_BITS // config.port_width


def _row_beats(config: AcceleratorConfig, columns: int) -> int:
    """Beats of one row of results of a piece."""
    return ceil_div(columns * FLOAT_BITS, config.port_width)


def cycles(config: AcceleratorConfig, tokens: int, k: int, n: int, group_size: int = 128) -> int:
    """Cycles of a single layer: M = ``tokens``, in_features ``k``, out_features ``n``.

    Raises
    ------
    ConfigError : the layer does not fit the config
    """
    return layer_cycles(fit_layer(config, k, n, group_size), tokens)
