# SPDX-License-Identifier: Apache-2.0
"""Checks a descriptor before anything of it starts, and works out what the units need to know."""

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.walker import command_layout
from hw.rtl.memory.activation_fetch import max_activation_beats
from hw.rtl.memory.burst_cutter import BEAT_COUNT_BITS
from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.control.command import command_fields, max_header_beats
from hw.spec.control.descriptor import (
    ADDRESS_BITS,
    ADDRESS_LIMIT,
    DATA_ALIGNMENT,
    DESCRIPTOR_WORDS,
    FIELD_WIDTHS,
    FIELDS,
    FLOAT_BYTES,
    WEIGHT_ALIGNMENT,
    Opcode,
)
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import StreamLayout

ERROR_BITS = 4
"""Width of an error code."""


def descriptor_layout() -> data.FlexibleLayout:
    """A descriptor as it lies in the window."""
    return data.FlexibleLayout(
        32 * DESCRIPTOR_WORDS, {field.name: data.Field(unsigned(field.width), field.low) for field in FIELDS}
    )


def reserved_bits() -> list[int]:
    """Bits of a descriptor that are in no field."""
    used = {bit for field in FIELDS for bit in range(field.low, field.low + field.width)}
    return [bit for bit in range(32 * DESCRIPTOR_WORDS) if bit not in used]


