# SPDX-License-Identifier: Apache-2.0
"""Fetches the descriptors of a program from memory into the descriptor queue."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Credits
from hw.rtl.control.descriptor_check import DESCRIPTOR_BITS
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.burst_cutter import burst_layout
from hw.spec.control.descriptor import ADDRESS_LIMIT
from hw.spec.control.program import LENGTH_BITS, PROGRAM_ALIGNMENT
from hw.spec.control.registers import QUEUE_DEPTH


def queued_layout() -> data.StructLayout:
    """A descriptor in the queue. first: it is the first one of a program."""
    return data.StructLayout({"descriptor": DESCRIPTOR_BITS, "first": 1})


class ProgramFetch(Block):
    """Reads a program, descriptor by descriptor, as far ahead as the queue has room.

    Each descriptor is one burst of 64 bytes. Bursts start at multiples of 64, so none crosses a 4 KiB boundary.

    Parameters
    ----------
    width : bits of the port

    Members
    -------
    start : fetch the program of ``length`` descriptors at ``address``; no effect while ``active`` or ``refused``, or if
        ``length`` is 0
    halt : pass no descriptor on, because data may be wrong
    claim : a descriptor of another source enters the queue; only while not ``active``
    release : a descriptor leaves the queue
    bursts, beats : for the read manager; always ready
    descriptors : to the queue, which has room for all that are requested
    active : not all descriptors of the program are in the queue
    refused : the address is too high or not a multiple of PROGRAM_ALIGNMENT; nothing is fetched; until the reset

    Latency: 1 cycle from ``start`` to the first burst, 1 from a descriptor's last beat to the descriptor. Throughput:
    1 burst and 1 beat per cycle.
    """

    latency = 1
    """Cycles from ``start`` to the first burst."""
    descriptor_latency = 1
    """Cycles from a descriptor's last beat to the descriptor."""

    def __init__(self, width: int):
        self.width, self.beats_each = width, DESCRIPTOR_BITS // width
        super().__init__(
            {
                "start": In(1),
                "address": In(64),
                "length": In(LENGTH_BITS),
                "halt": In(1),
                "claim": In(1),
                "release": In(1),
                "bursts": Out(stream.Signature(burst_layout(width))),
                "beats": In(stream.Signature(width)),
                "descriptors": Out(stream.Signature(queued_layout())),
                "active": Out(1),
                "refused": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "descriptor_latency": self.descriptor_latency, "room": QUEUE_DEPTH}

    def elaborate(self, platform) -> Module:
        m = Module()
        starts, begins, wrong = Signal(), Signal(), Signal()
        m.d.comb += [
            wrong.eq((self.address >= ADDRESS_LIMIT) | self.address[: PROGRAM_ALIGNMENT.bit_length() - 1].any()),
            starts.eq(self.start & ~self.active & ~self.refused & (self.length != 0)),
            begins.eq(starts & ~wrong),
        ]
        with m.If(starts & wrong):
            m.d.sync += self.refused.eq(1)
        self._ask(m, begins)
        self._join(m, begins)
        return m

    def _ask(self, m: Module, begins: Signal) -> None:
        """Requests a descriptor for each free entry of the queue."""
        byte_bits = (DESCRIPTOR_BITS // 8 - 1).bit_length()
        place, left, asking, taken = Signal(ADDRESS_BITS - byte_bits), Signal(LENGTH_BITS), Signal(), Signal()
        m.submodules.room = room = Credits(QUEUE_DEPTH, init=QUEUE_DEPTH)
        m.d.comb += [
            self.bursts.payload.address.eq(place << byte_bits),
            self.bursts.payload.beats.eq(self.beats_each),
            self.bursts.valid.eq(asking & room.enough),
            taken.eq(self.bursts.valid & self.bursts.ready),
            room.take.eq(taken | self.claim),
            room.add.eq(self.release),
        ]
        with m.If(begins):
            m.d.sync += [place.eq(self.address >> byte_bits), left.eq(self.length), asking.eq(1)]
        with m.Elif(taken):
            m.d.sync += [place.eq(place + 1), left.eq(left - 1), asking.eq(left != 1)]

    def _join(self, m: Module, begins: Signal) -> None:
        """Joins beats to descriptors."""
        whole, full, due = Signal(DESCRIPTOR_BITS, reset_less=True), Signal(), Signal(LENGTH_BITS)
        beat = Signal(range(self.beats_each))
        last = beat == self.beats_each - 1
        output = self.descriptors
        m.d.comb += [
            self.beats.ready.eq(1),
            output.valid.eq(full & ~self.halt),
            output.payload.descriptor.eq(whole),
        ]
        m.d.sync += full.eq(self.beats.valid & last)
        with m.If(self.beats.valid):
            m.d.sync += [
                beat.eq(Mux(last, 0, beat + 1)),
                whole.eq(Cat(whole[self.width :], self.beats.payload)),
            ]
        with m.If(begins):
            m.d.sync += [self.active.eq(1), due.eq(self.length), output.payload.first.eq(1)]
        with m.Elif(output.valid):
            m.d.sync += [self.active.eq(due != 1), due.eq(due - 1), output.payload.first.eq(0)]
