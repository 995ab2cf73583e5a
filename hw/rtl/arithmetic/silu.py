# SPDX-License-Identifier: Apache-2.0
"""SiLU of the gate, times the other projection."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.float_multiplier import FloatMultiplier
from hw.rtl.arithmetic.leading_zeros import leading_zeros
from hw.rtl.arithmetic.sigma import Sigma
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.stage import stage
from hw.spec.numerics.float32 import EXPONENT_BIAS, EXPONENT_FIELD_BITS, FRACTION_BITS


class Silu(Block):
    """``(gate * sigma(gate)) * up``, bit for bit :func:`hw.spec.numerics.vector.silu_mul`. Throughput 1 per cycle.

    Members
    -------
    valid : there are operands
    gate, up : float32
    result : float32, ``latency`` cycles later
    """

    _NORMALISE = 2
    """Leading zeros, shift."""

    def __init__(self):
        self.sigma = Sigma()
        self.products = FloatMultiplier(), FloatMultiplier()
        super().__init__({"valid": In(1), "gate": In(FLOAT), "up": In(FLOAT), "result": Out(FLOAT)})

    @property
    def latency(self) -> int:
        """Cycles from the operands to ``result``: sigma, its normalisation, two products."""
        return self._wait + sum(product.latency for product in self.products)

    @property
    def _wait(self) -> int:
        return self.sigma.latency + self._NORMALISE

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.sigma = sigma = self.sigma
        first, second = m.submodules.first, m.submodules.second = self.products
        half = self._wait + first.latency
        valid = Cat(self.valid, moving := Signal(half))
        m.d.sync += moving.eq(valid)
        m.d.comb += [sigma.valid.eq(self.valid), sigma.x.eq(self.gate)]
        m.d.comb += [
            first.valid.eq(valid[self._wait]),
            first.a.eq(delay(m, self.gate, self._wait, name="gate")),
            first.b.eq(self._float(m, valid[sigma.latency :], sigma.result)),
            second.valid.eq(valid[half]),
            second.a.eq(first.result),
            second.b.eq(delay(m, self.up, half, name="up")),
            self.result.eq(second.result),
        ]
        return m

    def _float(self, m: Module, moves, value) -> Signal:
        """sigma as a float32: it has no more bits than a significand, unless it is 1."""
        counted = stage(
            m,
            moves[0],
            "counted",
            value=(len(value), value),
            zeros=((len(value) - 1).bit_length(), leading_zeros(value)),
            zero=(1, ~value.any()),
        )
        fraction = (counted.value << counted.zeros)[len(value) - 1 - FRACTION_BITS : len(value) - 1]
        exponent = (EXPONENT_BIAS - counted.zeros)[:EXPONENT_FIELD_BITS]
        number = stage(
            m,
            moves[1],
            "sigma_float",
            number=(FLOAT, Cat(fraction, exponent & (~counted.zero).replicate(EXPONENT_FIELD_BITS))),
        )
        return number.number
