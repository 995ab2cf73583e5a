# SPDX-License-Identifier: Apache-2.0
"""The performance model of appends to a KV cache."""

from hw.spec.config import AcceleratorConfig
from hw.spec.latencies import Latencies
from hw.spec.memory.access import IDEAL_WRITE_LATENCY
from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.kv_cache import append_bundle
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops import Wait
from hw.spec.ops.append import AppendDescriptor
from hw.spec.timing.outputs import taken
from hw.spec.timing.timeline import Timeline


def append(config: AcceleratorConfig, now: Timeline, descriptor: AppendDescriptor) -> None:
    """Moves the timeline to the completion of an append."""
    latencies, tokens, columns = Latencies(config), descriptor.tokens, descriptor.out_features
    begin = now.loaded if descriptor.wait == Wait.NOTHING else now.memory
    transfers = ceil_div(columns, config.vector_lanes)
    first_row = taken(config, begin, tokens, columns) + latencies.epilogue - (tokens - 1) * transfers
    row = transfers + latencies.cache_row
    arrived, end = max(first_row - row, now.appended), now.writer + latencies.cache_job
    for rows in bundles(config, descriptor.slot, tokens, descriptor.slots):
        # A bundle is written when its last row is there; meanwhile the rows of the next one come.
        arrived += rows * row
        beats = bundle_beats(config, descriptor, rows)
        end = max(end, arrived + latencies.cache_writer + transfers) + beats + latencies.cache_head
    now.writer, now.appended = end, arrived
    end += latencies.write_data + latencies.write_complete + IDEAL_WRITE_LATENCY
    now.memory = max(now.memory, end)


def bundles(config: AcceleratorConfig, slot: int, tokens: int, slots: int) -> list[int]:
    """The numbers of rows that are written together: of neighbouring slots, from multiples of the bundle on."""
    found = []
    while tokens:
        found.append(min(append_bundle(config) - slot % append_bundle(config), slots - slot, tokens))
        tokens -= found[-1]
        slot = (slot + found[-1]) % slots
    return found


def bundle_beats(config: AcceleratorConfig, descriptor: AppendDescriptor, rows: int) -> int:
    """Beats of a bundle of some rows."""
    columns = descriptor.out_features
    return key_beats(config, columns, descriptor.planes) if descriptor.keys else value_beats(config, columns, rows)


def key_beats(config: AcceleratorConfig, columns: int, planes: int) -> int:
    """Beats of keys: their exponents, the scales of their groups and planes, their mantissas; one after the other."""
    groups = columns // BLOCK * planes
    return 1 + groups + 4 * groups * config.weight_bits // max(1, config.port_width // 8 // config.tile)


def value_beats(config: AcceleratorConfig, columns: int, rows: int = 1) -> int:
    """Beats of values: the mantissas of each row, column tile by column tile and plane by plane, and the exponents."""
    row_bytes = config.tile * config.weight_bits // 8
    return rows * columns // min(row_bytes, config.port_width // 8) + columns // BLOCK
