# SPDX-License-Identifier: Apache-2.0
"""Block floating point: a common exponent for a group of numbers, and their mantissas."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT, is_zero
from hw.rtl.common.mantissa import Mantissa
from hw.rtl.common.stage import stage
from hw.spec.config import EXPONENT_BITS
from hw.spec.numerics.block_float import BLOCK
from hw.spec.numerics.float32 import EXPONENT_BIAS, EXPONENT_FIELD_BITS, EXPONENT_SPECIAL, FRACTION_BITS
from hw.spec.numerics.linear import EXPONENT_MIN

_MAGNITUDE = EXPONENT_FIELD_BITS + FRACTION_BITS


class BlockFloat(Block):
    """Groups of ``BLOCK`` numbers, bit for bit :func:`hw.spec.numerics.block_float.quantize` without ``spread``.

    The rows of a group are stored until its largest magnitude is known. Then its mantissas come without a gap, one row
    per cycle. Throughput 1 row per cycle: groups may follow each other at once, and their rows may come with gaps.

    Parameters
    ----------
    lanes : numbers of a row, 1, 2, 4 or 8
    bits : bits of a mantissa, its sign included: 8 or 16

    Members
    -------
    valid : there is a row; every ``BLOCK / lanes`` rows are a group
    values : float32; a shorter group ends with zeros
    given : there is a row of mantissas, the first one ``latency`` cycles after the last row of its group
    mantissas, exponent : the row, and the exponent of its group
    non_finite : the group has an infinity or a NaN, so its mantissas have no meaning
    """

    def __init__(self, lanes: int, bits: int):
        self.lanes, self.bits, self.rows = lanes, bits, BLOCK // lanes
        super().__init__(
            {
                "valid": In(1),
                "values": In(data.ArrayLayout(FLOAT, lanes)),
                "given": Out(1),
                "mantissas": Out(data.ArrayLayout(signed(bits), lanes)),
                "exponent": Out(signed(EXPONENT_BITS)),
                "non_finite": Out(1),
            }
        )

    @property
    def _wait(self) -> int:
        """Cycles from a group's last row to its exponent: lanes in pairs, rows, two for the exponent."""
        return (self.lanes - 1).bit_length() + 3

    @property
    def latency(self) -> int:
        """Cycles from a group's last row to its first mantissas: exponent, reading, rounding."""
        return self._wait + 1 + Mantissa.latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "rows": self.rows}

    def elaborate(self, platform) -> Module:
        m = Module()
        # A row's place is written again by the second group after it. If the exponent takes longer than the rows of a
        # group, that is too early, and it is the fourth one.
        groups = 2 if self._wait <= self.rows else 4
        written, taken = (Signal(range(groups * self.rows), name=name) for name in ("written", "taken"))
        end = self.rows - 1
        exponent, found = self._exponent(m, (written & end) == end)
        more, read = Signal(), Signal()
        m.d.comb += read.eq(found | more)
        m.d.sync += [
            written.eq(written + self.valid),
            taken.eq(taken + read),
            more.eq(read & ((taken & end) != end)),
        ]
        m.submodules.memory = memory = Memory(shape=self.values.shape(), depth=groups * self.rows, init=[])
        write, row = memory.write_port(), memory.read_port()
        m.d.comb += [write.en.eq(self.valid), write.addr.eq(written), write.data.eq(self.values)]
        m.d.comb += [row.en.eq(read), row.addr.eq(taken)]
        current = stage(m, read, "current", exponent=(exponent.shape(), exponent))
        self._round(m, read, row.data, current.exponent)
        return m

    def _exponent(self, m: Module, last):
        """The exponent of a group, and whether the group is not finite; both stay until the next one is found."""
        largest, last = self._largest(m, last)
        ended = Signal(2)
        m.d.sync += ended.eq(Cat(last, ended))
        number = data.View(FLOAT, Cat(largest, Const(0, 1)))
        # If all bits of the mantissa and the one below are 1, rounding carries into another bit.
        top = Cat(number.fraction, Const(1, 1))[-self.bits :]
        found = stage(
            m,
            ended[0],
            "found",
            exponent=(signed(EXPONENT_FIELD_BITS + 1), number.exponent - (EXPONENT_BIAS - 1 + self.bits - 1)),
            carries=(1, top.all()),
            non_finite=(1, number.exponent == EXPONENT_SPECIAL),
        )
        exponent = found.exponent + found.carries
        shape = data.StructLayout({"exponent": signed(EXPONENT_BITS), "non_finite": 1})
        # Zeros and subnormal numbers have the lowest exponent, too.
        bounded = Mux(exponent < EXPONENT_MIN, EXPONENT_MIN, exponent)[:EXPONENT_BITS]
        common = Signal(shape, reset_less=True)
        with m.If(ended[1]):
            m.d.sync += [common.exponent.eq(bounded), common.non_finite.eq(found.non_finite)]
        given = Signal()
        m.d.sync += given.eq(ended[1])
        return common, given

    def _largest(self, m: Module, last):
        """The largest magnitude of the rows so far; and whether the row that comes to it now is a group's last one."""
        values = [Cat(value.fraction, value.exponent) for value in self.values]
        move = self.valid
        while len(values) > 1:
            larger = [Mux(a > b, a, b) for a, b in zip(values[::2], values[1::2])]
            pairs = {f"pair_{index}": (_MAGNITUDE, value) for index, value in enumerate(larger)}
            found = stage(m, move, f"largest_{len(pairs)}", **pairs, last=(1, last))
            values, last = [getattr(found, name) for name in pairs], found.last
            before, move = move, Signal(name=f"moves_{len(pairs)}")
            m.d.sync += move.eq(before)
        largest, first = Signal(_MAGNITUDE, reset_less=True), Signal(init=1)
        with m.If(move):
            m.d.sync += [largest.eq(Mux(first | (values[0] > largest), values[0], largest)), first.eq(last)]
        return largest, move & last

    def _round(self, m: Module, read, row, common) -> None:
        """Subnormal numbers count as zero."""
        moves = Cat(Signal(1 + Mantissa.latency, name="rounding"))
        m.d.sync += moves.eq(Cat(read, moves))
        for lane in range(self.lanes):
            m.submodules[f"mantissa_{lane}"] = mantissa = Mantissa(self.bits)
            value = row[lane]
            m.d.comb += [
                mantissa.moves.eq(moves),
                mantissa.value.eq(Mux(is_zero(value), 0, value)),
                mantissa.exponent.eq(common.exponent),
                self.mantissas[lane].eq(mantissa.mantissa),
            ]
        rounded = delay(m, common, Mantissa.latency, name="common")
        m.d.comb += [
            self.given.eq(moves[-1]),
            self.exponent.eq(rounded.exponent),
            self.non_finite.eq(rounded.non_finite),
        ]
