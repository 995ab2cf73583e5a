# SPDX-License-Identifier: Apache-2.0
"""The data of a decoder's programs in a device's memory. All programs of a decoder share it."""

from collections.abc import Sequence

import numpy as np

from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.operands import FLOAT_BYTES, result_pitch
from hw.spec.numerics.vector import PIECE
from hw.spec.ops import Wait
from hw.spec.ops.epilogue import PIECE_BYTES
from sw.devices.base import Buffer, Device
from sw.devices.jobs import Rows, TableRow, VectorJob
from sw.devices.pack import LayerPlan


class Matrix:
    """float32 [max_tokens, columns] in a device's memory. rows: the place of the rows."""

    def __init__(self, device: Device, columns: int):
        self._device, self.columns = device, columns
        pitch = result_pitch(columns)
        self.rows = Rows(device.alloc(device.config.max_tokens * pitch), pitch)

    def row(self, index: int) -> Rows:
        """The rows from one on."""
        return Rows(self.rows.buffer.part(index * self.rows.pitch), self.rows.pitch)

    def view(self, tokens: int) -> np.ndarray:
        """The memory itself: float32 [tokens, columns]."""
        rows = self._device.view(self.rows.buffer)[: tokens * self.rows.pitch].view(np.float32)
        return rows.reshape(tokens, -1)[:, : self.columns]


class Table:
    """A table in a device's memory that has a row for every position: float32 [positions, columns].

    Rows are whole units of DATA_ALIGNMENT apart, so a descriptor can have the address of any of them.
    """

    def __init__(self, device: Device, values: np.ndarray):
        self._count, columns = values.shape
        self._pitch = result_pitch(columns)
        padded = np.zeros((self._count, self._pitch // FLOAT_BYTES), np.float32)
        padded[:, :columns] = values
        self._buffer = device.alloc(padded.nbytes)
        device.write(self._buffer, padded)

    def rows(self, position: int) -> Rows:
        """The rows from a position on."""
        return Rows(self._buffer.part(position * self._pitch), self._pitch)

    def row(self, position: int) -> TableRow:
        """The place of a row in the table."""
        return TableRow(position, self._pitch, self._count)


class Activations:
    """The activations of all layers with the same K and planes: a copy for every plane, and zeros in the padding.

    Members
    -------
    buffer: as LinearJob takes it. pitch: bytes of a token. places: the copy of each plane.
    """

    def __init__(self, device: Device, plan: LayerPlan):
        self._device, self.k, self.planes = device, plan.k, plan.planes
        self.pitch = FLOAT_BYTES * plan.layout.k
        self.buffer = device.alloc(device.config.max_tokens * self.pitch)
        device.write(self.buffer, np.zeros(self.buffer.size, np.uint8))
        plane = self.pitch // plan.planes
        self.places = [Rows(self.buffer.part(index * plane), self.pitch) for index in range(plan.planes)]

    def row(self, index: int) -> Buffer:
        """The activations from a token on."""
        return self.buffer.part(index * self.pitch)

    def view(self, tokens: int) -> np.ndarray:
        """The memory itself, without the padding: float32 [tokens, planes, k]."""
        rows = self._device.view(self.buffer)[: tokens * self.pitch].view(np.float32)
        return rows.reshape(tokens, self.planes, -1)[:, :, : self.k]


class Inputs:
    """The Activations of the layers with the same input. Layers of all blocks share them."""

    def __init__(self, device: Device):
        self._device = device
        self._made: dict[tuple[int, int], Activations] = {}

    def of(self, plan: LayerPlan) -> Activations:
        """The activations of a layer."""
        key = plan.planes, plan.layout.k
        if key not in self._made:
            self._made[key] = Activations(self._device, plan)
        return self._made[key]

    def spread(self, name: str, plans: Sequence[LayerPlan], tokens: int) -> tuple[Rows, list[VectorJob]]:
        """The place of an output that all of these layers read, and the jobs that copy it to the others' places."""
        inputs = dict.fromkeys(self.of(plan) for plan in plans)
        first, *others = [place for one in inputs for place in one.places]
        source = Rows(first.buffer, first.pitch)
        jobs = []
        for index, place in enumerate(others):
            # Later copies have the same source, which then is in memory.
            wait = Wait.NOTHING if index else Wait.ACTIVATIONS
            job = VectorJob(f"{name}, copy", tokens, plans[0].k, source, place.buffer, wait, result_pitch=place.pitch)
            jobs.append(job)
        return first, jobs


class Pieces:
    """Maximum and argmax of every piece of one row of `columns` results. rows: their place."""

    def __init__(self, device: Device, columns: int):
        self._device, self._count = device, ceil_div(columns, PIECE)
        size = self._count * PIECE_BYTES
        self.rows = Rows(device.alloc(size), result_pitch(size // FLOAT_BYTES))

    def view(self) -> tuple[np.ndarray, np.ndarray]:
        """The memory itself: maxima, float32 [pieces], and argmax from the piece's first column, uint32 [pieces]."""
        pairs = self._device.view(self.rows.buffer).view(np.uint32).reshape(self._count, 2)
        return pairs[:, 0].view(np.float32), pairs[:, 1]
