# SPDX-License-Identifier: Apache-2.0
"""Stores the mantissas of a head until its bytes are written."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.geometry import CacheGeometry, log2
from hw.rtl.attention.head_float import GROUPS, NARROW, WIDE, head_layout
from hw.rtl.common.fifo import Credits, StreamFifo
from hw.spec.numerics.block_float import BLOCK

_HALVES = 2


class HeadStore(wiring.Component):
    """Holds two heads: one is written to memory while the next one comes.

    Members
    -------
    heads, mantissas : from :class:`hw.rtl.attention.head_float.HeadFloat`
    head : the oldest head; it may not be complete yet
    complete : all mantissas of the oldest head are there
    address, word : a word of the memory, and its mantissas in the next cycle: unsigned, with the offset that the cache
        has. The words of the head are those of the first or the second half, in turn
    """

    def __init__(self, shape: CacheGeometry):
        self.shape, self.lanes = shape, shape.config.vector_lanes
        super().__init__(
            {
                "heads": In(stream.Signature(head_layout())),
                "mantissas": In(stream.Signature(data.ArrayLayout(signed(WIDE), self.lanes))),
                "head": Out(stream.Signature(head_layout())),
                "complete": Out(1),
                "address": In(range(_HALVES * shape.words)),
                "word": Out(data.ArrayLayout(unsigned(WIDE), shape.word)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        # HeadFloat shows a head before its rows, and the next one after them.
        about = data.StructLayout({"wide": 1, "last_group": range(GROUPS)})
        m.submodules.infos = infos = StreamFifo(head_layout(), 2 * _HALVES)
        m.submodules.counts = counts = StreamFifo(about, _HALVES)
        m.submodules.unused = unused = Credits(_HALVES, init=_HALVES)
        m.submodules.filled = filled = Credits(_HALVES)
        shape, lanes, front = self.shape, self.lanes, counts.o.payload
        per_group = BLOCK // lanes
        row, half = Signal(range(shape.words * shape.word // lanes)), Signal()
        step, end, taken = Signal(), Signal(), self.head.valid & self.head.ready
        m.d.comb += [
            infos.i.payload.eq(self.heads.payload),
            counts.i.payload.wide.eq(self.heads.payload.wide),
            counts.i.payload.last_group.eq(self.heads.payload.last_group),
            infos.i.valid.eq(self.heads.valid & counts.i.ready),
            counts.i.valid.eq(self.heads.valid & infos.i.ready),
            self.heads.ready.eq(infos.i.ready & counts.i.ready),
            self.mantissas.ready.eq(counts.o.valid & unused.enough),
            step.eq(self.mantissas.valid & self.mantissas.ready),
            end.eq(step & (row == Cat(Const(per_group - 1, log2(per_group)), front.last_group))),
            counts.o.ready.eq(end),
            unused.take.eq(end),
            filled.add.eq(end),
            filled.take.eq(taken),
            # The next head's first row is written two cycles later or more; then the last word is read at the latest.
            unused.add.eq(taken),
            self.complete.eq(filled.enough),
        ]
        wiring.connect(m, infos.o, wiring.flipped(self.head))
        with m.If(step):
            m.d.sync += [row.eq(Mux(end, 0, row + 1)), half.eq(half ^ end)]
        m.submodules.memory = memory = Memory(shape=self.word.shape(), depth=_HALVES * shape.words, init=[])
        write, read = memory.write_port(granularity=lanes), memory.read_port()
        parts = shape.word // lanes
        place = row >> log2(parts)
        m.d.comb += [
            write.addr.eq(Cat(place[: log2(shape.words)], half)),
            *(write.data[index].eq(self._unsigned(index % lanes, front.wide)) for index in range(shape.word)),
            *(write.en[part].eq(step & (row[: log2(parts)] == part)) for part in range(parts)),
            read.en.eq(1),
            read.addr.eq(self.address),
            self.word.eq(read.data),
        ]
        return m

    def _unsigned(self, lane: int, wide):
        """A mantissa plus half of its range."""
        bits = self.mantissas.payload[lane]
        offset = Mux(wide, 1 << (WIDE - 1), 1 << (NARROW - 1))
        return bits ^ offset
