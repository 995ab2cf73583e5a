# SPDX-License-Identifier: Apache-2.0
"""Checks a descriptor before any unit starts with it, and computes derived values for the units."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.walker import command_layout
from hw.rtl.memory.activation_fetch import max_activation_beats
from hw.rtl.memory.burst_cutter import BEAT_COUNT_BITS
from hw.spec.config import FLOAT_BITS, MAX_N, AcceleratorConfig
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, FIELDS, FLOAT_BYTES, VALUE_BITS
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import StreamLayout
from hw.spec.numerics.vector import PIECE
from hw.spec.ops import LINEAR, OPS, VECTOR, Op
from hw.spec.ops.base import OPCODE_BITS
from hw.spec.ops.command import command_fields
from hw.spec.ops.epilogue import EPILOGUE_FIELDS, HEAD_UNIT, MAX_HEAD, PIECE_BYTES

ERROR_BITS = 4
"""Width of an error code."""
DESCRIPTOR_BITS = 32 * DESCRIPTOR_WORDS


def operations(config: AcceleratorConfig) -> list[Op]:
    """The operations of this hardware."""
    return [op for op in OPS.values() if op.exists(config)]


def epilogue_fields(config: AcceleratorConfig) -> list[str]:
    """The epilogue's fields that this hardware has."""
    return [field.name for field in LINEAR.fields_of(config) if field in EPILOGUE_FIELDS]


def field_values(config: AcceleratorConfig, raw: Value) -> dict[str, Value]:
    """The values of all fields of a descriptor; addresses and pitches in bytes. A field that is absent here is 0."""
    present = {field for op in operations(config) for field in op.fields_of(config)}
    values: dict[str, Value] = {field.name: Const(0) for field in FIELDS}
    for field in present:
        values[field.name] = Cat(Const(0, field.unit.bit_length() - 1), raw[field.low : field.low + field.width])
    return values


def reserved_bits(config: AcceleratorConfig, op: Op) -> list[int]:
    """Bits of a descriptor that are in no field of an operation."""
    used = {bit for field in op.fields_of(config) for bit in range(field.low, field.low + field.width)}
    return [bit for bit in range(DESCRIPTOR_BITS) if bit not in used]


def work_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A checked descriptor: the core's command, addresses and lengths of the operands, and the epilogue.

    vector : the operation is VECTOR; only with a vector unit
    """
    names = ["interrupt", "activations", "results", "weights", "weights_stride", *epilogue_fields(config)]
    if config.has_vector_unit:
        names += ["source_pitch"]
    return data.StructLayout(
        {
            "command": command_layout(config),
            **{name: unsigned(VALUE_BITS[name]) for name in names},
            "activation_beats": unsigned(max_activation_beats(config).bit_length()),
            "weight_beats": unsigned(BEAT_COUNT_BITS),
            **({"vector": 1} if config.has_vector_unit else {}),
        }
    )


@dataclass(frozen=True)
class Derived:
    """A value that is computed from a descriptor's fields and from earlier derived values; it gets a register."""

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
        Derived("columns", MAX_N.bit_length(), lambda v: Mux(v["silu"], v["out_features"] >> 1, v["out_features"])),
        Derived("weight_beats", widths["out_tiles"] + tile_beat_bits, lambda v: v["out_tiles"] * v["tile_beats"]),
        Derived("activation_beats", activation_bits, lambda v: v["tokens"] * v["slices"] * beats_per_slice),
        Derived("body_wrong", 1, lambda v: _body_wrong(layout, v["body_words"], v["slices"])),
    )


def derived_epilogue() -> tuple[Derived, ...]:
    """The same for the epilogue, with the values of :func:`derived_counts`."""
    row_bits = (MAX_N * FLOAT_BYTES).bit_length()
    return (
        Derived("heads", VALUE_BITS["head"] + VALUE_BITS["rotary_heads"], lambda v: v["head"] * v["rotary_heads"]),
        Derived(
            "second_bytes",
            row_bits,
            lambda v: Mux(
                v["second"],
                v["columns"] * FLOAT_BYTES,
                Mux(v["pieces"], (v["columns"] + (PIECE - 1) >> (PIECE - 1).bit_length()) * PIECE_BYTES, 0),
            ),
        ),
    )


Comparison = Callable[[Mapping[str, Value]], Value]


