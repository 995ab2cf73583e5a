# SPDX-License-Identifier: Apache-2.0
"""The gatherer: collects results on chip, so that they are written to memory in few long bursts."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import CreditFifo, StreamFifo
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.common.results import output_payload
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.write_manager import PIECE_BYTES, last_beat, piece_layout
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.control.descriptor import PITCH_BITS
from hw.spec.memory.access import PIECE_FLOATS


def gather_layout() -> data.StructLayout:
    """The place of one layer's results: row m starts at ``address + m * pitch``.

    interrupt : passed on with the last piece
    """
    return data.StructLayout({"address": unsigned(ADDRESS_BITS), "pitch": unsigned(PITCH_BITS), "interrupt": 1})


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


def _last_lane(keep: Value) -> Value:
    """Index of the last lane that is valid, if the valid ones come first and the first one is valid."""
    if len(keep) == 1:
        return Const(0, 0)
    half = len(keep) // 2
    low, high = _last_lane(keep[:half]), _last_lane(keep[half:])
    return Cat(Mux(keep[half], high, low), keep[half])


class Gatherer(Block):
    """Converts output tiles, in which a token has few columns, to pieces of up to 256 columns, token by token.

    A chunk is 256 columns of all tokens, or the rest of the layer. The results say where they belong and where a chunk
    and a layer end (:func:`hw.rtl.common.results.output_payload`). Chunks fill the two halves of a buffer in turn;
    while one chunk is sent, the next one is gathered, from the same layer or from the next one.

    Parameters
    ----------
    lanes, unit : of the results; if None those of the core

    Members
    -------
    job : the place of a layer's results
    results : from the core, chunk by chunk; a token's columns ascending, and a chunk's last column last
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

    def __init__(self, config: AcceleratorConfig, lanes: int | None = None, unit: int | None = None):
        self.config, self.width = config, config.port_width
        self.lanes = lanes or config.lanes
        self.unit = unit or self.lanes
        # A word holds at least one transfer of results, and is one beat or several.
        self.word_floats = max(self.width // FLOAT_BITS, self.lanes)
        self.piece_words = PIECE_FLOATS // self.word_floats
        super().__init__(
            {
                "job": In(stream.Signature(gather_layout())),
                "results": In(stream.Signature(output_payload(config, self.lanes, self.unit))),
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
        """Stores every transfer at its place, and passes a chunk on after its last transfer."""
        job = Signal(gather_layout())
        results, active, step = self.results.payload, Signal(), Signal()
        half, row = Signal(), Signal(range(self._HALVES * self.config.max_tokens))
        chunk_end, job_end = step & results.chunk_end, step & results.last
        m.d.comb += [
            self.job.ready.eq(~active | job_end),
            self.results.ready.eq(active & chunks.i.ready),
            step.eq(self.results.valid & self.results.ready),
            row.eq(results.token + self._first_row(half)),
            chunks.i.valid.eq(chunk_end),
            chunks.i.payload.address.eq(job.address),
            chunks.i.payload.pitch.eq(job.pitch),
            chunks.i.payload.last_token.eq(results.token),
            chunks.i.payload.last_float.eq(self._last_float()),
            chunks.i.payload.last.eq(results.last),
            chunks.i.payload.interrupt.eq(job.interrupt),
        ]
        self._write(m, memory, step, row)
        with m.If(chunk_end):
            m.d.sync += [half.eq(~half), job.address.eq(job.address + PIECE_BYTES)]
        # Without a job these fields may have any value, so no path to them starts at the job's valid.
        with m.If(self.job.ready):
            m.d.sync += [active.eq(self.job.valid), job.eq(self.job.payload)]

    def _last_float(self) -> Value:
        """The index of the transfer's last column in its piece."""
        results, lane = self.results.payload, _last_lane(self.results.payload.keep)
        unit_bits = self.unit.bit_length() - 1
        # The sum is in the piece: a transfer of all lanes begins at a multiple of their number.
        return Cat(lane[:unit_bits], (results.column + lane[unit_bits:])[: len(results.column)])

    def _write(self, m: Module, memory: Memory, step: Value, row: Value) -> None:
        """Stores one transfer of results in its part of a word of the row."""
        write, transfer = memory.write_port(granularity=1), self.results.payload.column
        part_bits = (self.word_floats // self.unit - 1).bit_length()
        part = transfer[:part_bits]
        m.d.comb += write.addr.eq(Cat(transfer[part_bits:], row))
        for index in range(self.word_floats):
            m.d.comb += [
                write.data[index].eq(self.results.payload.values[index % self.lanes]),
                # The rest of the word is written, too, so that it keeps no values of another layer.
                write.en[index].eq(step & (part <= index // self.unit)),
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
