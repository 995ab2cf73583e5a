# SPDX-License-Identifier: Apache-2.0
"""The definition of descriptors that the accelerator refuses, with the reason. The RTL is tested against it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import ErrorCode
from hw.spec.ops import LINEAR, Op, op_of
from hw.spec.ops.append import APPEND
from hw.spec.ops.base import AttentionOp, Banks, DescriptorField


def parse(words: Sequence[int], fields: Sequence[DescriptorField]) -> tuple[dict[str, int], bool]:
    """The values of fields in a descriptor's words, and whether all other bits are 0."""
    whole = sum(word << 32 * index for index, word in enumerate(words))
    values = {field.name: field.get(whole) for field in fields}
    return values, sum(field.put(values[field.name]) for field in fields) == whole


@dataclass
class Accepted:
    """What the check knows of the descriptors that it has accepted since the reset.

    Attributes
    ----------
    linear : the words of the last linear layer, if its activations are still on chip
    banks : the scores on chip
    """

    linear: Sequence[int] | None = None
    banks: Banks = field(default_factory=dict)

    def take(self, config: AcceleratorConfig, words: Sequence[int]) -> ErrorCode:
        """Why the next descriptor is refused, or ErrorCode.NONE; then it is accepted."""
        code = refusal(config, words, self.linear, self.banks)
        op = op_of(config, words)
        if code != ErrorCode.NONE or op is None:
            return code
        if op is LINEAR:
            self.linear = words
        elif isinstance(op, AttentionOp):
            op.use_bank(_fields(config, op, words)[0], self.banks)
            # All but this one bring other activations.
            self.linear = self.linear if op is APPEND else None
        return code


def refusal(
    config: AcceleratorConfig,
    words: Sequence[int],
    before: Sequence[int] | None = None,
    banks: Mapping[int, tuple[int, int]] | None = None,
) -> ErrorCode:
    """Why the descriptor is refused, or ErrorCode.NONE. before, banks: see :class:`Accepted`."""
    op = op_of(config, words)
    if op is None:
        return ErrorCode.OPCODE
    fields, clean = _fields(config, op, words)
    if not clean:
        return ErrorCode.OPCODE
    if op.shape_is_wrong(config, fields, None if before is None else parse(before, op.fields)[0]):
        return ErrorCode.SHAPE
    if isinstance(op, AttentionOp) and op.bank_is_wrong(fields, dict(banks or {})):
        return ErrorCode.SHAPE
    return ErrorCode.NONE


def _fields(config: AcceleratorConfig, op: Op, words: Sequence[int]) -> tuple[dict[str, int], bool]:
    """The fields of a descriptor, 0 for those that this hardware does not have; and whether all other bits are 0."""
    fields, clean = parse(words, op.fields_of(config))
    return {field.name: 0 for field in op.fields} | fields, clean
