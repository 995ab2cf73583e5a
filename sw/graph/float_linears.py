# SPDX-License-Identifier: Apache-2.0
"""Finds every float linear layer of an ONNX graph.

A linear layer is a node whose second input is a constant float matrix and whose first is not:
    MatMul                       weight [K, N]
    Gemm                         weight [K, N], or [N, K] with transB; its third input is a bias
    FusedMatMul (com.microsoft)  weight [K, N], or [N, K] with transB; no bias
The matrix may be an initializer that passes Identity, Cast, Reshape and Transpose, as in torch's tied heads.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB, STANDARD, attributes, before_logits, name_of, read, readers, separate_bias

FLOATS = (np.float32, np.float16)
LEAST = 16
"""Least rows and columns of a layer: products of rotary tables with positions have fewer."""
BIAS = 2
"""Gemm's input."""


@dataclass(frozen=True, eq=False)
class FloatSite:
    """One float linear layer.

    Members
    -------
    name: the node's name, made unique. node: the graph's node.
    n, k: out_features, in_features.
    transposed: the constant that the node reads is [N, K], not [K, N].
    bias: name of the constant that is added to the product, by the node or by an Add that alone reads it; or "".
    is_head: whether the product is the model's logits.
    """

    name: str
    node: onnx.NodeProto
    n: int
    k: int
    transposed: bool
    bias: str
    is_head: bool

    def weight(self, file: OnnxFile) -> np.ndarray:
        """float32 [N, K]. Raises UserError if it cannot be read or is not finite."""
        values = constant(file, self.node.input[1], self.name)
        values = np.ascontiguousarray(values if self.transposed else values.T, dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{file.path}: layer {self.name}: a weight is not finite")
        return values


def find_sites(file: OnnxFile) -> list[FloatSite]:
    """The float linear layers of a graph, in its order, without routers. Raises UserError if there is none."""
    heads = before_logits(file)
    sites, taken = [], set()
    for node in file.graph.node:
        form = float_form(file, node)
        if form is None or is_router(file, node):
            continue
        name = candidate = name_of(node)
        count = 1
        while candidate in taken:
            count += 1
            candidate = f"{name}#{count}"
        taken.add(candidate)
        sites.append(FloatSite(candidate, node, *form, float_bias(file, node, form[0]), node.output[0] in heads))
    if not sites:
        raise UserError(f"{file.path} has no float linear layers (MatMul, Gemm or FusedMatMul with constant weights)")
    return sites


def is_router(file: OnnxFile, node: onnx.NodeProto) -> bool:
    """Whether a node's output decides which experts compute a token, by Softmax and TopK."""
    following = readers(file, node.output[0])
    return any(
        other.op_type == "TopK"
        for softmax in following
        if softmax.op_type == "Softmax"
        for other in readers(file, softmax.output[0])
    )


def constant(file: OnnxFile, name: str, layer: str) -> np.ndarray:
    """The value of a constant tensor, as OnnxFile.constant, but also of a transposed one."""
    node = file.producers.get(name)
    if node is not None and node.op_type == "Transpose" and not file.is_constant(name):
        values = constant(file, node.input[0], layer)
        order = attributes(node).get("perm")
        return np.transpose(values, order)
    return file.constant(name, layer)


def _is_constant(file: OnnxFile, name: str) -> bool:
    node = file.producers.get(name)
    if node is not None and node.op_type == "Transpose" and node.domain in STANDARD:
        return _is_constant(file, node.input[0])
    return file.is_constant(name)


def constant_shape(file: OnnxFile, name: str) -> tuple[int, ...]:
    """The shape of a constant tensor; an initializer's data is read only if a Reshape follows it."""
    node = file.producers.get(name)
    if node is not None and node.op_type == "Transpose":
        inner = constant_shape(file, node.input[0])
        order = attributes(node).get("perm") or range(len(inner))[::-1]
        return tuple(inner[axis] for axis in order)
    if node is not None and node.op_type in ("Identity", "Cast"):
        return constant_shape(file, node.input[0])
    return file.shape(name, name)


def _dtype(file: OnnxFile, name: str) -> np.dtype | None:
    """The element type of an initializer or Constant, or that of a Cast's result."""
    node = file.producers.get(name)
    if node is None:
        kind = next((item.data_type for item in file.graph.initializer if item.name == name), 0)
    elif node.op_type == "Cast":
        kind = attributes(node)["to"]
    elif node.op_type == "Constant":
        kind = node.attribute[0].t.data_type
    else:
        return _dtype(file, node.input[0])
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind)) if kind else None


def float_form(file: OnnxFile, node: onnx.NodeProto) -> tuple[int, int, bool] | None:
    """(N, K, whether the constant is [N, K]), or None if the node is not a float linear layer."""
    contrib = node.op_type == "FusedMatMul" and node.domain == CONTRIB
    if not contrib and not (node.op_type in ("MatMul", "Gemm") and node.domain in STANDARD):
        return None
    if len(node.input) < 2 or not _is_constant(file, node.input[1]) or _is_constant(file, node.input[0]):
        return None
    shape = constant_shape(file, node.input[1])
    if len(shape) != 2 or min(shape) < LEAST or _dtype(file, node.input[1]) not in FLOATS:
        return None
    values = attributes(node)
    plain = values.get("alpha", 1.0) == 1 and not values.get("transA") and not values.get("transBatchA")
    if node.op_type == "Gemm" and read(node, BIAS):
        plain = plain and values.get("beta", 1.0) == 1 and _is_constant(file, node.input[BIAS])
    if not plain or values.get("transBatchB"):
        return None
    transposed = bool(values.get("transB", 0))
    k, n = shape[::-1] if transposed else shape
    return n, k, transposed


def float_bias(file: OnnxFile, node: onnx.NodeProto, n: int) -> str:
    """The constant that is added to a layer's product, by the node or after it; or ""."""
    if node.op_type == "Gemm" and read(node, BIAS):
        return node.input[BIAS]
    found = separate_bias(file, node.output[0], n)
    return found[0] if found else ""
