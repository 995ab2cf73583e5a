# SPDX-License-Identifier: Apache-2.0
"""Correctly rounded 1/x and 1/sqrt(x), one bit of the result per cycle."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import enum
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.inverse_digits import InverseDigits
from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT, FloatRound, is_infinite, is_nan, is_zero
from hw.rtl.common.stage import stage
from hw.spec.numerics.float32 import EXPONENT_BIAS, EXPONENT_FIELD_BITS, SIGNIFICAND_BITS
from hw.spec.numerics.functions import UNIT_BITS
from hw.spec.numerics.reciprocal import INTEGER_BITS

_SHIFTS = (16, 4, 1)
"""Units of the three shifts that normalise an integer. Each shifts by up to three units."""


class Inverse(enum.Enum, shape=2):
    """The functions."""

    RECIPROCAL = 0
    """1/x of a float32: :func:`hw.spec.numerics.reciprocal.reciprocal`."""
    RSQRT = 1
    """1/sqrt(x) of a float32: :func:`hw.spec.numerics.reciprocal.rsqrt`."""
    INTEGER = 2
    """1/S of an integer S: :func:`hw.spec.numerics.reciprocal.reciprocal_of_integer` with exponent ``-UNIT_BITS``."""


class Reciprocal(Block):
    """1/x, 1/sqrt(x) and 1/S, bit for bit as in :mod:`hw.spec.numerics.reciprocal`.

    One operand at a time: the next one may come when the result is there, so the throughput is 1 in ``latency`` cycles.
    The latency does not depend on the function or on the operand.

    Members
    -------
    valid, ready : there is an operand; it is taken if both are high
    function : an :class:`Inverse`
    x : float32, for 1/x and 1/sqrt(x)
    integer : S in units of ``2**-UNIT_BITS``, for 1/S
    done : high for one cycle, ``latency`` cycles after the operand
    result : float32, which stays until the next one
    """

    def __init__(self):
        # Two more bits than a field: exponents lie between -1 and 253.
        self.round = FloatRound(EXPONENT_FIELD_BITS + 2)
        self.digits = InverseDigits()
        super().__init__(
            {
                "valid": In(1),
                "ready": Out(1, init=1),
                "function": In(Inverse),
                "x": In(FLOAT),
                "integer": In(INTEGER_BITS),
                "done": Out(1),
                "result": Out(FLOAT),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from the operand to ``result``: operand, normalisation, digits, rounding."""
        return 1 + len(_SHIFTS) + self.digits.latency + self.round.latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.round, m.submodules.digits = self.round, self.digits
        start, rounding = Signal(), Signal()
        shifting = Signal(len(_SHIFTS) + 1)
        m.d.comb += [start.eq(self.valid & self.ready), self.digits.start.eq(shifting[-1])]
        m.d.sync += [
            shifting.eq(Cat(start, shifting)),
            rounding.eq(self.digits.done),
            self.done.eq(rounding),
            self.ready.eq((self.ready & ~self.valid) | rounding),
        ]
        about = Signal(self.round.about_layout, reset_less=True)
        with m.If(start):
            self._take(m, about)
        integer = self.function == Inverse.INTEGER
        significand = Cat(Const(0, INTEGER_BITS - SIGNIFICAND_BITS), self.x.fraction, Const(1, 1))
        taken = stage(m, start, "taken", number=(INTEGER_BITS, Mux(integer, self.integer, significand)))
        number, zeros = taken.number, []
        for step, unit in enumerate(_SHIFTS):
            number, units = self._shift(m, shifting[step], number, unit)
            zeros.insert(0, units)
        # The units are the digits of the number of zeros to base 4.
        with m.If(shifting[-1]):
            m.d.sync += about.exponent.eq(about.exponent + Cat(zeros))
        m.d.comb += self.digits.number.eq(number)
        self._round(m, rounding, about, number)
        return m

    def _take(self, m: Module, about) -> None:
        """The radicand, the exponent of the result, and the special cases."""
        x, integer, root = self.x, self.function == Inverse.INTEGER, self.function == Inverse.RSQRT
        # With y = 1/significand or 1/sqrt(significand or twice that) in (1/2, 1], the significand of the result is 2y.
        whole = EXPONENT_BIAS - INTEGER_BITS + UNIT_BITS
        quotient = 2 * EXPONENT_BIAS - 1 - x.exponent
        half = EXPONENT_BIAS // 2 + EXPONENT_BIAS - ((x.exponent + 1) >> 1)
        # The exponent of the radicand is even.
        radicand = Mux(x.exponent[0], Cat(x.fraction, Const(1, 1)), Cat(Const(0, 1), x.fraction, Const(1, 1)))
        m.d.sync += [
            self.digits.root.eq(root),
            self.digits.radicand.eq(radicand),
            about.sign.eq(x.sign & ~integer),
            about.exponent.eq(Mux(integer, whole, Mux(root, half, quotient))),
            about.zero.eq(is_infinite(x) & ~integer),
            about.infinite.eq(is_zero(x) & ~integer),
            about.nan.eq((is_nan(x) | (root & x.sign & ~is_zero(x))) & ~integer),
        ]

    def _shift(self, m: Module, move, number, unit: int):
        """Shift left by 0 to 3 units, until one of the highest bits is set; the number of units. Only integers move."""
        some = [number[INTEGER_BITS - (count + 1) * unit : INTEGER_BITS - count * unit].any() for count in range(3)]
        units = Cat(~some[0] & (some[1] | ~some[2]), ~some[0] & ~some[1])
        shifted = Array((number << count * unit)[:INTEGER_BITS] for count in range(4))[units]
        moved = stage(m, move, f"shifted_{unit}", number=(INTEGER_BITS, shifted), units=(2, units))
        return moved.number, moved.units

    def _round(self, m: Module, rounding, about, number) -> None:
        """Something is always left below the half bit, because only powers of two have exact results.

        Their digits are all ones, and rounding carries. The integer 0 has no leading one.
        """
        digits = self.digits.digits
        m.d.comb += [
            self.round.moves.eq(Cat(self.digits.done, rounding)),
            self.round.about.eq(about),
            self.round.about.infinite.eq(about.infinite | ~number[-1]),
            self.round.fraction.eq(digits[1:-1]),
            self.round.half.eq(digits[0]),
            self.round.rest.eq(1),
            self.result.eq(self.round.result),
        ]
