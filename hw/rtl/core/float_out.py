# SPDX-License-Identifier: Apache-2.0
"""Integer sums to float32, rounded once."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.numerics.float32 import EXPONENT_BIAS, EXPONENT_FIELD_BITS, EXPONENT_SPECIAL, FRACTION_BITS


class FloatOut(Block):
    """``value * 2**exponent`` as binary32 (IEEE 754), half to even, like :func:`hw.spec.numerics.linear.to_float32`.

    Overflow gives infinity, results below 2**-126 a zero of the same sign. The leading one is shifted to the top by
    one power of two per cycle. Registers move only for valid values, which saves power, and time in simulation.
    Throughput 1 per cycle.

    Members
    -------
    valid : there is a value
    value : signed sum Y
    exponent : signed power of two
    result : bits of the float32, ``latency`` cycles later
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        # The most negative sum never occurs, so the magnitude has one bit less; it is padded to a significand.
        self.bits = max(config.sum_bits - 1, FRACTION_BITS + 1)
        super().__init__(
            {
                "valid": In(1),
                "value": In(signed(config.sum_bits)),
                "exponent": In(signed(config.exponent_sum_bits)),
                "result": Out(FLOAT_BITS),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from ``value`` to ``result``: magnitude, one per power of two, rounding, packing."""
        return 3 + len(self._powers)

    @property
    def _powers(self) -> list[int]:
        return list(reversed(range((self.bits - 1).bit_length())))

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        shape = data.StructLayout(
            {
                "sign": 1,
                "magnitude": self.bits,
                # Biased exponent of the magnitude's top bit.
                "exponent": signed(self.config.exponent_sum_bits + 2),
            }
        )
        # One bit per stage: the register before the stage is valid.
        moving = Signal(self.latency - 1)
        m.d.sync += moving.eq(Cat(self.valid, moving))
        number = Signal(shape, name="number", reset_less=True)
        with m.If(self.valid):
            m.d.sync += [
                number.sign.eq(self.value < 0),
                number.magnitude.eq(Mux(self.value < 0, -self.value, self.value)),
                number.exponent.eq(self.exponent + (self.bits - 1 + EXPONENT_BIAS)),
            ]
        for stage, power in enumerate(self._powers):
            number = self._shift(m, moving[stage], number, 1 << power)
        self._round(m, moving[len(self._powers)], number)
        return m

    def _shift(self, m: Module, moving, number, distance: int):
        """Shift left by ``distance`` if this number of bits at the top are 0."""
        shifted = Signal.like(number, name=f"shifted_{distance}", reset_less=True)
        empty = ~number.magnitude[-distance:].any()
        with m.If(moving):
            m.d.sync += [
                shifted.sign.eq(number.sign),
                shifted.magnitude.eq(Mux(empty, number.magnitude << distance, number.magnitude)),
                shifted.exponent.eq(Mux(empty, number.exponent - distance, number.exponent)),
            ]
        return shifted

    def _round(self, m: Module, moving, number) -> None:
        """Round to the fraction, then pack. Rounding may carry into the exponent, so both are one sum."""
        cut = self.bits - 1 - FRACTION_BITS
        dropped, fraction = number.magnitude[:cut], number.magnitude[cut:-1]
        half, rest = (dropped[-1], dropped[:-1].any()) if cut else (Const(0, 1), Const(0, 1))
        packed = Signal(signed(len(number.exponent) + FRACTION_BITS), reset_less=True)
        present, sign = Signal(reset_less=True), Signal(reset_less=True)
        with m.If(moving):
            m.d.sync += [
                packed.eq(Cat(fraction, number.exponent).as_signed() + (half & (rest | fraction[0]))),
                present.eq(number.magnitude[-1]),
                sign.eq(number.sign),
            ]
        rounded = packed[FRACTION_BITS:].as_signed()
        with m.If(~present | (rounded <= 0)):
            m.d.sync += self.result.eq(Cat(Const(0, FLOAT_BITS - 1), sign))
        with m.Elif(rounded >= EXPONENT_SPECIAL):
            m.d.sync += self.result.eq(Cat(Const(0, FRACTION_BITS), Const(EXPONENT_SPECIAL, EXPONENT_FIELD_BITS), sign))
        with m.Else():
            m.d.sync += self.result.eq(Cat(packed[: FLOAT_BITS - 1], sign))
