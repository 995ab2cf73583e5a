# SPDX-License-Identifier: Apache-2.0
"""One object per opcode. The hardware's check, the driver, the reference and the documentation use these objects."""

from hw.spec.ops.base import Op, Opcode, Wait
from hw.spec.ops.linear import LINEAR

__all__ = ["LINEAR", "OPS", "Op", "Opcode", "Wait"]

OPS: dict[Opcode, Op] = {op.opcode: op for op in (LINEAR,)}
"""Every opcode of the accelerator."""
