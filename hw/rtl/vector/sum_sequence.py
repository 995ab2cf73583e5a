# SPDX-License-Identifier: Apache-2.0
"""The order of the additions in a sum of squares."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.delay import delay
from hw.spec.numerics.vector import PARTIAL_SUMS

HALVES = [PARTIAL_SUMS >> level for level in range(1, PARTIAL_SUMS.bit_length())]
"""Distances between the partial sums of a pair, level by level."""


class SumSequence(wiring.Component):
    """What the adders of :class:`hw.rtl.vector.sum_of_squares.SumOfSquares` add in each cycle.

    Partial sum n of a token is at address ``n // lanes`` of lane ``n % lanes``. First each row of squares is added to
    the partial sums of its address. When the last ones are written, the pairs of a level are read, one address per
    cycle, and added in the next cycle. A level begins when the one before it is written.

    Parameters
    ----------
    lanes : elements of a row
    square : cycles from a row to its squares, at least 2
    add : cycles of an adder

    Members
    -------
    valid, ready, last : a row is taken if ``valid`` and ``ready`` are high; it is the last one of a token
    squared : the squares of a row are there
    first : they are the first ones of their partial sums
    forward : the partial sums so far are the adders' results of this cycle
    paired : the pairs that were read in the cycle before are there
    address : where partial sums are read
    other : where the upper partial sums of pairs are read, if they are in the same lane
    level : how many levels were begun
    written, place : the adders' results are partial sums of this address
    finished : the result of the lowest adder is the sum
    """

    def __init__(self, lanes: int, square: int, add: int):
        self.lanes, self.square, self.add = lanes, square, add
        rows = range(PARTIAL_SUMS // lanes)
        flags = "squared", "first", "forward", "paired", "written", "finished"
        super().__init__(
            {
                "valid": In(1),
                "ready": Out(1),
                "last": In(1),
                **dict.fromkeys(flags, Out(1)),
                **dict.fromkeys(("address", "other", "place"), Out(rows)),
                "level": Out(range(len(HALVES) + 1)),
            }
        )

    @property
    def interval(self) -> int:
        """Cycles from a row to the next one: a partial sum must have been written, or be there, when it is read."""
        return max(1, self.add * self.lanes // PARTIAL_SUMS)

    def steps(self, half: int) -> int:
        """Cycles in which a level is read."""
        return max(1, half // self.lanes)

    @property
    def latency(self) -> int:
        """Cycles from the last row to ``finished``."""
        return self.square + self.add + sum(self.steps(half) + self.add + 1 for half in HALVES)

    def elaborate(self, platform) -> Module:
        m = Module()
        shape = data.StructLayout({"valid": 1, "last": 1, "place": Signal.like(self.place).shape()})
        entering = Signal(shape)
        soon = delay(m, entering, self.add - 1, name="soon", reset=True)
        leaving = delay(m, soon, 1, name="leaving", reset=True)
        last_of_row = self._rows(m, soon)
        reading, last_of_pairs = self._pairs(m, leaving)
        place = Signal.like(self.place)
        with m.If(reading):
            m.d.sync += place.eq(self.address)
        m.d.comb += [
            entering.valid.eq(self.squared | self.paired),
            entering.last.eq(last_of_row | last_of_pairs),
            entering.place.eq(Mux(self.squared, self.address, place)),
            self.written.eq(leaving.valid),
            self.place.eq(leaving.place),
        ]
        return m

    def _rows(self, m: Module, soon):
        """Take rows, and count them one cycle before their squares; whether the squares are a token's last ones."""
        taken, busy, pause = Signal(), Signal(), Signal(range(self.interval))
        m.d.comb += [self.ready.eq(~busy & (pause == 0)), taken.eq(self.valid & self.ready)]
        with m.If(taken):
            m.d.sync += [busy.eq(self.last), pause.eq(self.interval - 1)]
        with m.Else():
            m.d.sync += [busy.eq(busy & ~self.finished), pause.eq(Mux(pause == 0, 0, pause - 1))]
        coming = delay(m, Cat(taken, taken & self.last), self.square - 1, name="coming", reset=True)
        row, first = Signal.like(self.address), Signal(init=1)
        last = Signal()
        m.d.sync += [self.squared.eq(coming[0]), last.eq(coming[1])]
        with m.If(coming[0]):
            m.d.sync += [
                row.eq(Mux(coming[1], 0, row + 1)),
                first.eq(coming[1] | (first & ~row.all())),
                self.address.eq(row),
                self.first.eq(first),
                self.forward.eq(soon.valid & (soon.place == row)),
            ]
        return last

    def _pairs(self, m: Module, leaving):
        """Read the pairs of the levels; whether pairs are read, and whether those just read are a level's last ones."""
        reading, last, end = Signal(), Signal(), Signal()
        m.d.sync += [self.paired.eq(reading), last.eq(reading & end)]
        with m.If(reading):
            m.d.sync += [reading.eq(~end), self.address.eq(self.address + 1), self.other.eq(self.other + 1)]
        with m.Switch(self.level):
            for level, half in enumerate(HALVES, 1):
                with m.Case(level):
                    m.d.comb += end.eq(self.address == self.steps(half) - 1)
        with m.If(leaving.valid & leaving.last), m.Switch(self.level):
            for level, half in enumerate(HALVES):
                with m.Case(level):
                    m.d.sync += [reading.eq(1), self.address.eq(0), self.other.eq(half // self.lanes)]
                    m.d.sync += self.level.eq(level + 1)
            with m.Case(len(HALVES)):
                m.d.comb += self.finished.eq(1)
                m.d.sync += self.level.eq(0)
        return reading, last
