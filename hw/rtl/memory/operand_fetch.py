# SPDX-License-Identifier: Apache-2.0
"""Fetches an operand of the vector unit and holds it on chip: rows of float32 that are read as results pass."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.burst_cutter import BurstCutter, burst_layout
from hw.spec.config import FLOAT_BITS, MAX_N
from hw.spec.memory.access import OUTSTANDING, PIECE_FLOATS
from hw.spec.memory.operands import FLOAT_BYTES

PITCH_BITS = 25
"""Bits of the distance in bytes from one row to the next."""
CHUNK_ROW_BYTES = PIECE_FLOATS * FLOAT_BYTES


def operand_layout(max_tokens: int, *, periodic: bool = False) -> data.StructLayout:
    """The place of one layer's operand: row m starts at ``address + m * pitch``.

    address, pitch : multiples of 128 bytes; with a pitch of 0 one row is fetched and read for every token
    tokens : rows, 1 to ``max_tokens``
    columns : floats of a row, 1 to 2^18; periodic: the period, a multiple of 16 up to 256
    """
    return data.StructLayout(
        {
            "address": unsigned(ADDRESS_BITS),
            "pitch": unsigned(PITCH_BITS),
            "tokens": range(max_tokens + 1),
            "columns": range((PIECE_FLOATS if periodic else MAX_N) + 1),
        }
    )


class OperandFetch(Block):
    """Fetches chunks of 256 columns of all tokens into a ring of rows, and gives any of a chunk's floats per cycle.

    The ring holds two chunks of ``max_tokens`` rows, or more chunks of fewer rows. While one chunk is read, the
    following ones are fetched, of the same layer or of the next ones. A row is requested only if the ring has room for
    it, so ``beats`` never waits. With ``chunks`` 1, chunks of more than half of ``max_tokens`` rows are fetched and
    read in turn.

    A periodic operand is the rotary table: a token's row is as long as one head and applies to every head of the layer.
    It is one chunk, which is read until the end of the layer. One chunk in the ring is enough: the next layer's table
    is fetched while the array has no results of that layer yet. The block counts its columns itself, because
    the period does not divide a chunk. For this it relies on the order of the results: output tile by output tile, in
    it token by token (0, 1, 2 ...), columns ascending, each transfer read once. The length of a tile has no effect.

    Parameters
    ----------
    width : bits of the port
    max_tokens : maximum number of rows of a chunk; 1 if all jobs have a pitch of 0
    lanes : floats per read: 2, 4 or 8
    chunks : chunks of ``max_tokens`` rows that the ring holds, 1 or 2
    periodic : whether the operand is a periodic one

    Members
    -------
    jobs : the place of each layer's operand
    bursts, beats : for the read manager; no burst crosses 4 KiB, none is longer than a row of a chunk, and ``beats`` is
        always ready
    asking : not all bursts of the last job are sent
    available : the chunk that is read now is completely in the buffer
    read : read ``lanes`` floats in this cycle; only while ``available``
    token, column : the row, and the first float in units of ``lanes`` from the start of the chunk; valid with ``read``.
        A periodic operand has no ``column``, and for a job with pitch 0 ``token`` selects no row.
    data : the floats, float32 [lanes] with lane 0 lowest, ``read_latency`` cycles after ``read``; undefined behind the
        end of a row
    release : this is the last read of the chunk, or it was before; only while ``available``. A periodic operand is
        released once, at the end of the layer.

    Latency: 3 cycles from a job to its first burst, 2 from the last beat of a chunk to ``available``, 2 from ``read``
    to ``data``. Throughput: 1 burst, 1 beat and 1 read per cycle. After ``release`` the next chunk is ``available``
    without a gap if the ring has room for it and memory delivers it in less time than the one before is read.
    """

    latency = 1 + BurstCutter.latency + StreamFifo.latency
    """Cycles from a job's transfer to its first burst."""
    fill_latency = 1 + StreamFifo.latency
    """Cycles from the last beat of a chunk to ``available``."""
    read_latency = 2
    """Cycles from ``read`` to ``data``: the memory, and a register after the selection of a word's part."""
    _LEAST_ROWS = 8
    """Least size of the ring. Block RAM of this width is not smaller, and it hides memory's latency for few tokens."""
    _ROWS_AHEAD = 2 * OUTSTANDING
    """Maximum number of rows requested and not yet received: more than a read manager has bursts under way."""

    def __init__(self, width: int, max_tokens: int, lanes: int, *, chunks: int = 2, periodic: bool = False):
        if lanes not in (2, 4, 8):
            raise ValueError(f"lanes are 2, 4 or 8, not {lanes}")
        self.width, self.max_tokens, self.lanes, self.periodic = width, max_tokens, lanes, periodic
        self.beat_floats = width // FLOAT_BITS
        # A word holds at least the floats of one read, and is one beat or several.
        self.word_floats = max(self.beat_floats, lanes)
        # A power of two, so that the pointers of the ring wrap by themselves.
        self.rows = max(self._LEAST_ROWS, 1 << (chunks * max_tokens - 1).bit_length())
        self.cutter = BurstCutter(width)
        super().__init__(
            {
                "jobs": In(stream.Signature(operand_layout(max_tokens, periodic=periodic))),
                "bursts": Out(stream.Signature(burst_layout(width))),
                "beats": In(stream.Signature(width)),
                "asking": Out(1),
                "available": Out(1),
                "read": In(1),
                "token": In(range(max(2, max_tokens))),
                **({} if periodic else {"column": In(range(PIECE_FLOATS // lanes))}),
                "data": Out(lanes * FLOAT_BITS),
                "release": In(1),
            }
        )

    @property
    def depth(self) -> int:
        """Words of the buffer, each of ``word_floats`` floats."""
        return self.rows * PIECE_FLOATS // self.word_floats

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "latency": self.latency,
            "fill_latency": self.fill_latency,
            "read_latency": self.read_latency,
            "lanes": self.lanes,
            "rows": self.rows,
            "depth": self.depth,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        word = data.ArrayLayout(unsigned(FLOAT_BITS), self.word_floats)
        attributes = buffer_attributes(platform, self.depth, word.size)
        m.submodules.memory = memory = Memory(shape=word, depth=self.depth, init=[], attrs=attributes)
        m.submodules.rows = rows = StreamFifo(self._row_layout(), self._ROWS_AHEAD)
        # A chunk has at least one row, so this FIFO always has room.
        m.submodules.chunks = chunks = StreamFifo(self._chunk_layout(), self.rows)
        # The first row that is not released: the start of the chunk that is read now.
        first = Signal(range(2 * self.rows))
        self._ask(m, rows, first)
        # Registers before the comparison with a row's last beat; a row is there long before its first beat.
        m.submodules.front = front = StreamFifo(self._row_layout(), 2)
        wiring.connect(m, rows.o, front.i)
        self._fill(m, memory, front, chunks)
        self._read(m, memory, chunks, first)
        return m

    def _row_layout(self) -> data.StructLayout:
        """A requested row: its last beat, whether it is its chunk's last row, and whether it is for every token."""
        return data.StructLayout({"last_beat": range(PIECE_FLOATS // self.beat_floats), "last": 1, "every": 1})

    def _chunk_layout(self) -> data.StructLayout:
        """A full chunk: the row after it in the ring, its last column, and whether its row is for every token.

        One bit more than a row's number distinguishes a full ring from an empty one.
        """
        last = {"last_column": range(PIECE_FLOATS // self.lanes)} if self.periodic else {}
        return data.StructLayout({"end": range(2 * self.rows), **last, "every": 1})

    def _ask(self, m: Module, rows: StreamFifo, first: Signal) -> None:
        """Walks the rows of one job after another: tokens, chunks."""
        m.submodules.cutter = cutter = self.cutter
        # ``bursts.ready`` is known late, so the cutter and the walk over the rows do not depend on it.
        m.submodules.ahead = ahead = StreamFifo(burst_layout(self.width), 2)
        wiring.connect(m, cutter.bursts, ahead.i)
        wiring.connect(m, ahead.o, wiring.flipped(self.bursts))
        regions = cutter.regions
        job, whole = self.jobs.payload, Const(PIECE_FLOATS // self.beat_floats)
        total = Signal(range(MAX_N // self.beat_floats + 1))
        # The beats of a row's part in this chunk, and those behind this chunk.
        left, rest, beats, last_chunk = Signal.like(total), Signal.like(total), Signal.like(whole), Signal()
        address, next_chunk, pitch = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS), Signal(PITCH_BITS)
        count, rows_left, last_row, every = Signal.like(job.tokens), Signal.like(job.tokens), Signal(), Signal()
        asked, full = Signal(range(2 * self.rows)), Signal()
        active, load, step = Signal(), Signal(), Signal()
        after, limit, fits, single = Signal.like(asked), Signal.like(asked), Signal(), Signal()
        m.d.comb += [
            self.jobs.ready.eq(~active),
            load.eq(self.jobs.valid & self.jobs.ready),
            regions.payload.address.eq(address),
            regions.payload.beats.eq(beats),
            regions.valid.eq(active & ~full & rows.i.ready),
            step.eq(regions.valid & regions.ready),
            rows.i.valid.eq(step),
            rows.i.payload.last_beat.eq((beats - 1)[: len(rows.i.payload.last_beat)]),
            rows.i.payload.last.eq(last_row),
            rows.i.payload.every.eq(every),
            self.asking.eq(active | cutter.bursts.valid | ahead.o.valid),
            total.eq((job.columns + self.beat_floats - 1) >> (self.beat_floats - 1).bit_length()),
            rest.eq(Mux(active, left, total)),
            fits.eq(rest <= whole),
            after.eq(asked + 1),
            limit.eq(Cat(first[:-1], ~first[-1])),
            single.eq((job.pitch == 0) | (job.tokens == 1)),
        ]
        # ``step`` only selects, because it is known last. A row that becomes free counts one cycle later.
        m.d.sync += full.eq(Mux(step, after == limit, asked == limit))
        with m.If(step):
            m.d.sync += asked.eq(after)
        with m.If(load | (step & last_row)):
            m.d.sync += [left.eq(rest - whole), beats.eq(Mux(fits, rest, whole)), last_chunk.eq(fits)]
        with m.If(load):
            m.d.sync += [
                active.eq(1),
                address.eq(job.address),
                next_chunk.eq(job.address + CHUNK_ROW_BYTES),
                pitch.eq(job.pitch),
                every.eq(job.pitch == 0),
                count.eq(Mux(single, 1, job.tokens)),
                rows_left.eq(Mux(single, 1, job.tokens)),
                last_row.eq(single),
            ]
        with m.Elif(step & last_row):
            m.d.sync += [
                active.eq(~last_chunk),
                # This cannot wrap: a descriptor's addresses are below 2^40 - 2^34, and an operand spans less than 2^32.
                address.eq(next_chunk),
                next_chunk.eq(next_chunk + CHUNK_ROW_BYTES),
                rows_left.eq(count),
                last_row.eq(count == 1),
            ]
        with m.Elif(step):
            m.d.sync += [address.eq(address + pitch), rows_left.eq(rows_left - 1), last_row.eq(rows_left == 2)]

    def _fill(self, m: Module, memory: Memory, rows: StreamFifo, chunks: StreamFifo) -> None:
        """Writes the beats, row by row; rows: those that are not full."""
        write, word_beats = memory.write_port(granularity=1), self.word_floats // self.beat_floats
        part_bits = (word_beats - 1).bit_length()
        # A register, because a read manager selects the client of a beat in the cycle of the beat.
        arrived, floats = Signal(), Signal(self.width, reset_less=True)
        beat, row, row_end = Signal.like(rows.o.payload.last_beat), Signal(range(2 * self.rows)), Signal()
        m.d.comb += [
            # The ring has room: see the class.
            self.beats.ready.eq(1),
            row_end.eq(arrived & (beat == rows.o.payload.last_beat)),
            rows.o.ready.eq(row_end),
            chunks.i.valid.eq(row_end & rows.o.payload.last),
            chunks.i.payload.end.eq(row + 1),
            chunks.i.payload.every.eq(rows.o.payload.every),
            write.addr.eq(Cat(beat[part_bits:], row[:-1])),
        ]
        if self.periodic:
            beat_reads = self.beat_floats // self.lanes
            last = Cat(Const(beat_reads - 1, range(beat_reads)), beat) if beat_reads else beat[part_bits:]
            m.d.comb += chunks.i.payload.last_column.eq(last)
        for index in range(self.word_floats):
            m.d.comb += [
                write.data[index].eq(floats.word_select(index % self.beat_floats, FLOAT_BITS)),
                write.en[index].eq(arrived & (beat[:part_bits] == index // self.beat_floats)),
            ]
        m.d.sync += arrived.eq(self.beats.valid)
        with m.If(self.beats.valid):
            m.d.sync += floats.eq(self.beats.payload)
        with m.If(arrived):
            m.d.sync += beat.eq(Mux(row_end, 0, beat + 1))
        with m.If(row_end):
            m.d.sync += row.eq(row + 1)

    def _read(self, m: Module, memory: Memory, chunks: StreamFifo, first: Signal) -> None:
        """Reads the oldest chunk."""
        read, word_reads = memory.read_port(), self.word_floats // self.lanes
        chunk, part_bits = chunks.o.payload, (word_reads - 1).bit_length()
        column = self._count(m, chunk.last_column) if self.periodic else self.column
        part, row = Signal(range(word_reads)), Signal(range(self.rows))
        m.d.comb += [
            self.available.eq(chunks.o.valid),
            chunks.o.ready.eq(self.release),
            row.eq(first[:-1] + Mux(chunk.every, 0, self.token)),
            read.addr.eq(Cat(column[part_bits:], row)),
            read.en.eq(self.read),
        ]
        m.d.sync += [
            part.eq(column[:part_bits]),
            self.data.eq(Value.cast(read.data).word_select(part, self.lanes * FLOAT_BITS)),
        ]
        with m.If(self.release):
            m.d.sync += first.eq(chunk.end)

    def _count(self, m: Module, last: Value) -> Signal:
        """The column of a read within the period, as a result's column modulo the period.

        A token continues where it was in the same output tile. Token 0 starts the next tile where it ended the previous
        one. Every other token starts where token 0 has started.
        """
        column = Signal(range(PIECE_FLOATS // self.lanes))
        following, start, previous = Signal.like(column), Signal.like(column), Signal.like(self.token)
        others = Signal()
        m.d.comb += [
            others.eq((self.token != previous) & (self.token != 0)),
            column.eq(Mux(others, start, following)),
        ]

        def after(before: Signal) -> Value:
            return Mux(before == last, 0, before + 1)

        with m.If(self.read):
            # Both are computed before the choice between them, because ``token`` is known late.
            m.d.sync += [previous.eq(self.token), following.eq(Mux(others, after(start), after(following)))]
        with m.If(self.read & (self.token == 0) & (previous != 0)):
            m.d.sync += start.eq(column)
        with m.If(self.release):
            m.d.sync += [following.eq(0), start.eq(0), previous.eq(0)]
        return column
