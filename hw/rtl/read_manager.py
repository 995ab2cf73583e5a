# SPDX-License-Identifier: Apache-2.0
"""The AXI4 read manager: bursts for several clients over one port."""

from collections.abc import Mapping

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import AcceleratorConfig
from .activation_fetch import CHUNKS_AHEAD, chunk_beats
from .axi import ADDRESS_BITS, constant_address_fields, is_error, read_signature
from .burst_cutter import burst_layout, max_burst_beats
from .fifo import BlockFifo, Counter, StreamFifo

OUTSTANDING = 8
"""Bursts that a port may have under way: 8 times 4 KiB cover 2,048 cycles of latency."""


def read_clients(config: AcceleratorConfig) -> dict[str, int]:
    """Who reads over a port, and beats of their FIFOs; activations first: they are few, and a whole layer waits."""
    return {
        "activations": CHUNKS_AHEAD * chunk_beats(config),
        "weights": OUTSTANDING * max_burst_beats(config.port_width),
    }


class ReadManager(wiring.Component):
    """Reads bursts for several clients over one port, each client's in order.

    A burst is only asked for when its client's FIFO has room for all of it, so data never wait on the bus and no
    client holds up another. Bursts of several clients are asked for one by one, the first client's first. All have
    the same ID, so they come back in the order in which they were asked for.

    Parameters
    ----------
    width : bits of the port
    clients : name and FIFO depth in beats, a power of two, of each client; the first has precedence
    outstanding : bursts that may be under way, a power of two

    Members
    -------
    axi : AR and R
    <client>_bursts : bursts to read, none of which crosses a 4 KiB boundary
    <client>_beats : their data, in order
    halt : ask for nothing more; what is under way is still received
    under_way : bursts offered on AR and not yet received
    error : a burst was answered with SLVERR or DECERR; one cycle, with its address in ``error_address``
    oldest : address of the burst that memory owes next, if any

    Latency: 1 cycle from a burst to AR, 2 from R to the client. Throughput 1 burst and 1 beat per cycle.
    """

    latency = 1
    """Cycles from a burst's transfer to the first cycle of ARVALID."""

    def __init__(self, width: int, clients: Mapping[str, int], outstanding: int = OUTSTANDING):
        if outstanding < 2 or outstanding & (outstanding - 1):
            raise ValueError(f"outstanding bursts are a power of two from 2 up, not {outstanding}")
        self.width, self.clients, self.outstanding = width, dict(clients), outstanding
        members = {}
        for name in clients:
            members[f"{name}_bursts"] = In(stream.Signature(burst_layout(width)))
            members[f"{name}_beats"] = Out(stream.Signature(width))
        super().__init__(
            {
                "axi": Out(read_signature(width)),
                **members,
                "halt": In(1),
                "under_way": Out(range(outstanding + 1)),
                "error": Out(1),
                "error_address": Out(ADDRESS_BITS),
                "oldest": Out(ADDRESS_BITS),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        # What is under way: its client and, for the error register, its address.
        tag = data.StructLayout({"client": range(max(2, len(self.clients))), "address": ADDRESS_BITS})
        m.submodules.tags = tags = StreamFifo(tag, self.outstanding)
        m.d.comb += [self.under_way.eq(tags.level), self.oldest.eq(tags.o.payload.address)]
        requests = [
            self._client(m, index, name, depth, tags) for index, (name, depth) in enumerate(self.clients.items())
        ]
        self._ask(m, requests, tags)
        r = self.axi.r
        m.d.comb += [
            # Room was claimed before the burst was asked for.
            r.ready.eq(1),
            tags.o.ready.eq(r.valid & r.payload.last),
        ]
        m.d.sync += [self.error.eq(r.valid & is_error(r.payload.resp)), self.error_address.eq(tags.o.payload.address)]
        return m

    def _client(self, m: Module, index: int, name: str, depth: int, tags: StreamFifo) -> tuple:
        """A client's bursts, held back until there is room for them, and its FIFO; returns (bursts, may be asked)."""
        m.submodules[f"{name}_fifo"] = fifo = BlockFifo(unsigned(self.width), depth)
        m.submodules[f"{name}_room"] = room = Counter(depth, add=1, take=max_burst_beats(self.width), init=depth)
        wiring.connect(m, fifo.o, wiring.flipped(getattr(self, f"{name}_beats")))
        fits = Signal(name=f"{name}_fits")
        bursts = getattr(self, f"{name}_bursts")
        m.d.comb += [
            fits.eq(bursts.valid & (bursts.payload.beats <= room.value)),
            room.take.eq(Mux(bursts.valid & bursts.ready, bursts.payload.beats, 0)),
            room.add.eq(fifo.o.valid & fifo.o.ready),
            fifo.i.payload.eq(self.axi.r.payload.data),
            fifo.i.valid.eq(self.axi.r.valid & (tags.o.payload.client == index)),
        ]
        return bursts, fits

    def _ask(self, m: Module, requests: list[tuple], tags: StreamFifo) -> None:
        """Offers the first client's burst that fits on AR."""
        ar, free = self.axi.ar, Signal()
        m.d.comb += free.eq((~self.axi.ar.valid | self.axi.ar.ready) & tags.i.ready & ~self.halt)
        m.d.comb += constant_address_fields(ar.payload, self.width)
        with m.If(ar.ready):
            m.d.sync += ar.valid.eq(0)
        earlier = Signal(len(requests) + 1)
        m.d.comb += tags.i.valid.eq(free & Cat(fits for _, fits in requests).any())
        for index, (bursts, fits) in enumerate(requests):
            m.d.comb += [
                earlier[index + 1].eq(earlier[index] | fits),
                bursts.ready.eq(free & fits & ~earlier[index]),
            ]
            with m.If(bursts.valid & bursts.ready):
                m.d.comb += [tags.i.payload.client.eq(index), tags.i.payload.address.eq(bursts.payload.address)]
                m.d.sync += [
                    ar.valid.eq(1),
                    ar.payload.addr.eq(bursts.payload.address),
                    ar.payload.len.eq((bursts.payload.beats - 1)[:8]),
                ]
