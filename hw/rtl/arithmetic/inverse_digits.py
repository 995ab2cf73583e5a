# SPDX-License-Identifier: Apache-2.0
"""The digits of 1/n and 1/sqrt(n): one recurrence of two registers for both."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.spec.numerics.float32 import FRACTION_BITS, SIGNIFICAND_BITS
from hw.spec.numerics.reciprocal import INTEGER_BITS

DIGITS = SIGNIFICAND_BITS + 1
"""Bits of y below the point: a significand, whose leading one is the first of them, and the half bit."""
_ROOT_FRACTION = 2 * SIGNIFICAND_BITS
"""Fraction bits of the registers for 1/sqrt(n): the last test needs 23 of n and the square of half the last digit."""


class InverseDigits(wiring.Component):
    """The first 25 digits of y = 1/n for n in [1, 2), or of y = 1/sqrt(n) for n in [1, 4), both in (1/2, 1].

    For y = 1 all digits are ones, so y is always larger than its digits. The first one is 1. With digits y_j up to
    ``2**-j``, the next one is 1 if the larger y still has ``n y < 1`` or ``n y**2 < 1``. Two registers keep what this
    needs, so that a digit takes one subtraction::

        1/n        remainder_j = 2**j (1 - n y_j),    test_j = n
        1/sqrt(n)  remainder_j = 2**j (1 - n y_j**2), test_j = 2 n y_j + n 2**-(j+1)

    The digit is 1 if ``2 remainder >= test``, and the next remainder is then the difference. The next test of a root is
    ``test + 3 step`` after a 1 and ``test - step`` after a 0, with ``step = n 2**-(j+2)``; for 1/n a step is 0. Both
    are registers, because an addition after the digit is known would double the path.

    Widths: in 1/n a remainder is below n, so both have the 53 bits of n. In 1/sqrt(n), ``n y < 2``: with 48 fraction
    bits a test is below 4 + 1 and a remainder below 5, in 51 bits.

    Members
    -------
    start : begin
    root : y = 1/sqrt(n), and not 1/n
    number : n of 1/n, with 52 fraction bits
    radicand : n of 1/sqrt(n), with 23 fraction bits
    digits : 25 bits
    done : ``digits`` are complete; high for one cycle, ``latency`` cycles after ``start``
    """

    latency = DIGITS
    """One cycle to begin, one for each digit after the first."""

    def __init__(self):
        super().__init__(
            {
                "start": In(1),
                "root": In(1),
                "number": In(INTEGER_BITS),
                "radicand": In(SIGNIFICAND_BITS + 1),
                "digits": Out(DIGITS),
                "done": Out(1),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        stepping = Signal()
        remainder, after_0, after_1 = (
            Signal(INTEGER_BITS, name=name, reset_less=True) for name in ("remainder", "after_0", "after_1")
        )
        # A step is below 4/8 and three of them are below 2. The last step that is used still has all its bits.
        step, steps = (Signal(_ROOT_FRACTION + more, name=f"step_{more}", reset_less=True) for more in (-1, 1))
        test, twice = Mux(self.digits[0], after_1, after_0), Cat(Const(0, 1), remainder)
        difference = Signal(INTEGER_BITS + 2)
        m.d.comb += difference.eq(twice - test)
        one = ~difference[-1]
        with m.If(self.start):
            self._begin(m, remainder, after_1, step, steps)
        with m.Elif(stepping):
            m.d.sync += [
                remainder.eq(Mux(one, difference, twice)),
                after_1.eq(test + steps),
                after_0.eq(test - step),
                step.eq(step >> 1),
                steps.eq(steps >> 1),
                self.digits.eq(Cat(one, self.digits)),
            ]
        # The leading one is in the last place but one before the last digit.
        last = stepping & self.digits[-2]
        m.d.sync += [stepping.eq(self.start | (stepping & ~last)), self.done.eq(last)]
        return m

    def _begin(self, m: Module, remainder, after_1, step, steps) -> None:
        """The registers for y = 1/2: remainders 2 - n and 2 - n/2, tests n and 5n/4."""
        n = self.radicand
        # Its lowest bit in the registers' unit.
        place = _ROOT_FRACTION - FRACTION_BITS
        less = Mux(self.root, n << (place - 1), self.number)
        below = (Const(0, INTEGER_BITS + 1) - less)[:INTEGER_BITS]
        # 2 - n/2 is below 2: the negative number without its sign.
        m.d.sync += [
            remainder.eq(Mux(self.root, below[: _ROOT_FRACTION + 1], below)),
            after_1.eq(Mux(self.root, (n + (n << 2)) << (place - 2), self.number)),
            step.eq(Mux(self.root, n << (place - 3), 0)),
            steps.eq(Mux(self.root, (n + (n << 1)) << (place - 3), 0)),
            self.digits.eq(1),
        ]
