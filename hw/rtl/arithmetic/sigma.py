# SPDX-License-Identifier: Apache-2.0
"""The logistic function."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.polynomial import Polynomial
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.stage import stage
from hw.spec.numerics.float32 import EXPONENT_BIAS, SIGNIFICAND_BITS
from hw.spec.numerics.functions import (
    OFFSET_BITS,
    ONE,
    SIGMA_INDEX_BITS,
    SIGMA_RANGE_BITS,
    UNIT_BITS,
    VALUE_BITS,
    sigma_table,
)

_POSITION_BITS = SIGMA_INDEX_BITS + OFFSET_BITS
_TOP = EXPONENT_BIAS + SIGMA_RANGE_BITS - 1
"""Exponent field of the numbers in the upper half of the range. Their leading one is the position's highest bit."""


class Sigma(Block):
    """1 / (1 + exp(-x)), bit for bit :func:`hw.spec.numerics.functions.sigma`. Throughput 1 per cycle.

    Members
    -------
    valid : there is an argument
    x : float32
    result : in units of ``2**-UNIT_BITS``, from 0 to ``ONE``, ``latency`` cycles later
    """

    def __init__(self):
        self.polynomial = Polynomial(sigma_table())
        super().__init__({"valid": In(1), "x": In(FLOAT), "result": Out(UNIT_BITS + 1)})

    @property
    def latency(self) -> int:
        """Cycles from ``x`` to ``result``: distance, position, polynomial, rounding, sign."""
        return 2 + self.polynomial.latency + 2

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.polynomial = polynomial = self.polynomial
        moves = Cat(self.valid, moving := Signal(self.latency - 1))
        m.d.sync += moving.eq(moves)
        x = self.x
        # A position shifted by all its bits is 0. This is right for a zero, too, whose leading one is wrong.
        far = x.exponent <= _TOP - _POSITION_BITS
        argument = stage(
            m,
            moves[0],
            "argument",
            significand=(SIGNIFICAND_BITS, Cat(x.fraction, Const(1, 1))),
            places=(_POSITION_BITS.bit_length(), Mux(far, _POSITION_BITS, _TOP - x.exponent)),
            about=(2, Cat(x.sign, x.exponent > _TOP)),
        )
        highest = Cat(Const(0, _POSITION_BITS - SIGNIFICAND_BITS), argument.significand)
        position = stage(m, moves[1], "placed", position=(_POSITION_BITS, highest >> argument.places)).position
        m.d.comb += [polynomial.position.eq(position), polynomial.moves.eq(moves[2:-2])]
        negative, outside = delay(m, argument.about, 1 + polynomial.latency, name="about")
        # Half up: the carry of the bit below the unit.
        value = polynomial.value
        rounded = value[VALUE_BITS - UNIT_BITS :] + value[VALUE_BITS - UNIT_BITS - 1]
        magnitude = stage(
            m,
            moves[-2],
            "magnitude",
            value=(UNIT_BITS + 1, Mux(outside, ONE, rounded)),
            negative=(1, negative),
        )
        with m.If(moves[-1]):
            m.d.sync += self.result.eq(Mux(magnitude.negative, ONE - magnitude.value, magnitude.value))
        return m
