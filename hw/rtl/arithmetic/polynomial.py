# SPDX-License-Identifier: Apache-2.0
"""A table of quadratic polynomials, with two multipliers."""

from amaranth.hdl import Cat, Const, Module, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.boards.rom import Rom
from hw.rtl.common.stage import stage
from hw.spec.numerics.functions import OFFSET_BITS, VALUE_BITS, Table


def _signed_bits(values) -> int:
    """Bits of the widest of the values in two's complement."""
    return int(max(values.max(), -values.min() - 1)).bit_length() + 1


class Polynomial(wiring.Component):
    """``table.evaluate(position)``: :class:`hw.spec.numerics.functions.Table`. Throughput 1 per cycle.

    The table is read through two registers, those of a block RAM. Each multiplier has a register behind it, and one
    behind the sum that follows, those of a DSP slice.

    Parameters
    ----------
    table : the polynomials; the number of rows is a power of two

    Members
    -------
    moves : one bit per stage: the stage's input is valid and is registered; otherwise the stage keeps its registers
    position : row, and ``OFFSET_BITS`` bits of the place in it
    value : in units of ``2**-VALUE_BITS``, ``latency`` cycles later

    Raises
    ------
    ValueError : a value could be negative, or not fit
    """

    latency = 6
    """Two registers of the table, then two of each multiplier."""

    def __init__(self, table: Table):
        # Products are rounded, which adds less than 1. An offset is at most half an interval.
        slopes = abs(table.slopes) + abs(table.curvatures) // 2 + 1
        if (table.constants < slopes // 2 + 1).any() or (table.constants + slopes // 2 + 1).max() >> (VALUE_BITS + 1):
            raise ValueError("a polynomial's value is negative or does not fit")
        self._slope_bits = int(slopes.max()).bit_length() + 1
        self._row = data.StructLayout(
            {
                "constant": int(table.constants.max()).bit_length(),
                "slope": signed(_signed_bits(table.slopes)),
                "curvature": signed(_signed_bits(table.curvatures)),
            }
        )
        rows = [dict(zip(("constant", "slope", "curvature"), map(int, row))) for row in zip(*table)]
        self.rom = Rom(self._row.size, [self._row.const(row).as_bits() for row in rows])
        super().__init__(
            {
                "moves": In(self.latency),
                "position": In((len(rows) - 1).bit_length() + OFFSET_BITS),
                "value": Out(VALUE_BITS + 1),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.rom = rom = self.rom
        moves, place = self.moves, self.position[:OFFSET_BITS]
        m.d.comb += [rom.address.eq(self.position[OFFSET_BITS:]), rom.enable.eq(moves[0])]
        offset_shape = signed(OFFSET_BITS)
        # The place with its highest bit inverted is the signed offset from the centre.
        fetched = stage(m, moves[0], "fetched", offset=(offset_shape, Cat(place[:-1], ~place[-1])))
        row = stage(m, moves[1], "row", offset=(offset_shape, fetched.offset), row=(self._row, rom.data))
        product = row.row.curvature * row.offset
        curved = stage(
            m,
            moves[2],
            "curved",
            offset=(offset_shape, row.offset),
            row=(self._row, row.row),
            product=(product.shape(), product),
        )
        sloped = stage(
            m,
            moves[3],
            "sloped",
            offset=(offset_shape, curved.offset),
            constant=(self._row["constant"].shape, curved.row.constant),
            slope=(signed(self._slope_bits), self._sum(curved.row.slope, curved.product)),
        )
        product = sloped.slope * sloped.offset
        risen = stage(
            m,
            moves[4],
            "risen",
            constant=(self._row["constant"].shape, sloped.constant),
            product=(product.shape(), product),
        )
        with m.If(moves[5]):
            m.d.sync += self.value.eq(self._sum(risen.constant, risen.product))
        return m

    def _sum(self, addend, product):
        """``addend + product / 2**OFFSET_BITS``, half up: the half bit is below the addend."""
        above = Cat(Const(1 << (OFFSET_BITS - 1), OFFSET_BITS), addend)
        return ((above.as_signed() if addend.shape().signed else above) + product) >> OFFSET_BITS
