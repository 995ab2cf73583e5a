# SPDX-License-Identifier: Apache-2.0
"""A token's exponent, with which its elements are rounded to mantissas."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.mantissa import significand
from hw.spec.config import EXPONENT_BITS, AcceleratorConfig
from hw.spec.numerics.float32 import EXPONENT_SPECIAL


class TokenExponent(wiring.Component):
    """Finds a token's exponent from its largest magnitude.

    ``e`` is the smallest integer with ``rint(largest / 2**e) <= 2**(activation_bits - 1) - 1``; 0 for zero.
    See :func:`hw.spec.numerics.linear.quantize_activations`. Latency 1 cycle, throughput 1 per cycle.

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
