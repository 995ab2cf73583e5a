# SPDX-License-Identifier: Apache-2.0
"""Reads onnxruntime's MatMulNBits nodes (com.microsoft): Y = A W^T (+ bias), W = (q - z) * s.

    B            uint8 [N, nb, block_size * bits / 8] or with these axes merged; element 0 in a byte's low bits
    scales       float [N, nb] or flat
    zero_points  absent: 2^(bits - 1); uint8, packed like B: [N, ceil(nb * bits / 8)] or flat; float: [N, nb] or flat
    g_idx        deprecated; accepted if it says k // block_size
    bias         float [N]
nb = ceil(K / block_size) is the number of groups.
"""

import numpy as np
import onnx

from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB, attributes
from sw.graph.nodes import read as input_of
from sw.model.linear import QuantizedLinear

B, SCALES, ZERO_POINTS, G_IDX, BIAS = 1, 2, 3, 4, 5


def matches(node: onnx.NodeProto) -> bool:
    """Whether the node is a MatMulNBits."""
    return node.op_type == "MatMulNBits" and node.domain == CONTRIB


def check(file: OnnxFile, node: onnx.NodeProto, name: str) -> None:
    """Raises UserError if attributes and shapes contradict each other; reads no weights."""
    n, k, bits, block = _attributes(file, node, name)
    groups = -(-k // block)
    _expect(file, node, name, B, n * groups * (block * bits // 8))
    _expect(file, node, name, SCALES, n * groups)
    if _has(node, ZERO_POINTS):
        size = int(np.prod(file.shape(node.input[ZERO_POINTS], name)))
        packed, plain = n * -(-groups * bits // 8), n * groups
        if size not in (packed, plain):
            _refuse(file, name, f"zero_points has {size} elements, expected {packed} packed or {plain} float")
    if _has(node, BIAS):
        _expect(file, node, name, BIAS, n)


def shape(file: OnnxFile, node: onnx.NodeProto, name: str) -> tuple[int, int]:
    """(N, K). Raises UserError if the attributes do not define a layer."""
    n, k, _, _ = _attributes(file, node, name)
    return n, k


def read(file: OnnxFile, node: onnx.NodeProto, name: str) -> QuantizedLinear:
    """The layer, its weights read from the file. Raises UserError as `check` does, and for missing data."""
    check(file, node, name)
    n, k, bits, block = _attributes(file, node, name)
    groups = -(-k // block)
    packed = file.constant(node.input[B], name)
    if packed.dtype != np.uint8:
        _refuse(file, name, f"B is {packed.dtype}, not uint8")
    if _has(node, G_IDX):
        order = file.constant(node.input[G_IDX], name)[:k]
        if not np.array_equal(order, np.arange(k) // block):
            _refuse(file, name, "g_idx puts weights into groups out of order (act-order), which is not supported")
    return QuantizedLinear(
        name=name,
        q=unpack_bits(packed.reshape(n, -1), bits)[:, :k],
        scales=file.constant(node.input[SCALES], name).astype(np.float32).reshape(n, groups),
        zero_points=_zero_points(file, node, name, (n, groups), bits),
        group_size=block,
        bits=bits,
        bias=file.constant(node.input[BIAS], name).astype(np.float32).reshape(n) if _has(node, BIAS) else None,
        input_name=node.input[0],
        output_name=node.output[0],
        bias_in_node=_has(node, BIAS),
    )


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, bytes] as uint8 [N, 8 / bits * bytes], the low bits of a byte first; bits is 2, 4 or 8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(packed.shape[0], -1)


def _zero_points(file: OnnxFile, node: onnx.NodeProto, name: str, shape: tuple[int, int], bits: int) -> np.ndarray:
    if not _has(node, ZERO_POINTS):
        return np.full(shape, 1 << (bits - 1), np.uint8)
    values = file.constant(node.input[ZERO_POINTS], name)
    if values.dtype != np.uint8:
        if values.size != shape[0] * shape[1]:
            _refuse(file, name, f"zero_points has {values.size} elements, expected {shape[0] * shape[1]}")
        return values.astype(np.float32).reshape(shape)
    size = shape[0] * -(-shape[1] * bits // 8)
    if values.size != size:
        _refuse(file, name, f"zero_points has {values.size} bytes, expected {size}")
    return np.ascontiguousarray(unpack_bits(values.reshape(shape[0], -1), bits)[:, : shape[1]])


def _attributes(file: OnnxFile, node: onnx.NodeProto, name: str) -> tuple[int, int, int, int]:
    values = attributes(node)
    missing = [key for key in ("N", "K", "block_size") if not isinstance(values.get(key), int) or values[key] < 1]
    if missing:
        _refuse(file, name, f"attribute {missing[0]} is missing or not positive")
    bits, block = values.get("bits", 4), values["block_size"]
    if bits not in (2, 4, 8):
        _refuse(file, name, f"bits is {bits}: MatMulNBits defines its packing for 2, 4 and 8")
    if block < 16 or block & (block - 1):
        _refuse(file, name, f"block_size is {block}: MatMulNBits needs a power of two from 16")
    if values.get("weight_prepacked", 0):
        _refuse(file, name, "weights are prepacked for one device (weight_prepacked), which is not supported")
    return values["N"], values["K"], bits, block


def _has(node: onnx.NodeProto, index: int) -> bool:
    return input_of(node, index) != ""


def _expect(file: OnnxFile, node: onnx.NodeProto, name: str, index: int, size: int) -> None:
    if not _has(node, index):
        _refuse(file, name, f"input {index} is missing")
    shape = file.shape(node.input[index], name)
    if int(np.prod(shape)) != size:
        what = {B: "B", SCALES: "scales", BIAS: "bias"}[index]
        n, k, bits, block = _attributes(file, node, name)
        expected = f"N {n}, K {k}, bits {bits}, block_size {block} need {size}"
        _refuse(file, name, f"{what} is {list(shape)}, {int(np.prod(shape))} elements, but {expected}")


def _refuse(file: OnnxFile, name: str, problem: str) -> None:
    raise UserError(f"{file.path}: layer {name}: {problem}")
