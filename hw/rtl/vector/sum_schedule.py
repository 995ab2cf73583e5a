# SPDX-License-Identifier: Apache-2.0
"""The order in which one adder adds the partial sums of a token."""

from amaranth.hdl import Cat, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.select import select
from hw.spec.numerics.vector import PARTIAL_SUMS

_OUTPUTS = ("add", "partial", "low", "high", "write", "place")


class SumSchedule(wiring.Component):
    """A binary tree of additions, level by level: ``low`` and ``high`` are added, and their sum becomes number ``low``.

    Parameters
    ----------
    adder_latency : cycles from the read of the operands to their sum, which can be read one cycle later

    Members
    -------
    valid, step : a token is under way, for this number of cycles

    and one cycle later

    add : an addition begins in this cycle
    partial : its operands are partial sums; otherwise they are sums of the level before
    low, high : its operands
    write, place : a sum leaves the adder, and is written to this place
    """

    def __init__(self, adder_latency: int):
        self.adder_latency = adder_latency
        super().__init__(
            {
                "valid": In(1),
                "step": In(range(self.latency + 1)),
                **dict.fromkeys(("add", "partial", "write"), Out(1)),
                **dict.fromkeys(("low", "high"), Out(range(PARTIAL_SUMS))),
                "place": Out(range(PARTIAL_SUMS // 2)),
            }
        )

    @property
    def additions(self) -> list[tuple[int, int, int]]:
        """(step, low, high) of each addition."""
        found, start, half = [], 0, PARTIAL_SUMS // 2
        while half:
            found += [(start + index, index, index + half) for index in range(half)]
            # The first addition of the next level needs number ``half / 2`` of this one.
            start, half = start + half // 2 + self.adder_latency + 1, half // 2
        return found

    @property
    def latency(self) -> int:
        """Cycles from step 0 to the cycle in which the last sum leaves the adder."""
        return 1 + self.additions[-1][0] + self.adder_latency

    def elaborate(self, platform) -> Module:
        m = Module()
        shape = data.StructLayout({name: getattr(self, name).shape() for name in _OUTPUTS})
        steps = [dict.fromkeys(_OUTPUTS, 0) for _ in range(1 << len(self.step))]
        for step, low, high in self.additions:
            steps[step] |= {"add": 1, "partial": high - low == PARTIAL_SUMS // 2, "low": low, "high": high}
            steps[step + self.adder_latency] |= {"write": 1, "place": low}
        words = [shape.const(values).as_value() for values in steps]
        # Bit by bit: in a tree of whole words, yosys merges equal bits, and Verilator then sees loops in these words.
        found = data.View(shape, Cat(select([word[bit] for word in words], self.step) for bit in range(shape.size)))
        # Registers, because the places are addresses of memories that are read in the same cycle.
        m.d.sync += [getattr(self, name).eq(found[name]) for name in _OUTPUTS]
        m.d.sync += [getattr(self, name).eq(self.valid & found[name]) for name in ("add", "write")]
        return m
