# SPDX-License-Identifier: Apache-2.0
"""Latencies of the RTL's blocks in cycles, for the performance model, which may not import the RTL.

The RTL composes its own, and states them in the manifest; tests/hw/test_latencies.py holds both equal.
"""

from dataclasses import dataclass, field, fields

from hw.spec.config import AcceleratorConfig


def _of(block: str, name: str = "latency", cycles: int | None = None):
    """A figure that the manifest of ``block`` has as ``name``; always ``cycles``, or worked out from the config."""
    metadata = {"block": block, "property": name}
    return field(init=False, metadata=metadata) if cycles is None else field(default=cycles, metadata=metadata)


@dataclass(frozen=True)
class Latencies:
    """What one config's hardware takes. Each field names the block, and the property of its manifest, that it is of."""

    config: AcceleratorConfig
    fork: int = _of("fork", cycles=1)
    """From a command to its copies."""
    walker: int = _of("walker", cycles=1)
    """From a command to its first step."""
    queue: int = _of("fifo", cycles=1)
    """From the push to the check: a :class:`hw.rtl.common.fifo.StreamFifo`."""
    check: int = _of("descriptor_check", cycles=5)
    """From a descriptor to its work."""
    activation_fetch: int = _of("activation_fetch", cycles=1)
    """From a block of activations to its first burst."""
    row: int = _of("activation_fetch", "row_latency", cycles=3)
    """From the last beat of a row to the row."""
    read: int = _of("read_manager", cycles=1)
    """From a burst to AR."""
    beat: int = _of("read_manager", "beat_latency", cycles=2)
    """From R to a client with a FIFO."""
    gatherer: int = _of("gatherer", cycles=3)
    """From the last result of a chunk to its first beat."""
    write_data: int = _of("write_manager", "data_latency", cycles=1)
    """From a beat to W."""
    write_complete: int = _of("write_manager", "complete_latency", cycles=1)
    """From the last B to the completion."""
    activation_unit: int = _of("activation_unit")
    """From the last row of activations to the first slice of mantissas."""
    core: int = _of("core")
    """From the sequencer's decision on the last slice of an output tile to the tile's first result."""

    def __post_init__(self) -> None:
        tile, sum_bits = self.config.tile, self.config.sum_bits
        # Four are compared at a time; then the largest of the token, its exponent, and that where it is read.
        exponent = tile.bit_length() // 2 + 3
        # Started, read, out of the memory's register, rounded in three steps, in the FIFO.
        object.__setattr__(self, "activation_unit", exponent + 1 + 1 + 1 + 3 + 1)
        array, columns, drain = tile + 2, 7, tile + 1
        float_out = 3 + (max(sum_bits - 1, 24) - 1).bit_length()
        # Sequencer, activation buffer, array, columns, drain chain, conversion, FIFO.
        object.__setattr__(self, "core", 1 + 2 + array + columns + drain + float_out + 1)

    def figures(self) -> list[tuple[str, str, int]]:
        """(block, property of its manifest, cycles) of every figure."""
        known = [item for item in fields(self) if item.metadata]
        return [(item.metadata["block"], item.metadata["property"], getattr(self, item.name)) for item in known]
