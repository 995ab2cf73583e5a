# SPDX-License-Identifier: Apache-2.0
"""Buffers of a device's memory, and the operands, epilogues and outputs of jobs in them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from hw.spec.ops.epilogue import float_bits
from sw.common.errors import UserError

PAGE = 4096
"""Alignment in bytes of every buffer and of every port's region: no AXI burst crosses a multiple of it."""


class DeviceError(UserError):
    """A device that does not answer, or a request that is impossible. The message is one line."""


@dataclass(frozen=True)
class Buffer:
    """Bytes `address` to `address + size - 1` of a device's memory. An allocated buffer starts at a multiple of PAGE.

    A job may also have a part of an allocated buffer.
    """

    address: int
    size: int

    def part(self, start: int) -> "Buffer":
        """The bytes from offset `start` on."""
        return Buffer(self.address + start, self.size - start)


WEIGHTS = "weights"
"""The operand that is read ahead of all others."""
EXPONENTS = "exponents"
"""The powers of two of cached values."""
NOWHERE = Buffer(0, 0)
"""The results of a job that writes only the other outputs of its epilogue."""


class Rows(NamedTuple):
    """A row of float32 numbers for each token. buffer: it starts with the first row. pitch: bytes from one row to the
    next; 0: all tokens have the same row.
    """

    buffer: Buffer
    pitch: int = 0


class TableRow(NamedTuple):
    """A row of a table that has one for every position. position: its number; pitch: bytes from one row to the next;
    count: number of rows.
    """

    position: int
    pitch: int
    count: int


class Rotation(NamedTuple):
    """The rotation of the pairs of neighbouring columns of the first `heads` heads.

    table: cosine and sine of pair 0, of pair 1, ... of a head. head: columns of a head. first: the table's first row is
    this one of a table of all positions; None: the host writes the rows of each call to the same place.
    """

    table: Rows
    head: int
    heads: int
    first: TableRow | None = None

    def row(self, index: int) -> "Rotation":
        """The rotation of all rows by row `index`."""
        first = self.first and self.first._replace(position=self.first.position + index)
        return self._replace(table=Rows(self.table.buffer.part(index * self.table.pitch)), first=first)

    def moved(self, by: int) -> "Rotation":
        """The rotation of rows whose positions are `by` later."""
        if self.first is None:
            return self
        buffer, step = self.table.buffer, by * self.first.pitch
        table = Rows(Buffer(buffer.address + step, buffer.size - step), self.table.pitch)
        return self._replace(table=table, first=self.first._replace(position=self.first.position + by))


class Second(NamedTuple):
    """The second output: the results times a row. factor: float32 [columns]. results: the output."""

    factor: Buffer
    results: Rows


@dataclass(frozen=True)
class Epilogue:
    """The operators between a job's own values and its outputs; hw.spec.ops.epilogue has the definition and the order.

    Members
    -------
    scale: multiply each token by its r, which an earlier job of the same batch computed.
    addend: rows to add.
    rotation, silu: what becomes of pairs of columns.
    second: another output, for the next linear layer.
    pieces: place of maximum and argmax of every 256 columns, float32 and uint32 in turn.
    epsilon: compute each token's r with this epsilon; None: do not compute it.
    """

    scale: bool = False
    addend: Rows | None = None
    rotation: Rotation | None = None
    silu: bool = False
    second: Second | None = None
    pieces: Rows | None = None
    epsilon: float | None = None

    def fields(self) -> dict[str, int]:
        """The fields of hw.spec.ops.epilogue.EpilogueWords that are not 0, without those of the results."""
        values = {"scale": int(self.scale), "silu": int(self.silu)}
        if self.addend:
            values |= {"add": 1, "addend": self.addend.buffer.address, "addend_pitch": self.addend.pitch}
        if self.rotation:
            table, head, heads, _ = self.rotation
            values |= {"rotary": 1, "head": head, "rotary_heads": heads}
            values |= {"table": table.buffer.address, "table_pitch": table.pitch}
        if self.second:
            factor, rows = self.second
            values |= {"second": 1, "factor": factor.address}
            values |= {"second_results": rows.buffer.address, "second_pitch": rows.pitch}
        if self.pieces:
            values |= {"pieces": 1, "second_results": self.pieces.buffer.address, "second_pitch": self.pieces.pitch}
        if self.epsilon is not None:
            values |= {"squares": 1, "eps": float_bits(self.epsilon)}
        return values


NO_EPILOGUE = Epilogue()


class Access(NamedTuple):
    """An operand or output of a job.

    Members
    -------
    what: its name in messages.
    buffer: its place. size: bytes from the first to the last that the job uses.
    pitch, width: the bytes are `width` out of every `pitch`; pitch 0: all of them.
    """

    what: str
    buffer: Buffer
    size: int
    pitch: int = 0
    width: int = 0

    def overlaps(self, others: Iterable["Access"]) -> bool:
        """Whether it has a byte in common with one of the others."""
        return any(self._overlaps(other) for other in others)

    def _overlaps(self, other: "Access") -> bool:
        start, end = self.buffer.address, self.buffer.address + self.size
        if start >= other.buffer.address + other.size or other.buffer.address >= end:
            return False
        if not self.pitch or self.pitch != other.pitch:
            return True
        # Rows may be parts of the same wider rows.
        offset = (other.buffer.address - start) % self.pitch
        return offset < self.width or self.pitch - offset < other.width
