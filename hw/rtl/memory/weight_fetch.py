# SPDX-License-Identifier: Apache-2.0
"""Fetches a layer's weights: all ports read their regions in step, and their beats form a beat of the stream."""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Counter
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.burst_cutter import BEAT_COUNT_BITS, BurstCutter, burst_layout, max_burst_beats
from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import STRIDE_BITS


def weights_layout() -> data.StructLayout:
    """A layer's weights: port p reads ``beats`` beats at ``address + p * stride``; both are multiples of 4 KiB."""
    return data.StructLayout(
        {"address": unsigned(ADDRESS_BITS), "stride": unsigned(STRIDE_BITS), "beats": unsigned(BEAT_COUNT_BITS)}
    )


class WeightFetch(Block):
    """Requests the same bursts from every port, each in its own region, and joins the data.

    The same bursts and beats fill and empty every port's FIFO, so one counter is valid for the room in all of them.

    Parameters
    ----------
    depth : beats of the FIFO that each port has for weights

    Members
    -------
    regions : the layers' weights
    halt : send no more beats
    hold : begin no burst; one that some port has been offered goes on
    sparse : with a vector unit: begin a burst only if at most ``sparse_beats`` beats of a port are requested and not
        yet in the core. So the core has some weights when it begins a layer, and no port is busy with weights when
        this layer's activations are requested.
    bursts : for each port's read manager
    port_beats : each port's data
    beats : the weight stream

    Latency: 1 cycle from a layer to its first bursts, none for the data. Throughput: 1 beat per cycle.
    """

    latency = BurstCutter.latency

    def __init__(self, config: AcceleratorConfig, depth: int):
        self.config, self.depth = config, depth
        self.sparse_beats = max_burst_beats(config.port_width) // 2
        super().__init__(
            {
                "regions": In(stream.Signature(weights_layout())),
                "halt": In(1),
                "hold": In(1),
                **({"sparse": In(1)} if config.has_vector_unit else {}),
                "bursts": Out(stream.Signature(burst_layout(config.port_width))).array(config.ports),
                "port_beats": In(stream.Signature(config.port_width)).array(config.ports),
                "beats": Out(stream.Signature(config.beat_bits)),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "depth": self.depth, "sparse_beats": self.sparse_beats}

    def elaborate(self, platform) -> Module:
        m = Module()
        width = self.config.port_width
        m.submodules.cutter = cutter = BurstCutter(width)
        m.submodules.room = room = Counter(self.depth, take=max_burst_beats(width), init=self.depth)
        regions, burst, stride = self.regions, cutter.bursts.payload, Signal(STRIDE_BITS)
        fits, begun, done = Signal(), Signal(), Signal()
        may = ~self.hold
        if self.config.has_vector_unit:
            may &= ~self.sparse | (room.value >= self.depth - self.sparse_beats)
        m.d.comb += [
            cutter.regions.payload.address.eq(regions.payload.address),
            cutter.regions.payload.beats.eq(regions.payload.beats),
            cutter.regions.valid.eq(regions.valid),
            regions.ready.eq(cutter.regions.ready),
            fits.eq(cutter.bursts.valid & (burst.beats <= room.value) & (begun | may)),
            cutter.bursts.ready.eq(done),
            room.take.eq(Mux(done, burst.beats, 0)),
            room.add.eq(self.beats.valid & self.beats.ready),
        ]
        m.d.sync += begun.eq(fits & ~done)
        with m.If(regions.valid & regions.ready):
            m.d.sync += stride.eq(regions.payload.stride)
        asked = Signal(self.config.ports)
        for port, bursts in enumerate(self.bursts):
            m.d.comb += [
                # This cannot wrap: a descriptor's addresses are below 2^40 - 2^34.
                bursts.payload.address.eq(burst.address + stride * port),
                bursts.payload.beats.eq(burst.beats),
                bursts.valid.eq(fits & ~asked[port]),
            ]
            with m.If(bursts.valid & bursts.ready):
                m.d.sync += asked[port].eq(1)
        m.d.comb += done.eq(asked.all())
        with m.If(done):
            m.d.sync += asked.eq(0)
        m.d.comb += [
            self.beats.payload.eq(Cat(part.payload for part in self.port_beats)),
            self.beats.valid.eq(Cat(*(part.valid for part in self.port_beats), ~self.halt).all()),
            *(part.ready.eq(self.beats.valid & self.beats.ready) for part in self.port_beats),
        ]
        return m
