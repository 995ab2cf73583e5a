# SPDX-License-Identifier: Apache-2.0
"""Attention's part of the check of descriptors; see :mod:`hw.rtl.control.descriptor_rules`.

``is_append``, ``is_scores`` and ``is_values`` are among the values.
"""

from collections.abc import Mapping

from amaranth.hdl import Cat, Mux, Value

from hw.rtl.control.rules import Comparison, Derived, ceil_div, units
from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.memory.kv_cache import (
    KEY_BITS,
    LONGEST_CONTEXT,
    PLANE_COUNTS,
    chunk_bits,
    chunk_groups,
    group_beats,
    tile_step_bits,
    value_chunk,
    value_planes,
)
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops.base import Opcode
from hw.spec.ops.epilogue import MAX_HEAD

_COUNT_BITS = LONGEST_CONTEXT.bit_length()
_BLOCK_BITS = BLOCK.bit_length() - 1


def attention_values(config: AcceleratorConfig) -> tuple[Derived, ...]:
    """Derived values; there are at most two registers in a row.

    head_groups : groups of a query
    chunks, last_groups : chunks of the positions that are read; groups of positions in the last one
    last_beats : beats of a column tile of the last chunk of values
    tile_step : bytes on a port from one column tile of the cache to the next
    exponent_pitch : bytes from the exponents of a group of columns to those of the next
    position_units, bank_units : a row of scores; all rows of a descriptor
    """
    groups, beats = chunk_groups(config), value_chunk(config).tile_beats
    group_bits = (value_chunk(config).group_size - 1).bit_length()
    port_bytes, most_rows = config.port_width // 8, config.score_words // SCORE_UNIT
    unit_bits = (LONGEST_CONTEXT // SCORE_UNIT).bit_length()

    def head_groups(v: Mapping[str, Value]) -> Value:
        shifts = {planes: planes.bit_length() - 1 for planes in PLANE_COUNTS}
        found = v["groups"]
        for planes, shift in shifts.items():
            found = Mux(v["planes"] == planes, v["groups"] >> shift, found)
        return found

    def missing(v: Mapping[str, Value]) -> Value:
        """Groups that the last chunk lacks: the inverted bits of the index of its last group."""
        last = (v["positions"] - 1)[group_bits : (CHUNK - 1).bit_length()]
        return ~last if len(last) else last

    return (
        Derived("head_groups", (MAX_HEAD // BLOCK).bit_length() + 1, head_groups),
        Derived("chunks", chunk_bits(), lambda v: ceil_div(v["positions"], CHUNK)),
        Derived("missing", (groups - 1).bit_length(), missing),
        Derived("slot_chunks", chunk_bits(), lambda v: ceil_div(v["slots"], CHUNK)),
        Derived("last_groups", groups.bit_length(), lambda v: groups - v["missing"]),
        Derived(
            "last_beats",
            beats.bit_length(),
            lambda v: beats - v["missing"] * group_beats(config),
        ),
        Derived("tile_step", tile_step_bits(config), lambda v: v["slot_chunks"] * (beats * port_bytes)),
        Derived("exponent_pitch", _COUNT_BITS, lambda v: v["slot_chunks"] * CHUNK),
        Derived(
            "position_units",
            unit_bits,
            lambda v: ceil_div(Mux(v["is_values"], v["positions"], v["out_features"][:_COUNT_BITS]), SCORE_UNIT),
        ),
        Derived(
            "bank_units",
            max(unit_bits + config.max_tokens.bit_length(), most_rows.bit_length()),
            lambda v: v["position_units"] * v["tokens"],
        ),
    )


def attention_comparisons(
    config: AcceleratorConfig, stream_wrong: tuple[Comparison, ...]
) -> dict[Opcode, tuple[Comparison, ...]]:
    """Faults of the operations of attention; see their ``shape_is_wrong`` and ``bank_is_wrong``.

    stream_wrong: faults of a weight stream that its descriptor describes.
    """
    key_planes = [bits // config.weight_bits for bits in KEY_BITS]

    def keys_wrong(v: Mapping[str, Value]) -> Value:
        return Cat(v["planes"] != planes for planes in key_planes).all()

    def no_head(v: Mapping[str, Value]) -> Value:
        return v["out_features"][:_BLOCK_BITS].any()

    def rows_overlap(v: Mapping[str, Value], row: str) -> Value:
        return v["several"] & (v[row] > units(v["activation_pitch"]))

    def bank_too_small(v: Mapping[str, Value]) -> Value:
        return v["bank_units"] > config.score_words // SCORE_UNIT

    append: tuple[Comparison, ...] = (
        no_head,
        lambda v: Mux(v["keys"], keys_wrong(v), v["planes"] != value_planes(config)),
        lambda v: v["slot"] >= v["slots"],
        lambda v: rows_overlap(v, "operand_units"),
        lambda v: v["add"] & ~v["keys"],
    )
    scores: tuple[Comparison, ...] = (
        keys_wrong,
        lambda v: v["group_slices"] != BLOCK // config.tile,
        # The planes of a group are in the stream one after another.
        lambda v: (v["groups"] & (v["planes"] - 1)).any(),
        lambda v: v["head_groups"] > MAX_HEAD // BLOCK,
        *stream_wrong,
        lambda v: v["turn"] > v["slots"],
        lambda v: v["out_features"] > v["slots"],
        lambda v: (v["window"] == 0) & (v["out_features"] > v["turn"]),
        lambda v: rows_overlap(v, "head_groups"),
        bank_too_small,
        lambda v: v["bank_holds"],
    )
    values: tuple[Comparison, ...] = (
        no_head,
        lambda v: v["positions"] > v["slots"],
        bank_too_small,
        lambda v: ~v["bank_holds"] | v["bank_differs"],
    )
    return {Opcode.APPEND: append, Opcode.SCORES: scores, Opcode.VALUES: values}
