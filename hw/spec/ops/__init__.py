# SPDX-License-Identifier: Apache-2.0
"""One object per opcode. The hardware's check, the driver, the reference and the documentation use these objects."""

from collections.abc import Sequence

from hw.spec.config import AcceleratorConfig
from hw.spec.ops.append import APPEND
from hw.spec.ops.base import OPCODE_BITS, Op, Opcode, Wait
from hw.spec.ops.linear import LINEAR
from hw.spec.ops.scores import SCORES
from hw.spec.ops.values import VALUES
from hw.spec.ops.vector import VECTOR

__all__ = ["APPEND", "ATTENTION", "LINEAR", "OPS", "SCORES", "VALUES", "VECTOR", "Op", "Opcode", "Wait", "op_of"]

OPS: dict[Opcode, Op] = {op.opcode: op for op in (LINEAR, VECTOR)}
"""The opcodes of generated hardware."""
ATTENTION: dict[Opcode, Op] = {op.opcode: op for op in (APPEND, SCORES, VALUES)}
"""Those of attention. Only the reference device has them; the generator refuses a config with ``score_words``."""


def op_of(config: AcceleratorConfig, words: Sequence[int]) -> Op | None:
    """The operation of a descriptor; None if the hardware does not have it."""
    op = OPS.get(words[0] & ((1 << OPCODE_BITS) - 1))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return op if op and op.exists(config) else None
