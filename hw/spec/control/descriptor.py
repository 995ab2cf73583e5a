# SPDX-License-Identifier: Apache-2.0
"""The descriptor: one operation for the accelerator.

The meaning of its fields depends on its opcode (:mod:`hw.spec.ops`).
:mod:`hw.spec.memory.operands` defines the layout of operands in memory.
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
from hw.spec.ops.base import DESCRIPTOR_WORDS, DescriptorField, Opcode, Wait
from hw.spec.ops.linear import Descriptor
from hw.spec.ops.vector import VectorDescriptor

__all__ = [
    "ADDRESS_BITS",
    "ADDRESS_LIMIT",
    "BANK_SPAN",
    "DATA_ALIGNMENT",
    "DESCRIPTOR_WORDS",
    "FIELDS",
    "FLOAT_BYTES",
    "PITCH_BITS",
    "STRIDE_BITS",
    "VALUE_BITS",
    "WEIGHT_ALIGNMENT",
    "Descriptor",
    "DescriptorField",
    "Opcode",
    "VectorDescriptor",
    "Wait",
    "activation_beats",
    "region_bytes",
    "result_pitch",
    "weight_bytes",
    "weights_stride",
]

FIELDS: tuple[DescriptorField, ...] = tuple(
    sorted({field.name: field for op in OPS.values() for field in op.fields}.values(), key=lambda field: field.low)
)
"""The fields of all opcodes, in the order of their bits. All other bits are reserved and 0."""
VALUE_BITS = {field.name: (field.limit - 1).bit_length() for field in FIELDS}
"""Width of each field's values; addresses and pitches in bytes."""
PITCH_BITS = VALUE_BITS["result_pitch"]
"""Width of a pitch in bytes."""
STRIDE_BITS = VALUE_BITS["weights_stride"]
"""Width of the stride of weights in bytes."""
