# SPDX-License-Identifier: Apache-2.0
"""Checks a descriptor before any unit starts with it, and computes derived values for the units."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from amaranth.hdl import Cat, Module, Signal, Value, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.walker import command_layout
from hw.rtl.memory.activation_fetch import max_activation_beats
from hw.rtl.memory.burst_cutter import BEAT_COUNT_BITS
from hw.spec.config import FLOAT_BITS, MAX_N, AcceleratorConfig
from hw.spec.control.descriptor import ADDRESS_BITS, ADDRESS_LIMIT, DESCRIPTOR_WORDS, FIELD_WIDTHS, FIELDS, FLOAT_BYTES
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import StreamLayout
from hw.spec.ops import LINEAR, OPS
from hw.spec.ops.command import command_fields

ERROR_BITS = 4
"""Width of an error code."""


def descriptor_layout() -> data.FlexibleLayout:
    """The layout of a descriptor in the window."""
    return data.FlexibleLayout(
        32 * DESCRIPTOR_WORDS, {field.name: data.Field(unsigned(field.width), field.low) for field in FIELDS}
    )


def reserved_bits() -> list[int]:
    """Bits of a descriptor that are in no field."""
    used = {bit for field in FIELDS for bit in range(field.low, field.low + field.width)}
    return [bit for bit in range(32 * DESCRIPTOR_WORDS) if bit not in used]


def work_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A checked descriptor: the core's command, and addresses and lengths of the operands."""
    return data.StructLayout(
        {
            "command": command_layout(config),
            "interrupt": 1,
            "wait": unsigned(FIELD_WIDTHS["wait"]),
            "activations": unsigned(ADDRESS_BITS),
            "activation_beats": unsigned(max_activation_beats(config).bit_length()),
            "results": unsigned(ADDRESS_BITS),
            "result_pitch": unsigned(FIELD_WIDTHS["result_pitch"]),
            "weights": unsigned(ADDRESS_BITS),
            "weights_stride": unsigned(FIELD_WIDTHS["weights_stride"]),
            "weight_beats": unsigned(BEAT_COUNT_BITS),
        }
    )


@dataclass(frozen=True)
class Derived:
    """A value that is computed from a descriptor's counts and from earlier derived values; it gets a register."""

    name: str
    width: int
    of: Callable[[Mapping[str, Value]], Value]


def derived_counts(config: AcceleratorConfig) -> tuple[Derived, ...]:
    """Derived values in the order of their dependencies; there are at most two registers in a row."""
    layout, bounds, widths = StreamLayout(config), LINEAR.bounds(config), command_fields(config)
    tile, most = config.tile, {name: high for name, (_, high) in bounds.items()}
    slice_bits = (most["groups"] * most["group_slices"]).bit_length()
    tile_beat_bits = (most["header_beats"] + most["body_words"] * layout.beats_per_word).bit_length()
    beats_per_slice = tile * FLOAT_BITS // config.port_width
    activation_bits = most["tokens"].bit_length() + slice_bits + beats_per_slice.bit_length()
    return (
        Derived("slices", slice_bits, lambda v: v["groups"] * v["group_slices"]),
        Derived("tile_beats", tile_beat_bits, lambda v: v["header_beats"] + v["body_words"] * layout.beats_per_word),
        Derived("out_tiles", widths["out_tiles"], lambda v: (v["out_features"] + (tile - 1)) >> tile.bit_length() - 1),
        Derived("last_columns", widths["last_columns"], lambda v: ((v["out_features"] - 1) & (tile - 1)) + 1),
        Derived("header_wrong", 1, lambda v: _header_wrong(layout, v["header_beats"], v["groups"])),
        Derived("row_bytes", (MAX_N * FLOAT_BYTES).bit_length(), lambda v: v["out_features"] * FLOAT_BYTES),
        Derived("weight_beats", widths["out_tiles"] + tile_beat_bits, lambda v: v["out_tiles"] * v["tile_beats"]),
        Derived("activation_beats", activation_bits, lambda v: v["tokens"] * v["slices"] * beats_per_slice),
        Derived("body_wrong", 1, lambda v: _body_wrong(layout, v["body_words"], v["slices"])),
    )


