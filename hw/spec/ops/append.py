# SPDX-License-Identifier: Apache-2.0
"""Appends keys or values of one KV head to its cache: rows of float32 numbers become block floating point.

With ``add`` a row of memory, the same for all of them, is added to the keys first.

The layout of the cache is that of :mod:`hw.spec.memory.kv_cache`, the rounding that of
:mod:`hw.spec.numerics.attention`. Only the bytes of the appended positions are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.kv_cache import LONGEST_CONTEXT, PLANE_COUNTS, Bytes, KeyCache, ValueCache
from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.numerics.attention import cache_keys, cache_values
from hw.spec.numerics.block_float import BlockFloat
from hw.spec.ops.base import (
    COMMON_FIELDS,
    WEIGHT_FIELDS,
    AttentionOp,
    DescriptorField,
    DescriptorWords,
    Memory,
    Opcode,
    State,
    Wait,
    float_rows,
    in_order,
    opcode_field,
    units,
)
from hw.spec.ops.epilogue import EPILOGUE_FIELDS, MAX_HEAD, PITCH_BITS

_TITLE = "append to a KV cache"
SLOT_BITS = LONGEST_CONTEXT.bit_length() - 1
ROW_FIELDS: tuple[DescriptorField, ...] = (
    DescriptorField("activations", 128, 32, units(DATA_ALIGNMENT, "address of the rows"), DATA_ALIGNMENT),
    DescriptorField(
        "activation_pitch", 320, PITCH_BITS, units(DATA_ALIGNMENT, "from one row to the next"), DATA_ALIGNMENT
    ),
)
EXPONENT_FIELDS: tuple[DescriptorField, ...] = (
    DescriptorField("exponents", 352, 32, units(DATA_ALIGNMENT, "values: address of their exponents"), DATA_ALIGNMENT),
)
"""The exponents of values; from one group of 32 columns to the next there are ``slots`` bytes, in whole chunks."""
SLOTS_FIELD = DescriptorField("slots", 384, SLOT_BITS + 1, "positions that the cache can hold")
FIELDS: tuple[DescriptorField, ...] = in_order(
    (opcode_field(Opcode.APPEND, _TITLE),),
    COMMON_FIELDS,
    WEIGHT_FIELDS,
    ROW_FIELDS,
    EXPONENT_FIELDS,
    (field for field in EPILOGUE_FIELDS if field.name in ("add", "addend")),
    (
        DescriptorField("keys", 12, 1, "1: keys, 0: values"),
        DescriptorField("planes", 20, 3, "planes of a mantissa: 1, 2 or 4"),
        DescriptorField("slot", 256, SLOT_BITS, "slot of the first row; the slot after the last one is slot 0"),
        SLOTS_FIELD,
    ),
)


@dataclass(frozen=True, kw_only=True)
class AppendDescriptor(DescriptorWords):
    """The descriptor; the attributes are those of :data:`FIELDS`. Addresses and pitches in bytes."""

    op_fields = FIELDS

    keys: int
    planes: int
    tokens: int
    out_features: int
    activations: int
    activation_pitch: int
    weights: int
    weights_stride: int
    slot: int
    slots: int
    add: int = 0
    addend: int = 0
    exponents: int = 0
    interrupt: int = 0
    wait: int = Wait.NOTHING
    opcode: int = Opcode.APPEND


def cache_of(config: AcceleratorConfig, fields: Mapping[str, int]) -> KeyCache | ValueCache:
    """The cache that a descriptor describes. Raises ConfigError if there is none."""
    size, slots = fields["out_features"], fields["slots"]
    if not fields["keys"]:
        return ValueCache(config, size, slots)
    return KeyCache(config, size, slots, fields["planes"] * config.weight_bits)


class Append(AttentionOp):
    """See the module, and :class:`hw.spec.ops.base.Op`."""

    opcode = Opcode.APPEND
    title = _TITLE
    fields = FIELDS

    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """See :class:`Op`."""
        return {
            "wait": (min(Wait), max(Wait)),
            "tokens": (1, config.max_tokens),
            "out_features": (1, MAX_HEAD),
            "slots": (1, LONGEST_CONTEXT),
            "planes": (1, max(PLANE_COUNTS)),
        }

    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """See :class:`Op`."""
        if self.outside_bounds(config, fields):
            return True
        try:
            cache = cache_of(config, fields)
        except ConfigError:
            return True
        short = fields["tokens"] > 1 and fields["activation_pitch"] < FLOAT_BYTES * fields["out_features"]
        return (
            fields["planes"] != cache.planes
            or fields["slot"] >= fields["slots"]
            or short
            or (fields["add"] > fields["keys"])
        )

    def execute(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory, state: State) -> None:
        """See :class:`Op`. Raises NumericsError if a number is not finite."""
        d, cache = fields, cache_of(config, fields)
        rows = float_rows(memory, d["activations"], d["activation_pitch"], d["tokens"], d["out_features"])
        stride = d["weights_stride"]
        stream = memory.view(d["weights"], (config.ports - 1) * stride + cache.region_bytes)
        if isinstance(cache, KeyCache):
            added = float_rows(memory, d["addend"], 0, 1, d["out_features"])[0] if d["add"] else np.zeros(1, np.float32)
            numbers = cache_keys(rows, -added, cache.bits)
        else:
            numbers = cache_values(rows)
        for row in range(d["tokens"]):
            slot, one = (d["slot"] + row) % d["slots"], BlockFloat(*(part[row] for part in numbers))
            if isinstance(cache, ValueCache):
                _write(memory.view(d["exponents"], cache.exponent_bytes), cache.append_exponents(slot, one))
            _write(stream, cache.append(slot, one, stride))


def _write(memory: np.ndarray, some: Bytes) -> None:
    memory[some.offsets] = some.values


APPEND = Append()
