# SPDX-License-Identifier: Apache-2.0
"""The int8 head of a model that is quantized from floats: a table that was int8 before gets the same integers again.

GGUF files store their tables in Q8_0: q = rint(w / d), d = max|w| / 127 as float16, for every 32 weights. The floats
q * d give back both: 127 * d has 18 bits, so max|w| / 127 is exactly d in float32, and w / d is q.
"""

import numpy as np

from sw.common.arrays import slices
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import quantize_int8

BLOCK = 32
TOP = 127


def quantize_head(weight: np.ndarray, name: str = "lm_head") -> QuantizedLinear:
    """A float16 or float32 [N, K] matrix in 8 bits: its Q8_0 blocks if it consists of them, else as quantize_int8.

    Raises UserError if a weight is not finite.
    """
    n, k = weight.shape
    if k % BLOCK:
        return quantize_int8(weight, name)
    q, scales = np.empty((n, k), np.uint8), np.empty((n, k // BLOCK), np.float32)
    for rows in slices(n):
        values = np.asarray(weight[rows], np.float32).reshape(-1, k // BLOCK, BLOCK)
        scales[rows] = np.abs(values).max(axis=2) / np.float32(TOP)
        step = scales[rows][:, :, None]
        with np.errstate(over="ignore", invalid="ignore"):
            steps = np.rint(np.divide(values, step, out=np.zeros_like(values), where=step > 0))
            is_half = scales[rows].astype(np.float16) == scales[rows]
        if not (is_half.all() and np.array_equal(steps * step, values)):
            return quantize_int8(weight, name)
        q[rows] = (steps + 128).astype(np.uint8).reshape(-1, k)
    return QuantizedLinear(name, q, scales, np.full(scales.shape, 128, np.uint8), BLOCK, 8)
