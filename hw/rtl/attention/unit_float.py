# SPDX-License-Identifier: Apache-2.0
"""Probabilities as float32."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.leading_zeros import leading_zeros
from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.stage import stage
from hw.spec.numerics.float32 import EXPONENT_BIAS, FRACTION_BITS
from hw.spec.numerics.functions import UNIT_BITS


class UnitFloat(Block):
    """A multiple of ``2**-UNIT_BITS`` from 0 to 1 as float32, which is exact. Throughput 1 per cycle.

    Members
    -------
    valid : there is a number
    value : in units of ``2**-UNIT_BITS``, from 0 to ``2**UNIT_BITS``
    result : float32, ``latency`` cycles later
    """

    latency = 2

    def __init__(self):
        super().__init__({"valid": In(1), "value": In(UNIT_BITS + 1), "result": Out(FLOAT)})

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        moves = Signal()
        m.d.sync += moves.eq(self.valid)
        zeros = leading_zeros(self.value)
        counted = stage(m, self.valid, "counted", value=(len(self.value), self.value), zeros=(len(zeros), zeros))
        # Only 1 has all UNIT_BITS + 1 bits, and those below its highest are 0.
        shifted = (counted.value << counted.zeros)[UNIT_BITS - FRACTION_BITS : UNIT_BITS]
        with m.If(moves):
            m.d.sync += [
                self.result.fraction.eq(shifted),
                self.result.exponent.eq(Mux(counted.value.any(), EXPONENT_BIAS - counted.zeros, 0)),
            ]
        return m
