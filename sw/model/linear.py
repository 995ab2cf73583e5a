# SPDX-License-Identifier: Apache-2.0
"""One quantized linear layer, independent of the format of its file."""

from dataclasses import dataclass, replace

import numpy as np

from sw.common.arrays import slices
from sw.common.errors import UserError


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """y[m, n] = sum_k x[m, k] * (q[n, k] - z[n, g]) * s[n, g] (+ bias[n]), g = k // group_size.

    Members
    -------
    name: unique in the model.
    q: uint8 [N, K], each below 2^bits. K is the true in_features: the last group may be short.
    scales: float32 [N, G], any sign, G = ceil(K / group_size).
    zero_points: uint8 [N, G] (integer, below 2^bits) or float32 [N, G] (float, in steps of q).
    bias: float32 [N] or None.
    input_name, output_name: the ONNX tensors of the activations and of the product; empty outside an ONNX graph.
    bias_in_node: the ONNX node adds the bias itself, so the tensor `output_name` already contains it.
        Otherwise a separate Add follows, and `output_name` is the product alone.

    Raises UserError, with the layer's name, if shapes, types or ranges do not match.
    """

    name: str
    q: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    group_size: int
    bits: int
    bias: np.ndarray | None = None
    input_name: str = ""
    output_name: str = ""
    bias_in_node: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            self._refuse(f"bits must be 1 to 8, not {self.bits}")
        if self.group_size < 1:
            self._refuse(f"group_size must be positive, not {self.group_size}")
        if self.q.ndim != 2 or self.q.dtype != np.uint8 or 0 in self.q.shape:
            self._refuse(f"q must be uint8 [N, K], not {self.q.dtype} {list(self.q.shape)}")
        groups = (self.n, self.groups)
        if self.scales.shape != groups or self.scales.dtype != np.float32:
            self._refuse(
                f"scales must be float32 {list(groups)} (K {self.k}, group_size {self.group_size}), "
                f"not {self.scales.dtype} {list(self.scales.shape)}"
            )
        if self.zero_points.shape != groups or self.zero_points.dtype not in (np.uint8, np.float32):
            self._refuse(
                f"zero points must be uint8 or float32 {list(groups)}, "
                f"not {self.zero_points.dtype} {list(self.zero_points.shape)}"
            )
        if self.bias is not None and (self.bias.shape != (self.n,) or self.bias.dtype != np.float32):
            self._refuse(f"bias must be float32 [{self.n}], not {self.bias.dtype} {list(self.bias.shape)}")
        top = 1 << self.bits
        if self.q.max() >= top:
            self._refuse(f"q reaches {self.q.max()}, beyond the {self.bits}-bit maximum {top - 1}")
        if self.has_integer_zero_points and self.zero_points.max() >= top:
            self._refuse(f"a zero point is {self.zero_points.max()}, beyond the {self.bits}-bit maximum {top - 1}")
        for what, values in (("scale", self.scales), ("zero point", self.zero_points), ("bias", self.bias)):
            if values is not None and not np.isfinite(values).all():
                self._refuse(f"a {what} is not finite")

    def _refuse(self, problem: str) -> None:
        raise UserError(f"layer {self.name}: {problem}")

    @property
    def n(self) -> int:
        """out_features."""
        return self.q.shape[0]

    @property
    def k(self) -> int:
        """in_features."""
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        """Groups along K."""
        return -(-self.k // self.group_size)

    @property
    def has_integer_zero_points(self) -> bool:
        """Whether the zero points are stored as integers (float ones may still have integer values)."""
        return self.zero_points.dtype == np.uint8

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """The weights as float32 [N, K], or those of some rows."""
        group = np.arange(self.k) // self.group_size
        steps = self.q[rows].astype(np.float32) - self.zero_points[rows].astype(np.float32)[:, group]
        return steps * self.scales[rows][:, group]

    def float_output(self, x: np.ndarray) -> np.ndarray:
        """The expected value of the ONNX tensor `output_name` for activations x [M, K]: float64 [M, N].

        This is the definition in float, for error figures; hw.spec.numerics defines the accelerator's integers.
        """
        x = x.astype(np.float64)
        # In slices: the head of a model with 150,000 tokens would take a gigabyte in float64.
        y = np.concatenate([x @ self.dequantize(rows).astype(np.float64).T for rows in slices(self.n)], axis=1)
        return y + self.bias if self.bias is not None and self.bias_in_node else y

    def with_rows(self, order: np.ndarray | slice) -> "QuantizedLinear":
        """The same layer with its output rows in another order (int [N]), or with some of its rows (a slice)."""
        bias = None if self.bias is None else self.bias[order]
        return replace(self, q=self.q[order], scales=self.scales[order], zero_points=self.zero_points[order], bias=bias)


@dataclass(frozen=True, eq=False)
class Outline:
    """What decides which hardware a quantized layer needs: see QuantizedLinear."""

    name: str
    n: int
    k: int
    group_size: int
    bits: int
    zero_points: np.ndarray


@dataclass(frozen=True, eq=False)
class FloatLinear:
    """A linear layer that is not quantized: weight float32 [N, K], bias float32 [N] or None."""

    name: str
    weight: np.ndarray
    bias: np.ndarray | None = None

    @property
    def n(self) -> int:
        """out_features."""
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        """in_features."""
        return self.weight.shape[1]

    def with_rows(self, order: np.ndarray | slice) -> "FloatLinear":
        """The same layer with its output rows in another order (int [N]), or with some of its rows (a slice)."""
        return replace(self, weight=self.weight[order], bias=None if self.bias is None else self.bias[order])
