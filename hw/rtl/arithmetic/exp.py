# SPDX-License-Identifier: Apache-2.0
"""The exponential function of numbers that are not positive."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.polynomial import Polynomial
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.stage import stage
from hw.spec.numerics.float32 import EXPONENT_BIAS, FRACTION_BITS, SIGNIFICAND_BITS
from hw.spec.numerics.functions import (
    EXP_INDEX_BITS,
    EXP_RANGE_BITS,
    LOG2E_BITS,
    OFFSET_BITS,
    UNIT_BITS,
    VALUE_BITS,
    exp_table,
    log2e,
)

_POSITION_BITS = EXP_INDEX_BITS + OFFSET_BITS
_TOP = EXPONENT_BIAS + EXP_RANGE_BITS - 1
"""Exponent field of the numbers in the upper half of the range."""
_DROPPED = LOG2E_BITS + FRACTION_BITS - _POSITION_BITS - (EXP_RANGE_BITS - 1)
"""Bits of the product that are below the position for all of these numbers."""
_PRODUCT_BITS = SIGNIFICAND_BITS + LOG2E_BITS + 1
_LOW_BITS = 17
"""Unsigned bits that a multiplier of 27 x 18 signed bits takes at a time."""


class Exp(Block):
    """e to the power of x, bit for bit :func:`hw.spec.numerics.functions.exp`. Throughput 1 per cycle.

    Members
    -------
    valid : there is an argument
    x : float32, not positive; the sign is not looked at
    result : in units of ``2**-UNIT_BITS``, from 0 to ``2**UNIT_BITS``, ``latency`` cycles later
    """

    def __init__(self):
        self.polynomial = Polynomial(exp_table())
        super().__init__({"valid": In(1), "x": In(FLOAT), "result": Out(UNIT_BITS + 1)})

    @property
    def latency(self) -> int:
        """Cycles from ``x`` to ``result``: four to the logarithm, the polynomial, shift, rounding."""
        return 4 + self.polynomial.latency + 2

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.polynomial = polynomial = self.polynomial
        moves = Cat(self.valid, moving := Signal(self.latency - 1))
        m.d.sync += moving.eq(moves)
        outside, logarithm = self._logarithm(m, moves)
        m.d.comb += [polynomial.position.eq(logarithm[:_POSITION_BITS]), polynomial.moves.eq(moves[4:-2])]
        self._scale(m, moves, outside, logarithm[_POSITION_BITS:])
        return m

    def _logarithm(self, m: Module, moves):
        """The negative binary logarithm, in four cycles; and whether the argument is out of range, after one."""
        x = self.x
        bits = _PRODUCT_BITS - _DROPPED
        far = x.exponent <= _TOP - bits
        argument = stage(
            m,
            moves[0],
            "argument",
            significand=(SIGNIFICAND_BITS, Cat(x.fraction, Const(1, 1))),
            # Shifted by all its bits, the logarithm is 0; for a zero, too, whose leading one is wrong.
            places=(bits.bit_length(), Mux(far, bits, _TOP - x.exponent)),
            outside=(1, x.exponent > _TOP),
        )
        factor = Const(log2e(), LOG2E_BITS + 1)
        products = stage(
            m,
            moves[1],
            "products",
            low=(SIGNIFICAND_BITS + _LOW_BITS, argument.significand * factor[:_LOW_BITS]),
            high=(_PRODUCT_BITS - _LOW_BITS, argument.significand * factor[_LOW_BITS:]),
            places=(len(argument.places), argument.places),
        )
        # The lowest bits of the low product carry nothing into the sum.
        total = products.high + products.low[_LOW_BITS:]
        product = stage(
            m,
            moves[2],
            "product",
            highest=(bits, total[_DROPPED - _LOW_BITS :]),
            places=(len(argument.places), products.places),
        )
        shifted = stage(m, moves[3], "shifted", logarithm=(bits, product.highest >> product.places))
        return argument.outside, shifted.logarithm

    def _scale(self, m: Module, moves, outside, whole) -> None:
        """Shift by the whole part of the logarithm, and round half up."""
        value, extra = self.polynomial.value, VALUE_BITS - UNIT_BITS - 1
        kept = len(value) - extra
        most = (1 << kept.bit_length()) - 1
        powers = stage(m, moves[4], "powers", places=(kept.bit_length(), Mux(whole > most, most, whole)))
        places = delay(m, powers.places, self.polynomial.latency - 1, name="places")
        shifted = stage(m, moves[-2], "scaled", value=(kept, value[extra:] >> places))
        outside = delay(m, outside, self.latency - 2, name="outside")
        with m.If(moves[-1]):
            m.d.sync += self.result.eq(Mux(outside, 0, (shifted.value + 1) >> 1))