def comparisons(config: AcceleratorConfig) -> tuple[Callable, ...]:
    """Faults of a descriptor ``d`` with derived values ``v``; see :meth:`Linear.shape_is_wrong`."""
    port_bytes_bits = (config.port_width // 8).bit_length() - 1
    return (
        lambda v, d: v["slices"] > config.max_k // config.tile,
        lambda v, d: v["header_wrong"],
        lambda v, d: v["body_wrong"],
        # This also limits a region to less than 4 GiB.
        lambda v, d: (v["weight_beats"] << port_bytes_bits) > d.weights_stride,
        lambda v, d: (d.tokens > 1) & (v["row_bytes"] > d.result_pitch),
    )


def _header_wrong(layout: StreamLayout, beats, groups):
    """Whether a header with this number of groups does not end in the last one of ``beats``."""
    units, room = layout.exponents_units + groups * layout.record_units, beats * layout.beat_units
    return (units > room) | (units + layout.beat_units <= room)


def _body_wrong(layout: StreamLayout, words, slices):
    """Whether a body with this number of slices does not end in the last one of ``words``."""
    per_word = layout.slices_per_word
    if per_word == 1:
        return words != slices * layout.words_per_slice
    # A word has several slices; the last word may be partly filled.
    return (words * per_word < slices) | (words * per_word >= slices + per_word)


class DescriptorCheck(Block):
    """Passes valid descriptors on. It stops at the first invalid one, and keeps this one and its error until the reset.

    Members
    -------
    descriptors : descriptors as written by software
    work : the valid ones; a payload does not change from the cycle before its ``valid`` to its transfer
    error : why the current descriptor was refused (:class:`hw.spec.control.registers.ErrorCode`)

    It checks one descriptor at a time, with registers after the counts, after the derived values and after the
    comparisons.
    """

    latency = 5
    """Cycles from the transfer on ``descriptors`` to the transfer on ``work``."""
    most_in_flight = 1
    """Maximum number of descriptors in this block: one, until all of its shares are sent."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "descriptors": In(stream.Signature(descriptor_layout())),
                "work": Out(stream.Signature(work_layout(config))),
                "error": Out(ERROR_BITS),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

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
        # These are registers of the stage before the last, so the last stage has only the priority below.
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
        """Checks opcode and alignment, which needs no arithmetic."""
        opcode_wrong, misaligned = Signal(), Signal()
        raw = descriptor.as_value()
        unknown = [
            Cat(descriptor.opcode != opcode for opcode in OPS).all(),
            Cat(raw[bit] for bit in reserved_bits()).any(),
        ]
        bad = [descriptor[name][: alignment.bit_length() - 1].any() for name, alignment in LINEAR.alignments.items()]
        bad += [descriptor[name] >= ADDRESS_LIMIT for name in LINEAR.addresses]
        with m.If(busy):
            m.d.sync += [opcode_wrong.eq(Cat(unknown).any()), misaligned.eq(Cat(bad).any())]
        work = self.work.payload
        m.d.comb += [work[name].eq(descriptor[name]) for name in (*LINEAR.alignments, "interrupt", "wait")]
        return opcode_wrong, misaligned

    def _shape(self, m: Module, descriptor, busy) -> Signal:
        """Checks that every count is within its bounds, and that derived counts have the right values."""
        work = self.work.payload
        # Derived values are only as wide as their largest legal value: a count out of range is refused in any case.
        counts, outside = {}, []
        for name, (low, high) in LINEAR.bounds(self.config).items():
            counts[name] = descriptor[name][: high.bit_length()]
            outside += [descriptor[name] < low, descriptor[name] > high]

        def register(name: str, width: int, value) -> Signal:
            signal = Signal(width, name=name)
            with m.If(busy):
                m.d.sync += signal.eq(value)
            return signal

        values = dict(counts)
        for derived in derived_counts(self.config):
            values[derived.name] = register(derived.name, derived.width, derived.of(values))
        other = register("before_differs", 1, self._differs_from_before(m, values))
        wrong = [compare(values, descriptor) for compare in comparisons(self.config)]
        m.d.comb += [
            work.weight_beats.eq(values["weight_beats"]),
            work.activation_beats.eq(values["activation_beats"]),
            work.command.reuse.eq(descriptor.reuse),
            *(work.command[name].eq(values[name]) for name, _ in work.command.shape() if name != "reuse"),
        ]
        return register("shape_wrong", 1, Cat(*outside, *wrong, descriptor.reuse & other).any())

    def _differs_from_before(self, m: Module, values: Mapping[str, Value]) -> Value:
        """Whether there is no previous descriptor, or it had activations of another shape."""
        shape = Cat(values[name] for name in LINEAR.activation_shape)
        before, exists = Signal(len(shape)), Signal()
        with m.If(self.work.valid & self.work.ready):
            m.d.sync += [before.eq(shape), exists.eq(1)]
        return ~exists | (shape != before)
