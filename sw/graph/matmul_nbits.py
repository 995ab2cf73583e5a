# SPDX-License-Identifier: Apache-2.0
"""Reads onnxruntime's MatMulNBits nodes (com.microsoft): Y = A W^T (+ bias), W = (q - z) * s.

    B            uint8 [N, nb, block_size * bits / 8] or with these axes merged; element 0 in a byte's low bits
    scales       float [N, nb] or flat
    zero_points  absent: 2^(bits - 1); uint8, packed like B: [N, ceil(nb * bits / 8)] or flat; float: [N, nb] or flat
    g_idx        deprecated; accepted if it says k // block_size
    bias         float [N]
nb = ceil(K / block_size) is the number of groups.

onnxruntime has no kernel for 8 bits with float zero points. Such a layer is Concat(A, A) -> MatMulNBits with 4 bits and
2 K columns: first the high 4 bits of q with scales 16 s and whole zero points, then the low 4 bits with scales s. Both
zero points together, 16 high + low, are that of q. `read` returns the layer of 8 bits with the activations A.
"""

from dataclasses import replace

import numpy as np
import onnx

from sw.common.bits import unpack_bits
from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB, attributes, is_pair
from sw.graph.nodes import read as input_of
from sw.model.linear import Outline, QuantizedLinear

PLANE_BITS = 4
"""Bits of each of the two planes of an 8-bit layer."""
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
    return n, k if activations(file, node) == input_of(node, 0) else k // 2


def outline(file: OnnxFile, node: onnx.NodeProto, name: str) -> Outline:
    """What decides which hardware the layer needs; of its tensors only the zero points are read.

    Raises UserError as `check` does, and for missing data.
    """
    check(file, node, name)
    n, k, bits, block = _attributes(file, node, name)
    zero_points = _zero_points(file, node, name, (n, -(-k // block)), bits)
    if activations(file, node) == node.input[0]:
        return Outline(name, n, k, block, bits, zero_points)
    return Outline(name, n, k // 2, block, 2 * PLANE_BITS, _joined_zeros(zero_points))


def activations(file: OnnxFile, node: onnx.NodeProto) -> str:
    """The tensor that the layer multiplies: the node's input or, if that is two planes, the tensor that they share.

    Reads the scales of a node whose input is a tensor beside itself.
    """
    own = input_of(node, 0)
    source = file.producers.get(own)
    if source is None or not is_pair(source) or not _has(node, ZERO_POINTS):
        return own
    name, values = node.name or node.output[0], attributes(node)
    size, block = values.get("K", 0), values.get("block_size", 0)
    if values.get("bits", 4) != PLANE_BITS or not block or size % (2 * block):
        return own
    if not all(file.is_constant(node.input[index]) for index in (SCALES, ZERO_POINTS)):
        return own
    scales, zeros = (file.constant(node.input[index], name) for index in (SCALES, ZERO_POINTS))
    groups = 2 * (size // block // 2)
    if zeros.dtype == np.uint8 or scales.size != zeros.size or scales.size != values.get("N", 0) * groups:
        return own
    (high, low), (high_zeros, low_zeros) = (np.split(v.reshape(-1, groups), 2, axis=1) for v in (scales, zeros))
    whole = 1 << PLANE_BITS
    paired = np.array_equal(high, whole * low) and np.array_equal(high_zeros, np.floor(high_zeros))
    return source.input[0] if paired and low_zeros.min() >= 0 and low_zeros.max() <= whole else own


def planes(layer: QuantizedLinear) -> QuantizedLinear:
    """A layer of 8 bits with float zero points as one of 4 bits and 2 K columns: the high plane, then the low one.

    Raises UserError if K is no whole number of groups.
    """
    if layer.k % layer.group_size:
        raise UserError(f"layer {layer.name}: K {layer.k} is no whole number of groups of {layer.group_size}")
    whole = np.float32(1 << PLANE_BITS)
    high = np.floor(layer.zero_points / whole)
    return replace(
        layer,
        q=np.concatenate([layer.q >> PLANE_BITS, layer.q & ((1 << PLANE_BITS) - 1)], axis=1),
        scales=np.concatenate([whole * layer.scales, layer.scales], axis=1),
        # A tiny negative zero point is -1 and, rounded, 16: `activations` allows for it.
        zero_points=np.concatenate([high, layer.zero_points - whole * high], axis=1),
        bits=PLANE_BITS,
    )


def _joined(layer: QuantizedLinear) -> QuantizedLinear:
    """The inverse of `planes`."""
    high, low = np.split(layer.q, 2, axis=1)
    return replace(
        layer,
        q=high << PLANE_BITS | low,
        scales=np.split(layer.scales, 2, axis=1)[1],
        zero_points=_joined_zeros(layer.zero_points),
        bits=2 * PLANE_BITS,
    )


def _joined_zeros(zero_points: np.ndarray) -> np.ndarray:
    high, low = np.split(zero_points, 2, axis=1)
    return np.float32(1 << PLANE_BITS) * high + low


def read(file: OnnxFile, node: onnx.NodeProto, name: str) -> QuantizedLinear:
    """The layer, its weights read from the file. Raises UserError as `check` does, and for missing data."""
    check(file, node, name)
    layer = _read_node(file, node, name)
    source = activations(file, node)
    return layer if source == node.input[0] else replace(_joined(layer), input_name=source)


def _read_node(file: OnnxFile, node: onnx.NodeProto, name: str) -> QuantizedLinear:
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
