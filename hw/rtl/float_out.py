# SPDX-License-Identifier: Apache-2.0
"""Integer sums to float32, rounded once."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import FLOAT_BITS, AcceleratorConfig
from .delay import delay

_FRACTION_BITS = 23
_EXPONENT_BIAS = 127
_EXPONENT_SPECIAL = 255


class FloatOut(wiring.Component):
    """``value * 2**exponent`` as IEEE 754 binary32, half to even, as :func:`hw.spec.numerics.to_float32` defines it.

    Overflow gives infinity, results below 2**-126 a zero of the same sign. Latency 5 cycles, throughput 1 per cycle.

    Members
    -------
    value : signed sum Y
    exponent : signed power of two
    result : bits of the float32
    """

    latency = 5

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "value": In(signed(config.sum_bits)),
                "exponent": In(signed(config.exponent_sum_bits)),
                "result": Out(FLOAT_BITS),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        width = self.config.sum_bits
        # The magnitude of the most negative sum never occurs, so width - 1 bits hold it; pad to a significand.
        bits = max(width - 1, _FRACTION_BITS + 1)

        sign = Signal(reset_less=True)
        magnitude = Signal(bits, reset_less=True)
        m.d.sync += [sign.eq(self.value < 0), magnitude.eq(Mux(self.value < 0, -self.value, self.value))]
        exponent = delay(m, self.exponent, 3, name="exponent")

        shifted, zeros = self._normalise(m, magnitude)

        # Rounding may carry into the exponent: adding to the packed number does both at once.
        dropped = shifted[: bits - 1 - _FRACTION_BITS]
        fraction = shifted[bits - 1 - _FRACTION_BITS : -1]
        half, rest = (dropped[-1], dropped[:-1].any()) if len(dropped) else (Const(0, 1), Const(0, 1))
        biased_shape = signed(self.config.exponent_sum_bits + 2)
        biased = Signal(biased_shape)
        packed = Signal(signed(biased_shape.width + _FRACTION_BITS), reset_less=True)
        m.d.comb += biased.eq(exponent - zeros + (bits - 1 + _EXPONENT_BIAS))
        m.d.sync += packed.eq(Cat(fraction, biased).as_signed() + (half & (rest | fraction[0])))
        present = delay(m, shifted[-1], 1, name="present")
        sign_out = delay(m, sign, 3, name="sign")

        rounded = packed[_FRACTION_BITS:].as_signed()
        with m.If(~present | (rounded <= 0)):
            m.d.sync += self.result.eq(Cat(Const(0, FLOAT_BITS - 1), sign_out))
        with m.Elif(rounded >= _EXPONENT_SPECIAL):
            m.d.sync += self.result.eq(Cat(Const(0, _FRACTION_BITS), Const(_EXPONENT_SPECIAL, 8), sign_out))
        with m.Else():
            m.d.sync += self.result.eq(Cat(packed[: FLOAT_BITS - 1], sign_out))
        return m

    def _normalise(self, m: Module, value: Signal) -> tuple[Signal, Signal]:
        """Shift the leading one to the top, by powers of two in two cycles: the shifted value and how far."""
        bits = len(value)
        powers = list(reversed(range((bits - 1).bit_length())))
        shift = Signal(len(powers))
        for stage, part in enumerate((powers[: len(powers) // 2], powers[len(powers) // 2 :])):
            shift_so_far = shift
            shift = Signal(len(powers), name=f"shift_{stage}", reset_less=True)
            m.d.sync += shift.eq(shift_so_far)
            for power in part:
                distance = 1 << power
                empty = Signal(name=f"empty_{power}")
                step = Signal(bits, name=f"step_{power}")
                m.d.comb += [
                    empty.eq(~value[-distance:].any()),
                    step.eq(Mux(empty, Cat(Const(0, distance), value[:-distance]), value)),
                ]
                m.d.sync += shift[power].eq(empty)
                value = step
            register = Signal(bits, name=f"shifted_{stage}", reset_less=True)
            m.d.sync += register.eq(value)
            value = register
        return value, shift
