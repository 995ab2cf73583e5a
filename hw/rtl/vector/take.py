# SPDX-License-Identifier: Apache-2.0
"""Decides when the epilogue takes a transfer, and reads its operands."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.results import result_payload
from hw.rtl.vector.layouts import (
    OPERAND_LATENCY,
    Operand,
    Target,
    epilogue_layout,
    operand_members,
    taken_layout,
)
from hw.rtl.vector.rows import RowWalker
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.numerics.vector import PARTIAL_SUMS
from hw.spec.ops.scores import BANKS


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
    inverted : with attention, by bank of scores: 1/S of its rows is known

    Latency 1 cycle from a transfer to ``taken``; throughput 1 transfer per cycle, also from one job to the next one if
    jobs have two transfers or more. Transfers and jobs first enter FIFOs of two entries, which are registers: the
    decision to take a transfer has so many users that no long path may lead to it.
    """

    latency = StreamFifo.latency
    _AHEAD = 2

    def __init__(self, config: AcceleratorConfig, interval: int):
        self.config, self.interval, self.lanes = config, interval, config.vector_lanes
        self.walker = RowWalker(config, self.lanes)
        attention = {"inverted": In(BANKS)} if config.has_attention else {}
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
                **attention,
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.jobs = jobs = StreamFifo(self._stored, self._AHEAD)
        m.submodules.transfers = transfers = StreamFifo(self.results.payload.shape(), self._AHEAD)
        self._collect(m, jobs, transfers)
        job, taken, transfer, go = self.current, self.taken, transfers.o.payload, Signal()
        wanted, pause = self._wanted(job), Signal(range(self.interval))
        m.d.comb += [
            # Without ``needs_r``, which is behind the others.
            Value.cast(job).eq(Value.cast(jobs.o.payload)),
            jobs.o.ready.eq(go & transfer.last),
            go.eq(
                # A transfer comes at least one cycle after its job.
                transfers.o.valid
                & Cat(~wanted[operand] | self.available[operand] for operand in Operand).all()
                & self.room
                & (pause == 0)
                & ~self._unknown(jobs.o.payload)
            ),
            transfers.o.ready.eq(go),
            taken.valid.eq(go),
            taken.flags.eq(job.flags),
            taken.vector.eq(job.vector),
            *(taken.place[name].eq(transfer[name]) for name, _ in taken.place.shape()),
        ]
        if self.config.has_attention:
            m.d.comb += taken.target.eq(job.target)
        with m.If(go & job.flags.squares):
            m.d.sync += pause.eq(self.interval - 1)
        with m.Elif(pause != 0):
            m.d.sync += pause.eq(pause - 1)
        self._count(m, go)
        self._read(m, go, wanted, transfer.values)
        return m

    def _collect(self, m: Module, jobs: StreamFifo, transfers: StreamFifo) -> None:
        """Fills both FIFOs: the places of a job come from the array, or from the walker."""
        m.submodules.walker = walker = self.walker
        job, transfer = self.job.payload, transfers.i.payload
        active, vector, free, load = Signal(), Signal(), Signal(), Signal()
        # The walker has the next job. It gets each job as soon as it is offered, so no path to it starts at the end of
        # the job before. It has room, because it holds this job and the one before at most.
        walking = Signal()
        m.d.comb += [
            free.eq(~active | (transfers.i.valid & transfers.i.ready & transfer.last)),
            jobs.i.valid.eq(self.job.valid & free),
            Value.cast(jobs.i.payload).eq(Cat(job, *([self._needs_r(job)] if self.config.has_attention else []))),
            self.job.ready.eq(jobs.i.ready & free),
            load.eq(self.job.valid & self.job.ready),
            walker.job.valid.eq(self.job.valid & job.vector & ~walking),
            *(walker.job.payload[name].eq(job[name]) for name in ("tokens", "columns")),
            transfers.i.valid.eq(active & Mux(vector, walker.places.valid, self.results.valid)),
            walker.places.ready.eq(active & vector & transfers.i.ready),
            self.results.ready.eq(active & ~vector & transfers.i.ready),
            transfer.values.eq(self.results.payload.values),
            *(
                transfer[name].eq(Mux(vector, walker.places.payload[name], self.results.payload[name]))
                for name, _ in self.taken.place.shape()
            ),
        ]
        with m.If(load):
            m.d.sync += walking.eq(0)
        with m.Elif(walker.job.valid & walker.job.ready):
            m.d.sync += walking.eq(1)
        with m.If(free):
            m.d.sync += active.eq(load)
        with m.If(load):
            m.d.sync += vector.eq(job.vector)

    @property
    def _stored(self) -> data.StructLayout:
        """A job in the FIFO. With attention it is known there whether it needs r, because ``go`` is a long path."""
        more = {"needs_r": 1} if self.config.has_attention else {}
        return data.StructLayout({**self.current.shape().members, **more})

    def _needs_r(self, job) -> Value:
        """Whether the job has a row's factor r, or computes r of later ones."""
        flags = job.flags
        if not self.config.has_attention:
            return flags.scale | flags.squares
        other = job.inverse | (job.target == Target.SCORES)
        return (flags.scale & ~other) | flags.squares

    def _unknown(self, stored) -> Value:
        """Whether the factor of the job's rows is not known yet, or the sums of squares are in use."""
        if not self.config.has_attention:
            return self.pending & self._needs_r(stored)
        return (self.pending & stored.needs_r) | (stored.inverse & ~self.inverted.bit_select(stored.bank, 1))

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

    def _read(self, m: Module, go: Signal, wanted: dict[Operand, Value], given: Value) -> None:
        """Reads the operands of the transfer. The last one of a chunk or, for the table, of a layer releases it."""
        place, job = self.taken.place, self.current
        m.d.comb += [self.token.eq(place.token), self.column.eq(place.column)]
        for operand in Operand:
            end = place.last if operand is Operand.TABLE else place.chunk_end
            m.d.comb += [
                self.read[operand].eq(go & wanted[operand]),
                self.release[operand].eq(go & wanted[operand] & end),
            ]
        values = delay(m, Cat(given.as_value(), job.vector), OPERAND_LATENCY, name="values")
        m.d.comb += self.values.as_value().eq(Mux(values[-1], self.data[Operand.SOURCE].as_value(), values[:-1]))
