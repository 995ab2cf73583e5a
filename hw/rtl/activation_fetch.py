# SPDX-License-Identifier: Apache-2.0
"""Fetches a layer's activations over all read ports at once, so that no port has to carry them alone."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import AcceleratorConfig
from ..spec.descriptor import activation_beats
from .axi import ADDRESS_BITS
from .burst_cutter import burst_layout
from .fifo import Counter, StreamFifo

CHUNK_BYTES = 1024
"""What a port reads before it is the next port's turn: long enough for DDR, short enough to spread a single token.
Chunks end at multiples of this, so that each of them is one burst: none crosses 4 KiB, none is too long."""
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

    As the ports take turns, one counter of chunks keeps all of their FIFOs from overflowing.

    Members
    -------
    blocks : what to fetch
    bursts_<p> : port p's chunks, for its read manager
    beats_<p> : port p's data
    beats : the blocks' data, in order
    asking : bursts are still to come for the last block

    Latency: 1 cycle from a block to its first burst, none for the data. Throughput: 1 burst and 1 beat per cycle.
    """

    latency = 1

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        beats = stream.Signature(config.port_width)
        members = {}
        for port in range(config.ports):
            members[f"bursts_{port}"] = Out(stream.Signature(burst_layout(config.port_width)))
            members[f"beats_{port}"] = In(beats)
        super().__init__(
            {"blocks": In(stream.Signature(fetch_layout(config))), **members, "beats": Out(beats), "asking": Out(1)}
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.lengths = lengths = StreamFifo(self._length_layout(), 4)
        chunks = CHUNKS_AHEAD * self.config.ports
        m.submodules.room = room = Counter(chunks, init=chunks)
        self._ask(m, lengths, room)
        self._merge(m, lengths, room)
        return m

    def _length_layout(self) -> data.StructLayout:
        """What the two halves share of a block: its beats, and how many its first chunk lacks."""
        return data.StructLayout({"beats": len(self.blocks.payload.beats), "missing": range(chunk_beats(self.config))})

    def _turn(self, m: Module, name: str, advance) -> Signal:
        """Whose turn it is. It goes on from block to block, so that short ones spread over the ports too."""
        port = Signal(range(max(2, self.config.ports)), name=name)
        with m.If(advance):
            m.d.sync += port.eq(Mux(port == self.config.ports - 1, 0, port + 1))
        return port

    def _ask(self, m: Module, lengths: StreamFifo, room: Counter) -> None:
        whole, block = chunk_beats(self.config), self.blocks.payload
        beat_bits = (self.config.port_width // 8 - 1).bit_length()
        page_bits = (CHUNK_BYTES - 1).bit_length()
        address, left = Signal(ADDRESS_BITS), Signal.like(block.beats)
        beats, to_end = Signal(range(whole + 1)), Signal(range(whole + 1))
        taken, load, may = Signal(), Signal(), Signal()
        port = self._turn(m, "asking_port", taken)
        m.d.comb += [
            to_end.eq(whole - address[beat_bits:page_bits]),
            beats.eq(Mux(left < to_end, left, to_end)),
            self.asking.eq(left != 0),
            may.eq(self.asking & (room.value != 0)),
            room.take.eq(taken),
            self.blocks.ready.eq(~self.asking & lengths.i.ready),
            load.eq(self.blocks.valid & self.blocks.ready),
            lengths.i.valid.eq(load),
            lengths.i.payload.beats.eq(block.beats),
            lengths.i.payload.missing.eq(block.address[beat_bits:page_bits]),
        ]
        for index in range(self.config.ports):
            bursts = getattr(self, f"bursts_{index}")
            m.d.comb += [
                bursts.payload.address.eq(address),
                bursts.payload.beats.eq(beats),
                bursts.valid.eq(may & (port == index)),
            ]
            with m.If(bursts.valid & bursts.ready):
                m.d.comb += taken.eq(1)
        with m.If(load):
            m.d.sync += [address.eq(block.address), left.eq(block.beats)]
        with m.Elif(taken):
            m.d.sync += [address.eq((address[page_bits:] + 1) << page_bits), left.eq(left - beats)]

    def _merge(self, m: Module, lengths: StreamFifo, room: Counter) -> None:
        whole = chunk_beats(self.config)
        left, place = Signal.like(self.blocks.payload.beats), Signal(range(whole))
        active, taken, chunk_ends, block_ends = Signal(), Signal(), Signal(), Signal()
        port = self._turn(m, "merging_port", chunk_ends)
        m.d.comb += [
            active.eq(left != 0),
            taken.eq(self.beats.valid & self.beats.ready),
            block_ends.eq(taken & (left == 1)),
            chunk_ends.eq((taken & (place == whole - 1)) | block_ends),
            lengths.o.ready.eq(~active | block_ends),
            room.add.eq(chunk_ends),
        ]
        for index in range(self.config.ports):
            beats = getattr(self, f"beats_{index}")
            turn = active & (port == index)
            with m.If(turn):
                m.d.comb += [self.beats.payload.eq(beats.payload), self.beats.valid.eq(beats.valid)]
            m.d.comb += beats.ready.eq(turn & self.beats.ready)
        with m.If(lengths.o.valid & lengths.o.ready):
            m.d.sync += [left.eq(lengths.o.payload.beats), place.eq(lengths.o.payload.missing)]
        with m.Elif(taken):
            m.d.sync += [left.eq(left - 1), place.eq(place + 1)]
