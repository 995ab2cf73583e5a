# SPDX-License-Identifier: Apache-2.0
"""The operations on two neighbouring columns: rotary, and SiLU(gate) * up."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.arithmetic.float_multiplier import FloatMultiplier
from hw.rtl.arithmetic.silu import Silu
from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import gate
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT


class PairUnit(Block):
    """Rotates a pair of columns, or computes SiLU of the first times the second, or passes both on.

    Rotary is ``low c - high s`` and ``high c + low s``, bit for bit :func:`hw.spec.numerics.vector.rotary`; SiLU is
    :func:`hw.spec.numerics.vector.silu_mul`. The latency is the same for all three. Throughput 1 pair per cycle.

    Members
    -------
    valid : there is a pair
    rotary, silu : what to do with it; not both
    low, high : float32; for SiLU gate and up
    cosine, sine : float32
    low_result, high_result : float32, ``latency`` cycles later; for SiLU both are its result
    """

    def __init__(self):
        self.products = [FloatMultiplier() for _ in range(4)]
        self.sums = [FloatAdder() for _ in range(2)]
        self.silu_unit = Silu()
        super().__init__(
            {
                **dict.fromkeys(("valid", "rotary", "silu"), In(1)),
                **dict.fromkeys(("low", "high", "cosine", "sine"), In(FLOAT)),
                **dict.fromkeys(("low_result", "high_result"), Out(FLOAT)),
            }
        )

    @property
    def rotary_latency(self) -> int:
        """Cycles of the rotation alone."""
        return self.products[0].latency + self.sums[0].latency

    @property
    def latency(self) -> int:
        """Cycles from a pair to its results: those of the longest operation."""
        return max(self.rotary_latency, self.silu_unit.latency)

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        silu = self.silu_unit
        (m.submodules.silu,) = gate(m, platform, silu, name="silu", pipeline=(silu.valid, silu.latency))
        m.d.comb += [silu.valid.eq(self.valid & self.silu), silu.gate.eq(self.low), silu.up.eq(self.high)]
        rotated = self._rotate(m, platform)
        product = delay(m, silu.result, self.latency - silu.latency, name="product")
        flags = delay(m, Cat(self.rotary, self.silu), self.latency, name="flags")
        for name, turned in zip(("low", "high"), rotated, strict=True):
            passed = delay(m, getattr(self, name), self.latency, name=f"{name}_passed")
            turned = delay(m, turned, self.latency - self.rotary_latency, name=f"{name}_turned")
            result = getattr(self, f"{name}_result")
            with m.If(flags[1]):
                m.d.comb += result.eq(product)
            with m.Else():
                m.d.comb += result.eq(Mux(flags[0], turned, passed))
        return m

    def _rotate(self, m: Module, platform) -> list[Signal]:
        """Both rotated columns, ``rotary_latency`` cycles after the pair."""
        factors = ((self.low, self.cosine), (self.high, self.sine), (self.high, self.cosine), (self.low, self.sine))
        moves = Cat(self.valid & self.rotary, moving := Signal(self.products[0].latency))
        m.d.sync += moving.eq(moves)
        parts = gate(m, platform, *self.products, *self.sums, name="rotary", pipeline=(moves[0], self.rotary_latency))
        names = (*(f"product_{index}" for index in range(4)), *(f"sum_{index}" for index in range(2)))
        for name, part in zip(names, parts, strict=True):
            m.submodules[name] = part
        for product, (number, factor) in zip(self.products, factors, strict=True):
            m.d.comb += [product.valid.eq(moves[0]), product.a.eq(number), product.b.eq(factor)]
        for index, (total, negative) in enumerate(zip(self.sums, (1, 0), strict=True)):
            first, second = (product.result for product in self.products[2 * index : 2 * index + 2])
            m.d.comb += [
                total.valid.eq(moves[-1]),
                total.a.eq(first),
                total.b.eq(second),
                total.b.sign.eq(second.sign ^ negative),
            ]
        return [total.result for total in self.sums]
