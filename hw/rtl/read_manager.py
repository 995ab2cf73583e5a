# SPDX-License-Identifier: Apache-2.0
"""The AXI4 read manager: one linear region of memory as a stream of beats."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .axi import ADDRESS_BITS, BOUNDARY, MAX_BURST_BEATS, constant_address_fields, is_error, read_signature
from .fifo import BlockFifo, StreamFifo

BEAT_COUNT_BITS = 28
"""Bits of a job's length in beats: 4 GiB at 16 bytes a beat."""


def read_job() -> data.StructLayout:
    """A region to read: address, a multiple of the beat's bytes, and length in beats, at least 1."""
    return data.StructLayout({"address": unsigned(ADDRESS_BITS), "beats": unsigned(BEAT_COUNT_BITS)})


class ReadManager(wiring.Component):
    """Reads regions one after the other, in maximal INCR bursts that never cross a 4 KiB boundary.

    A burst is only asked for when the FIFO has room for all of it, so data never wait on the bus. The first burst of
    a job follows the last one of the job before without a gap.

    Parameters
    ----------
    width : bits of the port
    outstanding : bursts that may be under way; the FIFO holds as many

    Members
    -------
    job : regions to read
    axi : AR and R
    beats : the data, in order
    flush : give up: no new bursts, what is under way is taken and thrown away
    under_way : bursts asked for and not yet received
    error : a burst was answered with SLVERR or DECERR; one cycle, with its address in ``error_address``

    Latency: 2 cycles from a job to its first AR, 2 from R to ``beats``. Throughput 1 beat per cycle.
    """

    def __init__(self, width: int, outstanding: int = 8):
        if outstanding < 1 or outstanding & (outstanding - 1):
            raise ValueError(f"outstanding bursts are a power of two, not {outstanding}")
        self.width, self.outstanding = width, outstanding
        self.beat_bytes = width // 8
        self.burst_beats = min(MAX_BURST_BEATS, BOUNDARY // self.beat_bytes)
        super().__init__(
            {
                "job": In(stream.Signature(read_job())),
                "axi": Out(read_signature(width)),
                "beats": Out(stream.Signature(width)),
                "flush": In(1),
                "under_way": Out(range(outstanding + 1)),
                "error": Out(1),
                "error_address": Out(ADDRESS_BITS),
            }
        )

    @property
    def fifo_depth(self) -> int:
        """Beats that the FIFO holds."""
        return self.outstanding * self.burst_beats

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.fifo = fifo = BlockFifo(unsigned(self.width), self.fifo_depth)
        m.submodules.addresses = addresses = StreamFifo(unsigned(ADDRESS_BITS), max(2, self.outstanding))
        # Beats of room that no burst under way has a claim on.
        room = Signal(range(self.fifo_depth + 1), init=self.fifo_depth)
        asked = self._ask(m, room, addresses)
        self._receive(m, fifo, addresses)

        taken = Signal()
        m.d.comb += [
            self.beats.payload.eq(fifo.o.payload),
            self.beats.valid.eq(fifo.o.valid & ~self.flush),
            fifo.o.ready.eq(self.beats.ready | self.flush),
            taken.eq(fifo.o.valid & fifo.o.ready),
        ]
        # What a flush throws away on arrival never entered the FIFO and gives its room back all the same.
        thrown = self.axi.r.valid & self.axi.r.ready & self.flush
        m.d.sync += room.eq(room - asked + taken + thrown)
        started = self.axi.ar.valid & self.axi.ar.ready
        finished = self.axi.r.valid & self.axi.r.ready & self.axi.r.payload.last
        m.d.sync += self.under_way.eq(self.under_way + started - finished)
        return m

    def _ask(self, m: Module, room: Signal, addresses: StreamFifo) -> Signal:
        """Cuts jobs into bursts; returns the beats claimed in this cycle."""
        address = Signal(ADDRESS_BITS)
        left = Signal(BEAT_COUNT_BITS)
        to_boundary = Signal(range(self.burst_beats + 1))
        burst = Signal(range(self.burst_beats + 1))
        beat_bits = (self.beat_bytes - 1).bit_length()
        index_bits = (self.burst_beats - 1).bit_length()
        asked = Signal.like(burst)
        ar = self.axi.ar
        free, go = ~ar.valid | ar.ready, Signal()
        m.d.comb += [
            # A burst ends where the next block of ``burst_beats`` begins; blocks divide 4 KiB.
            to_boundary.eq(self.burst_beats - address[beat_bits : beat_bits + index_bits]),
            burst.eq(Mux(left < to_boundary, left, to_boundary)),
            go.eq((left != 0) & (burst <= room) & free & addresses.i.ready & ~self.flush),
            asked.eq(Mux(go, burst, 0)),
            addresses.i.payload.eq(address),
            addresses.i.valid.eq(go),
            self.job.ready.eq((left == 0) | (go & (left == burst))),
        ]
        m.d.comb += constant_address_fields(ar.payload, self.width)
        with m.If(ar.ready):
            m.d.sync += ar.valid.eq(0)
        with m.If(go):
            m.d.sync += [
                ar.valid.eq(1),
                ar.payload.addr.eq(address),
                ar.payload.len.eq(burst - 1),
                address.eq(address + (burst << beat_bits)),
                left.eq(left - burst),
            ]
        with m.If(self.flush):
            m.d.sync += left.eq(0)
        with m.Elif(self.job.valid & self.job.ready):
            m.d.sync += [address.eq(self.job.payload.address), left.eq(self.job.payload.beats)]
        return asked

    def _receive(self, m: Module, fifo: BlockFifo, addresses: StreamFifo) -> None:
        r = self.axi.r
        m.d.comb += [
            # Room was claimed before the burst was asked for.
            r.ready.eq(1),
            fifo.i.payload.eq(r.payload.data),
            fifo.i.valid.eq(r.valid & ~self.flush),
            addresses.o.ready.eq(r.valid & r.payload.last),
        ]
        m.d.sync += [self.error.eq(r.valid & is_error(r.payload.resp)), self.error_address.eq(addresses.o.payload)]
