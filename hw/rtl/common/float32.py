# SPDX-License-Identifier: Apache-2.0
"""float32 as a layout, and the last two stages of everything that results in one."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.spec.numerics.float32 import EXPONENT_FIELD_BITS, EXPONENT_SPECIAL, FRACTION_BITS, NAN_FRACTION

FLOAT = data.StructLayout({"fraction": FRACTION_BITS, "exponent": EXPONENT_FIELD_BITS, "sign": 1})
"""IEEE 754 binary32."""


def is_zero(number) -> Value:
    """Whether a :data:`FLOAT` is a zero or a subnormal number, which counts as zero."""
    return ~number.exponent.any()


def is_infinite(number) -> Value:
    """Whether a :data:`FLOAT` is an infinity."""
    return number.exponent.all() & ~number.fraction.any()


def is_nan(number) -> Value:
    """Whether a :data:`FLOAT` is a NaN."""
    return number.exponent.all() & number.fraction.any()


def special(exponent_bits: int) -> data.StructLayout:
    """The layout of a result's properties besides its fraction.

    ``exponent`` is biased and signed, of any width. ``zero``, ``infinite`` and ``nan`` replace the number; the last one
    that is set decides.
    """
    return data.StructLayout({"sign": 1, "exponent": signed(exponent_bits), "zero": 1, "infinite": 1, "nan": 1})


class FloatRound(wiring.Component):
    """Rounds a normalised significand half to even, and packs it.

    A result with an exponent field of 255 or more becomes infinity, one of 0 or less a zero of its sign. NaN is always
    :data:`hw.spec.numerics.float32.NAN`. Latency 2 cycles, throughput 1 per cycle.

    Members
    -------
    moves : one bit per stage: the stage's input is valid and is registered; otherwise the stage keeps its registers
    about : sign, biased exponent of the significand's leading one, and what replaces the number
    fraction : the significand without its leading one
    half : the first bit below the fraction
    rest : whether a bit below that is set
    result : float32
    """

    latency = 2

    def __init__(self, exponent_bits: int):
        self.about_layout = special(exponent_bits)
        super().__init__(
            {
                "moves": In(self.latency),
                "about": In(self.about_layout),
                "fraction": In(FRACTION_BITS),
                "half": In(1),
                "rest": In(1),
                "result": Out(FLOAT),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        about = Signal(self.about_layout, reset_less=True)
        # Rounding may carry into the exponent, so both are one sum.
        packed = Signal(signed(len(self.about.exponent) + FRACTION_BITS), reset_less=True)
        with m.If(self.moves[0]):
            m.d.sync += [
                about.eq(self.about),
                packed.eq(
                    Cat(self.fraction, self.about.exponent).as_signed() + (self.half & (self.rest | self.fraction[0]))
                ),
            ]
        exponent = packed[FRACTION_BITS:].as_signed()
        large, small = exponent >= EXPONENT_SPECIAL, exponent <= 0
        result = Signal(FLOAT)
        m.d.comb += [
            result.sign.eq(about.sign & ~about.nan),
            result.exponent.eq(exponent),
            result.fraction.eq(packed[:FRACTION_BITS]),
        ]
        with m.If(about.nan | about.infinite | (large & ~about.zero)):
            m.d.comb += [
                result.exponent.eq(EXPONENT_SPECIAL),
                result.fraction.eq(Mux(about.nan, NAN_FRACTION, 0)),
            ]
        with m.Elif(about.zero | small):
            m.d.comb += Cat(result.fraction, result.exponent).eq(Const(0, FRACTION_BITS + EXPONENT_FIELD_BITS))
        with m.If(self.moves[1]):
            m.d.sync += self.result.eq(result)
        return m
