# SPDX-License-Identifier: Apache-2.0
"""Fetches a layer's activations over all read ports at once, so that no port has to carry them alone."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import AcceleratorConfig
from ..spec.descriptor import activation_beats
from .axi import ADDRESS_BITS
from .burst_cutter import region_layout
from .fifo import StreamFifo

CHUNK_BYTES = 1024
"""What a port reads before it is the next port's turn: long enough for DDR, short enough to spread a single token."""
CHUNKS_AHEAD = 8
"""Chunks that a port's FIFO holds: what is asked for late comes after 2,048 cycles of weights that were asked for
before. With 128 bits that is the whole depth of a block RAM."""


def chunk_beats(config: AcceleratorConfig) -> int:
    """Beats of one chunk."""
    return CHUNK_BYTES * 8 // config.port_width


def max_activation_beats(config: AcceleratorConfig) -> int:
    """Beats of the largest block of activations."""
    return activation_beats(config, config.max_tokens, config.max_k // config.tile)


def fetch_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A block of activations: address, and length in beats of one port, at least 1."""
    return data.StructLayout(
        {"address": unsigned(ADDRESS_BITS), "beats": unsigned(max_activation_beats(config).bit_length())}
    )


class ActivationFetch(wiring.Component):
    """Cuts blocks into chunks, gives them to the ports in turn, and puts the data together again.

    Members
    -------
    blocks : what to fetch
    regions_<p> : port p's chunks, for its read manager
    beats_<p> : port p's data
    beats : the blocks' data, in order
    asking : regions are still to come for the last block

    Latency: 2 cycles from a block to its first region, none for the data. Throughput: 1 region and 1 beat per cycle.
    """

    latency = 2

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        beats = stream.Signature(config.port_width)
        members = {}
        for port in range(config.ports):
            members[f"regions_{port}"] = Out(stream.Signature(region_layout()))
            members[f"beats_{port}"] = In(beats)
        super().__init__(
            {"blocks": In(stream.Signature(fetch_layout(config))), **members, "beats": Out(beats), "asking": Out(1)}
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.lengths = lengths = StreamFifo(unsigned(len(self.blocks.payload.beats)), 4)
        self._ask(m, lengths)
        self._merge(m, lengths)
        return m

    def _turn(self, m: Module, name: str, advance) -> Signal:
        """Whose turn it is. It goes on from block to block, so that short ones spread over the ports too."""
        port = Signal(range(max(2, self.config.ports)), name=name)
        with m.If(advance):
            m.d.sync += port.eq(Mux(port == self.config.ports - 1, 0, port + 1))
        return port

    def _ask(self, m: Module, lengths: StreamFifo) -> None:
        whole = chunk_beats(self.config)
        address, left = Signal(ADDRESS_BITS), Signal.like(self.blocks.payload.beats)
        beats, taken, load = Signal(range(whole + 1)), Signal(), Signal()
        port = self._turn(m, "asking_port", taken)
        m.d.comb += [
            beats.eq(Mux(left < whole, left, whole)),
            self.blocks.ready.eq((left == 0) & lengths.i.ready),
            load.eq(self.blocks.valid & self.blocks.ready),
            self.asking.eq(left != 0),
            lengths.i.valid.eq(load),
            lengths.i.payload.eq(self.blocks.payload.beats),
        ]
        for index in range(self.config.ports):
            regions = getattr(self, f"regions_{index}")
            m.d.comb += [
                regions.payload.address.eq(address),
                regions.payload.beats.eq(beats),
                regions.valid.eq((left != 0) & (port == index)),
            ]
            with m.If(regions.valid & regions.ready):
                m.d.comb += taken.eq(1)
        with m.If(load):
            m.d.sync += [address.eq(self.blocks.payload.address), left.eq(self.blocks.payload.beats)]
        with m.Elif(taken):
            m.d.sync += [address.eq(address + CHUNK_BYTES), left.eq(left - beats)]

    def _merge(self, m: Module, lengths: StreamFifo) -> None:
        whole = chunk_beats(self.config)
        left, in_chunk = Signal.like(self.blocks.payload.beats), Signal(range(whole))
        taken, chunk_ends = Signal(), Signal()
        port = self._turn(m, "merging_port", chunk_ends)
        m.d.comb += [
            taken.eq(self.beats.valid & self.beats.ready),
            chunk_ends.eq(taken & ((in_chunk == whole - 1) | (left == 1))),
            lengths.o.ready.eq((left == 0) | (taken & (left == 1))),
        ]
        for index in range(self.config.ports):
            beats = getattr(self, f"beats_{index}")
            turn = (left != 0) & (port == index)
            with m.If(turn):
                m.d.comb += [self.beats.payload.eq(beats.payload), self.beats.valid.eq(beats.valid)]
            m.d.comb += beats.ready.eq(turn & self.beats.ready)
        with m.If(taken):
            m.d.sync += [left.eq(left - 1), in_chunk.eq(Mux(chunk_ends, 0, in_chunk + 1))]
        with m.If(lengths.o.valid & lengths.o.ready):
            m.d.sync += left.eq(lengths.o.payload)
