# SPDX-License-Identifier: Apache-2.0
"""Scores on chip: two banks that are filled, turned into probabilities, and read in turn."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.reciprocal import Inverse, Reciprocal
from hw.rtl.attention.layouts import bank_layout, bank_words, row_layout, scores_layout, word_floats
from hw.rtl.attention.score_writer import ScoreWriter
from hw.rtl.attention.softmax import Softmax
from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING
from hw.rtl.common.fifo import Credits, StreamFifo
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.common.results import output_payload
from hw.rtl.vector.layouts import result_unit
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import ceil_div
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops.scores import BANKS


class ScoreBanks(Block):
    """Stores scores, computes their softmax without the division, and holds it until it is read.

    A bank belongs to one descriptor of scores until it is released. While one bank is filled, the softmax of the other
    one is computed, and its probabilities are read, chunk by chunk.

    Members
    -------
    job : the scores of a descriptor; taken when its bank is free
    results : their values, as the vector unit gives them
    stored : a descriptor's scores are stored, and their maxima are known; one cycle
    ready : by bank: probabilities of a chunk that is not ``finished`` can be read
    finished : by bank: the chunk that is ``ready`` has been read; one cycle
    busy : by bank: the softmax reads it in this cycle, and nobody else may
    release : by bank: it is free again; only while it is ``inverted``, and after all chunks are ``finished``
    read, bank, address : read a word in this cycle; rows follow each other, see
        :func:`hw.rtl.attention.layouts.row_words`
    word : its data, float32, from the next cycle on
    inverted : by bank: 1/S of all of its rows can be read
    row, inverse : a row, and its 1/S in the same cycle

    Throughput: 1 transfer of results, 1 part of a word in the softmax, and 1 word that is read per cycle.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.word_shape = data.ArrayLayout(FLOAT, word_floats(config))
        self.writer, self.softmax, self.reciprocal = ScoreWriter(config), Softmax(config), Reciprocal()
        results = output_payload(config, config.vector_lanes, result_unit(config))
        super().__init__(
            {
                "job": In(stream.Signature(scores_layout(config))),
                "results": In(stream.Signature(results)),
                "stored": Out(1),
                "ready": Out(BANKS),
                "finished": In(BANKS),
                "busy": Out(BANKS),
                "release": In(BANKS),
                "read": In(1),
                "bank": In(1),
                "address": In(range(bank_words(config))),
                "word": Out(self.word_shape),
                "inverted": Out(BANKS),
                "row": In(row_layout(config)),
                "inverse": Out(FLOAT),
            }
        )

    @property
    def works(self) -> Value:
        """The softmax of a bank is computed, or 1/S of a row: for :func:`hw.rtl.common.clock_gate.gate`."""
        return ~self.softmax.job.ready | self.softmax.sums.valid | ~self.reciprocal.ready

    @property
    def settling(self) -> int:
        """Cycles from ``works``, or from an event, until the state stays as it is, if nothing comes in."""
        return self.writer.latency + self.softmax.latency + SETTLING

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "write_latency": self.writer.latency,
            "softmax_latency": self.softmax.latency,
            "inverse_latency": self.reciprocal.latency,
            "words": bank_words(self.config),
            "lanes": self.config.vector_lanes,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.writer, m.submodules.softmax = self.writer, self.softmax
        m.submodules.waiting = waiting = StreamFifo(bank_layout(self.config), BANKS)
        free = Signal(BANKS, init=~0)
        writer, softmax, bank = self.writer, self.softmax, self.job.payload.bank
        taken = self.job.valid & self.job.ready
        m.d.comb += [
            writer.job.payload.eq(self.job.payload),
            writer.job.valid.eq(self.job.valid & free.bit_select(bank, 1)),
            self.job.ready.eq(writer.job.ready & free.bit_select(bank, 1)),
            # A bank is in it once at most, so it has room.
            waiting.i.valid.eq(writer.done),
            waiting.i.payload.eq(writer.rows),
            self.stored.eq(writer.done),
        ]
        wiring.connect(m, wiring.flipped(self.results), writer.results)
        wiring.connect(m, waiting.o, softmax.job)
        for index in range(BANKS):
            with m.If(taken & (bank == index)):
                m.d.sync += free[index].eq(0)
            with m.Elif(self.release[index]):
                m.d.sync += free[index].eq(1)
            m.submodules[f"chunks_{index}"] = chunks = Credits(self._most_chunks)
            m.d.comb += [
                chunks.add.eq(softmax.done & (softmax.done_bank == index)),
                chunks.take.eq(self.finished[index]),
                self.ready[index].eq(chunks.enough),
                self.busy[index].eq(softmax.read & (softmax.place.bank == index)),
            ]
        self._memories(m, platform)
        self._maxima(m)
        self._invert(m)
        return m

    def _memories(self, m: Module, platform) -> None:
        """A bank is written by the writer or the softmax, and read by the softmax or from outside; one at a time."""
        writer, softmax, words = self.writer.write, self.softmax, []
        depth, lanes = bank_words(self.config), self.config.vector_lanes
        attributes = buffer_attributes(platform, depth, self.word_shape.size)
        for index in range(BANKS):
            m.submodules[f"bank_{index}"] = memory = Memory(
                shape=self.word_shape, depth=depth, init=[], attrs=attributes
            )
            write, read = memory.write_port(granularity=lanes), memory.read_port()
            own = writer.valid & (writer.place.bank == index)
            place = Mux(own, writer.place.as_value(), softmax.write.place.as_value())
            chosen = data.View(writer.place.shape(), place)
            valid = own | (softmax.write.valid & (softmax.write.place.bank == index))
            inside = self.busy[index]
            values = Mux(own, Cat(writer.values), Cat(softmax.write.values))
            m.d.comb += [
                write.addr.eq(chosen.address),
                Cat(write.data).eq(values.replicate(len(write.en))),
                *(write.en[part].eq(valid & (chosen.part == part)) for part in range(len(write.en))),
                read.addr.eq(Mux(inside, softmax.place.address, self.address)),
                read.en.eq(inside | (self.read & (self.bank == index))),
            ]
            words.append(Value.cast(read.data))
        for user, bank, word in (("softmax", softmax.place.bank, softmax.word), ("outside", self.bank, self.word)):
            # The bank of the last read, whose data is there.
            of = Signal(name=f"{user}_bank")
            m.d.sync += of.eq(bank)
            m.d.comb += Value.cast(word).eq(Array(words)[of])

    def _maxima(self, m: Module) -> None:
        """The largest score of each row."""
        m.submodules.maxima = memory = Memory(shape=FLOAT, depth=BANKS * self._rows, init=[])
        write, read, found = memory.write_port(), memory.read_port(domain="comb"), self.writer.maximum
        m.d.comb += [
            write.addr.eq(Cat(found.row.token, found.row.bank)),
            write.data.eq(found.number),
            write.en.eq(found.valid),
            read.addr.eq(Cat(self.softmax.row.token, self.softmax.row.bank)),
            Cat(self.softmax.maximum).eq(Cat(read.data)),
        ]

    @property
    def _most_chunks(self) -> int:
        """Chunks of the longest row of a bank."""
        return ceil_div(bank_words(self.config) * word_floats(self.config), CHUNK)

    @property
    def _rows(self) -> int:
        """Rows of a bank, as a power of two."""
        return 1 << len(self.row.token)

    def _invert(self, m: Module) -> None:
        """1/S of one row after another."""
        m.submodules.reciprocal = reciprocal = self.reciprocal
        m.submodules.inverses = memory = Memory(shape=FLOAT, depth=BANKS * self._rows, init=[])
        write, read, sums = memory.write_port(), memory.read_port(domain="comb"), self.softmax.sums
        row, last = Signal(row_layout(self.config)), Signal()
        m.d.comb += [
            reciprocal.valid.eq(sums.valid),
            sums.ready.eq(reciprocal.ready),
            reciprocal.function.eq(Inverse.INTEGER),
            reciprocal.integer.eq(sums.payload.total),
            write.addr.eq(Cat(row.token, row.bank)),
            write.data.eq(reciprocal.result),
            write.en.eq(reciprocal.done),
            read.addr.eq(Cat(self.row.token, self.row.bank)),
            Cat(self.inverse).eq(Cat(read.data)),
        ]
        with m.If(sums.valid & sums.ready):
            m.d.sync += [row.eq(sums.payload.row), last.eq(sums.payload.last)]
        for index in range(BANKS):
            with m.If(reciprocal.done & last & (row.bank == index)):
                m.d.sync += self.inverted[index].eq(1)
            with m.Elif(self.release[index]):
                m.d.sync += self.inverted[index].eq(0)
