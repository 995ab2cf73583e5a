# SPDX-License-Identifier: Apache-2.0
"""The performance model of appends to a KV cache."""

from hw.spec.config import AcceleratorConfig
from hw.spec.latencies import Latencies
from hw.spec.memory.access import IDEAL_WRITE_LATENCY
from hw.spec.memory.geometry import ceil_div
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops import Wait
from hw.spec.ops.append import AppendDescriptor
from hw.spec.timing.outputs import taken
from hw.spec.timing.timeline import Timeline


def append(config: AcceleratorConfig, now: Timeline, descriptor: AppendDescriptor) -> None:
    """Moves the timeline to the completion of an append."""
    latencies, tokens, columns = Latencies(config), descriptor.tokens, descriptor.out_features
    begin = now.loaded if descriptor.wait == Wait.NOTHING else now.memory
    first_row = taken(config, begin, tokens, columns) - (tokens - 1) * ceil_div(columns, config.vector_lanes)
    arrives = first_row + latencies.epilogue + latencies.cache_writer
    now.writer = max(now.writer + latencies.cache_job, arrives) + tokens * row_cycles(config, descriptor)
    end = now.writer + latencies.write_data + latencies.write_complete + IDEAL_WRITE_LATENCY
    now.memory = max(now.memory, end)


def row_cycles(config: AcceleratorConfig, descriptor: AppendDescriptor) -> int:
    """Cycles from one row of an append to the next: the slower of its transfers and its beats."""
    columns, latencies = descriptor.out_features, Latencies(config)
    beats = key_beats(config, columns, descriptor.planes) if descriptor.keys else value_beats(config, columns)
    return max(ceil_div(columns, config.vector_lanes) + latencies.cache_row, beats + latencies.cache_head)


def key_beats(config: AcceleratorConfig, columns: int, planes: int) -> int:
    """Beats of a key: its exponent, the scales of its groups and planes, its mantissas; one after the other."""
    groups = columns // BLOCK * planes
    return 1 + groups + 4 * groups * config.weight_bits // max(1, config.port_width // 8 // config.tile)


def value_beats(config: AcceleratorConfig, columns: int) -> int:
    """Beats of a value: its mantissas, column tile by column tile and plane by plane, and its exponents."""
    row_bytes = config.tile * config.weight_bits // 8
    return columns // min(row_bytes, config.port_width // 8, 2 * config.weight_bits) + columns // BLOCK
