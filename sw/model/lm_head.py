# SPDX-License-Identifier: Apache-2.0
"""The output layer of a decoder (lm_head) and the embedding, which may share its table: one policy for all exporters.

A table is float16 or float32 [vocab, hidden], or a QuantizedLinear whose rows are the tokens. A table that a file
stores in 4 or 8 bits is not changed. A float head becomes int8 in groups along K by rounding to nearest: it is the
largest layer of a decoder, and int8 takes a quarter of the bytes of float32 with almost no loss of quality.
"""

import numpy as np

from sw.common.arrays import slices
from sw.common.errors import UserError
from sw.model.linear import FloatLinear, QuantizedLinear

HEAD_MODES = ("int8", "float")
"""int8: a float head is quantized. float: it stays float. A head that is quantized in the file is never changed."""

Linear = QuantizedLinear | FloatLinear
Table = np.ndarray | QuantizedLinear


def head_layer(embedding: Table, head: Table | None, mode: str) -> Linear:
    """The layer that computes the logits. head: None if the embedding's table is also the head (tied)."""
    table = embedding if head is None else head
    if isinstance(table, QuantizedLinear):
        return table
    if mode == "float":
        return FloatLinear("lm_head", table.astype(np.float32, copy=False))
    return quantize_int8(table)


def quantize_int8(weight: np.ndarray, name: str = "lm_head") -> QuantizedLinear:
    """A float16 or float32 [N, K] matrix in 8 bits, symmetric: q = 128 + rint(w / s), s = max|w| / 127 of a group.

    The group size is 128 if K is a multiple of 128, else 64 if K is a multiple of 64, else 32. No weight changes by
    more than s / 2. Raises UserError if a weight is not finite.
    """
    n, k = weight.shape
    group = next((size for size in (128, 64) if k % size == 0), 32)
    groups = -(-k // group)
    q, scales = np.empty((n, k), np.uint8), np.empty((n, groups), np.float32)
    for rows in slices(n):
        values = np.zeros((len(scales[rows]), groups * group), np.float32)
        values[:, :k] = weight[rows]
        if not np.isfinite(values).all():
            raise UserError(f"layer {name}: a weight is not finite")
        values = values.reshape(-1, groups, group)
        scales[rows] = np.abs(values).max(axis=2) / np.float32(127)
        step = scales[rows][:, :, None]
        steps = np.rint(np.divide(values, step, out=np.zeros_like(values), where=step > 0))
        # Only a subnormal scale is so coarse that the largest weight is more than 127 steps.
        q[rows] = (np.clip(steps, -127, 127) + 128).astype(np.uint8).reshape(len(values), -1)[:, :k]
    return QuantizedLinear(name, q, scales, np.full(scales.shape, 128, np.uint8), group, 8)


def narrowest_exact(table: np.ndarray) -> np.ndarray:
    """A float16 or float32 table as float16 if every value is exact in float16, else as float32."""
    if table.dtype == np.float16:
        return table
    narrow = np.empty(table.shape, np.float16)
    for rows in slices(len(table)):
        with np.errstate(over="ignore"):
            narrow[rows] = table[rows]
        if not np.array_equal(narrow[rows].astype(np.float32), table[rows]):
            return table
    return narrow