def linear_comparisons(config: AcceleratorConfig) -> tuple[Comparison, ...]:
    """Faults of a linear layer's fields and derived values; see :meth:`Linear.shape_is_wrong`."""
    port_bytes_bits = (config.port_width // 8).bit_length() - 1
    return (
        lambda v: v["slices"] > config.max_k // config.tile,
        lambda v: v["header_wrong"],
        lambda v: v["body_wrong"],
        # This also limits a region to less than 4 GiB.
        lambda v: (v["weight_beats"] << port_bytes_bits) > v["weights_stride"],
        lambda v: v["reuse"] & v["before_differs"],
    )


def vector_comparisons() -> tuple[Comparison, ...]:
    """Faults of the fields of VECTOR; see :meth:`Vector.shape_is_wrong`."""
    return (lambda v: v["several"] & _pitch_wrong(v["source_pitch"], v["out_features"]),)


def result_comparisons() -> tuple[Comparison, ...]:
    """Faults of the place of the results; a part of :func:`epilogue_is_wrong` that all hardware has."""
    return (lambda v: v["several"] & ~v["quiet"] & (v["columns"] * FLOAT_BYTES > v["result_pitch"]),)


def epilogue_comparisons() -> tuple[Comparison, ...]:
    """The other faults of an epilogue; see :func:`hw.spec.ops.epilogue.epilogue_is_wrong`."""
    return (
        lambda v: (v["rotary"] & v["silu"]) | (v["second"] & v["pieces"]),
        lambda v: v["quiet"] & ~(v["second"] | v["pieces"]),
        lambda v: v["silu"] & v["out_features"][0],
        lambda v: v["rotary"] != (v["heads"] != 0),
        lambda v: ~v["rotary"] & ((v["head"] != 0) | (v["rotary_heads"] != 0)),
        lambda v: v["head"][: (HEAD_UNIT - 1).bit_length()].any() | (v["head"] > MAX_HEAD),
        lambda v: v["heads"] > v["out_features"],
        lambda v: v["several"] & (v["second_bytes"] > v["second_pitch"]),
        lambda v: v["several"] & v["add"] & _pitch_wrong(v["addend_pitch"], v["out_features"]),
        lambda v: v["several"] & _pitch_wrong(v["table_pitch"], v["head"]),
    )


def _pitch_wrong(pitch: Value, columns: Value) -> Value:
    """Whether rows overlap, and the pitch does not mean that there is only one."""
    return (pitch != 0) & (columns * FLOAT_BYTES > pitch)


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
    work : the valid ones
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
                "descriptors": In(stream.Signature(DESCRIPTOR_BITS)),
                "work": Out(stream.Signature(work_layout(config))),
                "error": Out(ERROR_BITS),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        descriptor = Signal(DESCRIPTOR_BITS)
        stage = Signal(self.latency - 1)
        idle, take, good = Signal(init=1), Signal(), Signal()
        done = self.work.valid & self.work.ready
        m.d.comb += [self.descriptors.ready.eq(idle), take.eq(idle & self.descriptors.valid)]
        m.d.sync += stage.eq(Cat(take, stage))
        with m.If(take):
            m.d.sync += [descriptor.eq(self.descriptors.payload), idle.eq(0)]
        with m.If(done):
            m.d.sync += [self.work.valid.eq(0), idle.eq(1)]
        opcode_wrong = self._register(m, ~idle, "opcode_wrong", self._unknown(descriptor))
        shape_wrong = self._shape(m, descriptor, ~idle).any()
        # These are registers of the stage before the last, so the last stage has only a small OR and the priority below.
        m.d.comb += good.eq(~(opcode_wrong | shape_wrong))
        with m.If(stage[-1]):
            m.d.sync += self.work.valid.eq(good)
            with m.If(opcode_wrong):
                m.d.sync += self.error.eq(ErrorCode.OPCODE)
            with m.Elif(shape_wrong):
                m.d.sync += self.error.eq(ErrorCode.SHAPE)
        return m

    def _register(self, m: Module, busy: Value, name: str, value: Value, width: int = 1) -> Signal:
        """A register for a value of the descriptor in this block."""
        signal = Signal(width, name=name)
        with m.If(busy):
            m.d.sync += signal.eq(value)
        return signal

    def _is(self, descriptor: Value, op: Op) -> Value:
        """Whether the descriptor has the opcode of an operation."""
        return descriptor[:OPCODE_BITS] == op.opcode

    def _unknown(self, descriptor: Value) -> Value:
        """Whether this hardware does not have the opcode, or a reserved bit is set. This needs no arithmetic."""
        good = [
            self._is(descriptor, op) & ~Cat(descriptor[bit] for bit in reserved_bits(self.config, op)).any()
            for op in operations(self.config)
        ]
        return ~Cat(good).any()

    def _shape(self, m: Module, descriptor: Value, busy: Value) -> Value:
        """Whether a count is out of its bounds, reuse is not possible, or a derived count has a wrong value.

        This has a register for each of the comparisons, because the comparisons alone fill a stage.
        """
        config, work = self.config, self.work.payload
        fields = field_values(config, descriptor)
        # Derived values are only as wide as their largest legal value: a count out of range is refused in any case.
        values = fields | {name: fields[name][: high.bit_length()] for name, (_, high) in LINEAR.bounds(config).items()}
        values["several"] = values["tokens"] > 1
        for derived in (*derived_counts(config), *(derived_epilogue() if config.has_vector_unit else ())):
            values[derived.name] = self._register(m, busy, derived.name, derived.of(values), derived.width)
        values["before_differs"] = self._register(
            m, busy, "before_differs", self._differs_from_before(m, descriptor, values)
        )
        wrong, rules = [], {LINEAR: linear_comparisons(config), VECTOR: vector_comparisons()}
        for op in operations(config):
            outside = [
                Cat(fields[name] < low, fields[name] > high).any() for name, (low, high) in op.bounds(config).items()
            ]
            found = [Cat(outside).any(), *(compare(values) for compare in rules[op])]
            wrong += [self._is(descriptor, op) & fault for fault in found]
        more = epilogue_comparisons() if config.has_vector_unit else ()
        wrong += [compare(values) for compare in (*result_comparisons(), *more)]
        m.d.comb += [
            *(work[name].eq(values[name]) for name, _ in work.shape() if name not in ("command", "vector")),
            *(work.command[name].eq(values[name]) for name, _ in work.command.shape()),
        ]
        if config.has_vector_unit:
            m.d.comb += work.vector.eq(self._is(descriptor, VECTOR))
        return self._register(m, busy, "shape_wrong", Cat(wrong), len(wrong))

    def _differs_from_before(self, m: Module, descriptor: Value, values: Mapping[str, Value]) -> Value:
        """Whether there is no previous linear layer, or it had activations of another shape."""
        shape = Cat(values[name] for name in LINEAR.activation_shape)
        before, exists = Signal(len(shape)), Signal()
        with m.If(self.work.valid & self.work.ready & self._is(descriptor, LINEAR)):
            m.d.sync += [before.eq(shape), exists.eq(1)]
        return ~exists | (shape != before)
