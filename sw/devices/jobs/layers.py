# SPDX-License-Identifier: Apache-2.0
"""Linear layers and epilogues as jobs."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Self

from hw.spec.control.descriptor import FLOAT_BYTES, Descriptor, VectorDescriptor, result_pitch, weight_bytes
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.numerics.vector import PIECE
from hw.spec.ops import Wait
from hw.spec.ops.base import DescriptorWords
from hw.spec.ops.epilogue import PIECE_BYTES
from sw.devices.jobs.moves import Move, Reach, row_of
from sw.devices.jobs.operands import NO_EPILOGUE, NOWHERE, WEIGHTS, Access, Buffer, Epilogue, Rows


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
    def descriptor(self, interrupt: bool = False) -> DescriptorWords:
        """The job as the hardware takes it. interrupt: whether its completion raises the interrupt."""

    @abstractmethod
    def sources(self) -> list[Access]:
        """The operands of the operation itself, weights first."""

    def moved(self, by: int) -> Self:
        """The job of the same call `by` positions later (earlier if it is negative), see sw.devices.jobs.moves."""
        rotation = self.epilogue.rotation
        if rotation is None or rotation.first is None:
            return self
        epilogue = replace(self.epilogue, rotation=rotation.moved(by))
        return replace(self, epilogue=epilogue)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def moves(self) -> list[Move]:
        """The fields of the descriptor that depend on the position."""
        rotation = self.epilogue.rotation
        if rotation is None or rotation.first is None:
            return []
        position, pitch, _ = rotation.first
        return [Move("table", row_of, position, pitch, rotation.table.buffer.address - row_of(position, pitch))]

    @property
    def moving_stream(self) -> Hashable:
        """Jobs with the same value have as many beats at every position. None: they do not depend on the position."""
        return None

    def reach(self) -> Reach:
        """How far the job can move."""
        rotation = self.epilogue.rotation
        if rotation is None or rotation.first is None:
            return Reach()
        position, _, count = rotation.first
        rows = self.tokens if rotation.table.pitch else 1
        return Reach(-position, count - rows - position)

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
