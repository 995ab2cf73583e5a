# SPDX-License-Identifier: Apache-2.0
"""Numbers of a few bits in bytes."""

import numpy as np


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, bytes] as uint8 [N, 8 / bits * bytes], the low bits of a byte first; bits is 2, 4 or 8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(packed.shape[0], -1)
