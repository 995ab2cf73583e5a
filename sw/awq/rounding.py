# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest in groups along K, with scales and zero points that every supported format can hold.

    s = (high - low) / (2^bits - 1) of a group, a float16 value; z = -low / s, rounded to a step of its format
    q = rint(w / s + z), clipped to 0 ... 2^bits - 1;  w is about (q - z) * s

low <= 0 <= high, so that zero is one of the values and z is in the range of q. AutoAWQ stores float16 scales; with such
scales a model is the same in every format.
"""

from dataclasses import dataclass

import numpy as np

from hw.spec.config import FIXED_FRACTION_BITS
from sw.model.linear import QuantizedLinear

ZERO_POINTS = ("integer", "fixed")
"""integer: z is a whole number. fixed: z has the fraction bits of the hardware's fixed-point zero points."""
LEAST_SCALE = np.float32(2.0**-24)
"""The least positive float16: the scale of a group of zeros."""
MOST_SCALE = np.float32(65504)


@dataclass(frozen=True)
class Form:
    """The number format of weights.

    Members
    -------
    bits: 2, 3, 4 or 8. group_size: weights along K with one scale; the last group of a row may be short.
    zero_point: one of ZERO_POINTS.
    """

    bits: int = 4
    group_size: int = 64
    zero_point: str = "integer"

    @property
    def top(self) -> int:
        """The largest q."""
        return (1 << self.bits) - 1

    @property
    def fraction(self) -> int:
        """Number of steps of a zero point between two whole numbers."""
        return 1 if self.zero_point == "integer" else 1 << FIXED_FRACTION_BITS

    def parts(self, k: int) -> list[slice]:
        """The groups of K weights."""
        return [slice(start, min(start + self.group_size, k)) for start in range(0, k, self.group_size)]

    def split(self, weight: np.ndarray) -> np.ndarray:
        """Reshapes float32 [N, K] to [N, G, group_size], padded with zeros."""
        n, k = weight.shape
        padding = -k % self.group_size
        padded = np.pad(weight, ((0, 0), (0, padding))) if padding else weight
        return padded.reshape(n, -1, self.group_size)


def grid(form: Form, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, zero points), float32, for ranges low <= 0 <= high of any shape."""
    scales = half(np.clip((high - low) / np.float32(form.top), LEAST_SCALE, MOST_SCALE))
    zero_points = np.rint(-low / scales * np.float32(form.fraction)) / np.float32(form.fraction)
    return scales, np.clip(zero_points, 0, form.top, dtype=np.float32)


def half(scales: np.ndarray) -> np.ndarray:
    """Rounded to float16 values, as float32."""
    return scales.astype(np.float16).astype(np.float32)


def steps(form: Form, weight: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> np.ndarray:
    """q as float32; the arrays are broadcast."""
    q = weight / scales
    q += zero_points
    np.rint(q, out=q)
    return np.clip(q, 0, form.top, out=q)


def extent(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of float32 [..., group_size]: the least and the largest of the weights and zero."""
    return np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Rounded weights: q uint8 [N, K], scales and zero points float32 [N, G]."""

    form: Form
    q: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def values(self, rows: slice = slice(None)) -> np.ndarray:
        """The weights, float32 [N, K], or some rows of them."""
        group = np.arange(self.q.shape[1]) // self.form.group_size
        return (self.q[rows] - self.zero_points[rows][:, group]) * self.scales[rows][:, group]

    def rows(self, rows: slice) -> "Rounded":
        """Some rows of the weights."""
        return Rounded(self.form, self.q[rows], self.scales[rows], self.zero_points[rows])

    def divided(self, factors: np.ndarray) -> "Rounded":
        """Every output row divided by a factor, float32 [N]: its scales are divided and rounded to float16 values."""
        scales = half(np.clip(self.scales / factors[:, None], LEAST_SCALE, MOST_SCALE))
        return Rounded(self.form, self.q, scales, self.zero_points)

    def layer(self, name: str) -> QuantizedLinear:
        """The layer of these weights; integer zero points are uint8."""
        kind = np.uint8 if self.form.zero_point == "integer" else np.float32
        return QuantizedLinear(
            name, self.q, self.scales, self.zero_points.astype(kind), self.form.group_size, self.form.bits
        )


def nearest(weight: np.ndarray, form: Form) -> Rounded:
    """float32 [N, K] rounded to nearest within the range of each group."""
    groups = form.split(weight)
    scales, zero_points = grid(form, *extent(groups))
    q = steps(form, groups, scales[:, :, None], zero_points[:, :, None])
    return Rounded(form, q.astype(np.uint8).reshape(len(weight), -1)[:, : weight.shape[1]], scales, zero_points)
