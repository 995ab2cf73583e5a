# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
"""One line of text with numbers: decimal counters, and the component that writes the line."""

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.boards.rom import Rom

DIGIT_BITS = 4
_ENTRY = data.StructLayout({"good": 8, "bad": 8, "is_digit": 1, "first": 1, "last": 1})


class DecimalCounter(wiring.Component):
    """Counts in decimal digits, so no division is needed to print the number.

    A carry takes one cycle per digit, which keeps the adders short: ``value`` is valid ``digits`` cycles after the last
    ``step``. After its largest number it wraps to 0.

    Members
    -------
    clear : set the counter to 0
    step : add 1
    value : the digits, lowest first, 4 bits each
    """

    def __init__(self, digits: int):
        self.digits = digits
        super().__init__({"clear": In(1), "step": In(1), "value": Out(DIGIT_BITS * digits)})

    def elaborate(self, platform) -> Module:
        m = Module()
        step = self.step
        digits = []
        for index in range(self.digits):
            digit = Signal(DIGIT_BITS, name=f"digit_{index}")
            carry = Signal(name=f"carry_{index}")
            m.d.sync += carry.eq(step & (digit == 9) & ~self.clear)
            with m.If(self.clear):
                m.d.sync += digit.eq(0)
            with m.Elif(step):
                m.d.sync += digit.eq(Mux(digit == 9, 0, digit + 1))
            digits.append(digit)
            step = carry
        m.d.comb += self.value.eq(Cat(digits))
        return m


class Number:
    """The place of a number in a line: digits ``low`` to ``low + digits - 1`` of the writer's ``numbers``."""

    def __init__(self, low: int, digits: int):
        self.low, self.digits = low, digits


def _entries(parts: Sequence[str | tuple[str, str] | Number]) -> list[int]:
    entries = []
    for part in parts:
        if isinstance(part, Number):
            for digit in reversed(range(part.digits)):
                flags = {"is_digit": 1, "first": int(digit == part.digits - 1), "last": int(digit == 0)}
                entries.append({"good": part.low + digit, **flags})
        else:
            good, bad = (part, part) if isinstance(part, str) else part
            if len(good) != len(bad):
                raise ValueError(f"both texts of a choice are equally long, not {good!r} and {bad!r}")
            entries += [{"good": ord(g), "bad": ord(b)} for g, b in zip(good, bad)]
    return [int.from_bytes(_ENTRY.const(entry).as_value().value.to_bytes(3, "little"), "little") for entry in entries]


class LineWriter(wiring.Component):
    """Writes a line, byte by byte; leading zeros of numbers are omitted.

    Parameters
    ----------
    parts : the line: ASCII texts; pairs of equally long texts, the first for ``good``; and objects of :class:`Number`
    digits : decimal digits of ``numbers``

    Members
    -------
    start : write the line; one cycle, while not ``busy``. ``numbers`` and ``good`` must not change while it is written
    numbers : the digits for the parts of :class:`Number`, lowest first
    good : take the first text of each pair
    busy : the line is not completely written
    bytes : the line
    """

    def __init__(self, parts: Sequence[str | tuple[str, str] | Number], digits: int):
        self.rom = Rom(_ENTRY.size, _entries(parts))
        super().__init__(
            {
                "start": In(1),
                "numbers": In(DIGIT_BITS * digits),
                "good": In(1),
                "busy": Out(1),
                "bytes": Out(stream.Signature(8)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.rom = rom = self.rom
        entry = _ENTRY(rom.data)
        digits = Array(self.numbers.word_select(i, DIGIT_BITS) for i in range(len(self.numbers) // DIGIT_BITS))
        digit, significant = Signal(DIGIT_BITS), Signal()
        silent, at_end = Signal(), Signal()
        m.d.comb += [
            rom.enable.eq(1),
            self.busy.eq(1),
            silent.eq(entry.is_digit & (digit == 0) & ~entry.last & ~significant),
        ]
        with m.FSM():
            with m.State("idle"):
                m.d.comb += self.busy.eq(0)
                m.d.sync += rom.address.eq(0)
                with m.If(self.start):
                    m.next = "fetch"
            with m.State("fetch"):
                m.next = "look_up"
            with m.State("look_up"):
                m.d.sync += [digit.eq(digits[entry.good]), at_end.eq(rom.address == len(rom.entries) - 1)]
                with m.If(entry.first):
                    m.d.sync += significant.eq(0)
                m.next = "spell"
            with m.State("spell"):
                letter = Mux(self.good, entry.good, entry.bad)
                m.d.sync += [
                    self.bytes.payload.eq(Mux(entry.is_digit, digit + ord("0"), letter)),
                    self.bytes.valid.eq(~silent),
                    significant.eq(significant | (digit != 0)),
                ]
                m.next = "send"
            with m.State("send"), m.If(~self.bytes.valid | self.bytes.ready):
                m.d.sync += [self.bytes.valid.eq(0), rom.address.eq(rom.address + 1)]
                with m.If(at_end):
                    m.next = "idle"
                with m.Else():
                    m.next = "fetch"
        return m
