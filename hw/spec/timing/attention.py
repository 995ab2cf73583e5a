# SPDX-License-Identifier: Apache-2.0
"""The performance model of scores and values.

Scores are a layer whose results stay on chip. The softmax of a bank begins when its scores are stored, and takes one
part of a row per cycle, chunk by chunk of 256 positions; meanwhile the array computes the next descriptor. Values are a
layer for each column tile of each chunk, whose activations are the probabilities of a bank; a chunk begins when its
softmax is computed. So in the steady state a column tile takes as long as the slowest of its weights, the array, the
drain, and the activation unit, which takes one in while it sends the one before.
"""

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.cycles import first_slice_cycles, result_cycles, rows_cycles, slices_cycles
from hw.spec.latencies import Latencies
from hw.spec.memory.access import BLOCKS_AHEAD, CHUNK_BYTES
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.memory.kv_cache import value_chunk, value_group, value_planes
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops import Wait
from hw.spec.ops.scores import SCORES, ScoresDescriptor, bank_words
from hw.spec.ops.values import ValuesDescriptor
from hw.spec.timing.timeline import Timeline

_ROWS_AHEAD = BLOCKS_AHEAD + 1
"""Rows that are requested at most: the activation fetch also knows the length of the one it merges."""


def scores(config: AcceleratorConfig, now: Timeline, descriptor: ScoresDescriptor) -> None:
    """Moves the timeline to the completion of a descriptor of scores: they are on chip."""
    latencies, rows, bank = Latencies(config), descriptor.tokens, descriptor.bank
    layer = SCORES.cache(config, vars(descriptor)).layer
    begin = now.loaded if descriptor.wait == Wait.NOTHING else now.memory
    now.loaded = _rows_loaded(config, begin, rows, layer.slices // descriptor.planes)
    first_slice, ahead = now.loaded + first_slice_cycles(config, rows), 0
    if descriptor.wait == Wait.WEIGHTS:
        # The weights are requested behind the rows.
        first_slice = max(now.array, first_slice, now.loaded + latencies.beat + layer.header_beats)
    else:
        first_slice = max(now.array, first_slice)
        ahead = first_slice - now.array
    last_slice = first_slice + slices_cycles(layer, rows, ahead, writes=False)
    results = last_slice + result_cycles(layer, rows)
    drain = rows * config.tile // config.lanes
    # The bank takes scores when its values are computed. The ring of sums holds two output tiles meanwhile.
    results = max(results, now.released[bank] + layer.out_tiles * drain)
    now.array = max(last_slice + max(rows, layer.stream.words_per_slice), results - 2 * drain - latencies.core)
    stored = results + latencies.epilogue + latencies.score_writer
    now.memory = max(now.memory, stored)
    _softmax(config, now, bank, rows, descriptor.out_features, stored)


def _softmax(config: AcceleratorConfig, now: Timeline, bank: int, rows: int, positions: int, stored: int) -> None:
    """The softmax of a bank: its probabilities, and 1/S of its rows, one after the other."""
    latencies, words = Latencies(config), bank_words(1, positions)
    begin = max(stored, now.softmax) + 1
    ends = [*range(CHUNK, words, CHUNK), words]
    now.softmax = begin + rows * words // config.vector_lanes
    now.ready[bank] = [begin + rows * end // config.vector_lanes + latencies.softmax for end in ends]
    # The sums of the rows follow each other in the last chunk.
    last_chunk = (words - (len(ends) - 1) * CHUNK) // config.vector_lanes
    first_sum = now.ready[bank][-1] - (rows - 1) * last_chunk
    one_by_one = max(now.inverse, first_sum) + rows * latencies.inverse
    now.inverse = now.inverted[bank] = max(one_by_one, now.ready[bank][-1] + latencies.inverse)


def _rows_loaded(config: AcceleratorConfig, begin: int, rows: int, slices: int) -> int:
    """When rows that are apart in memory are on chip: each of them is a block of its own."""
    row_beats = config.tile * FLOAT_BITS // config.port_width
    most = CHUNK_BYTES * 8 // config.port_width // row_beats
    chunks = [most] * (slices // most) + [slices % most] * (slices % most > 0)
    return begin + rows_cycles(config, chunks * rows, 0, _ROWS_AHEAD * len(chunks))[0]


def values(config: AcceleratorConfig, now: Timeline, descriptor: ValuesDescriptor) -> int:
    """Moves the timeline to the last sum of a descriptor of values, and returns its cycle."""
    latencies, rows, bank = Latencies(config), descriptor.tokens, descriptor.bank
    chunks = value_layers(config, descriptor.positions)
    tiles = ceil_div(descriptor.out_features, config.tile)
    periods = [chunk_cycles(chunk, rows) for chunk in chunks]
    # The first slice of each chunk: the array is free, and its first column tile is taken in.
    begin, free, starts = now.loaded + latencies.read, now.array, []
    for chunk, period, ready in zip(chunks, periods, now.ready[bank], strict=True):
        taken_in = max(begin, ready) + latencies.value_rows + rows * chunk.slices // value_planes(config)
        starts.append(max(free, taken_in + first_slice_cycles(config, rows)))
        free = starts[-1] + tiles * period
    first_slice, last, stream = starts[0], chunks[-1], chunks[-1].stream
    one_slice = max(rows, stream.words_per_slice)
    array = last.slices * one_slice
    beats = tiles * sum(_beats(chunk) for chunk in chunks)
    room = value_chunk(config).header_beats + stream.word_fifo_depth * stream.beats_per_word
    ahead = min(max(0, first_slice - now.array), room, beats)
    last_slice = max(starts[-1] + (tiles - 1) * periods[-1] + array - one_slice, first_slice + beats - ahead - 1)
    now.array = last_slice + one_slice
    # The unit takes in the rows of the next descriptor when the last chunk but one is sent.
    now.loaded = max(now.loaded, last_slice - periods[-1] - array)
    results = max(last_slice + result_cycles(last, rows), now.inverted[bank])
    now.released[bank] = results + (latencies.chunk_sums if len(chunks) > 1 else 0)
    return now.released[bank]


def value_layers(config: AcceleratorConfig, positions: int) -> list[LayerLayout]:
    """The layers of the chunks of one column tile. The last one ends with its last group of positions."""
    whole, rest = divmod(positions, CHUNK)
    chunks = [value_chunk(config)] * whole
    if rest:
        group = value_group(config)
        chunks.append(LayerLayout(config, ceil_div(rest, group) * group * value_planes(config), config.tile, group))
    return chunks


def _beats(chunk: LayerLayout) -> int:
    """Beats of a chunk. Its header is that of a full one."""
    return value_chunk(chunk.config).header_beats + chunk.body_words * chunk.stream.beats_per_word


def chunk_cycles(chunk: LayerLayout, rows: int) -> int:
    """Cycles of a chunk of values in the steady state."""
    config, turn = chunk.config, Latencies(chunk.config).turnaround
    sent = chunk.slices * rows
    taken = sent // value_planes(config)
    # A half of the unit is taken in while the other one is sent.
    unit = max(sent, taken) if abs(sent - taken) >= turn else ceil_div(sent + taken + turn, 2)
    array = chunk.slices * max(rows, chunk.stream.words_per_slice)
    drain = rows * config.tile // config.lanes
    return max(_beats(chunk), chunk.header_cycles, array, drain, unit)
