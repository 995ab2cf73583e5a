# SPDX-License-Identifier: Apache-2.0
"""Checks a descriptor before any unit starts with it, and computes derived values for the units."""

from collections.abc import Mapping

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, ValueLike, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.walker import command_layout
from hw.rtl.control.attention_rules import attention_values
from hw.rtl.control.descriptor_rules import HEADS_BITS, comparisons, derived_values, epilogue_comparisons
from hw.rtl.core.activation_unit import slice_bits
from hw.rtl.memory.activation_fetch import max_activation_beats
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.burst_cutter import BEAT_COUNT_BITS
from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, FIELDS, FLOAT_BYTES, PITCH_BITS, VALUE_BITS
from hw.spec.control.program import LENGTH_BITS
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.kv_cache import PAIRED_BITS, value_chunk
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops import ATTENTION, LINEAR, OPS, VECTOR, Op
from hw.spec.ops.base import OPCODE_BITS
from hw.spec.ops.epilogue import EPILOGUE_FIELDS, MAX_HEAD
from hw.spec.ops.scores import BANKS

ERROR_BITS = 4
"""Width of an error code."""
DESCRIPTOR_BITS = 32 * DESCRIPTOR_WORDS
ATTENTION_FIELDS = ("planes", "keys", "bank", "slot", "slots", "turn", "window", "causal", "positions", "exponents")
"""Fields of attention that units need."""


def operations(config: AcceleratorConfig) -> list[Op]:
    """The operations of this hardware."""
    return [op for op in OPS.values() if op.exists(config)]


def epilogue_fields(config: AcceleratorConfig) -> list[str]:
    """The epilogue's fields that this hardware has."""
    return [field.name for field in LINEAR.fields_of(config) if field in EPILOGUE_FIELDS]


def field_values(config: AcceleratorConfig, raw: Value) -> dict[str, Value]:
    """The values of all fields of a descriptor; addresses and pitches in bytes. A field that is absent here is 0."""
    values: dict[str, Value] = {field.name: Const(0) for field in FIELDS}
    for op in operations(config):
        for field in op.fields_of(config):
            values[field.name] = Cat(Const(0, field.unit.bit_length() - 1), raw[field.low : field.low + field.width])
    return values


def reserved_bits(config: AcceleratorConfig, op: Op) -> list[int]:
    """Bits of a descriptor that are in no field of an operation."""
    used = {bit for field in op.fields_of(config) for bit in range(field.low, field.low + field.width)}
    return [bit for bit in range(DESCRIPTOR_BITS) if bit not in used]


