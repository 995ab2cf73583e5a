# SPDX-License-Identifier: Apache-2.0
"""Fetches a layer's activations through all read ports, so that the load is shared."""

from functools import reduce
from operator import and_

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Credits, StreamFifo
from hw.rtl.core.activation_unit import row_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.burst_cutter import burst_layout
from hw.rtl.vector.layouts import MAX_PIECES
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.control.descriptor import activation_beats
from hw.spec.memory.access import BLOCKS_AHEAD, CHUNK_BYTES, CHUNKS_AHEAD, PIECE_FLOATS
from hw.spec.memory.operands import FLOAT_BYTES

PIECE_CHUNKS = PIECE_FLOATS * FLOAT_BYTES // CHUNK_BYTES
"""Chunks of one piece of results. After p pieces of a row this number times p chunks can be read, also if the row does
not start at a multiple of a chunk: its first chunk is then shorter."""


def chunk_beats(config: AcceleratorConfig) -> int:
    """Beats of one chunk."""
    return CHUNK_BYTES * 8 // config.port_width


def max_activation_beats(config: AcceleratorConfig) -> int:
    """Beats of the largest block of activations."""
    return activation_beats(config, config.max_tokens, config.max_k // config.tile)


def fetch_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A block of activations: address, and length in beats of one port, at least 1.

    With attention also ``exponents``: it is a block of the exponents of values instead, which is shorter than the
    largest block of activations.
    """
    most = max_activation_beats(config)
    exponents = {"exponents": 1} if config.has_attention else {}
    return data.StructLayout({"address": unsigned(ADDRESS_BITS), "beats": unsigned(most.bit_length()), **exponents})


class ActivationFetch(Block):
    """Cuts blocks into chunks, sends them to the ports in turn, and merges the data in order.

    Each port's beats are joined to rows of ``tile`` floats before its FIFO. So the output is as fast as all ports
    together, although a chunk comes from a single port. Because the ports take turns, one counter of chunks is enough
    to prevent an overflow of all FIFOs.

    With a vector unit a block can be a row of results that is still being written: it is then requested piece by piece,
    as far as it is in memory.

    Members
    -------
    blocks : blocks of activations to fetch
    bursts : each port's chunks, for its read manager
    port_beats : each port's data; always ready
    rows : the blocks' data, in order
    exponents : only with attention: the data of the blocks with ``exponents``, which are not in ``rows``. All blocks
        together are in order, so data for one output wait until the other one has taken the data before
    asking : not all bursts of the last block are sent, and the next one may be

    and with a vector unit

    follow : from the cycle after the block's transfer: the block is being written; ``pieces`` of it are in memory

    Latency: 1 cycle from a block to its first burst, 3 from a row's last beat to the row. Throughput: 1 burst and 1 row
    per cycle, and 1 beat per cycle and port.
    """

    latency = 1
    """Cycles from a block's transfer to its first burst."""
    row_latency = 3
    """Cycles from the last beat of a row to the row: join, FIFO, selection."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.row_beats = config.tile * FLOAT_BITS // config.port_width
        super().__init__(
            {
                "blocks": In(stream.Signature(fetch_layout(config))),
                "bursts": Out(stream.Signature(burst_layout(config.port_width))).array(config.ports),
                "port_beats": In(stream.Signature(config.port_width)).array(config.ports),
                "rows": Out(stream.Signature(row_layout(config))),
                **({"exponents": Out(stream.Signature(row_layout(config)))} if config.has_attention else {}),
                "asking": Out(1),
                **({"follow": In(1), "pieces": In(range(MAX_PIECES + 1))} if config.has_vector_unit else {}),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "row_latency": self.row_latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        blocks = BLOCKS_AHEAD if self.config.has_attention else 4
        m.submodules.lengths = lengths = StreamFifo(self._length_layout(), blocks)
        chunks = CHUNKS_AHEAD * self.config.ports
        m.submodules.room = room = Credits(chunks, init=chunks)
        self._ask(m, lengths, room)
        self._merge(m, lengths, room)
        return m

    def _length_layout(self) -> data.StructLayout:
        """A block's values for the merging half: its number of rows, and the rows that its first chunk lacks."""
        row_bits = (self.row_beats - 1).bit_length()
        exponents = {"exponents": 1} if self.config.has_attention else {}
        return data.StructLayout(
            {"rows": len(self.blocks.payload.beats) - row_bits, "missing": range(self.chunk_rows), **exponents}
        )

    @property
    def chunk_rows(self) -> int:
        """Rows of one chunk."""
        return chunk_beats(self.config) // self.row_beats

    def _turn(self, m: Module, name: str, advance) -> Signal:
        """The port whose turn it is. It continues from block to block, so that short blocks use all ports, too."""
        port = Signal(range(max(2, self.config.ports)), name=name)
        with m.If(advance):
            m.d.sync += port.eq(Mux(port == self.config.ports - 1, 0, port + 1))
        return port

    def _ask(self, m: Module, lengths: StreamFifo, room: Credits) -> None:
        whole, block = chunk_beats(self.config), self.blocks.payload
        beat_bits = (self.config.port_width // 8 - 1).bit_length()
        page_bits, row_bits = (CHUNK_BYTES - 1).bit_length(), (self.row_beats - 1).bit_length()
        # The offered chunk, the length of the block after it, and whether this length is 0 are registers, as in
        # hw.rtl.memory.burst_cutter, so that no computation depends on a port's answer.
        address, beats, last = Signal(ADDRESS_BITS), Signal(range(whole + 1)), Signal()
        left, to_end = Signal.like(block.beats), Signal(range(whole + 1))
        taken, load, may, active = Signal(), Signal(), Signal(), Signal()
        written = self._written(m, load, taken)
        port = self._turn(m, "asking_port", taken)
        m.d.comb += [
            to_end.eq(whole - block.address[beat_bits:page_bits]),
            self.asking.eq(active & written),
            may.eq(self.asking & room.enough),
            room.take.eq(taken),
            self.blocks.ready.eq(~active & lengths.i.ready),
            load.eq(self.blocks.valid & self.blocks.ready),
            lengths.i.valid.eq(load),
            lengths.i.payload.rows.eq(block.beats >> row_bits),
            lengths.i.payload.missing.eq(block.address[beat_bits + row_bits : page_bits]),
            *([lengths.i.payload.exponents.eq(block.exponents)] if self.config.has_attention else []),
        ]
        for index, bursts in enumerate(self.bursts):
            m.d.comb += [
                bursts.payload.address.eq(address),
                bursts.payload.beats.eq(beats),
                bursts.valid.eq(may & (port == index)),
            ]
            with m.If(bursts.valid & bursts.ready):
                m.d.comb += taken.eq(1)
        with m.If(load):
            fits = block.beats <= to_end
            m.d.sync += [
                active.eq(1),
                address.eq(block.address),
                beats.eq(Mux(fits, block.beats, to_end)),
                left.eq(block.beats - to_end),
                last.eq(fits),
            ]
        with m.Elif(taken):
            fits = left <= whole
            m.d.sync += [
                active.eq(~last),
                address.eq((address[page_bits:] + 1) << page_bits),
                beats.eq(Mux(fits, left, whole)),
                left.eq(left - whole),
                last.eq(fits),
            ]

    def _written(self, m: Module, load: Signal, taken: Signal) -> Value:
        """Whether the next chunk is in memory."""
        if not self.config.has_vector_unit:
            return Const(1)
        # A register. It stays 1 until the chunk is requested, also if ``pieces`` already counts for another block.
        chunks, written = Signal(range(PIECE_CHUNKS * MAX_PIECES + 1)), Signal()
        # A chunk is requested only if it is written, so the pieces are never fewer than what is requested of the row: a
        # difference means more. After the row's last piece they count from 0 again, and all of the row is in memory.
        requested = chunks[PIECE_CHUNKS.bit_length() - 1 :]
        # While no block is requested it may be 0 in any case; then no long path ends here.
        begins = self.blocks.ready if self.config.has_attention else load
        m.d.sync += written.eq(~begins & ~taken & (written | (requested != self.pieces)))
        with m.If(load):
            m.d.sync += chunks.eq(0)
        with m.Elif(taken):
            m.d.sync += chunks.eq(chunks + 1)
        return written | ~self.follow

    def _join(self, m: Module, port: int) -> StreamFifo:
        """Joins a port's beats to rows, and stores them in a FIFO."""
        beats, whole = self.port_beats[port], Signal(row_layout(self.config), reset_less=True)
        m.submodules[f"rows_{port}"] = fifo = StreamFifo(row_layout(self.config), CHUNKS_AHEAD * self.chunk_rows)
        place, full = Signal(range(max(2, self.row_beats))), Signal()
        last = (place == self.row_beats - 1) if self.row_beats > 1 else Const(1)
        m.d.comb += [
            # The FIFO has room: see the class.
            beats.ready.eq(1),
            fifo.i.payload.eq(whole),
            fifo.i.valid.eq(full),
        ]
        m.d.sync += full.eq(beats.valid & last)
        with m.If(beats.valid):
            m.d.sync += [
                place.eq(Mux(last, 0, place + 1)),
                whole.eq(Cat(whole.as_value()[self.config.port_width :], beats.payload)),
            ]
        return fifo

    def _merge(self, m: Module, lengths: StreamFifo, room: Credits) -> None:
        fifos = [self._join(m, port) for port in range(self.config.ports)]
        left, place = Signal.like(lengths.o.payload.rows), Signal(range(self.chunk_rows))
        # Whether rows are left, whether it is one, whether a chunk ends with the next one.
        some, last, ends = Signal(), Signal(), Signal()
        active, taken, chunk_ends, block_ends = Signal(), Signal(), Signal(), Signal()
        port = self._turn(m, "merging_port", chunk_ends)
        # At most one output is valid.
        outputs = [self.rows, self.exponents] if self.config.has_attention else [self.rows]
        m.d.comb += [
            active.eq(reduce(and_, (~output.valid | output.ready for output in outputs), some)),
            taken.eq(active & Array(fifo.o.valid for fifo in fifos)[port]),
            block_ends.eq(taken & last),
            chunk_ends.eq(taken & (ends | last)),
            lengths.o.ready.eq(~some | block_ends),
            room.add.eq(chunk_ends),
            *(fifo.o.ready.eq(active & (port == index)) for index, fifo in enumerate(fifos)),
        ]
        with m.If(taken):
            m.d.sync += self.rows.payload.eq(Array(fifo.o.payload.as_value() for fifo in fifos)[port])
        if self.config.has_attention:
            self._choose(m, lengths, taken)
        else:
            with m.If(taken):
                m.d.sync += self.rows.valid.eq(1)
            with m.Elif(self.rows.ready):
                m.d.sync += self.rows.valid.eq(0)
        with m.If(lengths.o.valid & lengths.o.ready):
            length = lengths.o.payload
            m.d.sync += [
                some.eq(1),
                left.eq(length.rows),
                last.eq(length.rows == 1),
                place.eq(length.missing),
                ends.eq(length.missing == self.chunk_rows - 1),
            ]
        with m.Elif(taken):
            m.d.sync += [
                some.eq(~last),
                left.eq(left - 1),
                last.eq(left == 2),
                place.eq(place + 1),
                ends.eq(place == self.chunk_rows - 2),
            ]

    def _choose(self, m: Module, lengths: StreamFifo, taken: Signal) -> None:
        """The output that a row goes to. Both have the register of the rows."""
        exponents = Signal()
        with m.If(lengths.o.valid & lengths.o.ready):
            m.d.sync += exponents.eq(lengths.o.payload.exponents)
        m.d.comb += self.exponents.payload.eq(self.rows.payload)
        for output, chosen in ((self.rows, ~exponents), (self.exponents, exponents)):
            m.d.sync += output.valid.eq((taken & chosen) | (output.valid & ~output.ready))
