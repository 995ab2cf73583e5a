# SPDX-License-Identifier: Apache-2.0
"""Functions that the matchers share: a node's attributes and names, and the readers of a tensor."""

from typing import Any

import numpy as np
import onnx
from onnx import helper

from sw.graph.file import OnnxFile

CONTRIB = "com.microsoft"
STANDARD = ("", "ai.onnx")
SHAPES = ("Shape", "Size")
"""Operators that read a tensor's shape, but not its values."""
SAME_VALUES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
LEAST_INPUTS = {
    **dict.fromkeys(
        ["Cast", "Identity", "Reciprocal", "ReduceMean", "Sigmoid", "Split", "Sqrt", "Swish", "Transpose"], 1
    ),
    **dict.fromkeys(["Squeeze", "Unsqueeze", "QuickGelu", "Slice", "GatherND", "Softmax", "Transpose"], 1),
    **dict.fromkeys(["Add", "Mul", "Div", "Pow", "MatMul", "Gemm", "FusedMatMul", "Gather", "Reshape"], 2),
    **dict.fromkeys(["DequantizeLinear", "SimplifiedLayerNormalization", "RMSNormalization"], 2),
    **dict.fromkeys(["MatMulNBits", "GatherBlockQuantized", "SkipSimplifiedLayerNormalization"], 3),
}
"""Operator of a decoder's parts -> number of inputs that it must have."""
TOKEN_IDS, LOGITS = "input_ids", "logits"
"""Names of a decoder's input and output, in every exporter that names them."""


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def name_of(node: onnx.NodeProto) -> str:
    """A node's name, or that of its first output if it has none."""
    return node.name or node.output[0]


def read(node: onnx.NodeProto, index: int) -> str:
    """A node's input by index, or "" if it is absent."""
    return node.input[index] if len(node.input) > index else ""


def made(node: onnx.NodeProto, index: int) -> str:
    """A node's output by index, or "" if it is absent."""
    return node.output[index] if len(node.output) > index else ""


def incomplete(file: OnnxFile) -> onnx.NodeProto | None:
    """The first node with fewer inputs than its operator needs, which is damage; or None."""
    return next((node for node in file.graph.node if len(node.input) < LEAST_INPUTS.get(node.op_type, 0)), None)


def is_pair(node: onnx.NodeProto) -> bool:
    """Whether a node puts a tensor beside itself, along the last axis: the activations of two planes of weights."""
    return (
        node.op_type == "Concat"
        and len(node.input) == 2
        and node.input[0] == node.input[1] != ""
        and attributes(node).get("axis") == -1
    )


def is_output(file: OnnxFile, name: str) -> bool:
    """Whether a tensor is an output of the graph."""
    return any(item.name == name for item in file.graph.output)


def readers(file: OnnxFile, name: str) -> list[onnx.NodeProto]:
    """The nodes that read a tensor, including those whose subgraphs read it."""
    return [*file.consumers.get(name, []), *(node for node in file.branching if name in _inner(node))]


def separate_bias(file: OnnxFile, product: str, n: int) -> tuple[str, onnx.NodeProto] | None:
    """The constant of n elements that an Add node, the only reader of a product, adds to it; and the node."""
    following = readers(file, product)
    if len(following) != 1 or following[0].op_type != "Add" or is_output(file, product):
        return None
    others = [name for name in following[0].input if name != product]
    if len(others) != 1 or not file.is_constant(others[0]):
        return None
    shape = file.shape(others[0], name_of(following[0]))
    return (others[0], following[0]) if shape and shape[-1] == n == int(np.prod(shape)) else None


def logits_name(file: OnnxFile) -> str:
    """The output with the logits: the one with that name, or else the first."""
    outputs = [item.name for item in file.graph.output]
    return LOGITS if LOGITS in outputs else outputs[0]


def before_logits(file: OnnxFile) -> set[str]:
    """The logits, and the tensors that become the logits by a bias, a cast or a reshape."""
    names = {logits_name(file)}
    for node in reversed(file.graph.node):
        if node.op_type in (*SAME_VALUES, "Add") and names.intersection(node.output):
            inputs = node.input if node.op_type == "Add" else node.input[:1]
            names.update(name for name in inputs if not file.is_constant(name))
    return names


def _inner(node: onnx.NodeProto) -> set[str]:
    """Every tensor that a node's subgraphs read, including tensors of the subgraphs themselves."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for part in graph.node:
                found.update(part.input)
                found |= _inner(part)
            found.update(item.name for item in graph.output)
    return found