def work_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A checked descriptor: the core's command, addresses and lengths of the operands, and the epilogue.

    vector : the operation is VECTOR; only with a vector unit
    heads : columns of all rotated heads; only with a vector unit
    index : the descriptor's index in its program; only in hardware that runs programs

    and with attention

    append, scores, values : the operation is this one
    last_groups, last_beats, tile_step : see :func:`hw.rtl.control.attention_rules.attention_values`
    chunks : chunks of values; 1 for other operations
    fetch_rows, fetch_pitch : rows that the activation fetch reads, from ``activations`` on, ``activation_beats`` each,
        for each chunk
    weight_tiles : column tiles of a chunk; in the first chunk they have ``weight_beats`` each
    unit_groups : groups of activations, each of which is sent for every plane

    and with ``config.reads_by_pieces``

    by_pieces : the rows that the activation fetch reads come piece by piece: those of a linear layer of several tokens
    last_slice : its number of K-slices minus 1
    row_end : the address behind the first row that the activation fetch reads
    results_end : the address behind the first row of results
    """
    names = ["interrupt", "wait", "activations", "results", "weights", "weights_stride", *epilogue_fields(config)]
    if config.has_vector_unit:
        names += ["source_pitch", "out_features"]
    return data.StructLayout(
        {
            "command": command_layout(config),
            **{name: unsigned(VALUE_BITS[name]) for name in names},
            "activation_beats": unsigned(max_activation_beats(config).bit_length()),
            "weight_beats": unsigned(BEAT_COUNT_BITS),
            **({"vector": 1, "heads": HEADS_BITS} if config.has_vector_unit else {}),
            **({"index": LENGTH_BITS} if config.has_programs else {}),
            **(_attention_work(config) if config.has_attention else {}),
        }
    )


def _attention_work(config: AcceleratorConfig) -> dict[str, int]:
    """Name and width of attention's part of a checked descriptor."""
    widths = {derived.name: derived.width for derived in attention_values(config)}
    tiles = (MAX_HEAD // config.tile).bit_length()
    return {
        **{name: VALUE_BITS[name] for name in ATTENTION_FIELDS},
        **dict.fromkeys(("append", "scores", "values"), 1),
        **{name: widths[name] for name in ("chunks", "last_groups", "last_beats", "tile_step")},
        "fetch_rows": max(tiles, config.max_tokens.bit_length()),
        "fetch_pitch": max(widths["exponent_pitch"], PITCH_BITS),
        "weight_tiles": tiles,
        "unit_groups": command_layout(config)["groups"].width,
        **(
            {"by_pieces": 1, "last_slice": slice_bits(config), "row_end": ADDRESS_BITS, "results_end": ADDRESS_BITS}
            if config.reads_by_pieces
            else {}
        ),
    }


class DescriptorCheck(Block):
    """Passes valid descriptors on. It stops at the first invalid one, and keeps this one and its error until the reset.

    Members
    -------
    descriptors : descriptors as written by software
    work : the valid ones; a payload does not change from the cycle before its ``valid`` to its transfer
    error : why the current descriptor was refused (:class:`hw.spec.control.registers.ErrorCode`)
    index : in hardware that runs programs: the current descriptor's index, from the cycle after its transfer on; it is
        passed on

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
                **({"index": In(LENGTH_BITS)} if config.has_programs else {}),
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
        opcode_wrong = self._register(m, ~idle, "opcode_wrong", self._unknown(m, descriptor, ~idle))
        shape_wrong = self._shape(m, descriptor, ~idle).any()
        # These are registers of the stage before the last: the last stage has only a small OR and the priority below.
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

    def _unknown(self, m: Module, descriptor: Value, busy: Value) -> Value:
        """Whether this hardware does not have the opcode, or a reserved bit is set."""
        known = []
        for op in operations(self.config):
            reserved = Cat(descriptor[bit] for bit in reserved_bits(self.config, op)).any()
            reserved = self._register(m, busy, f"{op.opcode.name.lower()}_reserved", reserved)
            known.append(self._is(descriptor, op) & ~reserved)
        return ~Cat(known).any()

    def _values(self, m: Module, descriptor: Value, busy: Value) -> dict[str, Value]:
        """All fields of the descriptor, and the derived values, each in a register."""
        values = field_values(self.config, descriptor)
        # Derived values are only as wide as their largest legal value: a count out of range is refused in any case.
        for name, (_, high) in LINEAR.bounds(self.config).items():
            values[name] = values[name][: high.bit_length()]
        values["several"] = values["tokens"] > 1
        if self.config.has_attention:
            values |= {f"is_{op.opcode.name.lower()}": self._is(descriptor, op) for op in ATTENTION.values()}
        for derived in derived_values(self.config):
            values[derived.name] = self._register(m, busy, derived.name, derived.of(values), derived.width)
        differs = self._differs_from_before(m, descriptor, values)
        values["before_differs"] = self._register(m, busy, "before_differs", differs)
        if self.config.has_attention:
            values |= self._banks(m, busy, values)
        return values

    def _banks(self, m: Module, busy: Value, values: Mapping[str, Value]) -> dict[str, Value]:
        """The banks of scores after the accepted descriptors: whether the descriptor's bank holds some, and whether
        their number differs from that of the descriptor's values."""
        shape, bank = Cat(values["tokens"], values["positions"]), values["bank"]
        scores = Cat(values["tokens"], values["out_features"][: len(values["positions"])])
        holds, differs = [], []
        for index in range(BANKS):
            held, full = Signal(len(shape), name=f"scores_{index}"), Signal(name=f"holds_{index}")
            with m.If(self.work.valid & self.work.ready & (bank == index)):
                with m.If(values["is_scores"]):
                    m.d.sync += [held.eq(scores), full.eq(1)]
                with m.Elif(values["is_values"]):
                    m.d.sync += full.eq(0)
            holds.append(full)
            differs.append(held != shape)
        return {
            name: self._register(m, busy, name, Cat(flags).bit_select(bank, 1))
            for name, flags in (("bank_holds", holds), ("bank_differs", differs))
        }

    def _shape(self, m: Module, descriptor: Value, busy: Value) -> Value:
        """The faults of the descriptor, a bit each: a count out of its bounds, or a comparison.

        This has a register for each of them, because the comparisons alone fill a stage.
        """
        values, fields = self._values(m, descriptor, busy), field_values(self.config, descriptor)
        faults = [compare(values) for compare in epilogue_comparisons(self.config)]
        for op in operations(self.config):
            outside = [
                (fields[name] < low) | (fields[name] > high) for name, (low, high) in op.bounds(self.config).items()
            ]
            found = [Cat(outside).any(), *(compare(values) for compare in comparisons(self.config)[op.opcode])]
            faults += [self._is(descriptor, op) & fault for fault in found]
        self._pass_on(m, descriptor, busy, values)
        return self._register(m, busy, "shape_wrong", Cat(faults), len(faults))

    def _pass_on(self, m: Module, descriptor: Value, busy: Value, values: dict[str, Value]) -> None:
        """The payload of ``work``."""
        work = self.work.payload
        if self.config.has_attention:
            values |= self._of_attention(m, descriptor, busy, values)
        m.d.comb += [
            *(work[name].eq(values[name]) for name, _ in work.shape() if name not in ("command", "vector", "index")),
            *(work.command[name].eq(values[name]) for name, _ in work.command.shape()),
        ]
        if self.config.has_vector_unit:
            m.d.comb += work.vector.eq(self._is(descriptor, VECTOR))
        if self.config.has_programs:
            m.d.comb += work.index.eq(self.index)

    def _of_attention(self, m: Module, descriptor: Value, busy: Value, values: Mapping[str, Value]) -> dict[str, Value]:
        """What units need instead of fields that several operations have in the same places, each in a register."""
        append, scores, output = (values[f"is_{name}"] for name in ("append", "scores", "values"))
        port_bytes = self.config.port_width // 8

        def chosen(of_scores: ValueLike, of_values: ValueLike, otherwise: ValueLike) -> Value:
            return Mux(scores, of_scores, Mux(output, of_values, otherwise))

        whole = value_chunk(self.config).tile_beats
        head = values["head_groups"] * (BLOCK * FLOAT_BYTES // port_bytes)
        rows, beats, pitch = 1, values["activation_beats"], values["activation_pitch"]
        linear, pieces = self._is(descriptor, LINEAR), {}
        if self.config.reads_by_pieces:
            # A linear layer's rows follow each other in memory.
            row_bytes = self.config.tile * FLOAT_BYTES
            rows, beats = values["tokens"], values["slices"] * (row_bytes // port_bytes)
            pitch = Mux(linear, values["slices"] * row_bytes, pitch)
            pieces = {
                "by_pieces": linear & values["several"],
                "last_slice": values["slices"] - 1,
                "row_end": values["activations"] + values["slices"] * row_bytes,
                "results_end": values["results"] + values["columns"] * FLOAT_BYTES,
            }
        found = {
            "append": append,
            "scores": scores,
            "values": output,
            "reuse": values["reuse"] & linear,
            "paired": scores if self.config.weight_bits == PAIRED_BITS else Const(0),
            "spare_records": Const(0),
            # Scores are multiplied by a constant, and results by 1/S.
            "scale": scores | output | (values["scale"] & ~append),
            "addend_pitch": Mux(append, 0, values["addend_pitch"]),
            "planes": Mux(scores | append, values["planes"], 1),
            "unit_groups": Mux(scores, values["head_groups"], values["groups"]),
            "activations": Mux(output, values["exponents"], values["activations"]),
            "activation_beats": chosen(head, CHUNK // port_bytes, beats),
            "chunks": Mux(output, values["chunks"], 1),
            "fetch_rows": chosen(values["tokens"], values["out_tiles"], rows),
            "fetch_pitch": Mux(output, values["exponent_pitch"], pitch),
            "weight_beats": Mux(
                output, Mux(values["chunks"] == 1, values["last_beats"], whole), values["weight_beats"]
            ),
            "weight_tiles": Mux(output, values["out_tiles"], 1),
            **pieces,
        }
        layout = self.work.payload.shape()
        widths = {name: field.width for name, field in (*layout, *layout["command"].shape)}
        return {name: self._register(m, busy, f"passed_{name}", value, widths[name]) for name, value in found.items()}

    def _differs_from_before(self, m: Module, descriptor: Value, values: Mapping[str, Value]) -> Value:
        """Whether there is no previous linear layer, or it had activations of another shape."""
        shape = Cat(values[name] for name in LINEAR.activation_shape)
        before, exists = Signal(len(shape)), Signal()
        done = self.work.valid & self.work.ready
        with m.If(done & self._is(descriptor, LINEAR)):
            m.d.sync += [before.eq(shape), exists.eq(1)]
        if self.config.has_attention:
            # They bring other activations.
            with m.Elif(done & (values["is_scores"] | values["is_values"])):
                m.d.sync += exists.eq(0)
        return ~exists | (shape != before)
