# SPDX-License-Identifier: Apache-2.0
"""One object per opcode. The hardware's check, the driver, the reference and the documentation use these objects."""

from collections.abc import Sequence

from hw.spec.config import AcceleratorConfig
from hw.spec.ops.append import APPEND
from hw.spec.ops.base import OPCODE_BITS, AttentionOp, Op, Opcode, Wait
from hw.spec.ops.linear import LINEAR
from hw.spec.ops.scores import SCORES
from hw.spec.ops.values import VALUES
from hw.spec.ops.vector import VECTOR

__all__ = ["APPEND", "ATTENTION", "LINEAR", "OPS", "SCORES", "VALUES", "VECTOR", "Op", "Opcode", "Wait", "op_of"]

ATTENTION: dict[Opcode, AttentionOp] = {op.opcode: op for op in (APPEND, SCORES, VALUES)}
"""The opcodes of attention."""
OPS: dict[Opcode, Op] = {LINEAR.opcode: LINEAR, VECTOR.opcode: VECTOR, **ATTENTION}
"""All opcodes. Some hardware does not have all of them: see :meth:`Op.exists`."""


def op_of(config: AcceleratorConfig, words: Sequence[int]) -> Op | None:
    """The operation of a descriptor; None if the hardware does not have it."""
    op = OPS.get(words[0] & ((1 << OPCODE_BITS) - 1))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return op if op and op.exists(config) else None
