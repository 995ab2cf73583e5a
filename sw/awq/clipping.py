# SPDX-License-Identifier: Apache-2.0
"""Searches the range of each group that gives the least error of a layer's output.

This is AWQ's second search: weights beyond a range are clipped to its ends, which makes the steps of the others finer.
Here the two ends are shrunk independently, and the measure is the squared error of the layer's real output. With
dW = quantized - float weights and G = X^T X / tokens of its inputs, the error of row n of the weights is exactly

    dW[n] G dW[n]^T
The part of it that depends on group g is, with d = dW[n, g],
    d G[g, g] d^T + 2 d r^T,   r = sum over all other groups h of dW[n, h] G[h, g]

So the groups of a row are visited in several sweeps, and each takes its best range for the current errors of the
others. All weights are rounded to nearest: the search chooses only a scale and a zero point for each group.
"""

import numpy as np

from sw.awq.rounding import LEAST_SCALE, MOST_SCALE, Form, Rounded, extent, grid, half, nearest, steps
from sw.awq.threads import threaded
from sw.common.arrays import slices

SHRINKS = np.array([1, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62], np.float32)
"""Factors for either end of a range; all pairs are tried."""
SWEEPS = 2
"""Sweeps over the groups of a row. The second one reduces SmolLM2's errors by another 8 %, and doubles the time."""
ROWS_AT_ONCE = 64
"""This number of rows and all their candidates about fit a processor's cache."""


def clip(weight: np.ndarray, gram: np.ndarray, form: Form, sweeps: int = SWEEPS) -> Rounded:
    """float32 [N, K] rounded in the best ranges for inputs with Gram matrix `gram`, float32 [K, K].

    Its error is never above that of `nearest`, apart from float rounding. sweeps: number of sweeps over a row's groups.
    Uses all processors.
    """
    parts = threaded(lambda rows: clip_rows(weight[rows], gram, form, sweeps), slices(len(weight), ROWS_AT_ONCE))
    arrays = zip(*((part.q, part.scales, part.zero_points) for part in parts))
    return Rounded(form, *(np.concatenate(values) for values in arrays))


def clip_rows(weight: np.ndarray, gram: np.ndarray, form: Form, sweeps: int = 1) -> Rounded:
    """Like `clip`, in the calling thread only."""
    start = nearest(weight, form)
    padding = -weight.shape[1] % form.group_size
    # Padded weights are always zero, and nothing depends on them.
    gram = np.pad(gram, (0, padding)) if padding else gram
    q, scales, zero_points = _Rows(form.split(weight), start, gram).search(sweeps)
    return Rounded(form, q.reshape(len(weight), -1)[:, : weight.shape[1]].astype(np.uint8), scales, zero_points)


class _Rows:
    """Some rows of the weights. groups: float32 [R, G, S]. start: initial values of the search."""

    def __init__(self, groups: np.ndarray, start: Rounded, gram: np.ndarray):
        self.form, self.gram = start.form, gram
        self.weights = groups
        self.low, self.high = extent(groups)
        self.scales, self.zero_points = start.scales.copy(), start.zero_points.copy()
        self.q = steps(self.form, groups, self.scales[:, :, None], self.zero_points[:, :, None])
        errors = (self.q - self.zero_points[:, :, None]) * self.scales[:, :, None] - groups
        self.errors = errors.reshape(len(groups), -1)

    def search(self, sweeps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(q as float32 [R, G, S], scales, zero points)."""
        for _ in range(sweeps):
            slopes = self.errors @ self.gram
            for group in range(self.weights.shape[1]):
                self._improve(group, slopes)
        return self.q, self.scales, self.zero_points

    def _improve(self, group: int, slopes: np.ndarray) -> None:
        """Gives a group of every row its best range. slopes: errors @ gram, float32 [R, K]; they are updated."""
        size = self.form.group_size
        part = slice(group * size, (group + 1) * size)
        block = np.ascontiguousarray(self.gram[part, part])
        before = self.errors[:, part].copy()
        tried = Group(self.form, self.weights[:, group], block, slopes[:, part] - before @ block)
        tried.consider(self.scales[None, :, group], self.zero_points[None, :, group])
        tried.search(self.low[:, group], self.high[:, group])
        self.q[:, group], self.errors[:, part] = tried.q, tried.errors
        self.scales[:, group], self.zero_points[:, group] = tried.scales, tried.zero_points
        slopes += (tried.errors - before) @ self.gram[part]


class Group:
    """One group of every row, and its best candidate so far. weights: [R, S]. block: its part of the Gram matrix.
    slope: the contribution of the other groups' errors, [R, S].
    """

    def __init__(self, form: Form, weights: np.ndarray, block: np.ndarray, slope: np.ndarray):
        self.form, self.weights, self.block, self.slope = form, weights, block, slope
        rows, size = weights.shape
        self.q, self.errors = np.zeros((rows, size), np.float32), np.zeros((rows, size), np.float32)
        self.scales, self.zero_points = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self.loss = np.full(rows, np.inf, np.float32)

    def consider(self, scales: np.ndarray, zero_points: np.ndarray) -> None:
        """Tries candidates, float32 [C, R], and keeps the best."""
        s, z = scales[:, :, None], zero_points[:, :, None]
        q = steps(self.form, self.weights, s, z)
        errors = (q - z) * s
        errors -= self.weights
        changes = (errors.reshape(-1, errors.shape[-1]) @ self.block).reshape(errors.shape)
        changes += 2 * self.slope
        losses = np.einsum("crs,crs->cr", changes, errors)
        best, rows = losses.argmin(axis=0), np.arange(len(self.loss))
        better = losses[best, rows] < self.loss
        best, rows = best[better], rows[better]
        self.q[better], self.errors[better], self.loss[better] = q[best, rows], errors[best, rows], losses[best, rows]
        self.scales[better], self.zero_points[better] = scales[best, rows], zero_points[best, rows]

    def search(self, low: np.ndarray, high: np.ndarray) -> None:
        """Tries all shrunk ranges, then a better scale and zero points beside the best. low, high: float32 [R]."""
        ends = SHRINKS[:, None, None] * low, SHRINKS[None, :, None] * high
        self.consider(*(values.reshape(-1, len(low)) for values in grid(self.form, *ends)))
        scales, zero_points = self._least_squares(), self.zero_points
        nudge = np.float32(1 if self.form.zero_point == "integer" else 0.25)
        near = np.clip(np.stack([zero_points, zero_points - nudge, zero_points + nudge]), 0, self.form.top)
        both = np.concatenate([near, near[1:]]), np.concatenate([np.stack([scales] * 3), np.stack([self.scales] * 2)])
        self.consider(both[1], both[0])

    def _least_squares(self) -> np.ndarray:
        """The best scales for the best candidate's q by least squares, float32 [R]."""
        u = self.q - self.zero_points[:, None]
        toward = u @ self.block
        curvature = (toward * u).sum(axis=1)
        wanted = (toward * self.weights).sum(axis=1) - (self.slope * u).sum(axis=1)
        scales = np.divide(wanted, curvature, out=self.scales.copy(), where=(curvature > 0) & (wanted > 0))
        return half(np.clip(scales, LEAST_SCALE, MOST_SCALE))
