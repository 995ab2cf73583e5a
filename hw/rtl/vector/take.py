# SPDX-License-Identifier: Apache-2.0
"""Decides when the epilogue takes a transfer, and reads its operands."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.results import result_payload
from hw.rtl.vector.layouts import (
    OPERAND_LATENCY,
    Operand,
    epilogue_layout,
    operand_members,
    taken_layout,
    vector_lanes,
)
from hw.rtl.vector.rows import RowWalker
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.numerics.vector import PARTIAL_SUMS


class TakeTransfers(Block):
    """Takes a transfer of the current job when all of its operands are on chip and the outputs have room.

    Parameters
    ----------
    interval : with ``squares``, at most one transfer in this number of cycles

    Members
    -------
    job : the epilogues, one for each descriptor
    results : from the array
    available, read, release, token, column, data : the operands; see :func:`hw.rtl.vector.layouts.operand_members`
    room : both outputs have room
    pending : r of an earlier job is not complete
    taken : the transfer that is taken in this cycle
    values : float32 of the transfer taken ``OPERAND_LATENCY`` cycles ago, together with its operands in ``data``
    current : the current job

    Latency 0 cycles; throughput 1 transfer per cycle.
    """

    latency = 0

    def __init__(self, config: AcceleratorConfig, interval: int):
        self.config, self.interval, self.lanes = config, interval, vector_lanes(config)
        self.walker = RowWalker(config, self.lanes)
        super().__init__(
            {
                "job": In(stream.Signature(epilogue_layout(config))),
                "results": In(stream.Signature(result_payload(config, self.lanes))),
                **operand_members(config),
                "room": In(1),
                "pending": In(1),
                "taken": Out(taken_layout(config)),
                "values": Out(data.ArrayLayout(FLOAT_BITS, self.lanes)),
                "current": Out(epilogue_layout(config)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.walker = walker = self.walker
        active, load, go = Signal(), Signal(), Signal()
        job, taken, place = self.current, self.taken, self.taken.place
        wanted = self._wanted(job)
        pause = Signal(range(self.interval))
        m.d.comb += [
            self.job.ready.eq(~active | (go & place.last)),
            load.eq(self.job.valid & self.job.ready),
            walker.job.valid.eq(load & self.job.payload.vector),
            *(walker.job.payload[name].eq(self.job.payload[name]) for name in ("tokens", "columns")),
            go.eq(
                active
                & Mux(job.vector, walker.places.valid, self.results.valid)
                & Cat(~wanted[operand] | self.available[operand] for operand in Operand).all()
                & self.room
                & (pause == 0)
                & ~(self.pending & (job.flags.scale | job.flags.squares))
            ),
            walker.places.ready.eq(go & job.vector),
            self.results.ready.eq(go & ~job.vector),
            taken.valid.eq(go),
            taken.flags.eq(job.flags),
            taken.vector.eq(job.vector),
            *(
                place[name].eq(Mux(job.vector, walker.places.payload[name], self.results.payload[name]))
                for name, _ in place.shape()
            ),
        ]
        with m.If(load):
            m.d.sync += [active.eq(1), job.eq(self.job.payload)]
        with m.Elif(go & place.last):
            m.d.sync += active.eq(0)
        with m.If(go & job.flags.squares):
            m.d.sync += pause.eq(self.interval - 1)
        with m.Elif(pause != 0):
            m.d.sync += pause.eq(pause - 1)
        self._count(m, go)
        self._read(m, go, wanted)
        return m

    def _wanted(self, job) -> dict[Operand, Value]:
        """Whether the job has an operand."""
        flags = job.flags
        return {
            Operand.SOURCE: job.vector,
            Operand.ADDEND: flags.add,
            Operand.TABLE: flags.rotary,
            Operand.FACTOR: flags.second,
        }

    def _count(self, m: Module, go: Signal) -> None:
        """The number of the piece, and what follows from the column in the row."""
        taken, lane_bits = self.taken, self.lanes.bit_length() - 1
        with m.If(go & taken.place.last):
            m.d.sync += taken.piece.eq(0)
        with m.Elif(go & taken.place.chunk_end):
            m.d.sync += taken.piece.eq(taken.piece + 1)
        column = Cat(taken.place.column, taken.piece)
        m.d.comb += [
            taken.rotate.eq(taken.flags.rotary & (column < (self.current.rotated >> lane_bits))),
            taken.head.eq(~(column >> (PARTIAL_SUMS.bit_length() - 1 - lane_bits)).any()),
        ]

    def _read(self, m: Module, go: Signal, wanted: dict[Operand, Value]) -> None:
        """Reads the operands of the transfer. The last one of a chunk or, for the table, of a layer releases it."""
        place, job = self.taken.place, self.current
        m.d.comb += [self.token.eq(place.token), self.column.eq(place.column)]
        for operand in Operand:
            end = place.last if operand is Operand.TABLE else place.chunk_end
            m.d.comb += [
                self.read[operand].eq(go & wanted[operand]),
                self.release[operand].eq(go & wanted[operand] & end),
            ]
        values = delay(m, Cat(self.results.payload.values.as_value(), job.vector), OPERAND_LATENCY, name="values")
        m.d.comb += self.values.as_value().eq(Mux(values[-1], self.data[Operand.SOURCE].as_value(), values[:-1]))
