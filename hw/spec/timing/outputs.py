# SPDX-License-Identifier: Apache-2.0
"""The performance model of the epilogue's input from memory, and of its outputs."""

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.latencies import Latencies
from hw.spec.memory.access import IDEAL_READ_LATENCY, IDEAL_WRITE_LATENCY, PIECE_FLOATS
from hw.spec.memory.geometry import ceil_div
from hw.spec.ops.linear import Descriptor

MAX_PORTS = 4


def row_beats(config: AcceleratorConfig, columns: int) -> int:
    """Beats of a row of floats on one port."""
    return ceil_div(columns * FLOAT_BITS, config.port_width)


def taken(config: AcceleratorConfig, begin: int, tokens: int, columns: int, squares: bool = False) -> int:
    """When the epilogue has taken rows from memory that are requested from the cycle ``begin`` on.

    squares : it adds their squares
    """
    latencies = Latencies(config)
    latency = latencies.operand_fetch + latencies.read + IDEAL_READ_LATENCY + latencies.operand_fill
    interval = epilogue_interval(config) if squares else 1
    pieces = [min(PIECE_FLOATS, columns - first) for first in range(0, columns, PIECE_FLOATS)]
    fetches = [latency + tokens * row_beats(config, piece) for piece in pieces]
    takes = [tokens * interval * ceil_div(piece, config.vector_lanes) for piece in pieces]
    # Pieces of more than half of the rows on chip are fetched and taken in turn.
    if 2 * tokens > config.max_tokens:
        return begin + sum(fetches) + sum(takes)
    later = sum(fetches[1:]) - latency * (len(pieces) - 1)
    return begin + fetches[0] + max(sum(takes), later)


def epilogue_interval(config: AcceleratorConfig) -> int:
    """Cycles of a transfer whose squares are added: a partial sum takes 8 cycles, and a token has 16 of them."""
    return max(1, config.vector_lanes // 2)


def operand_cycles(config: AcceleratorConfig, descriptor: Descriptor, beats: int) -> int:
    """Cycles by which a layer's activations come later because addend or rotary table use the same port.

    beats : of the activations on a port. A port has as many bursts under way of the activations as of the operand,
    whose bursts have at most twice as many beats. So the operand takes at most twice as many beats before the last
    ones of the activations. Chunks of the addend that are ahead of the results are as many as the chip holds.
    """
    piece = min(PIECE_FLOATS, descriptor.out_features)
    pieces = ceil_div(descriptor.out_features, PIECE_FLOATS)
    rows = descriptor.tokens if descriptor.addend_pitch else 1
    addend = descriptor.add * rows * row_beats(config, piece) * min(pieces, 2 * config.max_tokens // rows)
    table = descriptor.rotary * descriptor.tokens * row_beats(config, descriptor.head)
    # With four ports each operand has one of its own.
    on_port = max(addend, table) if config.ports == MAX_PORTS else addend + table
    return min(on_port, 2 * beats)


def written(
    config: AcceleratorConfig, results: int, tokens: int, columns: int, outputs: int = 1, second: bool = False
) -> int:
    """When the outputs are in memory.

    results : the cycle of the last result before the epilogue. outputs : 1, or 2 with the second output
    """
    latencies = Latencies(config)
    last_piece = tokens * row_beats(config, (columns - 1) % PIECE_FLOATS + 1)
    around = latencies.gatherer + latencies.write_data + latencies.write_complete + 1
    latency = latencies.second_output if second else latencies.epilogue
    return results + latency + around + max(1, outputs) * last_piece + IDEAL_WRITE_LATENCY
