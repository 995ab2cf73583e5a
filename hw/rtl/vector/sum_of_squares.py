# SPDX-License-Identifier: Apache-2.0
"""The sum of the squares of a token's elements."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT
from hw.rtl.vector.float_adder import FloatAdder
from hw.rtl.vector.float_multiplier import FloatMultiplier
from hw.rtl.vector.sum_sequence import HALVES, SumSequence
from hw.spec.numerics.vector import PARTIAL_SUMS


class SumOfSquares(Block):
    """Q of a token, bit for bit :func:`hw.spec.numerics.vector.sum_of_squares`.

    Each lane has a multiplier, an adder and the partial sums of its elements. A partial sum has its next element after
    ``16 / lanes`` rows, and an adder takes 8 cycles. So a row is taken every ``interval`` cycles: 1 with 1 or 2 lanes,
    2 with 4 lanes and 4 with 8. More adders would not help, because the order of a partial sum's elements is fixed.

    After the last row the same adders add pairs of partial sums, level by level. The next token's first row is taken
    when the sum is there.

    Parameters
    ----------
    lanes : elements of a row, 1, 2, 4 or 8

    Members
    -------
    valid, ready : there is a row; it is taken if both are high
    values : float32
    last : the row is the token's last one; a token has a multiple of 16 elements, the last ones of which may be zeros
    done : high for one cycle, ``latency`` cycles after the last row
    result : float32, which stays until the next one
    """

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.multipliers = [FloatMultiplier() for _ in range(lanes)]
        self.adders = [FloatAdder() for _ in range(lanes)]
        self.sequence = SumSequence(lanes, self.multipliers[0].latency, self.adders[0].latency)
        self.rows = PARTIAL_SUMS // lanes
        super().__init__(
            {
                "valid": In(1),
                "ready": Out(1),
                "values": In(data.ArrayLayout(FLOAT, lanes)),
                "last": In(1),
                "done": Out(1),
                "result": Out(FLOAT),
            }
        )

    @property
    def interval(self) -> int:
        """Cycles from a row to the next one."""
        return self.sequence.interval

    @property
    def latency(self) -> int:
        """Cycles from a token's last row to ``result``."""
        return self.sequence.latency + 1

    def properties(self) -> dict[str, int]:
        """Also ``token_interval``: cycles from a token's last row to the next one's first row."""
        return {"latency": self.latency, "interval": self.interval, "token_interval": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.sequence = sequence = self.sequence
        m.d.comb += [
            sequence.valid.eq(self.valid),
            sequence.last.eq(self.last),
            self.ready.eq(sequence.ready),
        ]
        m.d.sync += self.done.eq(sequence.finished)
        with m.If(sequence.finished):
            m.d.sync += self.result.eq(self.adders[0].result)
        own, upper = [], []
        for lane, (multiplier, adder) in enumerate(zip(self.multipliers, self.adders)):
            m.submodules[f"multiplier_{lane}"], m.submodules[f"adder_{lane}"] = multiplier, adder
            m.submodules[f"sums_{lane}"] = memory = Memory(shape=FLOAT, depth=self.rows, init=[])
            write = memory.write_port()
            ports = [memory.read_port(domain="comb") for _ in range(2)]
            m.d.comb += [write.en.eq(sequence.written), write.addr.eq(sequence.place), write.data.eq(adder.result)]
            m.d.comb += [ports[0].addr.eq(sequence.address), ports[1].addr.eq(sequence.other)]
            own.append(ports[0].data)
            upper.append(ports[1].data)
        for lane, (multiplier, adder) in enumerate(zip(self.multipliers, self.adders)):
            value = self.values[lane]
            m.d.comb += [
                multiplier.valid.eq(self.valid & self.ready),
                multiplier.a.eq(value),
                multiplier.b.eq(value),
                adder.valid.eq(sequence.squared | sequence.paired),
            ]
            self._add(m, lane, own, upper[lane])
        return m

    def _add(self, m: Module, lane: int, own, upper) -> None:
        """The operands of a lane's adder: a partial sum and a square, or a pair of partial sums, read one cycle before.

        Lanes that have no pair any more add something that is not read again.
        """
        sequence, adder = self.sequence, self.adders[lane]
        pair = Signal(data.ArrayLayout(FLOAT, 2), name=f"pair_{lane}", reset_less=True)
        for level, half in enumerate(HALVES, 1):
            if lane + half < self.lanes:
                upper = Mux(sequence.level == level, own[lane + half], upper)
        m.d.sync += [pair[0].eq(own[lane]), pair[1].eq(upper)]
        so_far = Mux(sequence.forward, adder.result, own[lane])
        with m.If(sequence.paired):
            m.d.comb += [adder.a.eq(pair[0]), adder.b.eq(pair[1])]
        with m.Else():
            m.d.comb += [adder.a.eq(Mux(sequence.first, 0, so_far)), adder.b.eq(self.multipliers[lane].result)]
