# SPDX-License-Identifier: Apache-2.0
"""The activations of values: probabilities times the values' powers of two."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.layouts import bank_words, row_words, rows_members, word_floats
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo, Credits
from hw.rtl.common.float32 import FLOAT, is_zero
from hw.spec.config import EXPONENT_BITS, AcceleratorConfig
from hw.spec.memory.kv_cache import value_group
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.float32 import EXPONENT_FIELD_BITS
from hw.spec.ops.epilogue import MAX_HEAD
from hw.spec.ops.scores import BANKS


def values_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The values of one descriptor. tiles : output tiles that hold the columns of a head."""
    return data.StructLayout({**rows_members(config), "tiles": range(MAX_HEAD // config.tile + 1)})


class ValueRows(Block):
    """For every chunk of 256 slots, for every output tile, for every row: the row's probabilities in the chunk.

    Each of them is multiplied by the power of two of its slot's values; a product below the normal numbers is 0. A
    chunk that is not full ends with the last group of slots. The products are exact.

    Members
    -------
    job : the values of a descriptor
    exponents : for every chunk, for every output tile, 256 powers of two, int8, in the form of rows of floats
    ready : by bank: the probabilities of the next chunk can be read
    finished : the last word of a chunk is read, for all output tiles
    busy : by bank: it cannot be read in this cycle
    read, bank, address, word : the bank, as in :class:`hw.rtl.attention.score_banks.ScoreBanks`
    rows : float32, ``tile`` slots of a row at a time

    Throughput 1 row per cycle. Latency 3 cycles from the last exponents of a chunk to its first row.
    """

    _FIFO = 8
    _CHUNKS = 2
    """Chunks of exponents on chip."""

    def __init__(self, config: AcceleratorConfig):
        self.config, self.floats = config, word_floats(config)
        row = data.ArrayLayout(32, self.floats)
        super().__init__(
            {
                "job": In(stream.Signature(values_layout(config))),
                "exponents": In(stream.Signature(row)),
                "ready": In(BANKS),
                "finished": Out(1),
                "busy": In(BANKS),
                "read": Out(1),
                "bank": Out(1),
                "address": Out(range(bank_words(config))),
                "word": In(data.ArrayLayout(FLOAT, self.floats)),
                "rows": Out(stream.Signature(row)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from a word's address to the row at the output: memory, product, FIFO."""
        return 2 + CreditFifo.latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.fifo = fifo = CreditFifo(self.rows.payload.shape(), self._FIFO)
        wiring.connect(m, fifo.o, wiring.flipped(self.rows))
        m.submodules.chunks = chunks = Credits(self._CHUNKS)
        step, part, chunk_end = Signal(), Signal(range(CHUNK // self.floats)), Signal()
        exponents = self._store(m, chunks, part, chunk_end)
        self._walk(m, fifo, chunks, step, part, chunk_end)
        m.d.comb += chunks.take.eq(chunk_end)
        powers = delay(m, exponents, 1, name="powers")
        for index in range(self.floats):
            number, power = self.word[index], powers.word_select(index, EXPONENT_BITS).as_signed()
            exponent = Signal(signed(EXPONENT_FIELD_BITS + 2), name=f"exponent_{index}")
            # Without the sign: no probability is negative.
            product = Signal(FLOAT.size - 1, name=f"product_{index}", reset_less=True)
            normal = ~is_zero(number) & (exponent > 0)
            m.d.comb += [
                exponent.eq(number.exponent + power),
                fifo.i.payload[index].eq(product),
            ]
            # At most 1 times the largest power of two of finite values, which is far below infinity.
            m.d.sync += product.eq(Mux(normal, Cat(number.fraction, exponent[:EXPONENT_FIELD_BITS]), 0))
        m.d.comb += [
            fifo.claim.eq(step),
            fifo.i.valid.eq(delay(m, step, 2, name="given", reset=True)),
        ]
        return m

    def _store(self, m: Module, chunks: Credits, part: Signal, chunk_end: Signal) -> Value:
        """Stores the exponents of two chunks. Returns those of a part of the chunk that is read."""
        width = self.floats * FLOAT_BYTES * EXPONENT_BITS
        per_row, rows = FLOAT_BYTES, CHUNK // (self.floats * FLOAT_BYTES)
        depth = self._CHUNKS * rows
        m.submodules.exponents = memory = Memory(shape=width, depth=depth, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        written, current = Signal(range(depth)), Signal(range(self._CHUNKS))
        m.submodules.free = free = Credits(depth, init=depth, least=1)
        push = self.exponents.valid & self.exponents.ready
        row_bits, part_bits = (rows - 1).bit_length(), (per_row - 1).bit_length()
        m.d.comb += [
            self.exponents.ready.eq(free.enough),
            write.addr.eq(written),
            write.data.eq(self.exponents.payload.as_value()),
            write.en.eq(push),
            free.take.eq(push),
            chunks.add.eq(push & (written[:row_bits] == rows - 1) if row_bits else push),
            read.addr.eq(Cat(part[part_bits:], current)),
        ]
        with m.If(push):
            m.d.sync += written.eq(written + 1)
        with m.If(chunk_end):
            m.d.sync += current.eq(current + 1)
        # The rows of a chunk become free one by one, from the second cycle on: a long path ends at ``ended``.
        more, ended = Signal(range(self._CHUNKS * rows + 1)), Signal()
        m.d.comb += free.add.eq(more != 0)
        m.d.sync += [ended.eq(chunk_end), more.eq(more + Mux(ended, rows, 0) - (more != 0))]
        return read.data.word_select(part[:part_bits], self.floats * EXPONENT_BITS)

    def _walk(
        self, m: Module, fifo: CreditFifo, chunks: Credits, step: Signal, part: Signal, chunk_end: Signal
    ) -> None:
        """Chunks, output tiles, rows, parts of a row's chunk."""
        config, job = self.config, Signal(values_layout(self.config))
        active, whole = Signal(), CHUNK // self.floats
        group_bits = (value_group(config) - 1).bit_length()
        words = Signal.like(row_words(config, job.positions))
        # Parts of the chunks behind this one, and of a row of this one less 1, in whole groups.
        left, final = Signal(range((1 << len(job.positions)) // self.floats + 1)), Signal()
        last_part = Signal.like(part)
        token, tile = Signal.like(job.tokens), Signal.like(job.tiles)
        last_token, final_tile = Signal.like(token), Signal.like(tile)
        chunk_start, row_start = Signal.like(self.address), Signal.like(self.address)
        # Registers: it is the last row, the last output tile.
        token_end, last_tile = Signal(), Signal()
        row_end, tiles_end = Signal(), Signal()
        positions = self.job.payload.positions
        groups = (positions + (value_group(config) - 1)) >> group_bits
        parts = groups * (value_group(config) // self.floats)
        m.d.comb += [
            self.job.ready.eq(~active),
            step.eq(active & fifo.room & chunks.enough & (self.ready & ~self.busy).bit_select(job.bank, 1)),
            self.read.eq(step),
            self.bank.eq(job.bank),
            self.address.eq(row_start + part),
            final.eq(left == 0),
            row_end.eq(part == last_part),
            chunk_end.eq(step & row_end & token_end),
            tiles_end.eq(last_tile & row_end & token_end),
            self.finished.eq(step & tiles_end),
        ]

        def begin(count: Value) -> list:
            """The chunk that begins with this number of parts left."""
            more = count > whole
            return [left.eq(Mux(more, count - whole, 0)), last_part.eq(Mux(more, whole - 1, count - 1))]

        with m.If(self.job.valid & self.job.ready):
            m.d.sync += [
                job.eq(self.job.payload),
                active.eq(1),
                words.eq(row_words(config, positions)),
                last_token.eq(self.job.payload.tokens - 1),
                final_tile.eq(self.job.payload.tiles - 1),
                token_end.eq(self.job.payload.tokens == 1),
                last_tile.eq(self.job.payload.tiles == 1),
                *begin(parts),
            ]
        next_chunk = Signal.like(self.address)
        m.d.comb += next_chunk.eq(Mux(final, 0, chunk_start + whole))
        with m.If(step):
            m.d.sync += part.eq(Mux(row_end, 0, part + 1))
            with m.If(row_end):
                of_tile = Mux(last_tile, next_chunk, chunk_start)
                m.d.sync += [
                    token.eq(Mux(token_end, 0, token + 1)),
                    token_end.eq(Mux(token_end, 0, token + 1) == last_token),
                    row_start.eq(Mux(token_end, of_tile, row_start + words)),
                ]
        with m.If(chunk_end):
            next_tile = Mux(last_tile, 0, tile + 1)
            m.d.sync += [tile.eq(next_tile), last_tile.eq(next_tile == final_tile)]
        with m.If(step & tiles_end):
            m.d.sync += [chunk_start.eq(next_chunk), *begin(left), active.eq(~final)]
