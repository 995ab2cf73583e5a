# SPDX-License-Identifier: Apache-2.0
"""The performance model of scores and values.

Scores are a layer whose results stay on chip. The softmax of a bank begins when its scores are stored, and takes one
part of a row per cycle; meanwhile the array computes the next descriptor. Values are a layer for each chunk of 256
positions of each column tile, whose activations are the probabilities of a bank. So in the steady state a chunk takes
as long as the slowest of its weights, the array, the drain, and the activation unit, which takes a chunk in while it
sends the one before.
"""

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.cycles import first_slice_cycles, result_cycles, rows_cycles, slices_cycles
from hw.spec.latencies import Latencies
from hw.spec.memory.access import CHUNK_BYTES
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.memory.kv_cache import value_chunk, value_group, value_planes
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops import Wait
from hw.spec.ops.base import DescriptorWords
from hw.spec.ops.scores import SCORES, bank_words
from hw.spec.timing.timeline import Timeline

_BLOCKS_AHEAD = 5
"""Rows that are requested at most: the activation fetch knows the lengths of the one that it merges and of four more."""


def scores(config: AcceleratorConfig, now: Timeline, descriptor: DescriptorWords) -> None:
    """Moves the timeline to the completion of a descriptor of scores: they are on chip."""
    fields = vars(descriptor)
    latencies, rows, bank = Latencies(config), fields["tokens"], fields["bank"]
    layer, planes = SCORES.cache(config, fields).layer, fields["planes"]
    waits = fields["wait"] != Wait.NOTHING
    begin = now.memory if waits else now.loaded
    now.loaded = _rows_loaded(config, begin, rows, layer.slices // planes)
    first_slice = max(now.array, now.loaded + first_slice_cycles(config, rows))
    ahead = 0 if fields["wait"] == Wait.WEIGHTS else first_slice - now.array
    if fields["wait"] == Wait.WEIGHTS:
        # The weights are requested behind the rows.
        first_slice = max(first_slice, now.loaded + latencies.beat + layer.header_beats)
    last_slice = first_slice + slices_cycles(layer, rows, ahead, writes=False)
    results = last_slice + result_cycles(layer, rows)
    drain = rows * config.tile // config.lanes
    # The bank takes scores when its values are computed. The ring of sums holds two output tiles meanwhile.
    results = max(results, now.released[bank] + layer.out_tiles * drain)
    now.array = max(last_slice + max(rows, layer.stream.words_per_slice), results - 2 * drain - latencies.core)
    stored = results + latencies.epilogue + latencies.score_writer
    now.memory = max(now.memory, stored)
    _softmax(config, now, bank, rows, fields["out_features"], stored)


def _softmax(config: AcceleratorConfig, now: Timeline, bank: int, rows: int, positions: int, stored: int) -> None:
    """The softmax of a bank: its probabilities, and 1/S of its rows, one after the other."""
    latencies = Latencies(config)
    row = bank_words(1, positions) // config.vector_lanes
    begin = max(stored, now.softmax) + 1
    now.softmax = begin + rows * row
    now.ready[bank] = now.softmax + latencies.softmax
    first_sum = begin + row + latencies.softmax
    now.inverse = max(now.inverse, first_sum) + latencies.inverse
    now.inverse = max(now.inverse + (rows - 1) * latencies.inverse, now.ready[bank] + latencies.inverse)
    now.inverted[bank] = now.inverse


def _rows_loaded(config: AcceleratorConfig, begin: int, rows: int, slices: int) -> int:
    """When rows that are apart in memory are on chip: each of them is a block of its own."""
    row_beats = config.tile * FLOAT_BITS // config.port_width
    most = CHUNK_BYTES * 8 // config.port_width // row_beats
    chunks = [most] * (slices // most) + [slices % most] * (slices % most > 0)
    return begin + rows_cycles(config, chunks * rows, 0, _BLOCKS_AHEAD * len(chunks))[0]


def values(config: AcceleratorConfig, now: Timeline, descriptor: DescriptorWords) -> int:
    """Moves the timeline to the last sum of a descriptor of values, and returns its cycle."""
    fields = vars(descriptor)
    latencies, rows, bank = Latencies(config), fields["tokens"], fields["bank"]
    layers = value_layers(config, fields["positions"])
    tiles = ceil_div(fields["out_features"], config.tile)
    ready = max(now.ready[bank], now.loaded + latencies.read)
    first, last = layers[0], layers[-1]
    loads = [rows * layer.slices // value_planes(config) for layer in (first, last)]
    begin = ready + latencies.value_rows
    first_slice = max(now.array, begin + loads[0] + first_slice_cycles(config, rows))
    periods = [chunk_cycles(layer, rows) for layer in layers]
    steady = tiles * sum(periods) - periods[-1]
    beats = tiles * sum(layer.tile_beats for layer in layers)
    room = first.header_beats + first.stream.word_fifo_depth * first.stream.beats_per_word
    ahead = min(max(0, first_slice - now.array), room, beats)
    one_slice = max(rows, last.stream.words_per_slice)
    last_slice = first_slice + max(steady + last.slices * one_slice - one_slice, beats - ahead - 1)
    now.array = last_slice + one_slice
    # The unit takes in the next layer's rows when the last chunk but one is sent.
    now.loaded = max(now.loaded, last_slice - periods[-1] - last.slices * one_slice)
    now.released[bank] = max(last_slice + result_cycles(last, rows), now.inverted[bank])
    if len(layers) > 1:
        now.released[bank] += latencies.chunk_sums
    return now.released[bank]


def value_layers(config: AcceleratorConfig, positions: int) -> list[LayerLayout]:
    """The layers of the chunks of one column tile."""
    chunk, (whole, rest) = value_chunk(config), divmod(positions, CHUNK)
    layers = [chunk] * whole
    if rest:
        group = value_group(config)
        layers.append(_Part(config, ceil_div(rest, group) * group * value_planes(config), config.tile, group))
    return layers


class _Part(LayerLayout):
    """A chunk that is not full: its header is that of a full one."""

    @property
    def header_beats(self) -> int:  # type: ignore[override]
        """See LayerLayout."""
        return value_chunk(self.config).header_beats


def chunk_cycles(layer: LayerLayout, rows: int) -> int:
    """Cycles of a chunk of values in the steady state."""
    config, latencies = layer.config, Latencies(layer.config)
    sent = layer.slices * rows
    taken, turn = sent // value_planes(config), latencies.turnaround
    unit = max(sent, taken) if abs(sent - taken) >= turn else (sent + taken + turn + 1) // 2
    array = layer.slices * max(rows, layer.stream.words_per_slice)
    drain = rows * config.tile // config.lanes
    return max(layer.tile_beats, layer.header_cycles, array, drain, unit)
