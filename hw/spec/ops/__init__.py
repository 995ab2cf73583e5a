# SPDX-License-Identifier: Apache-2.0
"""One object per opcode. The hardware's check, the driver, the reference and the documentation go through these."""

from hw.spec.ops.base import Op, Opcode
from hw.spec.ops.linear import LINEAR

OPS: dict[Opcode, Op] = {op.opcode: op for op in (LINEAR,)}
"""Every opcode that the accelerator knows."""
