# SPDX-License-Identifier: Apache-2.0
"""Latencies of the RTL's blocks in cycles, for the performance model, which must not import the RTL.

The RTL composes its own latencies and lists them in the manifest; tests/hw/spec/test_latencies.py compares both.
"""

from dataclasses import dataclass, field, fields

from hw.spec.config import AcceleratorConfig


def _of(block: str, name: str = "latency", cycles: int | None = None):
    """The property ``name`` in the manifest of ``block``: the constant ``cycles``, or computed from the config."""
    metadata = {"block": block, "property": name}
    return field(init=False, metadata=metadata) if cycles is None else field(default=cycles, metadata=metadata)


ATTENTION = (
    *("turnaround", "score_writer", "softmax", "inverse", "value_rows", "chunk_sums"),
    *("cache_writer", "cache_row", "cache_head", "cache_job"),
)
"""Latencies of attention. Hardware without it does not have them."""


@dataclass(frozen=True)
class Latencies:
    """Latencies of one config's hardware. Each field names its block and its property in the block's manifest."""

    config: AcceleratorConfig
    fork: int = _of("fork", cycles=1)
    """Cycles from a command to its copies."""
    walker: int = _of("walker", cycles=1)
    """Cycles from a command to its first step."""
    queue: int = _of("fifo", cycles=1)
    """Cycles from the push to the check: a :class:`hw.rtl.common.fifo.StreamFifo`."""
    check: int = _of("descriptor_check", cycles=5)
    """Cycles from a descriptor to its checked form."""
    activation_fetch: int = _of("activation_fetch", cycles=1)
    """Cycles from a block of activations to its first burst."""
    row: int = _of("activation_fetch", "row_latency", cycles=3)
    """Cycles from the last beat of a row to the row."""
    read: int = _of("read_manager", cycles=1)
    """Cycles from a burst to AR."""
    beat: int = _of("read_manager", "beat_latency", cycles=2)
    """Cycles from R to a client with a FIFO."""
    gatherer: int = _of("gatherer", cycles=3)
    """Cycles from the last result of a chunk to its first beat."""
    write_data: int = _of("write_manager", "data_latency", cycles=1)
    """Cycles from a beat to W."""
    write_complete: int = _of("write_manager", "complete_latency", cycles=1)
    """Cycles from the last B to the completion."""
    program_fetch: int = _of("program_fetch", cycles=1)
    """Cycles from the start of a program to its first burst."""
    descriptor: int = _of("program_fetch", "descriptor_latency", cycles=1)
    """Cycles from the last beat of a descriptor to the descriptor."""
    operand_fetch: int = _of("operand_fetch", cycles=3)
    """Cycles from an operand's place to its first burst."""
    operand_fill: int = _of("operand_fetch", "fill_latency", cycles=2)
    """Cycles from the last beat of a chunk of an operand until it is available."""
    epilogue: int = _of("epilogue", cycles=43)
    """Cycles from a result of the core to the result after the epilogue."""
    second_output: int = _of("epilogue", "second_latency", cycles=49)
    """Cycles from a result of the core to the second output."""
    activation_unit: int = _of("activation_unit")
    """Cycles from the last row of activations to the first slice of mantissas."""
    core: int = _of("core")
    """Cycles from the sequencer's decision on the last slice of an output tile to the tile's first result."""
    turnaround: int = _of("activation_unit", "turnaround")
    """With attention: cycles in which the unit neither loads nor sends a short layer."""
    score_writer: int = _of("score_banks", "write_latency")
    """With attention: cycles from the last score until the scores of a bank are stored."""
    softmax: int = _of("score_banks", "softmax_latency", cycles=26)
    """With attention: cycles from the last part of a chunk until its probabilities can be read."""
    inverse: int = _of("score_banks", "inverse_latency", cycles=31)
    """With attention: cycles from the sum of a row to 1/S."""
    value_rows: int = _of("value_rows", cycles=3)
    """With attention: cycles from a word of probabilities to the row of activations."""
    chunk_sums: int = _of("chunk_sums", "sum_latency", cycles=10)
    """With attention: cycles from a result to its sum with those of other chunks."""
    cache_writer: int = _of("cache_writer")
    """With attention: cycles from a row's last transfer to its first piece."""
    cache_row: int = _of("cache_writer", "row_gap")
    """With attention: cycles between the transfers of two rows that are appended."""
    cache_head: int = _of("cache_writer", "head_gap", cycles=2)
    """With attention: cycles between the beats of two rows that are appended."""
    cache_job: int = _of("cache_writer", "job_gap", cycles=7)
    """With attention: cycles between the beats of two appends."""

    def __post_init__(self) -> None:
        tile, sum_bits = self.config.tile, self.config.sum_bits
        # Comparisons of four values per cycle; then the maximum of the token, its exponent, and the exponent in memory.
        # By pieces, the maximum of the piece and that of the token.
        exponent = tile.bit_length() // 2 + 3 + self.config.reads_by_pieces
        # With attention, a register behind the choice between two inputs.
        intake = int(self.config.has_attention)
        # Start, read, the memory's output register, three steps of rounding, the FIFO.
        object.__setattr__(self, "activation_unit", intake + exponent + 1 + 1 + 1 + 3 + 1)
        object.__setattr__(self, "turnaround", intake + exponent + 1)
        lane_bits = self.config.vector_lanes.bit_length() - 1
        # Registers, mask, maximum of the lanes and of the row.
        object.__setattr__(self, "score_writer", 6 + lane_bits)
        # The exponent of a head: lanes in pairs, rows, three steps; then the pipeline. Two heads are on chip.
        head = lane_bits + 4
        object.__setattr__(self, "cache_writer", head + 15)
        object.__setattr__(self, "cache_row", head // 2 + 2)
        array, columns, drain = tile + 2, 7, tile + 1
        float_out = 3 + (max(sum_bits - 1, 24) - 1).bit_length()
        # Sequencer, activation buffer, array, columns, drain chain, conversion, FIFO.
        object.__setattr__(self, "core", 1 + 2 + array + columns + drain + float_out + 1)

    def figures(self) -> list[tuple[str, str, int]]:
        """(block, property of its manifest, cycles) of every latency of this hardware."""
        known = [item for item in fields(self) if item.metadata]
        if not self.config.has_attention:
            known = [item for item in known if item.name not in ATTENTION]
        return [(item.metadata["block"], item.metadata["property"], getattr(self, item.name)) for item in known]
