# SPDX-License-Identifier: Apache-2.0
"""The queue of descriptors: those of the window, and those of programs in memory."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.control.descriptor_check import DESCRIPTOR_BITS
from hw.rtl.control.program_fetch import ProgramFetch, queued_layout
from hw.rtl.memory.burst_cutter import burst_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.control.program import LENGTH_BITS
from hw.spec.control.registers import QUEUE_DEPTH


class DescriptorQueue(Block):
    """Queues descriptors in the order in which they come.

    Members
    -------
    window : descriptors of the window; one that is not accepted at once is lost
    descriptors : the oldest descriptor
    accepted : a descriptor enters the queue
    level : number of descriptors in the queue

    and in hardware that runs programs

    start, address, length, halt : see :class:`hw.rtl.control.program_fetch.ProgramFetch`; while it is ``active`` or
        ``refused``, the window is not ready. A descriptor of the window that comes with ``start`` is queued before the
        program
    bursts, beats : for the read manager
    fetching, refused : its ``active`` and ``refused``
    begun : index of the last descriptor that has left the queue. Indices count from 0 after the reset, and from 0 again
        at each program's first descriptor, modulo 2^24

    Latency 1 cycle from a descriptor to ``descriptors``, and from its transfer there to ``begun``. At most one
    descriptor leaves in two cycles.
    """

    container = True

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        members = {
            "window": In(stream.Signature(DESCRIPTOR_BITS)),
            "descriptors": Out(stream.Signature(DESCRIPTOR_BITS)),
            "accepted": Out(1),
            "level": Out(range(QUEUE_DEPTH + 1)),
        }
        if config.has_programs:
            members |= {
                "start": In(1),
                "address": In(64),
                "length": In(LENGTH_BITS),
                "halt": In(1),
                "bursts": Out(stream.Signature(burst_layout(config.port_width))),
                "beats": In(stream.Signature(config.port_width)),
                "fetching": Out(1),
                "refused": Out(1),
                "begun": Out(LENGTH_BITS),
            }
        super().__init__(members)

    def elaborate(self, platform) -> Module:
        m = Module()
        programs = self.config.has_programs
        shape = queued_layout() if programs else unsigned(DESCRIPTOR_BITS)
        m.submodules.fifo = fifo = StreamFifo(shape, QUEUE_DEPTH)
        m.d.comb += [
            self.accepted.eq(fifo.i.valid & fifo.i.ready),
            self.level.eq(fifo.level),
            self.descriptors.valid.eq(fifo.o.valid),
            fifo.o.ready.eq(self.descriptors.ready),
        ]
        if programs:
            self._merge(m, fifo)
        else:
            wiring.connect(m, wiring.flipped(self.window), fifo.i)
            m.d.comb += self.descriptors.payload.eq(fifo.o.payload)
        return m

    def _merge(self, m: Module, fifo: StreamFifo) -> None:
        """Fills the queue from both sources, which are never active at the same time."""
        m.submodules.program = program = ProgramFetch(self.config.port_width)
        wiring.connect(m, program.bursts, wiring.flipped(self.bursts))
        wiring.connect(m, wiring.flipped(self.beats), program.beats)
        fetched, taken = program.descriptors, Signal()
        closed = program.active | program.refused
        m.d.comb += [
            program.start.eq(self.start),
            program.address.eq(self.address),
            program.length.eq(self.length),
            program.halt.eq(self.halt),
            program.claim.eq(self.window.valid & self.window.ready),
            program.release.eq(taken),
            self.fetching.eq(program.active),
            self.refused.eq(program.refused),
            self.window.ready.eq(fifo.i.ready & ~closed),
            # The queue has room for all that are fetched.
            fetched.ready.eq(1),
            fifo.i.valid.eq(fetched.valid | (self.window.valid & ~closed)),
            fifo.i.payload.descriptor.eq(Mux(program.active, fetched.payload.descriptor, self.window.payload)),
            fifo.i.payload.first.eq(fetched.valid & fetched.payload.first),
            self.descriptors.payload.eq(fifo.o.payload.descriptor),
            taken.eq(fifo.o.valid & fifo.o.ready),
        ]
        # The addition has a cycle of its own.
        following, some = Signal(LENGTH_BITS), Signal()
        m.d.sync += following.eq(self.begun + some)
        with m.If(taken):
            m.d.sync += [some.eq(1), self.begun.eq(Mux(fifo.o.payload.first, 0, following))]
