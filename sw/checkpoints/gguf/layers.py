# SPDX-License-Identifier: Apache-2.0
"""GGUF's quantized tensors as linear layers in the number formats that the hardware has (docs/numerics.md).

A minimum m becomes the zero point z = m / s, so w = s (q - z). It is float32 here and gets 11 fraction bits on the
hardware (zero_point="fixed"). Its range is -16 to 16 for weights of 4 bits, and -256 to 256 for weights of 8 bits,
which run as two planes. Of the formats with minimums, Q4_1, Q4_K and Q2_K have 4 bits here, Q5_1 and Q5_K 8.

For z outside this range:
- A group that is mirrored (q becomes top - q, s becomes -s) has the zero point top - z. So z up to 31 or 511 is exact.
- If that is not enough, a tensor of 4 bits becomes one of 8 bits, which is exact too.
- The remaining groups, with abs(z) above 256, have weights of one sign whose differences are small. Each of these
  weights is rounded to 1/511 of the group's largest one. Such groups are not known from real models.
A group with s = 0 has equal weights -m, and no zero point: it becomes q = 0, z = h, s = m / h, with h a power of two.
"""

import numpy as np

from hw.spec.config import FIXED_FRACTION_BITS, FIXED_ZERO_POINT_BITS
from sw.checkpoints.gguf.blocks import FORMATS, Format, unpack_groups
from sw.checkpoints.gguf.header import GgufTensor
from sw.common.arrays import slices
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear

REACH = {
    4: 1 << (FIXED_ZERO_POINT_BITS - 1 - FIXED_FRACTION_BITS),
    8: 1 << (FIXED_ZERO_POINT_BITS - 1 - FIXED_FRACTION_BITS + 4),
}
"""bits -> zero points are from -REACH to almost REACH; 8 bits are two planes of 4, see hw.spec.numerics.planes."""
AT_ONCE = 1 << 22
"""Weights that are unpacked at once, so that the arrays in between are small."""
HALF_STEP = 0.5 / (1 << FIXED_FRACTION_BITS)


def quantized_layer(name: str, tensor: GgufTensor, bias: np.ndarray | None = None) -> QuantizedLinear:
    """A tensor [N, K] in one of the formats of sw.checkpoints.gguf.blocks as a layer; some rows are read at a time.

    bias: float32 [N] or None. Raises UserError if a scale or a minimum is not finite, and for a tensor that is not a
    matrix.
    """
    if len(tensor.shape) != 2:
        raise UserError(f"{tensor.path}: tensor {tensor.name} is {list(tensor.shape)}, not a matrix")
    form, (n, k) = FORMATS[tensor.kind], tensor.shape
    q = np.empty((n, k), np.uint8)
    scales = np.empty((n, k // form.group_size), np.float32)
    minimums = np.empty_like(scales) if form.has_minimums else None
    for rows in slices(n, max(1, AT_ONCE // k)):
        groups = unpack_groups(tensor.read(rows), tensor.kind)
        q[rows], scales[rows] = groups.q, groups.scales
        if minimums is not None and groups.minimums is not None:
            minimums[rows] = groups.minimums
    for what, values in (("scale", scales), ("minimum", minimums)):
        if values is not None and not np.isfinite(values).all():
            raise UserError(f"{tensor.path}: tensor {tensor.name}: a {what} is not finite")
    if minimums is None:
        zero_points, bits = np.full(scales.shape, 1 << (form.bits - 1), np.uint8), form.bits
    else:
        zero_points, bits = _zero_points(form, q.reshape(n, -1, form.group_size), scales, minimums)
    return QuantizedLinear(name, q, scales, zero_points, form.group_size, bits, bias)


def _zero_points(form: Format, q: np.ndarray, scales: np.ndarray, minimums: np.ndarray) -> tuple[np.ndarray, int]:
    """Float zero points [N, G], and the bits of q. Changes q [N, G, group_size] and scales where necessary."""
    flat = scales == 0
    if flat.any():
        half = np.float32(form.levels // 2)
        q[flat], scales[flat] = 0, minimums[flat] / half
        zero_points = np.divide(minimums, scales, out=np.zeros_like(scales), where=~flat)
        zero_points[flat] = half
    else:
        zero_points = minimums / scales
    bits = form.bits
    if bits == 4 and not np.all(_fits(zero_points, 4) | _fits(15 - zero_points, 4)):
        bits = 8
    top = (1 << bits) - 1
    mirrored = ~_fits(zero_points, bits) & (zero_points > 0)
    if mirrored.any():
        q[mirrored] = top - q[mirrored]
        scales[mirrored] *= -1
        zero_points[mirrored] = top - zero_points[mirrored]
    far = ~_fits(zero_points, bits)
    if far.any():
        q[far], scales[far], zero_points[far] = _rounded(q[far], scales[far], zero_points[far])
    return zero_points, bits


def _fits(zero_points: np.ndarray, bits: int) -> np.ndarray:
    """Whether zero points are within the hardware's field, after rounding."""
    reach = REACH[bits]
    return (zero_points >= -reach) & (zero_points < reach - HALF_STEP)


def _rounded(q: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups [F, group_size] of 8 bits whose zero points are below -REACH, with the zero point -REACH.

    All weights of such a group have one sign, and the smallest is more than half of the largest.
    """
    reach = REACH[8]
    steps = q.astype(np.float64) - zero_points.astype(np.float64)[:, None]
    largest = steps.max(axis=1, keepdims=True)
    new = np.rint(steps * ((reach + 255) / largest)) - reach
    return (
        new.astype(np.uint8),
        (scales * (largest[:, 0] / (reach + 255))).astype(np.float32),
        np.full(len(q), -reach, np.float32),
    )