def work_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A checked descriptor: what the core is told, and where the operands lie and how long they are."""
    return data.StructLayout(
        {
            "command": command_layout(config),
            "interrupt": 1,
            "activations": unsigned(ADDRESS_BITS),
            "activation_beats": unsigned(max_activation_beats(config).bit_length()),
            "results": unsigned(ADDRESS_BITS),
            "result_pitch": unsigned(FIELD_WIDTHS["result_pitch"]),
            "weights": unsigned(ADDRESS_BITS),
            "weights_stride": unsigned(FIELD_WIDTHS["weights_stride"]),
            "weight_beats": unsigned(BEAT_COUNT_BITS),
        }
    )


class DescriptorCheck(wiring.Component):
    """Lets good descriptors pass. The first bad one ends it: its error stays until the reset, and so does it.

    Members
    -------
    descriptors : as software wrote them
    work : the good ones
    error : why the descriptor now in here was refused (:class:`hw.spec.control.registers.ErrorCode`)

    One descriptor at a time: its counts, what follows from them, and the comparisons, a register after each.
    """

    latency = 5
    """Cycles from a descriptor's transfer to the work's."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "descriptors": In(stream.Signature(descriptor_layout())),
                "work": Out(stream.Signature(work_layout(config))),
                "error": Out(ERROR_BITS),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        descriptor = Signal(descriptor_layout())
        stage = Signal(self.latency - 1)
        idle, take, good = Signal(init=1), Signal(), Signal()
        done = self.work.valid & self.work.ready
        m.d.comb += [self.descriptors.ready.eq(idle), take.eq(idle & self.descriptors.valid)]
        m.d.sync += stage.eq(Cat(take, stage))
        with m.If(take):
            m.d.sync += [descriptor.eq(self.descriptors.payload), idle.eq(0)]
        with m.If(done):
            m.d.sync += [self.work.valid.eq(0), idle.eq(1)]
        opcode_wrong, misaligned = self._rules(m, descriptor, ~idle)
        shape_wrong = self._shape(m, descriptor, ~idle)
        # Registered with the stage before the last, so that the priority below is all that the last one does.
        m.d.comb += good.eq(~(opcode_wrong | misaligned | shape_wrong))
        with m.If(stage[-1]):
            m.d.sync += self.work.valid.eq(good)
            with m.If(opcode_wrong):
                m.d.sync += self.error.eq(ErrorCode.OPCODE)
            with m.Elif(shape_wrong):
                m.d.sync += self.error.eq(ErrorCode.SHAPE)
            with m.Elif(misaligned):
                m.d.sync += self.error.eq(ErrorCode.ALIGNMENT)
        return m

    def _rules(self, m: Module, descriptor, busy) -> tuple[Signal, Signal]:
        """Opcode and alignment, which need no arithmetic."""
        opcode_wrong, misaligned = Signal(), Signal()
        raw = descriptor.as_value()
        wrong = [(descriptor.opcode != Opcode.LINEAR), Cat(raw[bit] for bit in reserved_bits()).any()]
        bad = []
        for name, alignment in (
            ("activations", DATA_ALIGNMENT),
            ("results", DATA_ALIGNMENT),
            ("weights", WEIGHT_ALIGNMENT),
        ):
            address = getattr(descriptor, name)
            bad += [address[: alignment.bit_length() - 1].any(), address >= ADDRESS_LIMIT]
        bad.append(descriptor.weights_stride[: WEIGHT_ALIGNMENT.bit_length() - 1].any())
        bad.append(descriptor.result_pitch[: DATA_ALIGNMENT.bit_length() - 1].any())
        with m.If(busy):
            m.d.sync += [opcode_wrong.eq(Cat(wrong).any()), misaligned.eq(Cat(bad).any())]
        work = self.work.payload
        m.d.comb += [
            getattr(work, name).eq(getattr(descriptor, name))
            for name in ("activations", "results", "result_pitch", "weights", "weights_stride", "interrupt")
        ]
        return opcode_wrong, misaligned

    def _shape(self, m: Module, descriptor, busy) -> Signal:
        """Every count within its bounds, and those that follow from others equal to what they follow to."""
        config, layout, work = self.config, StreamLayout(self.config), self.work.payload
        tile_bits = config.tile.bit_length() - 1
        max_slices = config.max_k // config.tile
        # In range first: what follows is then as narrow as its widest legal value, and wrong ones are refused anyway.
        bounds = {
            "tokens": (1, config.max_tokens),
            "groups": (1, max_slices),
            "group_slices": (layout.min_group_slices, config.max_group_size // config.tile),
            "out_features": (1, MAX_N),
            "header_beats": (1, max_header_beats(config)),
            "body_words": (1, max_slices * layout.words_per_slice),
        }
        value, outside = {}, []
        for name, (low, high) in bounds.items():
            field = getattr(descriptor, name)
            value[name] = field[: high.bit_length()]
            outside += [field < low, field > high]

        # Each a register, in the order in which they depend on each other.
        def register(name: str, expression, width: int) -> Signal:
            signal = Signal(width, name=name)
            with m.If(busy):
                m.d.sync += signal.eq(expression)
            return signal

        widths = command_fields(config)
        slice_bits = (max_slices * bounds["group_slices"][1]).bit_length()
        slices = register("slices", value["groups"] * value["group_slices"], slice_bits)
        most_tile_beats = bounds["header_beats"][1] + bounds["body_words"][1] * layout.beats_per_word
        tile_beats = register(
            "tile_beats",
            value["header_beats"] + value["body_words"] * layout.beats_per_word,
            most_tile_beats.bit_length(),
        )
        out_tiles = register("out_tiles", (value["out_features"] + (config.tile - 1)) >> tile_bits, widths["out_tiles"])
        last_columns = register(
            "last_columns", ((value["out_features"] - 1) & (config.tile - 1)) + 1, widths["last_columns"]
        )
        header_units = layout.exponents_units + value["groups"] * layout.record_units
        room_units = value["header_beats"] * layout.beat_units
        header_wrong = register(
            "header_wrong", (header_units > room_units) | (header_units + layout.beat_units <= room_units), 1
        )
        row_bytes = register("row_bytes", value["out_features"] * FLOAT_BYTES, (MAX_N * FLOAT_BYTES).bit_length())

        per_slice = config.tile * 8 * FLOAT_BYTES // config.port_width
        beats = register("weight_beats", out_tiles * tile_beats, len(out_tiles) + len(tile_beats))
        activation_beats = register(
            "activation_beats",
            value["tokens"] * slices * per_slice,
            len(value["tokens"]) + slice_bits + per_slice.bit_length(),
        )
        body_wrong = register("body_wrong", self._body_wrong(layout, value["body_words"], slices), 1)
        other = register("before_differs", self._differs_from_before(m, descriptor, value), 1)
        port_bits = (config.port_width // 8).bit_length() - 1
        wrong = [
            *outside,
            slices > max_slices,
            header_wrong,
            body_wrong,
            descriptor.reuse & other,
            # Also keeps a region below 4 GiB.
            (beats << port_bits) > descriptor.weights_stride,
            (descriptor.tokens > 1) & (row_bytes > descriptor.result_pitch),
        ]
        m.d.comb += [
            work.weight_beats.eq(beats),
            work.activation_beats.eq(activation_beats),
            work.command.out_tiles.eq(out_tiles),
            work.command.last_columns.eq(last_columns),
            work.command.reuse.eq(descriptor.reuse),
        ]
        m.d.comb += [
            getattr(work.command, name).eq(value[name])
            for name in ("tokens", "groups", "group_slices", "header_beats", "body_words")
        ]
        return register("shape_wrong", Cat(wrong).any(), 1)

    @staticmethod
    def _body_wrong(layout: StreamLayout, words, slices):
        per_word = layout.slices_per_word
        if per_word == 1:
            return words != slices * layout.words_per_slice
        # Several slices in a word, the last word perhaps partly filled.
        return (words * per_word < slices) | (words * per_word >= slices + per_word)

    def _differs_from_before(self, m: Module, descriptor, value):
        """Whether there is no descriptor before this one, or it had activations of another shape."""
        shape = Cat(value[name] for name in ("tokens", "groups", "group_slices"))
        before, exists = Signal(len(shape)), Signal()
        with m.If(self.work.valid & self.work.ready):
            m.d.sync += [before.eq(shape), exists.eq(1)]
        return ~exists | (shape != before)
