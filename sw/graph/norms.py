# SPDX-License-Identifier: Apache-2.0
"""Finds root mean square norms in an ONNX graph, as one node or as the operators that exporters write.

SimplifiedLayerNormalization             x, weight
SkipSimplifiedLayerNormalization         x, y, weight: normalises x + y, its fourth output is x + y (com.microsoft)
RMSNormalization                         x, weight (opset 23)
Mul(weight, Mul(x, 1 / Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon)))), 1 / by Reciprocal or Div, casts in between
"""

import math
from collections.abc import Iterator

import numpy as np
import onnx

from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB, STANDARD, attributes, made, name_of, read
from sw.model.parts import Norm

FUSED = {
    ("SimplifiedLayerNormalization", ""): 1,
    ("SimplifiedLayerNormalization", CONTRIB): 1,
    ("SkipSimplifiedLayerNormalization", CONTRIB): 2,
    ("RMSNormalization", ""): 1,
}
"""Operator -> its input with the weight that scales every channel of its first output."""
EPSILON = {"SimplifiedLayerNormalization": 1e-5, "SkipSimplifiedLayerNormalization": 1e-12, "RMSNormalization": 1e-5}
"""Operator -> its epsilon if the node has no such attribute."""
SKIP_BIAS, SUM = 3, 3
"""Indices of SkipSimplifiedLayerNormalization's bias input (added before the norm) and of its output with the sum."""


def weight_of(node: onnx.NodeProto) -> str:
    """The tensor that scales the channels of a norm's first output, if the node is a whole norm; or ""."""
    place = FUSED.get((node.op_type, "" if node.domain in STANDARD else node.domain))
    return "" if place is None else read(node, place)


def find_norms(file: OnnxFile) -> Iterator[Norm]:
    """Every norm along the last axis with a constant weight, in the graph's order."""
    for node in file.graph.node:
        found = _fused(file, node) or _of_operators(file, node)
        if found is not None:
            yield found


def adds(node: onnx.NodeProto) -> bool:
    """Whether a norm's node adds two tensors first."""
    return node.op_type == "SkipSimplifiedLayerNormalization" and node.domain == CONTRIB


def _fused(file: OnnxFile, node: onnx.NodeProto) -> Norm | None:
    weight = weight_of(node)
    if not weight or not file.is_constant(weight):
        return None
    values = attributes(node)
    if values.get("axis", -1) not in (-1, 2):
        return None
    epsilon = values.get("epsilon", EPSILON[node.op_type])
    if not adds(node):
        return Norm(node.input[0], node.output[0], weight, epsilon, name_of(node))
    if read(node, SKIP_BIAS):
        return None
    return Norm(made(node, SUM), node.output[0], weight, epsilon, name_of(node), tuple(node.input[:2]))


def _of_operators(file: OnnxFile, node: onnx.NodeProto) -> Norm | None:
    """The norm of several operators whose last one is the node; or None."""
    split = _constant_and_other(file, node) if node.op_type == "Mul" else None
    if split is None:
        return None
    weight, scaled = split
    product = _producer(file, scaled)
    if product is None or product.op_type not in ("Mul", "Div") or len(product.input) != 2:
        return None
    # x may be cast to float32 for the norm; then all operators of the norm read the cast.
    for x, factor in (tuple(product.input), tuple(product.input)[::-1]):
        epsilon = _epsilon(file, factor, x, product.op_type == "Div")
        if epsilon is not None and (product.op_type == "Mul" or x == product.input[0]):
            source = file.producers.get(x)
            if source is not None and source.op_type == "Cast":
                x = source.input[0]
            return Norm(x, node.output[0], weight, epsilon, name_of(node))
    return None


def _epsilon(file: OnnxFile, factor: str, x: str, is_root: bool) -> float | None:
    """The epsilon of a tensor 1 / sqrt(mean(x^2) + epsilon), or of a tensor sqrt(mean(x^2) + epsilon) if `is_root`."""
    root = file.producers.get(factor)
    if not is_root:
        if root is None or root.op_type not in ("Reciprocal", "Div"):
            return None
        if root.op_type == "Div" and _scalar(file, root.input[0]) != 1:
            return None
        root = file.producers.get(root.input[-1])
    total = file.producers.get(root.input[0]) if root is not None and root.op_type == "Sqrt" else None
    split = _constant_and_other(file, total) if total is not None and total.op_type == "Add" else None
    mean = file.producers.get(split[1]) if split is not None else None
    power = file.producers.get(mean.input[0]) if mean is not None and mean.op_type == "ReduceMean" else None
    if split is None or mean is None or power is None or not _is_last_axis(file, mean):
        return None
    square = power.op_type == "Pow" and _scalar(file, power.input[1]) == 2
    square = square or (power.op_type == "Mul" and power.input[0] == power.input[1])
    epsilon = _scalar(file, split[0])
    return epsilon if square and power.input[0] == x and math.isfinite(epsilon) else None


def _is_last_axis(file: OnnxFile, mean: onnx.NodeProto) -> bool:
    values = attributes(mean)
    axes = values.get("axes")
    if axes is None and read(mean, 1) and file.is_constant(mean.input[1]):
        axes = file.constant(mean.input[1], name_of(mean)).reshape(-1).tolist()
    return axes in ([-1], [2]) and values.get("keepdims", 1) == 1


def _constant_and_other(file: OnnxFile, node: onnx.NodeProto) -> tuple[str, str] | None:
    if len(node.input) != 2:
        return None
    first, second = node.input
    if file.is_constant(first) == file.is_constant(second):
        return None
    return (first, second) if file.is_constant(first) else (second, first)


def _producer(file: OnnxFile, name: str) -> onnx.NodeProto | None:
    """The node that makes a tensor; if it is a Cast, the node that makes its input."""
    node = file.producers.get(name)
    return file.producers.get(node.input[0]) if node is not None and node.op_type == "Cast" else node


def _scalar(file: OnnxFile, name: str) -> float:
    """The value of a constant of one element; NaN, which equals no number, for any other tensor."""
    if not file.is_constant(name) or np.prod(file.shape(name, name)) != 1:
        return math.nan
    return float(np.asarray(file.constant(name, name)).reshape(-1)[0].astype(np.float64))
