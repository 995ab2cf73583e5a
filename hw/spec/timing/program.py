# SPDX-License-Identifier: Apache-2.0
"""The performance model of programs: predicts the cycle in which each descriptor is complete.

As in :mod:`hw.spec.cycles`, the memory is the simulated one named `ideal`. What this model adds is what passes between
two descriptors. A layer begins when the array is free and its activations are on chip. Activations that do not wait are
read while the descriptor before is computed; those that wait are read when the results before are in memory, and those
of a single token, or with attention of several, piece by piece as they are written.
"""

from collections.abc import Sequence

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.control.descriptor import Descriptor, VectorDescriptor
from hw.spec.control.program import DESCRIPTOR_BYTES
from hw.spec.cycles import (
    activation_cycles,
    dispatch_cycles,
    first_slice_cycles,
    result_cycles,
    slices_cycles,
)
from hw.spec.latencies import Latencies
from hw.spec.memory.access import CHUNK_BYTES, IDEAL_READ_LATENCY, PIECE_FLOATS
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.memory.operands import FLOAT_BYTES, activation_beats
from hw.spec.ops import Wait
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.base import DescriptorWords
from hw.spec.ops.linear import LINEAR
from hw.spec.ops.scores import ScoresDescriptor
from hw.spec.ops.values import ValuesDescriptor
from hw.spec.timing.append import append
from hw.spec.timing.attention import scores, values
from hw.spec.timing.outputs import operand_cycles, row_beats, taken, written
from hw.spec.timing.timeline import Timeline

AnyDescriptor = Descriptor | VectorDescriptor | AppendDescriptor | ScoresDescriptor | ValuesDescriptor

_FOLLOW = 4
"""Cycles from the acknowledgement of a piece to the request of its last chunk."""


def program_cycles(config: AcceleratorConfig, program: Sequence[DescriptorWords]) -> list[int]:
    """For each descriptor of a program the cycles from the start to its completion.

    program : checked descriptors, of hardware with programs (``config.has_programs``)
    """
    latencies, beats = Latencies(config), DESCRIPTOR_BYTES * 8 // config.port_width
    fetched = latencies.program_fetch + latencies.read + IDEAL_READ_LATENCY + beats + latencies.descriptor
    now, completions = Timeline(fetched, fetched, fetched), []
    for descriptor in program:
        earlier = now.memory
        if isinstance(descriptor, Descriptor):
            _layer(config, now, descriptor)
        elif isinstance(descriptor, VectorDescriptor):
            _vector(config, now, descriptor)
        elif isinstance(descriptor, AppendDescriptor):
            append(config, now, descriptor)
        elif isinstance(descriptor, ScoresDescriptor):
            scores(config, now, descriptor)
        elif isinstance(descriptor, ValuesDescriptor):
            _values(config, now, descriptor)
        now.before, now.earlier = descriptor, earlier
        completions.append(now.memory)
    return completions


def _layer(config: AcceleratorConfig, now: Timeline, descriptor: Descriptor) -> None:
    """Moves the timeline to the completion of a layer."""
    layer, tokens = LINEAR.layout(config, vars(descriptor)), descriptor.tokens
    if not descriptor.reuse:
        now.loaded = _loaded(config, now, descriptor, layer)
    first_slice = max(now.array, now.loaded + first_slice_cycles(config, tokens))
    last_slice = first_slice + slices_cycles(layer, tokens, first_slice - now.array)
    now.array = last_slice + max(tokens, layer.stream.words_per_slice)
    results = last_slice + result_cycles(layer, tokens)
    now.memory = max(now.memory, _written(config, descriptor, results))


