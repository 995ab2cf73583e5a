# SPDX-License-Identifier: Apache-2.0
"""The bytes of a beat: mantissas, scales and exponents at their places, and which of them are written."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.geometry import CacheGeometry, log2
from hw.rtl.attention.cache.layouts import Part, step_layout
from hw.rtl.attention.cache.places import CachePlaces
from hw.rtl.attention.head_float import WIDE
from hw.rtl.common.delay import delay
from hw.rtl.memory.write_manager import strobed_layout
from hw.spec.config import EXPONENT_BITS, SCALE_BITS

_SCALE_SHIFT_BITS = log2(SCALE_BITS)


class CacheBeats(wiring.Component):
    """Makes beats. A byte that is not written has any value.

    Members
    -------
    step : a step
    address, words : the memory of mantissas; the words of all positions of a bundle come in the next cycle
    beat : its data and strobes, ``latency`` cycles after the step

    No step waits.
    """

    latency = CachePlaces.latency

    def __init__(self, shape: CacheGeometry):
        self.shape, self.step_shape = shape, step_layout(shape)
        super().__init__(
            {
                "step": In(self.step_shape),
                "address": Out(range(2 * shape.words)),
                "words": In(data.ArrayLayout(data.ArrayLayout(WIDE, shape.word), shape.bundle)),
                "beat": Out(strobed_layout(shape.config.port_width)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        shape, step = self.shape, self.step
        place = {
            "part": step.part,
            # Its lowest bits are the byte in a port's beat.
            "inside": step.inside[: log2(shape.port_bytes)],
            "table": step.table[: log2(shape.port_bytes)],
            "byte": step.byte,
            "plane": step.plane,
            "member": step.member,
            "mask": step.mask,
        }
        about = Signal(data.StructLayout({name: Value.cast(value).shape() for name, value in place.items()}))
        m.d.comb += [getattr(about, name).eq(value) for name, value in place.items()]
        m.d.comb += self.address.eq(delay(m, step.address, 1, name="read"))
        at_word = delay(m, about, 2, name="at_word")
        at_plane = delay(m, at_word, 1, name="at_plane")
        at_bytes = delay(m, at_plane, 1, name="at_bytes")
        headers = [self._header(m, member) for member in range(shape.bundle)]
        planes = [self._plane(m, member, at_word.plane) for member in range(shape.bundle)]
        keys = [self._bytes(m, f"key_{member}", plane, at_plane.byte, shape.run) for member, plane in enumerate(planes)]
        plane = Array(planes)[at_plane.member] if shape.bundle > 1 else planes[0]
        values = self._bytes(m, "value", plane, at_plane.byte, shape.value_bytes)
        body, of_values = at_bytes.part[Part.BODY], at_bytes.part[Part.VALUES]
        for index in range(shape.port_bytes):
            run = index // shape.config.tile % shape.run
            # A position has a byte, or two neighbours if they are a scale.
            one, pair = (headers[place % shape.bundle].word_select(index % 2, 8) for place in (index, index // 2))
            of_header = Mux(at_bytes.part[Part.SCALES], pair, one) if shape.bundle > 1 else one
            of_key, of_value = keys[index % shape.bundle][run], values[index % shape.value_bytes]
            chosen = Mux(body, of_key, Mux(of_values, of_value, of_header))
            m.d.sync += self.beat.data.word_select(index, 8).eq(chosen)
        self._strobe(m, at_bytes)
        return m

    def _header(self, m: Module, member: int) -> Value:
        """A scale, or an exponent twice, of a position; four cycles after the step."""
        shape, step = self.shape, self.step
        part = step.part
        distance, row = Signal(EXPONENT_BITS), Signal(EXPONENT_BITS)
        # By width of the mantissas.
        low, offset = ([of(wide) for wide in (False, True)] for of in (shape.scale_offset, shape.exponent_offset))
        exponent, scale = Signal(signed(EXPONENT_BITS)), Signal()
        place = Signal(_SCALE_SHIFT_BITS)
        m.d.sync += [
            distance.eq(step.largest[member].as_signed() - step.exponent[member].as_signed()),
            place.eq(Mux(step.wide, low[1], low[0]) + shape.config.weight_bits * step.plane),
            row.eq(step.largest[member].as_signed() + Mux(step.wide, offset[1], offset[0])),
            exponent.eq(step.exponent[member]),
        ]
        is_row, is_scale = (
            delay(m, part[index], 1, name=f"is_{index.name.lower()}") for index in (Part.EXPONENT, Part.SCALES)
        )
        shift, byte = Signal(_SCALE_SHIFT_BITS), Signal(EXPONENT_BITS)
        m.d.sync += [
            shift.eq(place - distance),
            byte.eq(Mux(is_row, row, exponent)),
            scale.eq(is_scale),
        ]
        both = Signal(SCALE_BITS)
        power = Cat(shift == index for index in range(SCALE_BITS))
        m.d.sync += both.eq(Mux(scale, power, Cat(byte, byte)))
        return delay(m, both, 1, name="header")

    def _plane(self, m: Module, member: int, index) -> Value:
        """One plane of all mantissas of a position's word, three cycles after the step's word was read."""
        width = self.shape.config.weight_bits
        planes = [
            Array(Value.cast(self.words[member][lane]).word_select(plane, width) for plane in range(WIDE // width))[
                index[: log2(WIDE // width)]
            ]
            for lane in range(self.shape.word)
        ]
        plane = Signal(len(planes) * width, name=f"plane_{member}")
        m.d.sync += plane.eq(Cat(planes))
        return plane

    @staticmethod
    def _bytes(m: Module, name: str, plane: Value, byte, count: int) -> list[Value]:
        """The ``count`` bytes of a plane from ``byte`` on, in registers."""
        whole = [plane.word_select(index, 8) for index in range(len(plane) // 8)]
        index, picked = byte[log2(count) :], []
        for place in range(count):
            register = Signal(8, name=f"{name}_{place}")
            options = whole[place::count]
            m.d.sync += register.eq(Array(options)[index] if len(options) > 1 else options[0])
            picked.append(register)
        return picked

    def _strobe(self, m: Module, about) -> None:
        """Compares the place of each byte with that of the step, as far as they must be equal."""
        shape, part = self.shape, about.part
        bits = log2(shape.port_bytes)
        # Bits of a place that do not count, by part.
        free = {
            Part.EXPONENT: shape.bundle - 1,
            Part.SCALES: 2 * shape.bundle - 1,
            Part.BODY: max(0, shape.port_bytes - shape.config.tile) | shape.bundle - 1,
            Part.VALUES: shape.value_bytes - 1,
            Part.TABLE: shape.bundle - 1,
        }
        ignored = Signal(bits)
        terms = [Mux(part[index], Const(mask, bits), 0) for index, mask in free.items() if mask]
        m.d.comb += ignored.eq(Cat(Cat(term[bit] for term in terms).any() for bit in range(bits)))
        place = Mux(part[Part.TABLE], about.table, about.inside)
        for index in range(shape.port_bytes):
            inside = ((place ^ index) & ~ignored)[:bits] == 0
            if shape.bundle > 1:
                one, pair = (about.mask[at % shape.bundle] for at in (index, index // 2))
                inside &= Mux(part[Part.SCALES], pair, one)
            m.d.sync += self.beat.strobe[index].eq(inside)
