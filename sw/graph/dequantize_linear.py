# SPDX-License-Identifier: Apache-2.0
"""Reads DequantizeLinear(weights) -> [Cast, Transpose ->] MatMul or Gemm as quantized linear layers.

The weights are int2, uint2 (opset 25), int4, uint4, int8 or uint8, [K, N] or, before a Transpose or Gemm's transB,
[N, K]. ONNX has no type of 3 bits: such weights are int4 or uint4. Scales and zero points (absent: 0) are per block
along K (opset 21: axis, block_size), per output row, or one for the whole matrix.
Signed weights become unsigned: q and zero point are both raised by half the range.
"""

from typing import NoReturn

import numpy as np
import onnx

from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.nodes import STANDARD, attributes
from sw.model.linear import QuantizedLinear

# element type -> (bits, offset that makes it unsigned)
TYPES = {"int2": (2, 2), "uint2": (2, 0), "int4": (4, 8), "uint4": (4, 0), "int8": (8, 128), "uint8": (8, 0)}
BIAS = 2


def matches(file: OnnxFile, node: onnx.NodeProto) -> bool:
    """Whether the node is a MatMul or Gemm whose second operand is a dequantized constant."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD:
        return False
    source, _ = _dequantize_node(file, node)
    return source is not None


def shape(file: OnnxFile, node: onnx.NodeProto, name: str) -> tuple[int, int]:
    """(N, K). Raises UserError if the weights are not a matrix."""
    source, transposed = _dequantize_node(file, node)
    assert source is not None, "shape() is called for nodes that match"
    sizes = file.shape(source.input[0], name)
    if len(sizes) != 2:
        raise UserError(f"{file.path}: layer {name}: weights are {list(sizes)}, not a matrix")
    return (sizes[0], sizes[1]) if transposed else (sizes[1], sizes[0])


def read(file: OnnxFile, node: onnx.NodeProto, name: str) -> QuantizedLinear:
    """The layer, its weights read from the file. Raises UserError for layouts that are not groups along K."""

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"{file.path}: layer {name}: {problem}")

    source, transposed = _dequantize_node(file, node)
    assert source is not None, "read() is called for nodes that match"
    weights = file.constant(source.input[0], name)
    scales = file.constant(source.input[1], name).astype(np.float32)
    has_zero_points = len(source.input) > 2 and source.input[2] != ""
    zero_points = file.constant(source.input[2], name) if has_zero_points else np.zeros(scales.shape, weights.dtype)
    if weights.ndim != 2:
        refuse(f"weights are {list(weights.shape)}, not a matrix")
    if weights.dtype.name not in TYPES:
        refuse(f"weights are {weights.dtype.name}, not one of {', '.join(TYPES)}")
    if zero_points.shape != scales.shape:
        refuse(f"zero points are {list(zero_points.shape)}, scales {list(scales.shape)}")
    bits, offset = TYPES[weights.dtype.name]
    values = attributes(source)
    axis = values.get("axis", 1) % 2
    block = values.get("block_size", 0)
    k_axis = 1 if transposed else 0
    k, n = weights.shape[k_axis], weights.shape[1 - k_axis]
    if block:
        if axis != k_axis:
            refuse(f"blocks run along axis {axis}, the output features; only blocks along K can be accelerated")
        group_size, expected = block, (-(-k // block), n)
        if scales.shape != (expected if k_axis == 0 else expected[::-1]):
            refuse(f"scales are {list(scales.shape)}, but K {k}, N {n}, block_size {block} need {expected[0]} per row")
    elif scales.size == 1:
        group_size = k
        scales, zero_points = (np.broadcast_to(v.reshape(1, 1), (n, 1)) for v in (scales, zero_points))
    else:
        if axis == k_axis or scales.size != n:
            refuse(f"{scales.size} scales on axis {axis} are not one per output row")
        group_size = k
        scales, zero_points = scales.reshape(n, 1), zero_points.reshape(n, 1)
    if block and k_axis == 0:
        scales, zero_points = scales.T, zero_points.T
    bias = _gemm_bias(file, node, name, n, refuse)
    return QuantizedLinear(
        name=name,
        q=_unsigned(weights if transposed else weights.T, offset),
        scales=np.ascontiguousarray(scales),
        zero_points=_unsigned(zero_points, offset),
        group_size=group_size,
        bits=bits,
        bias=bias,
        input_name=node.input[0],
        output_name=node.output[0],
        bias_in_node=bias is not None,
    )


def _unsigned(values: np.ndarray, offset: int) -> np.ndarray:
    return np.ascontiguousarray((values.astype(np.int16) + offset).astype(np.uint8))


def _dequantize_node(file: OnnxFile, node: onnx.NodeProto) -> tuple[onnx.NodeProto | None, bool]:
    """The DequantizeLinear of constants that feeds the second operand, and whether its matrix is [N, K]."""
    transposed = node.op_type == "Gemm" and bool(attributes(node).get("transB", 0))
    source = file.producers.get(node.input[1])
    while source is not None and source.op_type in ("Transpose", "Cast"):
        if source.op_type == "Transpose":
            if list(attributes(source).get("perm", [1, 0])) != [1, 0]:
                return None, False
            transposed = not transposed
        source = file.producers.get(source.input[0])
    if source is None or source.op_type != "DequantizeLinear" or not file.is_constant(source.input[0]):
        return None, False
    return source, transposed


def _gemm_bias(file: OnnxFile, node: onnx.NodeProto, name: str, n: int, refuse) -> np.ndarray | None:
    if node.op_type != "Gemm":
        return None
    if attributes(node).get("transA", 0) or attributes(node).get("alpha", 1.0) != 1.0:
        refuse("Gemm with transA or alpha is not a linear layer")
    if len(node.input) <= BIAS or not node.input[BIAS]:
        return None
    bias = file.constant(node.input[BIAS], name).astype(np.float32) * np.float32(attributes(node).get("beta", 1.0))
    if bias.size not in (1, n) or (bias.ndim and bias.shape[-1] != bias.size):
        refuse(f"Gemm adds a tensor {list(bias.shape)}, which is not one value per output feature ({n})")
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (n,)))
