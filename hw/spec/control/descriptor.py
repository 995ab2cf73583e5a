# SPDX-License-Identifier: Apache-2.0
"""The descriptor: one piece of work for the accelerator.

What its fields mean depends on its opcode (:mod:`hw.spec.ops`).
:mod:`hw.spec.memory.operands` says how operands lie in memory.
"""

from hw.spec.memory.operands import (
    ADDRESS_BITS,
    ADDRESS_LIMIT,
    BANK_SPAN,
    DATA_ALIGNMENT,
    FLOAT_BYTES,
    WEIGHT_ALIGNMENT,
    activation_beats,
    region_bytes,
    result_pitch,
    weight_bytes,
    weights_stride,
)
from hw.spec.ops import OPS
from hw.spec.ops.base import DESCRIPTOR_WORDS, DescriptorField, Opcode
from hw.spec.ops.linear import Descriptor

__all__ = [
    "ADDRESS_BITS",
    "ADDRESS_LIMIT",
    "BANK_SPAN",
    "DATA_ALIGNMENT",
    "DESCRIPTOR_WORDS",
    "FIELDS",
    "FIELD_WIDTHS",
    "FLOAT_BYTES",
    "WEIGHT_ALIGNMENT",
    "Descriptor",
    "DescriptorField",
    "Opcode",
    "activation_beats",
    "region_bytes",
    "result_pitch",
    "weight_bytes",
    "weights_stride",
]

FIELDS: tuple[DescriptorField, ...] = tuple(
    sorted({field.name: field for op in OPS.values() for field in op.fields}.values(), key=lambda field: field.low)
)
"""The fields of all opcodes, by their places. Every bit that is in no field is reserved and 0."""
FIELD_WIDTHS = {field.name: field.width for field in FIELDS}
