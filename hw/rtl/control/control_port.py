# SPDX-License-Identifier: Apache-2.0
"""An AXI4-Lite subordinate that turns transactions into accesses to a simple register bus."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.memory.axi import Response, lite_signature


class ControlPort(wiring.Component):
    """One write and one read at a time, independent of each other.

    AW and W may come in any order and at any distance. Every AXI output is a register or the inverse of one, so there
    is no combinational path from an AXI input to an AXI output.

    Parameters
    ----------
    address_bits : width of the AXI addresses; the two lowest bits are ignored

    Members
    -------
    axi : the AXI4-Lite port
    write_word : index of the word to write
    write_response : the bus's response to a write of this word, in the same cycle
    write : write ``write_data`` in this cycle, if the word can be written
    read_word : index of the word to read, stable until the response is taken
    read : one cycle; the values of this cycle are read
    read_data, read_response : data and response, one cycle after ``read``

    Latency: 2 cycles from the later one of AW and W to B, 3 from AR to R. Throughput: a write every 2 cycles, a
    read every 4, if the responses are taken at once.
    """

    write_latency, write_period = 2, 2
    """Cycles from the transfer that completes a write to the first cycle of BVALID, and between writes."""
    read_latency, read_period = 3, 4
    """Cycles from the transfer on AR to the first cycle of RVALID, and between reads."""

    def __init__(self, address_bits: int):
        self.address_bits = address_bits
        super().__init__(
            {
                "axi": In(lite_signature(address_bits)),
                "write": Out(1),
                "write_word": Out(address_bits - 2),
                "write_data": Out(32),
                "write_response": In(Response),
                "read": Out(1),
                "read_word": Out(address_bits - 2),
                "read_data": In(32),
                "read_response": In(Response),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        self._write(m)
        self._read(m)
        return m

    def _write(self, m: Module) -> None:
        aw, w, b = self.axi.aw, self.axi.w, self.axi.b
        has_address, has_data, strobes, decide = Signal(), Signal(), Signal(4), Signal()
        m.d.comb += [
            aw.ready.eq(~has_address),
            w.ready.eq(~has_data),
            # The response to the previous write must have been taken.
            decide.eq(has_address & has_data & ~b.valid),
            self.write.eq(decide & strobes.all()),
        ]
        with m.If(aw.valid & aw.ready):
            m.d.sync += [has_address.eq(1), self.write_word.eq(aw.payload.addr[2:])]
        with m.If(w.valid & w.ready):
            m.d.sync += [has_data.eq(1), self.write_data.eq(w.payload.data), strobes.eq(w.payload.strb)]
        with m.If(b.valid & b.ready):
            m.d.sync += b.valid.eq(0)
        with m.If(decide):
            m.d.sync += [b.valid.eq(1), has_address.eq(0), has_data.eq(0), b.payload.resp.eq(self.write_response)]
            with m.If(self.write_response != Response.DECERR):
                # An interconnect makes a write without strobes from the other half of a 64-bit access: this is OKAY.
                # A write of some bytes is an error, because registers are written as a whole.
                with m.If(~strobes.any()):
                    m.d.sync += b.payload.resp.eq(Response.OKAY)
                with m.Elif(~strobes.all()):
                    m.d.sync += b.payload.resp.eq(Response.SLVERR)

    def _read(self, m: Module) -> None:
        ar, r = self.axi.ar, self.axi.r
        # Four cycles: AR is taken; the registers are read; their data is here; R is valid.
        idle, answered = Signal(init=1), Signal()
        m.d.comb += ar.ready.eq(idle)
        m.d.sync += [self.read.eq(ar.valid & idle), answered.eq(self.read)]
        with m.If(ar.valid & idle):
            m.d.sync += [idle.eq(0), self.read_word.eq(ar.payload.addr[2:])]
        with m.If(answered):
            m.d.sync += [
                r.valid.eq(1),
                Cat(r.payload.data, r.payload.resp).eq(Cat(self.read_data, self.read_response)),
            ]
        with m.If(r.valid & r.ready):
            m.d.sync += [r.valid.eq(0), idle.eq(1)]
