# SPDX-License-Identifier: Apache-2.0
"""Rounding of float32 to a mantissa with a given exponent."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.float32 import FLOAT
from hw.spec.config import EXPONENT_BITS
from hw.spec.numerics.float32 import EXPONENT_BIAS, FRACTION_BITS, SIGNIFICAND_BITS

_UNIT_EXPONENT = EXPONENT_BIAS + FRACTION_BITS
"""Biased exponent with which the significand's lowest bit has the value 1."""


def significand(number) -> Cat:
    """The 24-bit significand of a :data:`FLOAT`; its leading bit is 0 for subnormal numbers."""
    return Cat(number.fraction, number.exponent.any())


class Mantissa(wiring.Component):
    """``rint(value / 2**exponent)``, half to even. Latency 3 cycles, throughput 1 per cycle.

    Parameters
    ----------
    bits : bits of a mantissa, its sign included

    Members
    -------
    moves : one bit per stage: the stage's input is valid and is registered; otherwise the stage keeps its registers
    value : float32
    exponent : the mantissa's exponent; with it the result fits
    mantissa : the result
    """

    latency = 3

    def __init__(self, bits: int):
        super().__init__(
            {
                "moves": In(self.latency),
                "value": In(FLOAT),
                "exponent": In(signed(EXPONENT_BITS)),
                "mantissa": Out(signed(bits)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        value, bits = self.value, len(self.mantissa)
        # Distance of the right shift. With 25 places or more the result is 0, also after rounding.
        most = SIGNIFICAND_BITS + 1
        places = Signal(range(most), reset_less=True)
        far = Signal(reset_less=True)
        number = Signal(SIGNIFICAND_BITS, reset_less=True)
        signs = [Signal(reset_less=True, name=f"sign_{stage}") for stage in range(2)]
        distance = Signal(signed(EXPONENT_BITS + 3))
        m.d.comb += distance.eq(self.exponent + _UNIT_EXPONENT - Mux(value.exponent.any(), value.exponent, 1))
        with m.If(self.moves[0]):
            m.d.sync += [
                places.eq(distance),
                far.eq(distance >= most),
                number.eq(significand(value)),
                signs[0].eq(value.sign),
            ]
        moved = Signal(SIGNIFICAND_BITS + most, reset_less=True)
        with m.If(self.moves[1]):
            m.d.sync += [
                moved.eq(Mux(far, 0, Cat(Const(0, most), number) >> places)),
                signs[1].eq(signs[0]),
            ]
        # Below the result's lowest bit are the half bit and the remaining bits, which decide whether this is a tie.
        kept, half, rest = moved[most:], moved[most - 1], moved[: most - 1].any()
        sign = signs[1].replicate(bits)
        with m.If(self.moves[2]):
            m.d.sync += self.mantissa.eq(((kept + (half & (rest | kept[0])))[:bits] ^ sign) + signs[1])
        return m
