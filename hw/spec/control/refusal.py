# SPDX-License-Identifier: Apache-2.0
"""The definition of descriptors that the accelerator refuses, with the reason. The RTL is tested against it."""

from collections.abc import Sequence

from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import ErrorCode
from hw.spec.ops import op_of
from hw.spec.ops.base import DescriptorField


def parse(words: Sequence[int], fields: Sequence[DescriptorField]) -> tuple[dict[str, int], bool]:
    """The values of fields in a descriptor's words, and whether all other bits are 0."""
    whole = sum(word << 32 * index for index, word in enumerate(words))
    values = {field.name: field.get(whole) for field in fields}
    return values, sum(field.put(values[field.name]) for field in fields) == whole


def refusal(config: AcceleratorConfig, words: Sequence[int], before: Sequence[int] | None = None) -> ErrorCode:
    """Why the descriptor is refused, or ErrorCode.NONE. before: the words of the last linear layer that was accepted."""
    op = op_of(config, words)
    if op is None:
        return ErrorCode.OPCODE
    fields, clean = parse(words, op.fields_of(config))
    if not clean:
        return ErrorCode.OPCODE
    # The fields that this hardware does not have are 0.
    fields = {field.name: 0 for field in op.fields} | fields
    if op.shape_is_wrong(config, fields, None if before is None else parse(before, op.fields)[0]):
        return ErrorCode.SHAPE
    return ErrorCode.NONE
