# SPDX-License-Identifier: Apache-2.0
"""The performance model of programs: predicts the cycle in which each descriptor is complete.

As in :mod:`hw.spec.cycles`, the memory is the simulated one named `ideal`. What this model adds is what passes between
two descriptors. A layer begins when the array is free and its activations are on chip. Activations that do not wait are
read while the descriptor before is computed; those that wait are read when the results before are in memory, and those
of a single token piece by piece as they are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
from hw.spec.memory.access import CHUNK_BYTES, IDEAL_READ_LATENCY, IDEAL_WRITE_LATENCY, PIECE_FLOATS
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.ops import Wait
from hw.spec.ops.linear import LINEAR

_FOLLOW = 4
"""Cycles from the acknowledgement of a piece to the request of its last chunk."""


@dataclass
class _Timeline:
    """When the parts of the accelerator are free, in cycles from the start of the program."""

    array: int
    """The array can begin the next layer."""
    memory: int
    """The outputs of all descriptors so far are in memory."""
    loaded: int
    """The last activations are on chip."""
    before: Descriptor | VectorDescriptor | None = None


def program_cycles(config: AcceleratorConfig, program: Sequence[Descriptor | VectorDescriptor]) -> list[int]:
    """For each descriptor of a program the cycles from the start to its completion.

    program : checked descriptors, of hardware with programs (``config.has_programs``)
    """
    latencies, beats = Latencies(config), DESCRIPTOR_BYTES * 8 // config.port_width
    fetched = latencies.program_fetch + latencies.read + IDEAL_READ_LATENCY + beats + latencies.descriptor
    now, completions = _Timeline(fetched, fetched, fetched), []
    for descriptor in program:
        if isinstance(descriptor, Descriptor):
            _layer(config, now, descriptor)
        else:
            _vector(config, now, descriptor)
        now.before = descriptor
        completions.append(now.memory)
    return completions


def _layer(config: AcceleratorConfig, now: _Timeline, descriptor: Descriptor) -> None:
    """Moves the timeline to the completion of a layer."""
    layer, tokens = LINEAR.layout(config, vars(descriptor)), descriptor.tokens
    if not descriptor.reuse:
        now.loaded = _loaded(config, now, descriptor, layer)
    first_slice = max(now.array, now.loaded + first_slice_cycles(config, tokens))
    last_slice = first_slice + slices_cycles(layer, tokens, first_slice - now.array)
    now.array = last_slice + max(tokens, layer.stream.words_per_slice)
    results = last_slice + result_cycles(layer, tokens)
    now.memory = max(now.memory, _written(config, descriptor, results))


def _loaded(config: AcceleratorConfig, now: _Timeline, descriptor: Descriptor, layer: LayerLayout) -> int:
    """When the activations of a layer are on chip."""
    latencies, tokens = Latencies(config), descriptor.tokens
    rows_done = activation_cycles(config, tokens, layer.slices)[0]
    if descriptor.wait == Wait.NOTHING:
        return now.loaded + rows_done
    if now.before is None or not _follows(descriptor, now.before):
        return now.memory + rows_done - dispatch_cycles(config)
    # Only the last piece is not on chip yet when memory has acknowledged the row.
    columns = now.before.out_features >> now.before.silu
    last_piece = (columns - 1) % PIECE_FLOATS + 1
    chunk = min(CHUNK_BYTES, last_piece * FLOAT_BITS // 8) * 8 // config.port_width
    return now.memory + _FOLLOW + latencies.read + IDEAL_READ_LATENCY + chunk + latencies.row


def _follows(descriptor: Descriptor, before: Descriptor | VectorDescriptor) -> bool:
    """Whether the activations are a row that is read as the descriptor before writes it."""
    row = before.second_results if before.second else before.results
    return descriptor.tokens == before.tokens == 1 and descriptor.activations == row


def _vector(config: AcceleratorConfig, now: _Timeline, descriptor: VectorDescriptor) -> None:
    """Moves the timeline to the completion of a descriptor without a layer."""
    latencies, tokens, columns = Latencies(config), descriptor.tokens, descriptor.out_features
    begin = now.loaded if descriptor.wait == Wait.NOTHING else now.memory
    first = tokens * _beats(config, min(columns, PIECE_FLOATS))
    on_chip = begin + latencies.operand_fetch + latencies.read + IDEAL_READ_LATENCY + first + latencies.operand_fill
    taken = tokens * ceil_div(columns, config.vector_lanes)
    fetched = tokens * _beats(config, columns) - first
    now.memory = max(now.memory, _written(config, descriptor, on_chip + max(taken, fetched)))


def _written(config: AcceleratorConfig, descriptor: Descriptor | VectorDescriptor, results: int) -> int:
    """When the outputs are in memory. results: the cycle of the last result before the epilogue."""
    latencies, columns = Latencies(config), descriptor.out_features >> descriptor.silu
    outputs = (not descriptor.quiet) + descriptor.second
    last_piece = descriptor.tokens * _beats(config, (columns - 1) % PIECE_FLOATS + 1)
    around = latencies.gatherer + latencies.write_data + latencies.write_complete + 1
    latency = latencies.second_output if descriptor.second else latencies.epilogue
    return results + latency + around + max(1, outputs) * last_piece + IDEAL_WRITE_LATENCY


def _beats(config: AcceleratorConfig, columns: int) -> int:
    """Beats of a row of floats on one port."""
    return ceil_div(columns * FLOAT_BITS, config.port_width)
