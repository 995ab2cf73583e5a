# SPDX-License-Identifier: Apache-2.0
"""Stores the mantissas of some heads until their bytes are written."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.geometry import CacheGeometry, log2
from hw.rtl.attention.head_float import NARROW, WIDE, head_layout
from hw.rtl.common.fifo import Credits, StreamFifo
from hw.spec.numerics.block_float import BLOCK

_HALVES = 2


def plan_layout(shape: CacheGeometry) -> data.StructLayout:
    """A head: its index in its bundle, and whether it is the last one of the bundle."""
    return data.StructLayout({"member": unsigned(max(1, shape.bundle_bits)), "last": 1})


def bundle_layout(shape: CacheGeometry) -> data.StructLayout:
    """The heads of a bundle, by their index, and the index of the last one; the first one is known from the slot."""
    heads = data.ArrayLayout(head_layout(), shape.bundle)
    return data.StructLayout({"heads": heads, "last": unsigned(max(1, shape.bundle_bits))})


class HeadStore(wiring.Component):
    """Holds two bundles of heads: one is written to memory while the next one comes.

    Members
    -------
    heads, mantissas : from :class:`hw.rtl.attention.head_float.HeadFloat`
    plan : for each head, before its last mantissas: its index in its bundle, and whether it is the last one
    bundle : the oldest bundle, when it is complete: its heads, and the index of the last one
    address, words : a word of the memory, and its mantissas in the next cycle, of each head of a bundle: unsigned, with
        the offset that the cache has. The words of a bundle are those of the first or the second half, in turn
    """

    def __init__(self, shape: CacheGeometry):
        self.shape, self.lanes = shape, shape.config.vector_lanes
        super().__init__(
            {
                "heads": In(stream.Signature(head_layout())),
                "mantissas": In(stream.Signature(data.ArrayLayout(signed(WIDE), self.lanes))),
                "plan": In(stream.Signature(plan_layout(shape))),
                "bundle": Out(stream.Signature(bundle_layout(shape))),
                "address": In(range(_HALVES * shape.words)),
                "words": Out(data.ArrayLayout(data.ArrayLayout(unsigned(WIDE), shape.word), shape.bundle)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        # HeadFloat shows a head before its rows, and the next one after them.
        m.submodules.infos = infos = StreamFifo(head_layout(), _HALVES)
        m.submodules.unused = unused = Credits(_HALVES, init=_HALVES)
        m.submodules.lasts = lasts = StreamFifo(unsigned(max(1, self.shape.bundle_bits)), _HALVES)
        shape, lanes, front = self.shape, self.lanes, infos.o.payload
        per_group, plan = BLOCK // lanes, self.plan.payload
        row, half, read_half = Signal(range(shape.words * shape.word // lanes)), Signal(), Signal()
        step, end, taken = Signal(), Signal(), self.bundle.valid & self.bundle.ready
        wiring.connect(m, wiring.flipped(self.heads), infos.i)
        m.d.comb += [
            self.mantissas.ready.eq(infos.o.valid & unused.enough),
            step.eq(self.mantissas.valid & self.mantissas.ready),
            end.eq(step & (row == Cat(Const(per_group - 1, log2(per_group)), front.last_group))),
            infos.o.ready.eq(end),
            self.plan.ready.eq(end),
            unused.take.eq(end & plan.last),
            # The next bundle's first row is written two cycles later or more; then the last word is read at the latest.
            unused.add.eq(taken),
            lasts.i.valid.eq(end & plan.last),
            lasts.i.payload.eq(plan.member),
            self.bundle.valid.eq(lasts.o.valid),
            self.bundle.payload.last.eq(lasts.o.payload),
            lasts.o.ready.eq(self.bundle.ready),
        ]
        with m.If(step):
            m.d.sync += [row.eq(Mux(end, 0, row + 1)), half.eq(half ^ (end & plan.last))]
        with m.If(taken):
            m.d.sync += read_half.eq(~read_half)
        for member in range(shape.bundle):
            chosen = plan.member == member if shape.bundle > 1 else Const(1)
            m.submodules[f"heads_{member}"] = heads = Memory(shape=head_layout(), depth=_HALVES, init=[])
            write, read = heads.write_port(), heads.read_port(domain="comb")
            m.d.comb += [
                write.en.eq(end & chosen),
                write.addr.eq(half),
                write.data.eq(front),
                read.addr.eq(read_half),
                self.bundle.payload.heads[member].eq(read.data),
            ]
            self._mantissas(m, member, step & chosen, Cat(row, half), front.wide)
        return m

    def _mantissas(self, m: Module, member: int, step: Value, row: Value, wide: Value) -> None:
        """The memory of one head of each half. row : of ``lanes`` mantissas; its highest bit is the half."""
        shape, lanes = self.shape, self.lanes
        memory = Memory(shape=self.words.shape().elem_shape, depth=_HALVES * shape.words, init=[])
        m.submodules[f"memory_{member}"] = memory
        write, read = memory.write_port(granularity=lanes), memory.read_port()
        parts = shape.word // lanes
        m.d.comb += [
            write.addr.eq(row >> log2(parts)),
            *(write.data[index].eq(self._unsigned(index % lanes, wide)) for index in range(shape.word)),
            *(write.en[part].eq(step & (row[: log2(parts)] == part)) for part in range(parts)),
            read.en.eq(1),
            read.addr.eq(self.address),
            self.words[member].eq(read.data),
        ]

    def _unsigned(self, lane: int, wide):
        """A mantissa plus half of its range."""
        bits = self.mantissas.payload[lane]
        offset = Mux(wide, 1 << (WIDE - 1), 1 << (NARROW - 1))
        return bits ^ offset
