# SPDX-License-Identifier: Apache-2.0
"""The kind of memory for a large buffer."""

from hw.spec.memory.geometry import ceil_div

URAM_DEPTH, URAM_WIDTH = 4096, 72
"""Shape of one URAM288 (AMD UG573)."""
_FILLED = 3 / 4


def buffer_attributes(platform, depth: int, width: int) -> dict[str, str]:
    """Attributes of a memory of ``depth`` words of ``width`` bits that is read through a register.

    On UltraScale+ the memory is UltraRAM if it fills most of the blocks that it takes, and block RAM otherwise. For
    other parts the tools choose.
    """
    if getattr(platform, "family", None) != "ultrascaleplus":
        return {}
    blocks = ceil_div(depth, URAM_DEPTH) * ceil_div(width, URAM_WIDTH)
    filled = depth * width / (blocks * URAM_DEPTH * URAM_WIDTH)
    return {"ram_style": "ultra" if filled >= _FILLED else "block"}
