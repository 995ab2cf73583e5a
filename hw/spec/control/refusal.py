# SPDX-License-Identifier: Apache-2.0
"""Which descriptors the accelerator refuses, and why: the definition that the RTL is tested against."""

from collections.abc import Sequence

from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.operands import ADDRESS_LIMIT
from hw.spec.ops import OPS
from hw.spec.ops.base import OPCODE_BITS, DescriptorField


def parse(words: Sequence[int], fields: Sequence[DescriptorField]) -> tuple[dict[str, int], bool]:
    """These fields of a descriptor's words, and whether every other bit is 0."""
    whole = sum(word << 32 * index for index, word in enumerate(words))
    values = {field.name: whole >> field.low & ((1 << field.width) - 1) for field in fields}
    used = sum(value << field.low for field, value in zip(fields, values.values(), strict=True))
    return values, used == whole


def refusal(config: AcceleratorConfig, words: Sequence[int], before: Sequence[int] | None = None) -> ErrorCode:
    """Why the descriptor is refused, or ErrorCode.NONE. before: the words of the last one that was accepted."""
    opcode = words[0] & ((1 << OPCODE_BITS) - 1)
    op = next((op for op in OPS.values() if op.opcode == opcode), None)
    if op is None:
        return ErrorCode.OPCODE
    fields, clean = parse(words, op.fields)
    if not clean:
        return ErrorCode.OPCODE
    if op.shape_is_wrong(config, fields, None if before is None else parse(before, op.fields)[0]):
        return ErrorCode.SHAPE
    if any(fields[name] % alignment for name, alignment in op.alignments.items()):
        return ErrorCode.ALIGNMENT
    if any(fields[name] >= ADDRESS_LIMIT for name in op.addresses):
        return ErrorCode.ALIGNMENT
    return ErrorCode.NONE
