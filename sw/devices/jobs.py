# SPDX-License-Identifier: Apache-2.0
"""Jobs: what a device computes, one job for each descriptor. A batch, or a program, is a sequence of jobs.

A job is plain data. Its operands are float32 in the device's memory; its name is for messages. `descriptor` is the only
place where a job becomes the values of hw.spec.ops: the driver sends them, and the reference device computes from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import (
    FLOAT_BYTES,
    Descriptor,
    VectorDescriptor,
    result_pitch,
    weight_bytes,
)
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.numerics.vector import PIECE
from hw.spec.ops import Wait
from hw.spec.ops.epilogue import PIECE_BYTES, epilogue_is_wrong, float_bits
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
NOWHERE = Buffer(0, 0)
"""The results of a job that writes only the other outputs of its epilogue."""


class Rows(NamedTuple):
    """A row of float32 numbers for each token. buffer: it starts with the first row. pitch: bytes from one row to the
    next; 0: all tokens have the same row.
    """

    buffer: Buffer
    pitch: int = 0


class Rotation(NamedTuple):
    """The rotation of the pairs of neighbouring columns of the first `heads` heads.

    table: cosine and sine of pair 0, of pair 1, ... of a head. head: columns of a head.
    """

    table: Rows
    head: int
    heads: int


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
            table, head, heads = self.rotation
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


class Job(ABC):
    """What all jobs have in common.

    Members
    -------
    name: for messages.
    tokens: M, 1 to max_tokens.
    results: float32 [M, columns], a row every `pitch` bytes; NOWHERE if the job does not write them.
    result_pitch: bytes from one row of results to the next; 0: as few as possible.
    wait: which of the job's reads start only when the results of all earlier jobs are in memory.
    """

    name: str
    tokens: int
    results: Buffer
    result_pitch: int
    wait: Wait
    epilogue: Epilogue

    @property
    @abstractmethod
    def values(self) -> int:
        """Columns before the epilogue."""

    @property
    @abstractmethod
    def beats(self) -> int:
        """Beats of the weight stream."""

    @abstractmethod
    def descriptor(self, interrupt: bool = False) -> Descriptor | VectorDescriptor:
        """The job as the hardware takes it. interrupt: whether its completion raises the interrupt."""

    @abstractmethod
    def sources(self) -> list[Access]:
        """The operands of the operation itself, weights first."""

    @property
    def columns(self) -> int:
        """Columns of the results."""
        return self.values >> self.epilogue.silu

    @property
    def pitch(self) -> int:
        """Bytes from one row of results to the next."""
        return self.result_pitch or result_pitch(self.columns)

    def reads(self) -> list[Access]:
        """Everything that the job reads."""
        epilogue, found = self.epilogue, self.sources()
        if epilogue.addend:
            found.append(self._rows("addend", epilogue.addend, self.values))
        if epilogue.rotation:
            found.append(self._rows("rotary table", epilogue.rotation.table, epilogue.rotation.head))
        if epilogue.second:
            found.append(self._rows("factor", Rows(epilogue.second.factor), self.columns))
        return found

    def writes(self) -> list[Access]:
        """Everything that the job writes."""
        epilogue, found = self.epilogue, []
        if self.results != NOWHERE:
            size = (self.tokens - 1) * self.pitch + result_pitch(self.columns)
            found.append(Access("results", self.results, size, self.pitch, FLOAT_BYTES * self.columns))
        if epilogue.second:
            found.append(self._rows("second output", epilogue.second.results, self.columns))
        if epilogue.pieces:
            numbers = ceil_div(self.columns, PIECE) * PIECE_BYTES // FLOAT_BYTES
            found.append(self._rows("pieces", epilogue.pieces, numbers))
        return found

    def _rows(self, what: str, rows: Rows, columns: int) -> Access:
        width = FLOAT_BYTES * columns
        return Access(what, rows.buffer, (self.tokens - 1) * rows.pitch + width, rows.pitch, width)

    def _epilogue_fields(self) -> dict[str, int]:
        quiet = int(self.results == NOWHERE)
        return {**self.epilogue.fields(), "quiet": quiet, "result_pitch": 0 if quiet else self.pitch}


@dataclass(frozen=True)
class LinearJob(Job):
    """One layer for one to max_tokens tokens: y[m, n] = sum_k x[m, k] * w[n, k], then the epilogue.

    Members, besides those of Job
    -------
    layout: the layer's weight stream.
    weights: the weight stream in the layout of `sw.devices.base.weight_image`.
    activations: float32 [M, layout.k], K padded with zeros; in memory before the job reads them.
    reuse: use the activations of the previous job of the same batch, which has the same buffer, M, K and group size.
        A job without `reuse` loads them again, which takes time but does not change the results.
    """

    name: str
    layout: LayerLayout
    tokens: int
    weights: Buffer
    activations: Buffer
    results: Buffer
    reuse: bool = False
    wait: Wait = Wait.NOTHING
    epilogue: Epilogue = NO_EPILOGUE
    result_pitch: int = 0

    @property
    def values(self) -> int:
        """See Job."""
        return self.layout.n

    @property
    def beats(self) -> int:
        """See Job."""
        return self.layout.beats

    def descriptor(self, interrupt: bool = False) -> Descriptor:
        """See Job."""
        return Descriptor.from_layer(
            self.layout,
            self.tokens,
            activations=self.activations.address,
            weights=self.weights.address,
            results=self.results.address,
            reuse=self.reuse,
            interrupt=interrupt,
            wait=self.wait,
            **self._epilogue_fields(),
        )

    def sources(self) -> list[Access]:
        """See Job."""
        size = FLOAT_BYTES * self.tokens * self.layout.k
        return [
            Access(WEIGHTS, self.weights, weight_bytes(self.layout)),
            Access("activations", self.activations, size),
        ]


@dataclass(frozen=True)
class VectorJob(Job):
    """The epilogue of rows in memory, without a linear layer. Without an epilogue it copies the rows, bit for bit.

    Members, besides those of Job
    -------
    width: columns of the rows.
    source: the rows.
    """

    name: str
    tokens: int
    width: int
    source: Rows
    results: Buffer = NOWHERE
    wait: Wait = Wait.NOTHING
    epilogue: Epilogue = NO_EPILOGUE
    result_pitch: int = 0

    @property
    def values(self) -> int:
        """See Job."""
        return self.width

    @property
    def beats(self) -> int:
        """See Job."""
        return 0

    def descriptor(self, interrupt: bool = False) -> VectorDescriptor:
        """See Job."""
        return VectorDescriptor(
            tokens=self.tokens,
            out_features=self.width,
            activations=self.source.buffer.address,
            source_pitch=self.source.pitch,
            results=self.results.address,
            interrupt=int(interrupt),
            wait=self.wait,
            **self._epilogue_fields(),
        )

    def sources(self) -> list[Access]:
        """See Job."""
        return [self._rows("rows", self.source, self.width)]


def check_jobs(config: AcceleratorConfig, jobs: Sequence[Job]) -> None:
    """Raises DeviceError, with the layer's name, if a batch is impossible on every device."""
    if not jobs:
        raise DeviceError("a batch has at least one job")
    before: LinearJob | None = None
    # The outputs that reads may overtake, those of data and those of weights, and the tokens that have an r.
    data: list[Access] = []
    weights: list[Access] = []
    scaled = 0
    for job in jobs:
        _check_job(config, job)
        if job.wait != Wait.NOTHING:
            data = []
        if job.wait == Wait.WEIGHTS:
            weights = []
        writes = job.writes()
        for read in job.reads():
            if read.overlaps(writes) or read.overlaps(weights if read.what == WEIGHTS else data):
                raise DeviceError(f"layer {job.name} reads results of its own batch, and does not wait for them")
        if isinstance(job, LinearJob):
            if job.reuse and (before is None or _operands(before) != _operands(job)):
                raise DeviceError(
                    f"layer {job.name} reuses activations, and the job before has others (or none is before)"
                )
            before = job
        if job.epilogue.scale and scaled < job.tokens:
            raise DeviceError(f"layer {job.name} scales its tokens, and no job before it computes their scales")
        if job.epilogue.epsilon is not None:
            scaled = max(scaled, job.tokens)
        data = data + writes
        weights = weights + writes


def _check_job(config: AcceleratorConfig, job: Job) -> None:
    if isinstance(job, LinearJob) and job.layout.config != config:
        digest = job.layout.config.digest[:16]
        raise DeviceError(f"layer {job.name} is packed for other hardware (config {digest})")
    if not 1 <= job.tokens <= config.max_tokens:
        raise DeviceError(f"layer {job.name}: M is 1 to max_tokens ({config.max_tokens}), not {job.tokens}")
    for what, buffer, size, *_ in (*job.reads(), *job.writes()):
        if buffer.size < size:
            raise DeviceError(f"layer {job.name}: its {what} take {size:,} bytes, the buffer has {buffer.size:,}")
    if isinstance(job, LinearJob) and job.epilogue == NO_EPILOGUE:
        return
    if not config.has_vector_unit:
        raise DeviceError(f"layer {job.name} has an epilogue, and hardware with --operators linear has none")
    if epilogue_is_wrong(config, vars(job.descriptor())):
        raise DeviceError(f"layer {job.name}: no hardware has its epilogue")


def _operands(job: LinearJob) -> tuple:
    return job.activations, job.tokens, job.layout.k, job.layout.group_size
