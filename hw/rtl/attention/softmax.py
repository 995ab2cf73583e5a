# SPDX-License-Identifier: Apache-2.0
"""Softmax without its division: the scores of a bank become probabilities."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.exp import Exp
from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.attention.layouts import (
    COUNT_BITS,
    bank_layout,
    place_layout,
    row_layout,
    row_words,
    word_floats,
    write_layout,
)
from hw.rtl.attention.unit_float import UnitFloat
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.stage import stage
from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.memory.kv_cache import LONGEST_CONTEXT
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.functions import UNIT_BITS

SUM_BITS = UNIT_BITS + LONGEST_CONTEXT.bit_length()
"""Bits of the sum of the longest row, in units of ``2**-UNIT_BITS``."""


def sum_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The sum of a row's probabilities. last : it is the bank's last row."""
    return data.StructLayout({"row": row_layout(config), "last": 1, "total": SUM_BITS})


class Softmax(Block):
    """Reads the scores s of a bank, and writes ``p = exp(s - m)`` as float32 to their places.

    m is the row's largest score. It goes over the chunks of 256 slots, and in a chunk over the rows, because values
    are computed in this order. A part of a word has as many scores as the vector unit has lanes. Slots behind the row's
    last one get 0. All values are bit for bit those of :func:`hw.spec.numerics.attention.probabilities`.

    Members
    -------
    job : the rows of a bank
    read, place : read the word at the place's address in this cycle; ``word`` is its data in the next cycle
    row, maximum : a row, and its largest score in the same cycle
    write : a part of a word
    done : the probabilities of a chunk are written, for all rows: one cycle, ``latency`` cycles after its last part
    done_bank : valid with ``done``
    sums : the sum of each row's probabilities

    Throughput 1 part per cycle, if the sums are taken in time.
    """

    _SUMS = 8
    """Entries of the FIFO of sums. The last chunk of a row is begun only if there is room."""

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.vector_lanes
        self.parts = word_floats(config) // self.lanes
        self.adders = [FloatAdder() for _ in range(self.lanes)]
        self.exps = [Exp() for _ in range(self.lanes)]
        super().__init__(
            {
                "job": In(stream.Signature(bank_layout(config))),
                "read": Out(1),
                "place": Out(place_layout(config)),
                "word": In(data.ArrayLayout(FLOAT, word_floats(config))),
                "row": Out(row_layout(config)),
                "maximum": In(FLOAT),
                "write": Out(write_layout(config)),
                "done": Out(1),
                "done_bank": Out(1),
                "sums": Out(stream.Signature(sum_layout(config))),
            }
        )

    @property
    def exp_latency(self) -> int:
        """Cycles from a part to its probabilities: the address, the memory, its register, difference, exp."""
        return 3 + self.adders[0].latency + self.exps[0].latency

    @property
    def latency(self) -> int:
        """Cycles from a part to the cycle after its write."""
        return self.exp_latency + UnitFloat.latency + 1

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.sums_fifo = sums = CreditFifo(sum_layout(self.config), self._SUMS)
        wiring.connect(m, sums.o, wiring.flipped(self.sums))
        about = self._walk(m, sums)
        self._compute(m, sums, about)
        return m

    def _walk(self, m: Module, sums: CreditFifo):
        """The parts of all words, one per cycle. Returns what accompanies a part; ``valid`` says that there is one."""
        config, job = self.config, Signal(bank_layout(self.config))
        active, step, word_end = Signal(), Signal(), Signal()
        place, token = Signal(place_layout(config)), Signal.like(self.row.token)
        words = Signal.like(row_words(config, job.positions))
        whole = CHUNK // word_floats(config)
        # Words of a row, of a row in the last chunk, of a row in this chunk; the same from here on; chunks behind this.
        of_row, of_last, of_chunk = (Signal.like(words, name=name) for name in ("row", "last", "chunk"))
        left, behind = Signal.like(words), Signal(range(((1 << len(words)) - 1) // whole + 1))
        chunk_start, row_start = Signal.like(place.address), Signal.like(place.address)
        chunk_slot, slot = Signal(COUNT_BITS), Signal(COUNT_BITS)
        first, first_chunk, tokens_after_first = Signal(init=1), Signal(init=1), Signal.like(token)
        # Registers: of the rows' words and of the rows this is the last one, and of the chunks.
        last_word, last_token, final = Signal(), Signal(), Signal()
        # A row has one word in this chunk, in the last chunk.
        one_word, last_single = Signal(), Signal()
        row_end, chunk_end = Signal(), Signal()
        m.d.comb += [
            self.job.ready.eq(~active),
            words.eq(row_words(config, self.job.payload.positions)),
            step.eq(active & (sums.room | ~(first & final))),
            sums.claim.eq(step & first & final),
            word_end.eq(place.part == self.parts - 1),
            row_end.eq(word_end & last_word),
            chunk_end.eq(row_end & last_token),
            place.bank.eq(job.bank),
        ]

        def begin(behind_it: Value, ends: Value, last: Value, single: Value) -> list:
            """The chunk that has so many behind it. ends: none; last: words of a row in the last chunk; single: 1."""
            count, one = Mux(ends, last, whole), Mux(ends, single, int(whole == 1))
            registers = [(behind, behind_it), (final, ends), (of_chunk, count), (left, count)]
            return [register.eq(value) for register, value in (*registers, (last_word, one), (one_word, one))]

        with m.If(self.job.valid & self.job.ready):
            # From the last position, because the way over the words of a row is longer.
            at = self.job.payload.positions - 1
            unit_bits = (SCORE_UNIT - 1).bit_length()
            units, per_unit = at[unit_bits : (CHUNK - 1).bit_length()], SCORE_UNIT // word_floats(config)
            last, single = (units + 1) << per_unit.bit_length() - 1, ~units.any() if per_unit == 1 else Const(0)
            m.d.sync += last_single.eq(single)
            m.d.sync += [job.eq(self.job.payload), active.eq(1), of_row.eq(words), of_last.eq(last), first_chunk.eq(1)]
            m.d.sync += [
                tokens_after_first.eq(self.job.payload.tokens - 1),
                last_token.eq(self.job.payload.tokens == 1),
            ]
            chunks = at[(CHUNK - 1).bit_length() : COUNT_BITS]
            m.d.sync += begin(chunks, ~chunks.any(), last, single)
        with m.If(step):
            m.d.sync += [first.eq(row_end), place.part.eq(Mux(word_end, 0, place.part + 1)), slot.eq(slot + self.lanes)]
            with m.If(word_end):
                m.d.sync += [place.address.eq(place.address + 1), left.eq(left - 1), last_word.eq(left == 2)]
            with m.If(row_end):
                following = Signal.like(row_start)
                # Behind the last row it is not used.
                m.d.comb += following.eq(row_start + of_row)
                m.d.sync += [
                    *(register.eq(following) for register in (row_start, place.address)),
                    token.eq(token + 1),
                    last_token.eq(token + 1 == tokens_after_first),
                    slot.eq(chunk_slot),
                    left.eq(of_chunk),
                    last_word.eq(one_word),
                ]
            with m.If(chunk_end):
                next_start = Signal.like(chunk_start)
                m.d.comb += next_start.eq(Mux(final, 0, chunk_start + whole))
                next_slot = Mux(final, 0, chunk_slot + CHUNK)
                m.d.sync += [
                    *(register.eq(next_start) for register in (chunk_start, row_start, place.address)),
                    *(register.eq(next_slot) for register in (chunk_slot, slot)),
                    token.eq(0),
                    last_token.eq(tokens_after_first == 0),
                    first_chunk.eq(0),
                    active.eq(~final),
                    *begin((behind - 1)[: len(behind)], behind == 1, of_last, last_single),
                ]
        of_part = {
            "valid": step,
            "place": place,
            "token": token,
            "first": first,
            "first_chunk": first_chunk,
            "row_end": row_end,
            "chunk_end": chunk_end,
            "final": final,
            "inside": Cat((slot | lane) < job.positions for lane in range(self.lanes)),
        }
        about = Signal(data.StructLayout({name: value.shape() for name, value in of_part.items()}))
        m.d.comb += [getattr(about, name).eq(value) for name, value in of_part.items()]
        # Registers, because others read the bank in the cycles that this block leaves.
        asked = data.View(about.shape(), delay(m, about, 1, name="asked", reset=True))
        m.d.sync += self.read.eq(step & (place.part == 0))
        m.d.comb += [self.place.eq(asked.place), self.row.token.eq(asked.token), self.row.bank.eq(asked.place.bank)]
        return asked

    def _compute(self, m: Module, sums: CreditFifo, about) -> None:
        """Difference, exp, and the probabilities as float32; and the sum of a row."""
        read = delay(m, about, 1, name="read_part", reset=True)
        part = self._part(m, read)
        maximum = delay(m, self.maximum.as_value(), 1, name="maximum_of_row")
        taken = stage(m, read.valid, "taken", values=(self.lanes * FLOAT.size, part), maximum=(FLOAT.size, maximum))
        valid = delay(m, about.valid, 2, name="taken_valid", reset=True)
        exp_valid = delay(m, valid, self.adders[0].latency, name="exp_valid", reset=True)
        found = delay(m, about, self.exp_latency - 1, name="found", reset=True)
        out = delay(m, found, UnitFloat.latency, name="out", reset=True)
        unsigned_maximum, sign = taken.maximum[:-1], taken.maximum[-1]
        numbers = []
        for lane, (adder, exp) in enumerate(zip(self.adders, self.exps, strict=True)):
            m.submodules[f"adder_{lane}"], m.submodules[f"exp_{lane}"] = adder, exp
            m.submodules[f"unit_{lane}"] = unit = UnitFloat()
            number, probability = Signal(UNIT_BITS + 1, name=f"number_{lane}"), Signal(FLOAT, name=f"p_{lane}")
            m.d.comb += [
                adder.valid.eq(valid),
                Cat(adder.a).eq(taken.values.word_select(lane, FLOAT.size)),
                Cat(adder.b).eq(Cat(unsigned_maximum, ~sign)),
                exp.valid.eq(exp_valid),
                Cat(exp.x).eq(Cat(adder.result)),
                number.eq(Mux(found.inside[lane], exp.result, 0)),
                unit.valid.eq(found.valid),
                unit.value.eq(exp.result),
                Cat(probability).eq(Cat(unit.result)),
                Cat(self.write.values[lane]).eq(Mux(out.inside[lane], probability.as_value(), 0)),
            ]
            numbers.append(number)
        m.d.comb += [self.write.valid.eq(out.valid), self.write.place.eq(out.place)]
        m.d.sync += [self.done.eq(out.valid & out.chunk_end), self.done_bank.eq(out.place.bank)]
        self._sum(m, sums, found, numbers)

    def _part(self, m: Module, read) -> Value:
        """The part of the word. Others read the bank after the first part, so a register keeps the other ones."""
        size = self.lanes * FLOAT.size
        word = Value.cast(self.word)
        if self.parts == 1:
            return word
        kept = Signal(len(word) - size, reset_less=True)
        with m.If(read.valid & (read.place.part == 0)):
            m.d.sync += kept.eq(word[size:])
        return Cat(word[:size], kept).word_select(read.place.part, size)

    def _sum(self, m: Module, sums: CreditFifo, found, numbers: list[Signal]) -> None:
        """Adds the lanes, then the parts of a row. The sums of the chunks so far are in a memory."""
        m.submodules.totals = memory = Memory(shape=SUM_BITS, depth=max(2, self.config.max_tokens), init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        added = stage(m, found.valid, "added", lanes=(UNIT_BITS + self.lanes.bit_length(), sum(numbers)))
        after = delay(m, found, 1, name="after_lanes", reset=True)
        total, base, whole = Signal(SUM_BITS), Signal(SUM_BITS), Signal(SUM_BITS)
        m.d.comb += [
            read.addr.eq(after.token),
            base.eq(Mux(after.first, Mux(after.first_chunk, 0, read.data), total)),
            whole.eq(added.lanes + base),
            write.addr.eq(after.token),
            write.data.eq(whole),
            write.en.eq(after.valid & after.row_end),
        ]
        with m.If(after.valid):
            m.d.sync += total.eq(whole)
        row = sums.i.payload.row
        m.d.comb += [
            sums.i.valid.eq(after.valid & after.row_end & after.final),
            row.bank.eq(after.place.bank),
            row.token.eq(after.token),
            sums.i.payload.last.eq(after.chunk_end & after.final),
            sums.i.payload.total.eq(whole),
        ]
