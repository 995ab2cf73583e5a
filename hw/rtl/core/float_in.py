# SPDX-License-Identifier: Apache-2.0
"""Conversion of float32 to mantissas: a token's exponent, and the rounding of its elements."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.float32 import FLOAT
from hw.spec.config import EXPONENT_BITS, AcceleratorConfig
from hw.spec.numerics.float32 import (
    EXPONENT_BIAS,
    EXPONENT_SPECIAL,
    FRACTION_BITS,
    SIGNIFICAND_BITS,
)

_UNIT_EXPONENT = EXPONENT_BIAS + FRACTION_BITS
"""Biased exponent with which the significand's lowest bit has the value 1."""


def significand(number) -> Cat:
    """The 24-bit significand of a :data:`FLOAT`; its leading bit is 0 for subnormal numbers."""
    return Cat(number.fraction, number.exponent.any())


class TokenExponent(wiring.Component):
    """Finds a token's exponent from its largest magnitude.

    ``e`` is the smallest integer with ``rint(largest / 2**e) <= 2**(activation_bits - 1) - 1``; 0 for zero.
    See :func:`hw.spec.numerics.linear.quantise_activations`. Latency 1 cycle, throughput 1 per cycle.

    Members
    -------
    largest : float32 bits without the sign
    exponent : e
    non_finite : the largest magnitude is infinite or not a number
    out_of_range : e does not fit its field
    """

    latency = 1

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {"largest": In(31), "exponent": Out(signed(EXPONENT_BITS)), "non_finite": Out(1), "out_of_range": Out(1)}
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        bits = self.config.activation_bits
        number = data.View(FLOAT, Cat(self.largest, Const(0, 1)))
        # If all bits of the mantissa and the one below are 1, rounding carries into another bit.
        carries = significand(number)[-bits:].all()
        exponent = Signal(signed(EXPONENT_BITS + 2))
        low, high = -(1 << (EXPONENT_BITS - 1)), (1 << (EXPONENT_BITS - 1)) - 1
        zero = ~self.largest.any()
        m.d.comb += exponent.eq(number.exponent - (126 + bits - 1) + carries)
        m.d.sync += [
            self.exponent.eq(Mux(zero, 0, exponent)),
            self.non_finite.eq(number.exponent == EXPONENT_SPECIAL),
            # The exponent of a subnormal number is lower than its field.
            self.out_of_range.eq(~zero & ((exponent < low) | (exponent > high) | (number.exponent == 0))),
        ]
        return m


class Mantissa(wiring.Component):
    """``rint(value / 2**exponent)``, half to even. Latency 3 cycles, throughput 1 per cycle.

    Members
    -------
    moves : one bit per stage: the stage's input is valid and is registered; otherwise the stage keeps its registers
    value : float32
    exponent : exponent of its token; with it the result fits
    mantissa : the result
    """

    latency = 3

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "moves": In(self.latency),
                "value": In(FLOAT),
                "exponent": In(signed(EXPONENT_BITS)),
                "mantissa": Out(signed(config.activation_bits)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        value, bits = self.value, self.config.activation_bits
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
