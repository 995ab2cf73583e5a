# SPDX-License-Identifier: Apache-2.0
"""Correctly rounded 1/x and 1/sqrt(x), one bit of the result per cycle."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import enum
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT, FloatRound, is_infinite, is_nan, is_zero
from hw.rtl.vector.inverse_digits import InverseDigits
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
        number, about = Signal(INTEGER_BITS, reset_less=True), Signal(self.round.about_layout, reset_less=True)
        root, odd = Signal(reset_less=True), Signal(reset_less=True)
        with m.If(start):
            m.d.sync += [root.eq(self.function == Inverse.RSQRT), odd.eq(~self.x.exponent[0])]
            self._take(m, number, about)
        for step, unit in enumerate(_SHIFTS):
            with m.If(shifting[step]):
                self._shift(m, number, about, unit)
        m.d.comb += [self.digits.root.eq(root), self.digits.odd.eq(odd), self.digits.number.eq(number)]
        self._round(m, rounding, about, number)
        return m

    def _take(self, m: Module, number, about) -> None:
        """The significand at the top, the exponent of the result, and the special cases."""
        x, integer, root = self.x, self.function == Inverse.INTEGER, self.function == Inverse.RSQRT
        significand = Cat(Const(0, INTEGER_BITS - SIGNIFICAND_BITS), x.fraction, Const(1, 1))
        # With y = 1/significand or 1/sqrt(significand or twice that) in (1/2, 1], the significand of the result is 2y.
        whole = EXPONENT_BIAS - INTEGER_BITS + UNIT_BITS
        quotient = 2 * EXPONENT_BIAS - 1 - x.exponent
        half = EXPONENT_BIAS // 2 + EXPONENT_BIAS - ((x.exponent + 1) >> 1)
        m.d.sync += [
            number.eq(Mux(integer, self.integer, significand)),
            about.sign.eq(x.sign & ~integer),
            about.exponent.eq(Mux(integer, whole, Mux(root, half, quotient))),
            about.zero.eq(is_infinite(x) & ~integer),
            about.infinite.eq(is_zero(x) & ~integer),
            about.nan.eq((is_nan(x) | (root & x.sign & ~is_zero(x))) & ~integer),
        ]

    def _shift(self, m: Module, number, about, unit: int) -> None:
        """Shift left by 0 to 3 units, until one of the highest bits is set. Only an integer moves."""
        empty = [~number[-(count * unit) :].any() for count in (1, 2, 3)]
        units = Mux(empty[2], 3, Mux(empty[1], 2, empty[0]))
        with m.Switch(units):
            for count in range(4):
                with m.Case(count):
                    m.d.sync += [
                        number.eq(number << (count * unit)),
                        about.exponent.eq(about.exponent + count * unit),
                    ]

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
