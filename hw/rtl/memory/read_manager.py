# SPDX-License-Identifier: Apache-2.0
"""The AXI4 read manager: bursts for several clients over one port."""

from collections.abc import Collection, Sequence

from amaranth.hdl import Cat, Const, Module, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import BlockFifo, Credits, StreamFifo
from hw.rtl.memory.axi import ADDRESS_BITS, constant_address_fields, is_error, read_signature
from hw.rtl.memory.burst_cutter import burst_layout, max_burst_beats
from hw.rtl.vector.layouts import Operand
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.access import OUTSTANDING, WEIGHT_BURSTS_AHEAD


def operands_of(config: AcceleratorConfig, port: int) -> list[Operand]:
    """The operands of the vector unit that are read through a port: they take turns over the ports."""
    return [operand for operand in Operand if config.has_vector_unit and operand % config.ports == port]


def weights_ahead(width: int) -> int:
    """Beats of weights that a port of ``width`` bits is ahead of the core: the depth of its FIFO for them."""
    return WEIGHT_BURSTS_AHEAD * max_burst_beats(width)


def patient_clients(config: AcceleratorConfig, port: int) -> range:
    """Clients of a port that wait for activations: with attention the operands of the vector unit.

    A layer that begins requests both. Its activations come in short bursts from all ports in turn, so one port that
    also reads an operand would delay them all, and the operand is needed later.
    """
    return range(1, 1 + len(operands_of(config, port)) * config.has_attention)


def read_fifo_depths(config: AcceleratorConfig, port: int = 0) -> list[int]:
    """Beats of the FIFO of each client of a port, as :class:`ReadManager` takes them.

    The clients are activations, the port's operands of the vector unit, on port 0 the program, and weights, in order of
    precedence: activations and operands are few, and a whole layer waits for them.
    """
    others = len(operands_of(config, port)) + (config.has_programs and port == 0)
    return [0] * (1 + others) + [weights_ahead(config.port_width)]


class ReadManager(Block):
    """Reads bursts for several clients over one port, each client's in order.

    A client only requests bursts for which its FIFO has room; it counts its requested bursts and the beats it took. So
    data never waits on the bus, and no client blocks another. If several clients have bursts, those of the first client
    are requested first. All bursts have the same ID, so their data comes in the order of the requests.

    Parameters
    ----------
    width : bits of the port
    depths : for each client the depth of its FIFO in beats, a power of two, or 0 for a client that is always ready; the
        first client has precedence
    outstanding : bursts that may be under way, a power of two
    patient : clients whose bursts are not requested while bursts of the first client are under way. The data of such
        bursts never wait, so a patient client's turn comes

    Members
    -------
    axi : AR and R
    bursts : for each client the bursts to read, none of which crosses a 4 KiB boundary
    beats : for each client their data, in order
    halt : request no more bursts; data of bursts under way is still received
    under_way : bursts offered on AR and not yet received
    error : a burst was answered with SLVERR or DECERR; one cycle, with its address in ``error_address``
    oldest : address of the oldest burst under way, if any

    Latency: 1 cycle from a burst to AR, 2 from R to a client with a FIFO. Throughput 1 burst and 1 beat per cycle.
    """

    latency = 1
    """Cycles from a burst's transfer to the first cycle of ARVALID."""
    beat_latency = BlockFifo.latency
    """Cycles from R to a client with a FIFO."""

    def __init__(
        self, width: int, depths: Sequence[int], outstanding: int = OUTSTANDING, patient: Collection[int] = ()
    ):
        if outstanding < 2 or outstanding & (outstanding - 1):
            raise ValueError(f"outstanding bursts are a power of two from 2 up, not {outstanding}")
        self.width, self.depths, self.outstanding, self.patient = width, tuple(depths), outstanding, tuple(patient)
        super().__init__(
            {
                "axi": Out(read_signature(width)),
                "bursts": In(stream.Signature(burst_layout(width))).array(len(self.depths)),
                "beats": Out(stream.Signature(width)).array(len(self.depths)),
                "halt": In(1),
                "under_way": Out(range(outstanding + 1)),
                "error": Out(1),
                "error_address": Out(ADDRESS_BITS),
                "oldest": Out(ADDRESS_BITS),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "beat_latency": self.beat_latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        # The bursts under way: their client and, for the error register, their address.
        tag = data.StructLayout({"client": range(max(2, len(self.depths))), "address": ADDRESS_BITS})
        m.submodules.tags = tags = StreamFifo(tag, self.outstanding)
        m.d.comb += [self.under_way.eq(tags.level), self.oldest.eq(tags.o.payload.address)]
        self._ask(m, tags)
        for index, (beats, depth) in enumerate(zip(self.beats, self.depths, strict=True)):
            if depth:
                m.submodules[f"fifo_{index}"] = fifo = BlockFifo(unsigned(self.width), depth)
                wiring.connect(m, fifo.o, wiring.flipped(beats))
                beats = fifo.i
            m.d.comb += [
                beats.payload.eq(self.axi.r.payload.data),
                beats.valid.eq(self.axi.r.valid & (tags.o.payload.client == index)),
            ]
        r = self.axi.r
        m.d.comb += [
            # The FIFOs have room: see the class.
            r.ready.eq(1),
            tags.o.ready.eq(r.valid & r.payload.last),
        ]
        m.d.sync += [self.error.eq(r.valid & is_error(r.payload.resp)), self.error_address.eq(tags.o.payload.address)]
        return m

    def _ask(self, m: Module, tags: StreamFifo) -> None:
        """Sends a burst of the first client that has one to AR."""
        ar, free = self.axi.ar, Signal()
        m.d.comb += [
            free.eq((~ar.valid | ar.ready) & tags.i.ready & ~self.halt),
            *constant_address_fields(ar.payload, self.width),
        ]
        waits = self._first_under_way(m, tags) if self.patient else Const(0)
        asked = [
            bursts.valid & ~waits if index in self.patient else bursts.valid for index, bursts in enumerate(self.bursts)
        ]
        m.d.comb += tags.i.valid.eq(free & Cat(asked).any())
        with m.If(ar.ready):
            m.d.sync += ar.valid.eq(0)
        earlier = Signal(len(self.bursts) + 1)
        for index, bursts in enumerate(self.bursts):
            ready = free & ~earlier[index]
            m.d.comb += [
                earlier[index + 1].eq(earlier[index] | asked[index]),
                bursts.ready.eq(ready & ~waits if index in self.patient else ready),
            ]
            with m.If(bursts.valid & bursts.ready):
                m.d.comb += [tags.i.payload.client.eq(index), tags.i.payload.address.eq(bursts.payload.address)]
                m.d.sync += [
                    ar.valid.eq(1),
                    ar.payload.addr.eq(bursts.payload.address),
                    ar.payload.len.eq((bursts.payload.beats - 1)[:8]),
                ]

    def _first_under_way(self, m: Module, tags: StreamFifo) -> Value:
        """Whether bursts of the first client are under way, since the cycle before."""
        m.submodules.first = first = Credits(self.outstanding)
        bursts = self.bursts[0]
        m.d.comb += [
            first.add.eq(bursts.valid & bursts.ready),
            first.take.eq(tags.o.valid & tags.o.ready & (tags.o.payload.client == 0)),
        ]
        return first.enough
