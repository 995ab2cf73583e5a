# SPDX-License-Identifier: Apache-2.0
"""The values that the check of a descriptor computes from its fields, and the comparisons that find a wrong descriptor.

Functions get all values by name: the fields of the descriptor, addresses and pitches in bytes, and the derived values.
A field that the hardware does not have is 0.
"""

from collections.abc import Mapping

from amaranth.hdl import Mux, Value

from hw.rtl.control.attention_rules import attention_comparisons, attention_values
from hw.rtl.control.rules import Comparison, Derived, ceil_div, more_than, pitch_wrong, row_units, units
from hw.spec.config import FLOAT_BITS, MAX_N, AcceleratorConfig
from hw.spec.control.descriptor import DATA_ALIGNMENT, FLOAT_BYTES, VALUE_BITS, WEIGHT_ALIGNMENT, Opcode
from hw.spec.memory.geometry import StreamLayout
from hw.spec.numerics.vector import PARTIAL_SUMS, PIECE
from hw.spec.ops import LINEAR
from hw.spec.ops.command import command_fields
from hw.spec.ops.epilogue import HEAD_UNIT, MAX_HEAD, PIECE_BYTES

HEADS_BITS = VALUE_BITS["head"] + VALUE_BITS["rotary_heads"]
"""Width of the number of columns of all rotated heads."""
_ROW_UNIT_BITS = (MAX_N * FLOAT_BYTES // DATA_ALIGNMENT).bit_length()


def derived_values(config: AcceleratorConfig) -> tuple[Derived, ...]:
    """Derived values in the order of their dependencies; there are at most two registers in a row."""
    epilogue = _derived_epilogue() if config.has_vector_unit else ()
    return (*_derived_counts(config), *epilogue, *(attention_values(config) if config.has_attention else ()))


def _derived_counts(config: AcceleratorConfig) -> tuple[Derived, ...]:
    """Derived values of a linear layer and of its results."""
    layout, bounds, widths = StreamLayout(config), LINEAR.bounds(config), command_fields(config)
    tile, most = config.tile, {name: high for name, (_, high) in bounds.items()}
    slice_bits = (most["groups"] * most["group_slices"]).bit_length()
    tile_beat_bits = (most["header_beats"] + most["body_words"] * layout.beats_per_word).bit_length()
    header_bits = (layout.exponents_units + most["groups"] * layout.record_units).bit_length()
    beats_per_slice = tile * FLOAT_BITS // config.port_width
    activation_bits = most["tokens"].bit_length() + slice_bits + beats_per_slice.bit_length()
    return (
        Derived("slices", slice_bits, lambda v: v["groups"] * v["group_slices"]),
        Derived("tile_beats", tile_beat_bits, lambda v: v["header_beats"] + v["body_words"] * layout.beats_per_word),
        Derived("out_tiles", widths["out_tiles"], lambda v: (v["out_features"] + (tile - 1)) >> tile.bit_length() - 1),
        Derived("last_columns", widths["last_columns"], lambda v: ((v["out_features"] - 1) & (tile - 1)) + 1),
        Derived("header_length", header_bits, lambda v: _header_length(layout, v["groups"])),
        Derived("columns", MAX_N.bit_length(), lambda v: Mux(v["silu"], v["out_features"] >> 1, v["out_features"])),
        Derived("result_units", _ROW_UNIT_BITS, lambda v: row_units(v["columns"])),
        Derived("weight_beats", widths["out_tiles"] + tile_beat_bits, lambda v: v["out_tiles"] * v["tile_beats"]),
        Derived("activation_beats", activation_bits, lambda v: v["tokens"] * v["slices"] * beats_per_slice),
        Derived("header_wrong", 1, lambda v: v["header_beats"] != v["header_length"]),
        Derived("body_wrong", 1, lambda v: _body_wrong(layout, v["body_words"], v["slices"])),
    )


def _derived_epilogue() -> tuple[Derived, ...]:
    """The same for the epilogue, with the values of :func:`_derived_counts`."""
    pieces_in_unit = PIECE * (DATA_ALIGNMENT // PIECE_BYTES)

    def second(v: Mapping[str, Value]) -> Value:
        return Mux(v["second"], row_units(v["columns"]), Mux(v["pieces"], ceil_div(v["columns"], pieces_in_unit), 0))

    return (
        Derived("heads", HEADS_BITS, lambda v: v["head"] * v["rotary_heads"]),
        Derived("operand_units", _ROW_UNIT_BITS, lambda v: row_units(v["out_features"])),
        Derived("second_units", _ROW_UNIT_BITS, second),
    )


def comparisons(config: AcceleratorConfig) -> dict[Opcode, tuple[Comparison, ...]]:
    """Faults of one operation; see its ``shape_is_wrong``."""
    beats_in_unit = WEIGHT_ALIGNMENT // (config.port_width // 8)

    def weights_wrong(v: Mapping[str, Value]) -> Value:
        # This also limits a region to less than 4 GiB.
        return more_than(v["weight_beats"], units(v["weights_stride"], WEIGHT_ALIGNMENT), beats_in_unit)

    stream_wrong: tuple[Comparison, ...] = (
        lambda v: v["slices"] > config.max_k // config.tile,
        lambda v: v["header_wrong"],
        lambda v: v["body_wrong"],
        weights_wrong,
    )
    linear: tuple[Comparison, ...] = (*stream_wrong, lambda v: v["reuse"] & v["before_differs"])
    vector: tuple[Comparison, ...] = (lambda v: v["several"] & pitch_wrong(v["source_pitch"], v["operand_units"]),)
    attention = attention_comparisons(config, stream_wrong) if config.has_attention else {}
    return {Opcode.LINEAR: linear, Opcode.VECTOR: vector, **attention}


def epilogue_comparisons(config: AcceleratorConfig) -> tuple[Comparison, ...]:
    """Faults of the epilogue of any operation; see :func:`hw.spec.ops.epilogue.epilogue_is_wrong`.

    Without the vector unit only the first one is possible.
    """

    def results_wrong(v: Mapping[str, Value]) -> Value:
        found = v["several"] & ~v["quiet"] & (v["result_units"] > units(v["result_pitch"]))
        # Only these two do not write results to memory.
        return found & ~v["is_append"] & ~v["is_scores"] if config.has_attention else found

    always: tuple[Comparison, ...] = (results_wrong,)
    if not config.has_vector_unit:
        return always
    return (
        *always,
        lambda v: v["silu"] & (v["rotary"] | v["second"] | v["pieces"] | v["squares"]),
        lambda v: v["second"] & v["pieces"],
        lambda v: v["quiet"] & ~(v["second"] | v["pieces"]),
        lambda v: v["silu"] & v["out_features"][0],
        lambda v: v["squares"] & v["out_features"][: (PARTIAL_SUMS - 1).bit_length()].any(),
        lambda v: v["rotary"] != (v["heads"] != 0),
        lambda v: ~v["rotary"] & ((v["head"] != 0) | (v["rotary_heads"] != 0)),
        lambda v: v["head"][: (HEAD_UNIT - 1).bit_length()].any() | (v["head"] > MAX_HEAD),
        lambda v: v["heads"] > v["out_features"],
        lambda v: v["several"] & (v["second_units"] > units(v["second_pitch"])),
        lambda v: v["several"] & v["add"] & pitch_wrong(v["addend_pitch"], v["operand_units"]),
        lambda v: v["several"] & pitch_wrong(v["table_pitch"], row_units(v["head"])),
    )


def _header_length(layout: StreamLayout, groups: Value) -> Value:
    """Beats of a header with this number of groups; a beat has a power of two of units."""
    return ceil_div(layout.exponents_units + groups * layout.record_units, layout.beat_units)


def _body_wrong(layout: StreamLayout, words: Value, slices: Value) -> Value:
    """Whether a body with this number of slices does not end in the last one of ``words``."""
    per_word = layout.slices_per_word
    if per_word == 1:
        return words != slices * layout.words_per_slice
    # A word has several slices; the last word may be partly filled.
    return (words * per_word < slices) | (words * per_word >= slices + per_word)
