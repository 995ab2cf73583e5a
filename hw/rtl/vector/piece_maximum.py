# SPDX-License-Identifier: Apache-2.0
"""The largest number of each piece of a row, and its place."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT, is_nan, is_zero
from hw.rtl.common.results import place_layout
from hw.rtl.common.stage import stage
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.numerics.float32 import EXPONENT_SPECIAL, FRACTION_BITS, NAN_FRACTION

_NAN = EXPONENT_SPECIAL << FRACTION_BITS | NAN_FRACTION
_NAN_KEY, _LOWEST_KEY = (1 << (FLOAT_BITS - 1)) - 1, 1 << (FLOAT_BITS - 1)


class PieceMaximum(Block):
    """Maximum and argmax of each piece of each token, bit for bit :func:`hw.spec.numerics.vector.piece_maxima`.

    Transfers of several tokens may take turns: the largest number so far is kept for each token. Throughput 1 transfer
    per cycle; pieces may follow each other at once.

    Members
    -------
    valid : there are numbers
    values : float32
    keep : lanes that have a number; the valid ones come first, and the first one is valid
    token, column : their place (:func:`hw.rtl.common.results.place_layout`)
    maximum : the first of the largest numbers of the piece; ``latency`` cycles after its last transfer
    index : its column, from the first one of the piece
    """

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.vector_lanes
        place = place_layout(config, self.lanes)
        super().__init__(
            {
                "valid": In(1),
                "values": In(data.ArrayLayout(FLOAT, self.lanes)),
                "keep": In(self.lanes),
                **{name: In(place[name].shape) for name in ("token", "column")},
                "maximum": Out(FLOAT),
                "index": Out(FLOAT_BITS),
            }
        )

    @property
    def _levels(self) -> int:
        return self.lanes.bit_length() - 1

    @property
    def latency(self) -> int:
        """Cycles from a piece's last transfer to ``maximum``: keys, lanes in pairs, transfers."""
        return 1 + self._levels + 1

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        moves = Cat(self.valid, moving := Signal(self.latency - 1))
        m.d.sync += moving.eq(moves)
        place = {name: (self.signature.members[name].shape, getattr(self, name)) for name in ("token", "column")}
        lanes = {f"lane_{lane}": self._enter(value, self.keep[lane]) for lane, value in enumerate(self.values)}
        row = stage(m, moves[0], "row", **lanes, **place)
        for level in range(self._levels):
            pairs = {
                f"lane_{lane}": self._larger(level, row[f"lane_{2 * lane}"], row[f"lane_{2 * lane + 1}"])
                for lane in range(self.lanes >> (level + 1))
            }
            place = {name: (shape, row[name]) for name, (shape, _) in place.items()}
            row = stage(m, moves[1 + level], f"level_{level}", **pairs, **place)
        self._follow(m, moves[-1], row)
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

    def _follow(self, m: Module, move, row) -> None:
        """The largest number of the token's transfers so far. The first one of a piece replaces it.

        Read, comparison and write are in one cycle, so transfers of one token may follow each other at once.
        """
        best = data.StructLayout({"key": signed(FLOAT_BITS), "number": FLOAT, "index": len(self.column) + self._levels})
        m.submodules.best = memory = Memory(shape=best, depth=1 << len(self.token), init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        candidate, larger = row.lane_0, Signal()
        m.d.comb += [
            read.addr.eq(row.token),
            larger.eq(~row.column.any() | (candidate.key > read.data.key)),
            write.addr.eq(row.token),
            write.data.key.eq(Mux(larger, candidate.key, read.data.key)),
            write.data.number.eq(Mux(larger, candidate.number, read.data.number)),
            write.data.index.eq(Mux(larger, Cat(candidate.lane, row.column), read.data.index)),
            write.en.eq(move),
        ]
        with m.If(move):
            m.d.sync += [self.maximum.eq(write.data.number), self.index.eq(write.data.index)]
