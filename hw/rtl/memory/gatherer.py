# SPDX-License-Identifier: Apache-2.0
"""The gatherer: collects results on chip, so that they are written to memory in few long bursts."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import CreditFifo, StreamFifo
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.core.drain import result_payload
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.write_manager import PIECE_BYTES, last_beat, piece_layout
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.control.descriptor import PITCH_BITS
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.ops.command import command_fields


def gather_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The place of one layer's results: row m starts at ``address + m * pitch``.

    tokens, out_tiles, last_columns : as in the core's command
    interrupt : passed on with the last piece
    """
    counts = command_fields(config)
    return data.StructLayout(
        {
            **{name: unsigned(counts[name]) for name in ("tokens", "out_tiles", "last_columns")},
            "address": unsigned(ADDRESS_BITS),
            "pitch": unsigned(PITCH_BITS),
            "interrupt": 1,
        }
    )


def chunk_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A full half of the buffer: one piece for each of ``last_token + 1`` tokens, all with the same length."""
    return data.StructLayout(
        {
            "address": unsigned(ADDRESS_BITS),
            "pitch": unsigned(PITCH_BITS),
            "last_token": range(config.max_tokens),
            "last_float": range(PIECE_FLOATS),
            "last": 1,
            "interrupt": 1,
        }
    )


class Gatherer(Block):
    """Converts output tiles, in which a token has few columns, to pieces of up to 256 columns, token by token.

    A chunk is 256 columns of all tokens, or the rest of the layer. Chunks fill the two halves of a buffer in turn;
    while one chunk is sent, the next one is gathered, from the same layer or from the next one.

    Members
    -------
    job : the place of a layer's results
    results : from the core: for each output tile, for each token, its columns
    pieces : for each chunk, for each token, the place of its floats
    beats : the floats of the pieces, ``port_width`` bits a beat; every piece starts with a new beat, and data after its
        last float is undefined

    Latency: 2 cycles from the last result of a chunk to its first piece, 3 to its first beat. Throughput: 1 beat per
    cycle, and 1 transfer of results per cycle if a chunk is sent in less time than the next one is gathered.
    """

    latency = 2 * StreamFifo.latency + 1
    """Cycles from the last result of a chunk to its first beat."""
    read_latency = 2 * StreamFifo.latency
    """Cycles from the last result of a chunk to its first piece."""
    _HALVES = 2
    _PIECES_AHEAD = 2
    _BEATS_AHEAD = 8
    """Depth of the FIFO after the memory, so that a piece is sent before its data is needed."""
    most_in_flight = 1 + _HALVES + _PIECES_AHEAD
    """Maximum number of descriptors in this block: one is gathered; others have their last chunk in the buffer or their
    last piece after it."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.width, self.lanes = config.port_width, config.drain_lanes
        # A word holds at least one transfer of results, and is one beat or several.
        self.word_floats = max(self.width // FLOAT_BITS, self.lanes)
        self.piece_words = PIECE_FLOATS // self.word_floats
        super().__init__(
            {
                "job": In(stream.Signature(gather_layout(config))),
                "results": In(stream.Signature(result_payload(config))),
                "pieces": Out(stream.Signature(piece_layout())),
                "beats": Out(stream.Signature(self.width)),
            }
        )

    @property
    def depth(self) -> int:
        """Words of the buffer, each of ``word_floats`` floats."""
        return self._HALVES * self.config.max_tokens * self.piece_words

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "read_latency": self.read_latency, "lanes": self.lanes, "depth": self.depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        word = data.ArrayLayout(unsigned(FLOAT_BITS), self.word_floats)
        attributes = buffer_attributes(platform, self.depth, word.size)
        m.submodules.memory = memory = Memory(shape=word, depth=self.depth, init=[], attrs=attributes)
        # A chunk stays in the FIFO until its last beat is read, so a full FIFO means that both halves are full.
        m.submodules.chunks = chunks = StreamFifo(chunk_layout(self.config), self._HALVES)
        self._gather(m, memory, chunks)
        self._send(m, memory, chunks)
        return m

    def _first_row(self, half: Value) -> Value:
        """The first row of a half of the buffer; a row is one token's piece."""
        return Mux(half, self.config.max_tokens, 0)

    def _gather(self, m: Module, memory: Memory, chunks: StreamFifo) -> None:
        """Walks the results of one layer after another: columns, tokens, output tiles, chunks."""
        tile, results = self.config.tile, self.results
        job, new = Signal(gather_layout(self.config)), self.job.payload
        active, load, step = Signal(), Signal(), Signal()
        last_token, last_column = Signal(range(self.config.max_tokens)), Signal(range(tile))
        transfer, token = Signal(range(tile // self.lanes)), Signal.like(last_token)
        tile_index, tiles_left, last_tile = Signal(range(PIECE_FLOATS // tile)), Signal.like(job.out_tiles), Signal()
        half, row = Signal(), Signal(range(self._HALVES * self.config.max_tokens))
        column = Signal(range(tile))
        # The last transfer of an output tile's token: a register, because long paths start at the comparison with it.
        final, lane_bits = Signal.like(transfer), (self.lanes - 1).bit_length()
        columns_end, tile_end, chunk_end, job_end = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            self.job.ready.eq(~active | (step & job_end)),
            load.eq(self.job.valid & self.job.ready),
            results.ready.eq(active & chunks.i.ready),
            step.eq(results.valid & results.ready),
            # The last column of this output tile. A pair without its second column is a transfer, too.
            column.eq(last_column | Mux(last_tile, 0, tile - 1)),
            columns_end.eq(transfer == final),
            tile_end.eq(columns_end & (token == last_token)),
            chunk_end.eq(tile_end & (last_tile | tile_index.all())),
            job_end.eq(tile_end & last_tile),
            chunks.i.valid.eq(step & chunk_end),
            chunks.i.payload.address.eq(job.address),
            chunks.i.payload.pitch.eq(job.pitch),
            chunks.i.payload.last_token.eq(last_token),
            chunks.i.payload.last_float.eq(Cat(column, tile_index)),
            chunks.i.payload.last.eq(last_tile),
            chunks.i.payload.interrupt.eq(job.interrupt),
        ]
        self._write(m, memory, step, row, Cat(transfer, tile_index))
        with m.If(step):
            m.d.sync += transfer.eq(Mux(columns_end, 0, transfer + 1))
        with m.If(step & columns_end):
            m.d.sync += [token.eq(token + 1), row.eq(row + 1)]
        with m.If(step & tile_end):
            m.d.sync += [
                token.eq(0),
                row.eq(self._first_row(half ^ chunk_end)),
                tile_index.eq(Mux(chunk_end, 0, tile_index + 1)),
                tiles_left.eq(tiles_left - 1),
                last_tile.eq(tiles_left == 2),
                final.eq(Mux(tiles_left == 2, last_column, tile - 1) >> lane_bits),
            ]
        with m.If(step & chunk_end):
            m.d.sync += [half.eq(~half), job.address.eq(job.address + PIECE_BYTES)]
        with m.If(load):
            m.d.sync += [
                active.eq(1),
                job.eq(new),
                last_token.eq(new.tokens - 1),
                last_column.eq(new.last_columns - 1),
                final.eq((new.last_columns - 1 | Mux(new.out_tiles == 1, 0, tile - 1)) >> lane_bits),
                tiles_left.eq(new.out_tiles),
                last_tile.eq(new.out_tiles == 1),
            ]
        with m.Elif(step & job_end):
            m.d.sync += active.eq(0)

    def _write(self, m: Module, memory: Memory, step: Value, row: Value, transfer: Value) -> None:
        """Stores one transfer of results, number ``transfer`` of its row, in its part of a word."""
        write = memory.write_port(granularity=1)
        part_bits = (self.word_floats // self.lanes - 1).bit_length()
        part = transfer[:part_bits]
        m.d.comb += write.addr.eq(Cat(transfer[part_bits:], row))
        for index in range(self.word_floats):
            m.d.comb += [
                write.data[index].eq(self.results.payload.values[index % self.lanes]),
                # The rest of the word is written, too, so that it keeps no values of another layer.
                write.en[index].eq(step & (part <= index // self.lanes)),
            ]

    def _send(self, m: Module, memory: Memory, chunks: StreamFifo) -> None:
        """Reads chunk after chunk, token by token."""
        chunk, word_beats = chunks.o.payload, self.word_floats * FLOAT_BITS // self.width
        m.submodules.pieces = pieces = StreamFifo(piece_layout(), self._PIECES_AHEAD)
        wiring.connect(m, pieces.o, wiring.flipped(self.pieces))
        read = memory.read_port()
        m.submodules.beats = beats = CreditFifo(unsigned(self.width), self._BEATS_AHEAD)
        token, beat = Signal.like(chunk.last_token), Signal(range(PIECE_FLOATS * FLOAT_BITS // self.width))
        half, row = Signal(), Signal(range(self._HALVES * self.config.max_tokens))
        offset = Signal(range(self.config.max_tokens << PITCH_BITS))
        fetch, piece_end, chunk_end = Signal(), Signal(), Signal()
        # Whether a piece's first beat is next, and whether its last is if it is not the first: compared a cycle before.
        first, ends = Signal(init=1), Signal()
        last = last_beat(chunk.last_float, self.width)
        m.d.comb += [
            fetch.eq(chunks.o.valid & beats.room & (pieces.i.ready | ~first)),
            piece_end.eq(Mux(first, last == 0, ends)),
            chunk_end.eq(piece_end & (token == chunk.last_token)),
            chunks.o.ready.eq(fetch & chunk_end),
            pieces.i.valid.eq(fetch & first),
            # This cannot wrap: a descriptor's addresses are below 2^40 - 2^34, and results span less than 2^31 bytes.
            pieces.i.payload.address.eq(chunk.address + offset),
            pieces.i.payload.last_float.eq(chunk.last_float),
            pieces.i.payload.last.eq(chunk.last & (token == chunk.last_token)),
            pieces.i.payload.interrupt.eq(chunk.interrupt),
            read.addr.eq(Cat(beat[(word_beats - 1).bit_length() :], row)),
            read.en.eq(fetch),
            beats.claim.eq(fetch),
        ]
        with m.If(fetch):
            m.d.sync += [beat.eq(Mux(piece_end, 0, beat + 1)), first.eq(piece_end), ends.eq(beat + 1 == last)]
        with m.If(fetch & piece_end):
            m.d.sync += [token.eq(token + 1), row.eq(row + 1), offset.eq(offset + chunk.pitch)]
        with m.If(fetch & chunk_end):
            m.d.sync += [token.eq(0), row.eq(self._first_row(~half)), offset.eq(0), half.eq(~half)]
        # Data arrives one cycle after its fetch. Its entry of the FIFO is reserved.
        wiring.connect(m, beats.o, wiring.flipped(self.beats))
        part = Signal(range(word_beats))
        m.d.sync += [beats.i.valid.eq(fetch), part.eq(beat)]
        m.d.comb += beats.i.payload.eq(Value.cast(read.data).word_select(part, self.width))
