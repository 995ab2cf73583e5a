# SPDX-License-Identifier: Apache-2.0
"""The sum of two float32."""

from amaranth.hdl import Cat, Const, Module, Mux

from hw.rtl.arithmetic.leading_zeros import leading_zeros
from hw.rtl.arithmetic.operator import FloatOperator
from hw.rtl.common.float32 import FLOAT, is_infinite, is_nan, is_zero
from hw.rtl.common.stage import stage
from hw.spec.numerics.float32 import EXPONENT_FIELD_BITS, FRACTION_BITS, SIGNIFICAND_BITS

_GUARD_BITS = 2
"""Bits below the larger significand that are kept exactly. One more bit says whether anything below them was set."""
_MOST_PLACES = SIGNIFICAND_BITS + _GUARD_BITS
"""From this distance on, nothing of the smaller significand is left but that bit."""
_SUM_BITS = 1 + SIGNIFICAND_BITS + _GUARD_BITS + 1
"""A carry, the significand, and what is below it."""


class FloatAdder(FloatOperator):
    """``a + b``, bit for bit :func:`hw.spec.numerics.float32.add`. Invert a sign for the difference.

    The operand of the larger magnitude is found first, so the sum of the significands is never negative. An exponent is
    a biased field, minus the leading zeros, and the carry of rounding. Members: see :class:`FloatOperator`.
    """

    stages = 6
    """Comparison, order, alignment, sum, leading zeros, shift."""

    def _compute(self, m: Module, moves) -> None:
        ordered = self._order(m, moves[1], self._compare(m, moves[0]))
        total = self._add(m, moves[3], self._align(m, moves[2], ordered))
        self._normalise(m, moves[5], self._count(m, moves[4], total))

    def _compare(self, m: Module, move):
        """Which magnitude is larger, both differences of the exponents, and the special cases."""
        a, b = self.a, self.b
        return stage(
            m,
            move,
            "compared",
            a=(FLOAT, a),
            b=(FLOAT, b),
            zeros=(2, Cat(is_zero(a), is_zero(b))),
            swap=(1, Cat(b.fraction, b.exponent) > Cat(a.fraction, a.exponent)),
            down=(EXPONENT_FIELD_BITS, a.exponent - b.exponent),
            up=(EXPONENT_FIELD_BITS, b.exponent - a.exponent),
            infinite=(1, is_infinite(a) | is_infinite(b)),
            nan=(1, is_nan(a) | is_nan(b) | (is_infinite(a) & is_infinite(b) & (a.sign ^ b.sign))),
        )

    def _order(self, m: Module, move, c):
        """The larger and the smaller operand, and how far the smaller one has to move."""
        a = Mux(c.zeros[0], 0, Cat(c.a.fraction, Const(1, 1)))
        b = Mux(c.zeros[1], 0, Cat(c.b.fraction, Const(1, 1)))
        places = Mux(c.swap, c.up, c.down)
        return stage(
            m,
            move,
            "ordered",
            large=(SIGNIFICAND_BITS, Mux(c.swap, b, a)),
            small=(SIGNIFICAND_BITS, Mux(c.swap, a, b)),
            exponent=(EXPONENT_FIELD_BITS, Mux(c.swap, c.b.exponent, c.a.exponent)),
            places=(_MOST_PLACES.bit_length(), Mux(places > _MOST_PLACES, _MOST_PLACES, places)),
            subtract=(1, c.a.sign ^ c.b.sign),
            sign=(1, Mux(c.swap, c.b.sign, c.a.sign)),
            infinite=(1, c.infinite),
            nan=(1, c.nan),
        )

    def _align(self, m: Module, move, o):
        """Shift the smaller significand right, with all bits that fall out below."""
        return stage(
            m,
            move,
            "aligned",
            large=(SIGNIFICAND_BITS, o.large),
            small=(SIGNIFICAND_BITS + _MOST_PLACES, Cat(Const(0, _MOST_PLACES), o.small) >> o.places),
            exponent=(EXPONENT_FIELD_BITS, o.exponent),
            subtract=(1, o.subtract),
            sign=(1, o.sign),
            infinite=(1, o.infinite),
            nan=(1, o.nan),
        )

    def _add(self, m: Module, move, s):
        """The sum or the difference. The lowest bit of the smaller operand says whether anything is below."""
        below = _MOST_PLACES - _GUARD_BITS
        small = Cat(s.small[:below].any(), s.small[below:])
        large = Cat(Const(0, _GUARD_BITS + 1), s.large)
        inverted = Cat(small ^ s.subtract.replicate(len(small)), s.subtract)
        return stage(
            m,
            move,
            "added",
            total=(_SUM_BITS, large + inverted + s.subtract),
            exponent=(EXPONENT_FIELD_BITS, s.exponent),
            subtract=(1, s.subtract),
            sign=(1, s.sign),
            infinite=(1, s.infinite),
            nan=(1, s.nan),
        )

    def _count(self, m: Module, move, s):
        """Leading zeros. A sum that is exactly zero is +0, unless both operands are negative."""
        zero = ~s.total.any()
        return stage(
            m,
            move,
            "counted",
            total=(_SUM_BITS, s.total),
            zeros=((_SUM_BITS - 1).bit_length(), leading_zeros(s.total)),
            exponent=(EXPONENT_FIELD_BITS, s.exponent),
            sign=(1, s.sign & ~(zero & s.subtract)),
            zero=(1, zero),
            infinite=(1, s.infinite),
            nan=(1, s.nan),
        )

    def _normalise(self, m: Module, move, s) -> None:
        """Shift the leading one to the top, which is the place of the carry."""
        cut = _SUM_BITS - 1 - FRACTION_BITS
        shifted = (s.total << s.zeros)[:_SUM_BITS]
        register = stage(
            m,
            move,
            "normalised",
            fraction=(FRACTION_BITS, shifted[cut:-1]),
            half=(1, shifted[cut - 1]),
            rest=(1, shifted[: cut - 1].any()),
            about=(
                self.round.about_layout,
                Cat(s.sign, (s.exponent + 1 - s.zeros)[: EXPONENT_FIELD_BITS + 2], s.zero, s.infinite, s.nan),
            ),
        )
        self._give(m, register.about, register.fraction, register.half, register.rest)
