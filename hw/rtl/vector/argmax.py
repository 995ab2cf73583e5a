# SPDX-License-Identifier: Apache-2.0
"""The largest number of a piece, and its place."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT, is_nan, is_zero
from hw.rtl.common.stage import stage
from hw.spec.config import FLOAT_BITS
from hw.spec.numerics.float32 import EXPONENT_SPECIAL, FRACTION_BITS, NAN_FRACTION
from hw.spec.numerics.vector import PIECE

_NAN = EXPONENT_SPECIAL << FRACTION_BITS | NAN_FRACTION
_NAN_KEY, _LOWEST_KEY = (1 << (FLOAT_BITS - 1)) - 1, 1 << (FLOAT_BITS - 1)


class Argmax(Block):
    """Maximum and argmax of each piece, bit for bit :func:`hw.spec.numerics.vector.piece_maxima`.

    Throughput 1 row per cycle; pieces may follow each other at once.

    Parameters
    ----------
    lanes : numbers of a row, a power of two

    Members
    -------
    valid : there is a row
    values : float32
    keep : lanes that have a number; the lowest one has, and only the last row of a piece may have fewer than all
    last : the row is the last one of a piece, which has at most ``PIECE`` columns
    done : high for one cycle, ``latency`` cycles after the last row
    maximum : the first of the largest numbers
    index : its column, from the first one of the piece
    """

    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(
            {
                "valid": In(1),
                "values": In(data.ArrayLayout(FLOAT, lanes)),
                "keep": In(lanes),
                "last": In(1),
                "done": Out(1),
                "maximum": Out(FLOAT),
                "index": Out(range(PIECE)),
            }
        )

    @property
    def _lane_bits(self) -> int:
        return (self.lanes - 1).bit_length()

    @property
    def latency(self) -> int:
        """Cycles from a piece's last row to ``maximum``: keys, lanes in pairs, rows."""
        return 1 + self._lane_bits + 1

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        moves = Cat(self.valid, moving := Signal(self.latency - 1))
        m.d.sync += moving.eq(moves)
        row = stage(
            m,
            moves[0],
            "row",
            **{f"lane_{lane}": self._enter(value, self.keep[lane]) for lane, value in enumerate(self.values)},
            last=(1, self.last),
        )
        for level in range(self._lane_bits):
            lanes = [getattr(row, f"lane_{lane}") for lane in range(self.lanes >> level)]
            pairs = [self._larger(level, low, high) for low, high in zip(lanes[::2], lanes[1::2])]
            values = {f"lane_{lane}": pair for lane, pair in enumerate(pairs)}
            row = stage(m, moves[1 + level], f"level_{level}", **values, last=(1, row.last))
        self._follow(m, moves[-1], row.lane_0, row.last)
        return m

    def _layout(self, level: int) -> data.StructLayout:
        """A candidate among ``2**level`` lanes."""
        return data.StructLayout({"key": signed(FLOAT_BITS), "number": FLOAT, "lane": level})

    def _enter(self, number, keep):
        """Keys compare as signed integers like the numbers: the order of :func:`hw.spec.numerics.float32.order`.

        Negative magnitudes are inverted, so no number has the lowest key of all, which is that of lanes without one.
        """
        zero, nan = is_zero(number), is_nan(number)
        magnitude = Cat(number.fraction, number.exponent)
        usual = Cat(magnitude ^ number.sign.replicate(len(magnitude)), number.sign)
        key = Mux(zero, 0, Mux(nan, _NAN_KEY, usual))
        return self._layout(0), Cat(Mux(keep, key, _LOWEST_KEY), Mux(nan, _NAN, number))

    def _larger(self, level: int, low, high):
        """The lower lane of two equal ones."""
        above = high.key > low.key
        names = "key", "number", "lane"
        return self._layout(level + 1), Cat(*(Mux(above, high[name], low[name]) for name in names), above)

    def _follow(self, m: Module, move, candidate, last) -> None:
        """The largest of the rows so far. The first one of a piece replaces it."""
        key, first = Signal(signed(FLOAT_BITS), reset_less=True), Signal(init=1)
        place = Signal(range(PIECE // self.lanes))
        with m.If(move):
            m.d.sync += [first.eq(last), place.eq(Mux(last, 0, place + 1))]
            with m.If(first | (candidate.key > key)):
                m.d.sync += [
                    key.eq(candidate.key),
                    self.maximum.eq(candidate.number),
                    self.index.eq(Cat(candidate.lane, place)),
                ]
        m.d.sync += self.done.eq(move & last)