def _loaded(config: AcceleratorConfig, now: Timeline, descriptor: Descriptor, layer: LayerLayout) -> int:
    """When the activations of a layer are on chip."""
    latencies, tokens = Latencies(config), descriptor.tokens
    rows_done = activation_cycles(config, tokens, layer.slices)[0]
    on_port = ceil_div(activation_beats(config, tokens, layer.slices), config.ports)
    if descriptor.wait == Wait.NOTHING:
        return now.loaded + rows_done
    before = now.before
    if isinstance(before, ValuesDescriptor) and _has_tail(config, descriptor, layer, before):
        # All pieces but the last one are read while the values are computed.
        last = (layer.slices - 1) % (PIECE_FLOATS // config.tile) + 1
        rest = activation_cycles(config, tokens, last)[0] - dispatch_cycles(config)
        return max(now.earlier + rows_done, now.memory + rest)
    if not isinstance(before, Descriptor | VectorDescriptor) or not _follows(config, descriptor, layer, before):
        # With attention the operands wait for the activations.
        operands = 0 if config.has_attention else operand_cycles(config, descriptor, on_port)
        return now.memory + rows_done + operands - dispatch_cycles(config)
    # Only the last piece of the last row is not on chip yet when memory has acknowledged the rows.
    columns = before.out_features >> before.silu
    last_piece = (columns - 1) % PIECE_FLOATS + 1
    chunk = min(CHUNK_BYTES, last_piece * FLOAT_BITS // 8) * 8 // config.port_width
    # The second output is written before the results, but for the first row, which comes later.
    behind = (tokens - 1) * row_beats(config, last_piece) if before.second and not before.quiet else 0
    return now.memory - behind + _FOLLOW + latencies.read + IDEAL_READ_LATENCY + chunk + latencies.row


def _follows(
    config: AcceleratorConfig, descriptor: Descriptor, layer: LayerLayout, before: Descriptor | VectorDescriptor
) -> bool:
    """Whether the activations are read as the descriptor before writes them: a row, or exactly its rows."""
    row, pitch = (
        (before.second_results, before.second_pitch) if before.second else (before.results, before.result_pitch)
    )
    if descriptor.tokens != before.tokens or descriptor.activations != row:
        return False
    exactly = pitch == FLOAT_BYTES * layer.k == FLOAT_BYTES * (before.out_features >> before.silu)
    return descriptor.tokens == 1 or (config.reads_by_pieces and exactly)


def _has_tail(config: AcceleratorConfig, descriptor: Descriptor, layer: LayerLayout, before: ValuesDescriptor) -> bool:
    """Whether the values are in the last piece of the activations, and end with their rows."""
    row, columns = FLOAT_BYTES * layer.k, before.out_features
    last_piece = (layer.k - 1) % PIECE_FLOATS + 1
    ends = descriptor.activations + row == before.results + FLOAT_BYTES * columns
    return (
        config.reads_by_pieces
        and descriptor.tokens > 1
        and ends
        and before.result_pitch == row
        and columns <= last_piece
    )


def _vector(config: AcceleratorConfig, now: Timeline, descriptor: VectorDescriptor) -> None:
    """Moves the timeline to the completion of a descriptor without a layer."""
    begin = now.loaded if descriptor.wait == Wait.NOTHING else now.memory
    results = taken(config, begin, descriptor.tokens, descriptor.out_features, bool(descriptor.squares))
    now.memory = max(now.memory, _written(config, descriptor, results))


def _values(config: AcceleratorConfig, now: Timeline, descriptor: ValuesDescriptor) -> None:
    """Moves the timeline to the completion of a descriptor of values."""
    results = values(config, now, descriptor)
    now.memory = max(now.memory, written(config, results, descriptor.tokens, descriptor.out_features))


def _written(config: AcceleratorConfig, descriptor: Descriptor | VectorDescriptor, results: int) -> int:
    """When the outputs are in memory. results: the cycle of the last result before the epilogue."""
    columns, outputs = descriptor.out_features >> descriptor.silu, (not descriptor.quiet) + descriptor.second
    return written(config, results, descriptor.tokens, columns, outputs, bool(descriptor.second))
