# SPDX-License-Identifier: Apache-2.0
"""The gatherer: collects results on chip, so that memory is written in few long bursts."""

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
from hw.spec.control.descriptor import FIELD_WIDTHS
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.ops.command import command_fields

PITCH_BITS = FIELD_WIDTHS["result_pitch"]


def gather_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Where the results of one layer go: row m from ``address + m * pitch`` on.

    tokens, out_tiles, last_columns : as in the core's command
    interrupt : handed on with the last piece
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
    """A full half of the buffer: one piece for each of ``last_token + 1`` tokens, all of the same length."""
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
    """Turns output tiles, in which a token has a few columns, into pieces of up to 256 columns, token by token.

    A chunk is 256 columns of all tokens, or what is left of the layer. Chunks fill the two halves of a buffer in turn;
    while one is sent, the next one is gathered, be it of the same layer or of the next.

    Members
    -------
    job : where the results of a layer go
    results : from the core: for each output tile, for each token, its columns
    pieces : for each chunk, for each token, where its floats go
    beats : the floats of the pieces, ``port_width`` bits a beat; every piece starts with a new beat, and what its last
        beat has beyond its last float means nothing

    Latency: 2 cycles from the last result of a chunk to its first piece, 3 to its first beat. Throughput: 1 beat per
    cycle, and 1 transfer of results per cycle while sending a chunk takes less time than gathering the one after it.
    """

    latency = 2 * StreamFifo.latency + 1
    """Cycles from the last result of a chunk to its first beat."""
    read_latency = 2 * StreamFifo.latency
    """Cycles from the last result of a chunk to its first piece."""
    _HALVES = 2
    _PIECES_AHEAD = 2
    _BEATS_AHEAD = 8
    """Beats that wait behind the memory, so that a piece is known before its data are wanted."""
    most_in_flight = 1 + _HALVES + _PIECES_AHEAD
    """Descriptors in here: one is gathered, others have their last chunk in the buffer or their last piece after it."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.width, self.lanes = config.port_width, config.drain_lanes
        # A word takes a transfer of results, and is one beat or several.
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
        # A chunk stays here until its last beat was read, so a full FIFO means that both halves are.
        m.submodules.chunks = chunks = StreamFifo(chunk_layout(self.config), self._HALVES)
        self._gather(m, memory, chunks)
        self._send(m, memory, chunks)
        return m

    def _first_row(self, half: Value) -> Value:
        """Row of the buffer, a row being one token's piece, where a half begins."""
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
        columns_end, tile_end, chunk_end, job_end = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            self.job.ready.eq(~active | (step & job_end)),
            load.eq(self.job.valid & self.job.ready),
            results.ready.eq(active & chunks.i.ready),
            step.eq(results.valid & results.ready),
            # The last column of this output tile; of a pair without its second column comes a transfer all the same.
            column.eq(last_column | Mux(last_tile, 0, tile - 1)),
            columns_end.eq(transfer == column >> (self.lanes - 1).bit_length()),
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
            ]
        with m.If(step & chunk_end):
            m.d.sync += [half.eq(~half), job.address.eq(job.address + PIECE_BYTES)]
        with m.If(load):
            m.d.sync += [
                active.eq(1),
                job.eq(new),
                last_token.eq(new.tokens - 1),
                last_column.eq(new.last_columns - 1),
                tiles_left.eq(new.out_tiles),
                last_tile.eq(new.out_tiles == 1),
            ]
        with m.Elif(step & job_end):
            m.d.sync += active.eq(0)

    def _write(self, m: Module, memory: Memory, step: Value, row: Value, transfer: Value) -> None:
        """Stores one transfer of results, the ``transfer``-th of its row, in its part of a word."""
        write = memory.write_port(granularity=1)
        part_bits = (self.word_floats // self.lanes - 1).bit_length()
        part = transfer[:part_bits]
        m.d.comb += write.addr.eq(Cat(transfer[part_bits:], row))
        for index in range(self.word_floats):
            m.d.comb += [
                write.data[index].eq(self.results.payload.values[index % self.lanes]),
                # The floats behind it come later or never; nothing is left there of another layer.
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
        m.d.comb += [
            fetch.eq(chunks.o.valid & beats.room & (pieces.i.ready | (beat != 0))),
            piece_end.eq(beat == last_beat(chunk.last_float, self.width)),
            chunk_end.eq(piece_end & (token == chunk.last_token)),
            chunks.o.ready.eq(fetch & chunk_end),
            pieces.i.valid.eq(fetch & (beat == 0)),
            # Cannot wrap: a descriptor's addresses are below 2^40 - 2^34, and no result is 2^31 bytes behind the first.
            pieces.i.payload.address.eq(chunk.address + offset),
            pieces.i.payload.last_float.eq(chunk.last_float),
            pieces.i.payload.last.eq(chunk.last & (token == chunk.last_token)),
            pieces.i.payload.interrupt.eq(chunk.interrupt),
            read.addr.eq(Cat(beat[(word_beats - 1).bit_length() :], row)),
            read.en.eq(fetch),
            beats.claim.eq(fetch),
        ]
        with m.If(fetch):
            m.d.sync += beat.eq(Mux(piece_end, 0, beat + 1))
        with m.If(fetch & piece_end):
            m.d.sync += [token.eq(token + 1), row.eq(row + 1), offset.eq(offset + chunk.pitch)]
        with m.If(fetch & chunk_end):
            m.d.sync += [token.eq(0), row.eq(self._first_row(~half)), offset.eq(0), half.eq(~half)]
        # What was fetched arrives a cycle later. Room for it was claimed before.
        wiring.connect(m, beats.o, wiring.flipped(self.beats))
        part = Signal(range(word_beats))
        m.d.sync += [beats.i.valid.eq(fetch), part.eq(beat)]
        m.d.comb += beats.i.payload.eq(Value.cast(read.data).word_select(part, self.width))
