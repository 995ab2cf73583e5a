# SPDX-License-Identifier: Apache-2.0
"""The scale of RMSNorm."""

from amaranth.hdl import Module
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.vector.float_adder import FloatAdder
from hw.rtl.vector.float_multiplier import FloatMultiplier
from hw.rtl.vector.reciprocal import Inverse, Reciprocal
from hw.rtl.vector.sum_of_squares import SumOfSquares


class NormScale(Block):
    """r of a token, bit for bit :func:`hw.spec.numerics.vector.norm_scale`: ``1 / sqrt(Q * inverse + eps)``.

    Rows are taken as by :class:`hw.rtl.vector.sum_of_squares.SumOfSquares`, one in ``interval`` cycles. The next
    token's rows are taken from the cycle on in which Q is there.

    Parameters
    ----------
    lanes : elements of a row, 1, 2, 4 or 8

    Members
    -------
    valid, ready, values, last : the rows of a token
    inverse, eps : float32(1/K) and float32(eps); they stay until ``done``
    done : high for one cycle, ``latency`` cycles after the last row
    result : float32, which stays until the next one
    """

    def __init__(self, lanes: int):
        self.squares, self.reciprocal = SumOfSquares(lanes), Reciprocal()
        self.multiplier, self.adder = FloatMultiplier(), FloatAdder()
        super().__init__(
            {
                "valid": In(1),
                "ready": Out(1),
                "values": In(data.ArrayLayout(FLOAT, lanes)),
                "last": In(1),
                "inverse": In(FLOAT),
                "eps": In(FLOAT),
                "done": Out(1),
                "result": Out(FLOAT),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from a token's last row to ``result``: Q, product, sum, 1/sqrt."""
        return sum(part.latency for part in (self.squares, self.multiplier, self.adder, self.reciprocal))

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {**self.squares.properties(), "latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.squares, m.submodules.reciprocal = squares, reciprocal = self.squares, self.reciprocal
        m.submodules.multiplier, m.submodules.adder = multiplier, adder = self.multiplier, self.adder
        multiplied = delay(m, squares.done, multiplier.latency, name="multiplied", reset=True)
        # The next token's Q takes longer than 1/sqrt, so that is always ready.
        m.d.comb += [
            squares.valid.eq(self.valid),
            squares.values.eq(self.values),
            squares.last.eq(self.last),
            self.ready.eq(squares.ready),
            multiplier.valid.eq(squares.done),
            multiplier.a.eq(squares.result),
            multiplier.b.eq(self.inverse),
            adder.valid.eq(multiplied),
            adder.a.eq(multiplier.result),
            adder.b.eq(self.eps),
            reciprocal.valid.eq(delay(m, multiplied, adder.latency, name="added", reset=True)),
            reciprocal.function.eq(Inverse.RSQRT),
            reciprocal.x.eq(adder.result),
            self.done.eq(reciprocal.done),
            self.result.eq(reciprocal.result),
        ]
        return m
