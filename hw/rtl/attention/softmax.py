# SPDX-License-Identifier: Apache-2.0
"""Softmax without its division: the scores of a bank become probabilities."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
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
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.kv_cache import LONGEST_CONTEXT
from hw.spec.numerics.functions import UNIT_BITS

SUM_BITS = UNIT_BITS + LONGEST_CONTEXT.bit_length()
"""Bits of the sum of the longest row, in units of ``2**-UNIT_BITS``."""


def sum_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The sum of a row's probabilities. last : it is the bank's last row."""
    return data.StructLayout({"row": row_layout(config), "last": 1, "total": SUM_BITS})


class Softmax(Block):
    """Reads the scores s of a bank row by row, and writes ``p = exp(s - m)`` as float32 to their places.

    m is the row's largest score. A part of a word has as many scores as the vector unit has lanes. Slots behind the
    row's last one get 0. All values are bit for bit those of :func:`hw.spec.numerics.attention.probabilities`.

    Members
    -------
    job : the rows of a bank
    read, place : read the word at the place's address in this cycle; ``word`` is its data from the next cycle on
    row, maximum : a row, and its largest score in the same cycle
    write : a part of a word
    done : all probabilities of a bank are written: one cycle, ``latency`` cycles after its last part is read
    done_bank : valid with ``done``
    sums : the sum of each row's probabilities

    Throughput 1 part per cycle, if the sums are taken in time.
    """

    _SUMS = 8
    """Entries of the FIFO of sums. A row is begun only if there is room."""

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
        """Cycles from a part's address to its probabilities: the memory, its register, difference, exp."""
        return 2 + self.adders[0].latency + self.exps[0].latency

    @property
    def latency(self) -> int:
        """Cycles from a part's address to the cycle after its write."""
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
        """The parts of all rows, one per cycle. Returns what accompanies a part; ``valid`` says that there is one."""
        config, job = self.config, Signal(bank_layout(self.config))
        active, step, word_end = Signal(), Signal(), Signal()
        place, token = self.place, self.row.token
        slot, words, left = Signal(COUNT_BITS), Signal.like(row_words(config, job.positions)), None
        left = Signal.like(words)
        first, row_end, last = Signal(init=1), Signal(), Signal()
        m.d.comb += [
            self.job.ready.eq(~active),
            words.eq(row_words(config, self.job.payload.positions)),
            step.eq(active & (sums.room | ~first)),
            sums.claim.eq(step & first),
            word_end.eq(place.part == self.parts - 1),
            row_end.eq(word_end & (left == 1)),
            last.eq(row_end & (token == job.tokens - 1)),
            self.read.eq(step & (place.part == 0)),
            place.bank.eq(job.bank),
            self.row.bank.eq(job.bank),
        ]
        of_row = Signal.like(words)
        with m.If(self.job.valid & self.job.ready):
            m.d.sync += [job.eq(self.job.payload), active.eq(1), of_row.eq(words), left.eq(words)]
        with m.If(step):
            m.d.sync += [
                first.eq(row_end),
                slot.eq(Mux(row_end, 0, slot + self.lanes)),
                place.part.eq(Mux(word_end, 0, place.part + 1)),
            ]
            with m.If(word_end):
                m.d.sync += [
                    place.address.eq(Mux(last, 0, place.address + 1)),
                    left.eq(Mux(row_end, of_row, left - 1)),
                ]
            with m.If(row_end):
                m.d.sync += [token.eq(Mux(last, 0, token + 1)), active.eq(~last)]
        layout = {
            "valid": 1,
            "place": place.shape(),
            "token": token.shape(),
            "first": 1,
            "row_end": 1,
            "last": 1,
            "inside": self.lanes,
        }
        about = Signal(data.StructLayout(layout))
        m.d.comb += [
            about.valid.eq(step),
            about.place.eq(place),
            about.token.eq(token),
            about.first.eq(first),
            about.row_end.eq(row_end),
            about.last.eq(last),
            about.inside.eq(Cat((slot | lane) < job.positions for lane in range(self.lanes))),
        ]
        return about

    def _compute(self, m: Module, sums: CreditFifo, about) -> None:
        """Difference, exp, and the probabilities as float32; and the sum of a row."""
        read = delay(m, about, 1, name="read_part", reset=True)
        part = Value.cast(self.word).word_select(read.place.part, self.lanes * FLOAT.size)
        maximum = delay(m, self.maximum.as_value(), 1, name="maximum_of_row")
        taken = stage(m, read.valid, "taken", values=(self.lanes * FLOAT.size, part), maximum=(FLOAT.size, maximum))
        valid = delay(m, about.valid, 2, name="taken_valid", reset=True)
        exp_valid = delay(m, valid, self.adders[0].latency, name="exp_valid", reset=True)
        found = delay(m, about, self.exp_latency, name="found", reset=True)
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
        m.d.sync += [self.done.eq(out.valid & out.last), self.done_bank.eq(out.place.bank)]
        self._sum(m, sums, found, numbers)

    def _sum(self, m: Module, sums: CreditFifo, found, numbers: list[Signal]) -> None:
        """Adds the lanes, then the parts of a row."""
        total = Signal(SUM_BITS)
        added = stage(m, found.valid, "added", lanes=(UNIT_BITS + self.lanes.bit_length(), sum(numbers)))
        after = delay(m, found, 1, name="after_lanes", reset=True)
        whole = Signal(SUM_BITS)
        m.d.comb += whole.eq(added.lanes + Mux(after.first, 0, total))
        with m.If(after.valid):
            m.d.sync += total.eq(whole)
        row = sums.i.payload.row
        m.d.comb += [
            sums.i.valid.eq(after.valid & after.row_end),
            row.bank.eq(after.place.bank),
            row.token.eq(after.token),
            sums.i.payload.last.eq(after.last),
            sums.i.payload.total.eq(whole),
        ]
