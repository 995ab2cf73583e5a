# SPDX-License-Identifier: Apache-2.0
"""The product of two float32."""

from amaranth.hdl import Cat, Const, Module, Signal

from hw.rtl.arithmetic.operator import FloatOperator
from hw.rtl.common.float32 import is_infinite, is_nan, is_zero
from hw.spec.numerics.float32 import EXPONENT_BIAS, FRACTION_BITS, SIGNIFICAND_BITS

_LOW_BITS = 17
"""Unsigned bits that a multiplier of 27 x 18 signed bits takes at a time."""


class FloatMultiplier(FloatOperator):
    """``a * b``, bit for bit :func:`hw.spec.numerics.float32.mul`.

    Two multipliers of 27 x 18 bits. An exponent is two biased fields minus one bias, and the carries of normalisation
    and of rounding. Members: see :class:`FloatOperator`.
    """

    stages = 4
    """Operands, two products, their sum, normalisation."""

    def _compute(self, m: Module, moves) -> None:
        about = self._operands(m, moves[0])
        for stage in (1, 2):
            before, about = about, Signal(self.round.about_layout, name=f"about_{stage}", reset_less=True)
            with m.If(moves[stage]):
                m.d.sync += about.eq(before)
        self._normalise(m, moves[3], about, self._multiply(m, moves))

    def _operands(self, m: Module, move):
        """Sign, exponent and special cases."""
        a, b = self.a, self.b
        about = Signal(self.round.about_layout, name="about_0", reset_less=True)
        zero, infinite = is_zero(a) | is_zero(b), is_infinite(a) | is_infinite(b)
        with m.If(move):
            m.d.sync += [
                about.sign.eq(a.sign ^ b.sign),
                about.exponent.eq(a.exponent + b.exponent - EXPONENT_BIAS),
                about.zero.eq(zero),
                about.infinite.eq(infinite),
                about.nan.eq(is_nan(a) | is_nan(b) | (zero & infinite)),
            ]
        return about

    def _multiply(self, m: Module, moves) -> Signal:
        """The product of the significands, in three cycles. A zero's leading one is wrong and does not matter."""
        a, b = (Signal(SIGNIFICAND_BITS, name=f"significand_{name}", reset_less=True) for name in "ab")
        low = Signal(SIGNIFICAND_BITS + _LOW_BITS, reset_less=True)
        high = Signal(2 * SIGNIFICAND_BITS - _LOW_BITS, reset_less=True)
        product = Signal(2 * SIGNIFICAND_BITS, reset_less=True)
        with m.If(moves[0]):
            m.d.sync += [a.eq(Cat(self.a.fraction, Const(1, 1))), b.eq(Cat(self.b.fraction, Const(1, 1)))]
        with m.If(moves[1]):
            m.d.sync += [low.eq(a * b[:_LOW_BITS]), high.eq(a * b[_LOW_BITS:])]
        with m.If(moves[2]):
            m.d.sync += product.eq(Cat(low[:_LOW_BITS], (high + low[_LOW_BITS:])[: len(high)]))
        return product

    def _normalise(self, m: Module, move, about, product) -> None:
        """The product of two numbers in [1, 2) is in [1, 4)."""
        cut = len(product) - 2 - FRACTION_BITS
        large = product[-1]
        given = Signal(self.round.about_layout, reset_less=True)
        fraction = Signal(FRACTION_BITS, reset_less=True)
        half, rest = Signal(reset_less=True), Signal(reset_less=True)
        with m.If(move):
            m.d.sync += [
                given.eq(about),
                given.exponent.eq(about.exponent + large),
                fraction.eq(product.bit_select(cut + large, FRACTION_BITS)),
                half.eq(product.bit_select(cut - 1 + large, 1)),
                rest.eq(product[: cut - 1].any() | (large & product[cut - 1])),
            ]
        self._give(m, given, fraction, half, rest)
