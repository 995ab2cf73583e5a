# SPDX-License-Identifier: Apache-2.0
"""Fetches a layer's weights: all ports read their regions in step, and their beats form a beat of the stream."""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Counter
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.burst_cutter import BEAT_COUNT_BITS, BurstCutter, burst_layout, max_burst_beats
from hw.rtl.memory.burst_splitter import BurstSplitter
from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import STRIDE_BITS
from hw.spec.memory.access import EARLY_BURST_BEATS


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
    hold : begin no burst from the next cycle on; one that is offered to the ports goes on
    split : begin bursts of at most ``EARLY_BURST_BEATS`` beats. With ``hold``, few beats are then under way: the
        activations of a layer that waits are requested behind them.
    bursts : for each port's read manager
    port_beats : each port's data
    beats : the weight stream

    Latency: 4 cycles from a layer to its first bursts, none for the data. Throughput: 1 beat per cycle.
    """

    latency = BurstCutter.latency + BurstSplitter.latency + 2

    def __init__(self, config: AcceleratorConfig, depth: int):
        self.config, self.depth = config, depth
        super().__init__(
            {
                "regions": In(stream.Signature(weights_layout())),
                "halt": In(1),
                "hold": In(1),
                "split": In(1),
                "bursts": Out(stream.Signature(burst_layout(config.port_width))).array(config.ports),
                "port_beats": In(stream.Signature(config.port_width)).array(config.ports),
                "beats": Out(stream.Signature(config.beat_bits)),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "depth": self.depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        width = self.config.port_width
        m.submodules.cutter = cutter = BurstCutter(width)
        m.submodules.splitter = splitter = BurstSplitter(width, EARLY_BURST_BEATS)
        m.submodules.room = room = Counter(self.depth, take=max_burst_beats(width), init=self.depth)
        wiring.connect(m, cutter.bursts, splitter.whole)
        regions, bursts = self.regions, splitter.bursts
        # The splitter's burst may be offered: it has room in the FIFOs, and keeps it until it is taken. A register,
        # because the way from the room to the cutter and to the ports is long.
        allowed = Signal()
        # The burst that is offered to the ports.
        burst, offered = Signal.like(bursts.payload), Signal()
        # The strides of the bursts in the cutter, in the splitter, and of the one that is offered.
        strides = [Signal(STRIDE_BITS, name=f"stride_{stage}") for stage in range(3)]
        asked, done = Signal(self.config.ports), Signal()
        m.d.comb += [
            cutter.regions.payload.address.eq(regions.payload.address),
            cutter.regions.payload.beats.eq(regions.payload.beats),
            cutter.regions.valid.eq(regions.valid),
            splitter.split.eq(self.split),
            regions.ready.eq(cutter.regions.ready),
            # The ports' answers have no path to the splitter. This costs no cycle, because ``allowed`` is 0 in the
            # cycle after a burst.
            bursts.ready.eq(allowed & ~offered),
            room.take.eq(Mux(bursts.ready, bursts.payload.beats, 0)),
            room.add.eq(self.beats.valid & self.beats.ready),
            done.eq(asked.all()),
        ]
        room_left = bursts.payload.beats <= room.value
        m.d.sync += allowed.eq(bursts.valid & room_left & ~bursts.ready & ~self.hold)
        with m.If(regions.ready):
            m.d.sync += strides[0].eq(regions.payload.stride)
        with m.If(~bursts.valid | bursts.ready):
            m.d.sync += strides[1].eq(strides[0])
        with m.If(~offered):
            m.d.sync += [burst.eq(bursts.payload), strides[2].eq(strides[1]), asked.eq(0)]
            m.d.sync += offered.eq(bursts.ready)
        with m.Elif(done):
            m.d.sync += offered.eq(0)
        for port, asks in enumerate(self.bursts):
            m.d.comb += [
                # This cannot wrap: a descriptor's addresses are below 2^40 - 2^34.
                asks.payload.address.eq(burst.address + strides[2] * port),
                asks.payload.beats.eq(burst.beats),
                asks.valid.eq(offered & ~asked[port]),
            ]
            with m.If(asks.valid & asks.ready):
                m.d.sync += asked[port].eq(1)
        m.d.comb += [
            self.beats.payload.eq(Cat(part.payload for part in self.port_beats)),
            self.beats.valid.eq(Cat(*(part.valid for part in self.port_beats), ~self.halt).all()),
            *(part.ready.eq(self.beats.valid & self.beats.ready) for part in self.port_beats),
        ]
        return m
