# SPDX-License-Identifier: Apache-2.0
"""Keys and values in block floating point: a head at a time."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo, Credits, StreamFifo
from hw.rtl.common.float32 import FLOAT, is_zero
from hw.rtl.common.mantissa import Mantissa
from hw.rtl.common.stage import stage
from hw.spec.config import EXPONENT_BITS
from hw.spec.memory.kv_cache import KEY_BITS
from hw.spec.numerics.attention import key_spread
from hw.spec.numerics.block_float import BLOCK
from hw.spec.numerics.float32 import EXPONENT_BIAS, EXPONENT_FIELD_BITS, EXPONENT_SPECIAL, FRACTION_BITS
from hw.spec.numerics.linear import EXPONENT_MIN
from hw.spec.ops.epilogue import MAX_HEAD

NARROW, WIDE = KEY_BITS
GROUPS = MAX_HEAD // BLOCK
_MAGNITUDE = EXPONENT_FIELD_BITS + FRACTION_BITS
_HALVES = 2


def head_layout() -> data.StructLayout:
    """A head, besides its mantissas.

    keys, wide : as in its rows
    exponents : of each group
    largest : the largest of them
    last_group : index of its last group
    """
    exponents = data.ArrayLayout(signed(EXPONENT_BITS), GROUPS)
    return data.StructLayout(
        {"keys": 1, "wide": 1, "exponents": exponents, "largest": signed(EXPONENT_BITS), "last_group": range(GROUPS)}
    )


class HeadFloat(Block):
    """Heads of 32 to 256 numbers, bit for bit :func:`hw.spec.numerics.attention.cache_keys` without a centre, and
    :func:`hw.spec.numerics.attention.cache_values`.

    A head is stored until its largest numbers are known; the next one is stored meanwhile.

    Parameters
    ----------
    lanes : numbers of a row, 1, 2, 4 or 8

    Members
    -------
    rows : float32; ``last`` marks the last row of a head, which is the last one of a group. ``keys`` and ``wide`` are
        the same in all rows of a head: exponents differ by a limited amount, and mantissas have 16 bits instead of 8
    heads : each head, before its mantissas
    mantissas : row by row
    non_finite : a row had an infinity or a NaN; it stays until the next reset

    Throughput: 1 row per cycle in and out.
    """

    _FIFO = 8

    def __init__(self, lanes: int):
        self.lanes, self.per_group = lanes, BLOCK // lanes
        row = {"values": data.ArrayLayout(FLOAT, lanes), "last": 1, "keys": 1, "wide": 1}
        super().__init__(
            {
                "rows": In(stream.Signature(data.StructLayout(row))),
                "heads": Out(stream.Signature(head_layout())),
                "mantissas": Out(stream.Signature(data.ArrayLayout(signed(WIDE), lanes))),
                "non_finite": Out(1),
            }
        )

    @property
    def exponent_latency(self) -> int:
        """Cycles from a group's last row until its exponent is stored: lanes in pairs, rows, three for the exponent."""
        return (self.lanes - 1).bit_length() + 4

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"exponent_latency": self.exponent_latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        depth = _HALVES * MAX_HEAD // self.lanes
        m.submodules.memory = memory = Memory(shape=data.ArrayLayout(FLOAT, self.lanes), depth=depth, init=[])
        # A half is in it from its last exponent until its last row is read.
        about = data.StructLayout({"keys": 1, "wide": 1, "last_group": range(GROUPS)})
        m.submodules.stored = full = StreamFifo(about, _HALVES)
        m.submodules.halves = free = Credits(_HALVES, init=_HALVES)
        self._send(m, memory, full, free, *self._store(m, memory, full, free))
        return m

    def _store(self, m: Module, memory: Memory, full: StreamFifo, free: Credits):
        """Stores rows, and finds the exponents. Returns those of both halves, and their largest and lowest ones."""
        rows, step = self.rows.payload, Signal()
        half, row = Signal(), Signal(range(MAX_HEAD // self.lanes))
        group_end = Signal()
        m.d.comb += [
            self.rows.ready.eq(free.enough),
            step.eq(self.rows.valid & self.rows.ready),
            group_end.eq((row & (self.per_group - 1)) == self.per_group - 1),
            free.take.eq(step & rows.last),
        ]
        write = memory.write_port()
        m.d.comb += [write.en.eq(step), write.addr.eq(Cat(row, half)), write.data.eq(rows.values)]
        with m.If(step):
            m.d.sync += [row.eq(Mux(rows.last, 0, row + 1)), half.eq(half ^ rows.last)]
        number, ended = self._largest(m, step, group_end)
        place = {
            "half": (1, half),
            "group": (range(GROUPS), row >> (self.per_group - 1).bit_length()),
            "last": (1, rows.last),
            "keys": (1, rows.keys),
            "wide": (1, rows.wide),
        }
        layout = data.StructLayout({name: shape for name, (shape, _) in place.items()})
        now = Signal(layout)
        m.d.comb += [getattr(now, name).eq(value) for name, (_, value) in place.items()]
        wait = self.exponent_latency
        at_number = delay(m, now, wait - 3, name="at_number")
        found = self._exponent(m, number, ended, at_number.wide)
        after = delay(m, at_number, 2, name="at_exponent")
        stored = delay(m, ended, 2, name="stored", reset=True)
        exponent, non_finite = Signal(signed(EXPONENT_BITS)), Signal()
        m.d.sync += [exponent.eq(self._bounded(found)), non_finite.eq(found.non_finite)]
        exponents = Signal(data.ArrayLayout(data.ArrayLayout(signed(EXPONENT_BITS), GROUPS), _HALVES))
        largest = Signal(data.ArrayLayout(signed(EXPONENT_BITS), _HALVES))
        with m.If(stored):
            m.d.sync += exponents[after.half][after.group].eq(exponent)
            before = largest[after.half]
            m.d.sync += before.eq(Mux((after.group == 0) | (exponent > before.as_signed()), exponent, before))
            m.d.sync += self.non_finite.eq(self.non_finite | non_finite)
        m.d.sync += [
            full.i.valid.eq(stored & after.last),
            full.i.payload.keys.eq(after.keys),
            full.i.payload.wide.eq(after.wide),
            full.i.payload.last_group.eq(after.group),
        ]
        # The lowest exponent of a head: a register, because the comparisons with it are long. A head leaves ``full``
        # one cycle after it has come, when its register is there.
        lowest = Signal(data.ArrayLayout(signed(EXPONENT_BITS + 1), _HALVES))
        head_half = delay(m, after.half, 1, name="head_half")
        spreads = Mux(full.i.payload.wide, key_spread(WIDE), key_spread(NARROW))
        with m.If(full.i.valid):
            of_keys = largest[head_half].as_signed() - spreads
            m.d.sync += lowest[head_half].eq(Mux(full.i.payload.keys, of_keys, EXPONENT_MIN))
        return exponents, largest, lowest

    def _largest(self, m: Module, step, last):
        """The largest magnitude of a group, and whether it is complete; ``exponent_latency`` - 3 cycles after a row."""
        values = [Cat(value.fraction, value.exponent) for value in self.rows.payload.values]
        move = step
        while len(values) > 1:
            larger = [Mux(a > b, a, b) for a, b in zip(values[::2], values[1::2])]
            pairs = {f"pair_{index}": (_MAGNITUDE, value) for index, value in enumerate(larger)}
            found = stage(m, move, f"largest_{len(pairs)}", **pairs, last=(1, last))
            values, last = [getattr(found, name) for name in pairs], found.last
            before, move = move, Signal(name=f"moves_{len(pairs)}")
            m.d.sync += move.eq(before)
        largest, first, ended = Signal(_MAGNITUDE, reset_less=True), Signal(init=1), Signal()
        with m.If(move):
            m.d.sync += [largest.eq(Mux(first | (values[0] > largest), values[0], largest)), first.eq(last)]
        m.d.sync += ended.eq(move & last)
        return largest, ended

    def _exponent(self, m: Module, largest, ended, wide):
        """The exponent before it is bounded: in parts, one cycle later."""
        number = data.View(FLOAT, Cat(largest, Const(0, 1)))
        # If all bits of the mantissa and the one below are 1, rounding carries into another bit.
        carries = [Cat(number.fraction, Const(1, 1))[-bits:].all() for bits in (NARROW, WIDE)]
        bias = EXPONENT_BIAS - 1 - 1
        return stage(
            m,
            ended,
            "found",
            exponent=(signed(EXPONENT_FIELD_BITS + 2), number.exponent - Mux(wide, bias + WIDE, bias + NARROW)),
            carries=(1, Mux(wide, carries[1], carries[0])),
            non_finite=(1, number.exponent == EXPONENT_SPECIAL),
        )

    @staticmethod
    def _bounded(found):
        """Zeros and subnormal numbers have the lowest exponent, too."""
        exponent = found.exponent + found.carries
        # Compared before the addition, because both together are a long path.
        low = Mux(found.carries, found.exponent < EXPONENT_MIN - 1, found.exponent < EXPONENT_MIN)
        return Mux(low, EXPONENT_MIN, exponent)[:EXPONENT_BITS]

    def _send(self, m: Module, memory: Memory, full: StreamFifo, free: Credits, exponents, largest, lowests) -> None:
        """Reads the rows of one half after the other, and rounds them."""
        m.submodules.fifo = fifo = CreditFifo(self.mantissas.payload.shape(), self._FIFO)
        wiring.connect(m, fifo.o, wiring.flipped(self.mantissas))
        about, half, row = full.o.payload, Signal(), Signal(range(MAX_HEAD // self.lanes))
        head, shown = self.heads.payload, Signal()
        step, group = Signal(), row >> (self.per_group - 1).bit_length()
        end = Signal()
        lowest = lowests[half].as_signed()
        m.d.comb += [
            head.keys.eq(about.keys),
            head.wide.eq(about.wide),
            head.largest.eq(largest[half]),
            head.last_group.eq(about.last_group),
            *(
                head.exponents[index].eq(Mux(one > lowest, one, lowest))
                for index, one in enumerate(_signed_elements(exponents[half]))
            ),
            # A head is shown before its rows; after its last row comes the next one.
            self.heads.valid.eq(full.o.valid & ~shown),
            step.eq(full.o.valid & shown & fifo.room),
            end.eq(row == Cat(Const(self.per_group - 1, (self.per_group - 1).bit_length()), about.last_group)),
            full.o.ready.eq(step & end),
            free.add.eq(step & end),
            fifo.claim.eq(step),
        ]
        with m.If(self.heads.valid & self.heads.ready):
            m.d.sync += shown.eq(1)
        with m.Elif(step & end):
            m.d.sync += shown.eq(0)
        with m.If(step):
            m.d.sync += [row.eq(Mux(end, 0, row + 1)), half.eq(half ^ end)]
        read = memory.read_port()
        m.d.comb += [read.en.eq(step), read.addr.eq(Cat(row, half))]
        exponent = delay(m, Array(_signed_elements(head.exponents))[group], 1, name="exponent")
        moves = Cat(Signal(1 + Mantissa.latency, name="rounding"))
        m.d.sync += moves.eq(Cat(step, moves))
        for lane in range(self.lanes):
            m.submodules[f"mantissa_{lane}"] = mantissa = Mantissa(WIDE)
            value = read.data[lane]
            m.d.comb += [
                mantissa.moves.eq(moves),
                # Subnormal numbers count as zero.
                mantissa.value.eq(Mux(is_zero(value), 0, value)),
                mantissa.exponent.eq(exponent),
                fifo.i.payload[lane].eq(mantissa.mantissa),
            ]
        m.d.comb += fifo.i.valid.eq(moves[-1])


def _signed_elements(exponents) -> list:
    return [exponents[index].as_signed() for index in range(GROUPS)]
