# SPDX-License-Identifier: Apache-2.0
"""A first-in first-out buffer between two streams, in distributed memory."""

from amaranth.hdl import Module, Mux, Shape, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.ram import buffer_attributes


class StreamFifo(Block):
    """FIFO with first-word fall-through. Latency 1 cycle, throughput 1 transfer per cycle.

    Reads are asynchronous, so it maps to distributed RAM. It is intended for tens of entries. A FIFO of two entries is
    two registers, because paths that start at the entry in front are then shorter.

    Parameters
    ----------
    shape : shape of the payload
    depth : entries, a power of two

    Members
    -------
    i, o : input and output stream
    level : number of entries, ``0..depth``
    """

    latency = 1

    def __init__(self, shape, depth: int):
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"FIFO depth is a power of two from 2 up, not {depth}")
        self.shape, self.depth = shape, depth
        super().__init__(
            {"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape)), "level": Out(range(depth + 1))}
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "depth": self.depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        # One bit more than the address distinguishes a full memory from an empty one.
        written, taken = Signal(range(2 * self.depth)), Signal(range(2 * self.depth))
        push, pop = Signal(), Signal()
        # valid and full are registers, because long paths start at them: each transfer depends on them.
        full = Signal()
        # ``push`` and ``pop`` only enable these registers, because they are known last.
        with m.If(push != pop):
            m.d.sync += [self.o.valid.eq(push | (self.level != 1)), full.eq(push & (self.level == self.depth - 1))]
        m.d.comb += [
            self.i.ready.eq(~full),
            push.eq(self.i.valid & self.i.ready),
            pop.eq(self.o.valid & self.o.ready),
            self.level.eq(written - taken),
        ]
        with m.If(push):
            m.d.sync += written.eq(written + 1)
        with m.If(pop):
            m.d.sync += taken.eq(taken + 1)
        if self.depth == 2:
            self._registers(m, push, pop, full)
        else:
            self._memory(m, push, written[:-1], taken[:-1])
        return m

    def _memory(self, m: Module, push: Signal, written: Value, taken: Value) -> None:
        m.submodules.memory = memory = Memory(shape=self.shape, depth=self.depth, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        m.d.comb += [
            self.o.payload.eq(read.data),
            read.addr.eq(taken),
            write.addr.eq(written),
            write.data.eq(self.i.payload),
            write.en.eq(push),
        ]

    def _registers(self, m: Module, push: Signal, pop: Signal, full: Signal) -> None:
        width = Shape.cast(self.shape).width
        front, second = Signal(width, reset_less=True), Signal(width, reset_less=True)
        incoming = Value.cast(self.i.payload)
        m.d.comb += Value.cast(self.o.payload).eq(front)
        with m.If(~self.o.valid | pop):
            m.d.sync += front.eq(Mux(full, second, incoming))
        with m.If(push):
            m.d.sync += second.eq(incoming)


class BlockFifo(wiring.Component):
    """FIFO with first-word fall-through in block memory, for hundreds of entries and more.

    Latency 2 cycles, throughput 1 transfer per cycle. The read port's register is the output, so the FIFO holds one
    entry more than its memory.

    Parameters
    ----------
    shape : shape of the payload
    depth : entries of the memory, a power of two

    Members
    -------
    i, o : input and output stream
    """

    latency = 2

    def __init__(self, shape, depth: int):
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"FIFO depth is a power of two from 2 up, not {depth}")
        self.shape, self.depth = shape, depth
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform) -> Module:
        m = Module()
        attributes = buffer_attributes(platform, self.depth, Shape.cast(self.shape).width)
        m.submodules.memory = memory = Memory(shape=self.shape, depth=self.depth, init=[], attrs=attributes)
        write, read = memory.write_port(), memory.read_port()
        # One bit more than the address distinguishes a full memory from an empty one.
        written, fetched = Signal(range(2 * self.depth)), Signal(range(2 * self.depth))
        push, fetch, level = Signal(), Signal(), Signal.like(written)
        # Registers, as in StreamFifo, because long paths start at them.
        full, some = Signal(), Signal()
        with m.If(push != fetch):
            m.d.sync += [some.eq(push | (level != 1)), full.eq(push & (level == self.depth - 1))]
        m.d.comb += [
            level.eq(written - fetched),
            self.i.ready.eq(~full),
            push.eq(self.i.valid & self.i.ready),
            fetch.eq(some & (~self.o.valid | self.o.ready)),
            write.addr.eq(written[:-1]),
            write.data.eq(self.i.payload),
            write.en.eq(push),
            read.addr.eq(fetched[:-1]),
            read.en.eq(fetch),
            self.o.payload.eq(read.data),
        ]
        m.d.sync += self.o.valid.eq(fetch | (self.o.valid & ~self.o.ready))
        with m.If(push):
            m.d.sync += written.eq(written + 1)
        with m.If(fetch):
            m.d.sync += fetched.eq(fetched + 1)
        return m


class Counter(wiring.Component):
    """Counts by several per cycle: ``value + add - take``, both in the same cycle if needed. Latency 1 cycle.

    Members
    -------
    add, take : amounts for this cycle; the user must keep the value within ``0..limit``
    value : the count
    """

    def __init__(self, limit: int, *, add: int = 1, take: int = 1, init: int = 0):
        self.init = init
        super().__init__(
            {"add": In(range(add + 1)), "take": In(range(take + 1)), "value": Out(range(limit + 1), init=init)}
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        # In this order: longer paths end at ``add``.
        m.d.sync += self.value.eq(self.value - self.take + self.add)
        return m


class Credits(wiring.Component):
    """A count of credits, which changes by at most one per cycle. Latency 1 cycle.

    Parameters
    ----------
    limit : maximum of the count
    least : value of the count that is ``enough``
    init : initial count

    Members
    -------
    add, take : one more, one less, both in the same cycle if needed; the user must keep the count within ``0..limit``
    enough : the count is ``least`` or more; a register, because pipelines' decisions to move are critical paths
    """

    def __init__(self, limit: int, *, least: int = 1, init: int = 0):
        self.limit, self.least, self.init = limit, least, init
        super().__init__({"add": In(1), "take": In(1), "enough": Out(1, init=init >= least)})

    def elaborate(self, platform) -> Module:
        m = Module()
        count = Signal(range(self.limit + 1), init=self.init)
        # ``take`` only enables these registers, because it is known last.
        with m.If(self.add != self.take):
            m.d.sync += [
                count.eq(count + Mux(self.add, 1, -1)),
                self.enough.eq(Mux(self.add, count >= self.least - 1, count > self.least)),
            ]
        return m


class CreditFifo(wiring.Component):
    """FIFO after a pipeline that cannot wait: an entry of the FIFO is reserved for each value that enters the pipeline.

    Latency and throughput are those of :class:`StreamFifo`. An entry is free again 1 cycle after its transfer on ``o``.

    Parameters
    ----------
    shape : shape of the payload
    depth : entries, a power of two; values in the pipeline count as well

    Members
    -------
    room : there is an entry that is not reserved
    claim : reserve an entry; only while there is ``room``
    i : the pipeline's output, one transfer for each ``claim``; never waits
    o : output stream
    """

    latency = StreamFifo.latency

    def __init__(self, shape, depth: int):
        self.shape, self.depth = shape, depth
        super().__init__(
            {
                "room": Out(1),
                "claim": In(1),
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.fifo = fifo = StreamFifo(self.shape, self.depth)
        m.submodules.credits = credits = Credits(self.depth, init=self.depth)
        wiring.connect(m, wiring.flipped(self.i), fifo.i)
        wiring.connect(m, fifo.o, wiring.flipped(self.o))
        m.d.comb += [
            self.room.eq(credits.enough),
            credits.take.eq(self.claim),
            credits.add.eq(self.o.valid & self.o.ready),
        ]
        return m
