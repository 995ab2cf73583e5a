# SPDX-License-Identifier: Apache-2.0
"""Reads every quantized linear layer of an ONNX file, and the weights of matched parts.

MatMulNBits (com.microsoft)   2, 4 or 8 bits, all forms of scales and zero points: see sw.graph.matmul_nbits
DequantizeLinear (2, 4 or 8 bits) -> [Cast, Transpose ->] MatMul or Gemm: see sw.graph.dequantize_linear
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import onnx

from sw.common.errors import UserError
from sw.graph import dequantize_linear, matmul_nbits
from sw.graph.file import OnnxFile
from sw.graph.float_linears import constant, float_form
from sw.graph.nodes import name_of, separate_bias
from sw.graph.nodes import read as read_input
from sw.model.decoder import PROJECTIONS, DecoderLayer
from sw.model.linear import FloatLinear, Outline, QuantizedLinear
from sw.model.lm_head import Linear
from sw.model.parts import Block, Norm, Projection

# Quantized products that this importer does not read, named when a model holds nothing else.
UNSUPPORTED = ("MatMulBnb4", "MatMulFpQ4", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QMoE")


@dataclass(frozen=True)
class _Site:
    """A layer whose weights have not been read yet."""

    name: str
    node: onnx.NodeProto
    activations: str
    read: Callable[[OnnxFile, onnx.NodeProto, str], QuantizedLinear]


class Linears(Sequence[QuantizedLinear]):
    """The quantized linear layers of a model in graph order. Every access reads the weights; they are not kept.

    file: the ONNX file.
    """

    def __init__(self, file: OnnxFile, sites: Sequence[_Site]):
        self.file = file
        self._sites = sites

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def names(self) -> list[str]:
        """The layers' names, without reading weights."""
        return [site.name for site in self._sites]

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The graph's nodes that compute the layers. The first input of each is the tensor of activations."""
        return [_reading(site.node, site.activations) for site in self._sites]

    @property
    def tensors(self) -> list[tuple[str, str]]:
        """(input_name, output_name) of every layer, without reading weights."""
        return [(site.activations, site.node.output[0]) for site in self._sites]

    @overload
    def __getitem__(self, index: int) -> QuantizedLinear: ...

    @overload
    def __getitem__(self, index: slice) -> "Linears": ...

    def __getitem__(self, index: int | slice) -> "QuantizedLinear | Linears":
        if isinstance(index, slice):
            return Linears(self.file, self._sites[index])
        site = self._sites[index]
        return _with_separate_bias(self.file, site.read(self.file, site.node, site.name))

    def outlines(self) -> Iterator[Outline]:
        """The layers without their weights. Raises UserError as reading them does, if zero points are damaged."""
        for site in self._sites:
            if matmul_nbits.matches(site.node):
                yield matmul_nbits.outline(self.file, site.node, site.name)
            else:
                layer = site.read(self.file, site.node, site.name)
                yield Outline(layer.name, layer.n, layer.k, layer.group_size, layer.bits, layer.zero_points)

    def __iter__(self) -> Iterator[QuantizedLinear]:
        return (self[i] for i in range(len(self)))


def find_linears(model_path: Path | str) -> Linears:
    """The quantized linear layers of an ONNX file. Names are the nodes' names, made unique.

    Raises UserError if the file is damaged, if it has no such layer, or if a layer's tensors do not fit its attributes.
    The latter, and missing external data, may be reported only when the layer is accessed.
    """
    file = OnnxFile(model_path)
    sites: list[_Site] = []
    taken: set[str] = set()
    for node in file.graph.node:
        activations = read_input(node, 0)
        if matmul_nbits.matches(node):
            read, activations = matmul_nbits.read, matmul_nbits.activations(file, node)
        elif dequantize_linear.matches(file, node):
            read = dequantize_linear.read
        else:
            continue
        sites.append(_Site(_unique(name_of(node), taken), node, activations, read))
    if not sites:
        others = sorted({node.op_type for node in file.graph.node if node.op_type in UNSUPPORTED})
        hint = f" (it has {', '.join(others)}, which are not supported)" if others else ""
        raise UserError(f"{file.path} has no quantized linear layers{hint}")
    for site in sites:
        if matmul_nbits.matches(site.node):
            matmul_nbits.check(file, site.node, site.name)
    return Linears(file, sites)


def _reading(node: onnx.NodeProto, activations: str) -> onnx.NodeProto:
    """A node, with other activations if it has others."""
    if node.input[0] == activations:
        return node
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    changed.input[0] = activations
    return changed


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def _with_separate_bias(file: OnnxFile, layer: QuantizedLinear) -> QuantizedLinear:
    """The layer with the bias of an Add node that is the product's only reader."""
    found = None if layer.bias is not None else separate_bias(file, layer.output_name, layer.n)
    if found is None:
        return layer
    return replace(layer, bias=file.constant(found[0], layer.name).astype("float32").reshape(-1))


def read_linear(file: OnnxFile, part: Projection) -> Linear:
    """A matched linear layer, with the bias that is added to its product.

    Raises UserError, with the layer's name, if its tensors are damaged.
    """
    node = file.producers[part.product]
    rows = slice(part.first_row, part.first_row + part.n)
    if part.quantized:
        read = matmul_nbits.read if matmul_nbits.matches(node) else dequantize_linear.read
        layer = _with_separate_bias(file, read(file, node, part.name))
        return layer if part.is_whole else layer.with_rows(rows)
    form = float_form(file, node)
    assert form is not None, "what is not quantized is float"
    weight = constant(file, node.input[1], part.name).astype(np.float32, copy=False)
    weight = np.ascontiguousarray((weight if form[2] else weight.T)[rows])
    bias = file.constant(part.bias, part.name).astype(np.float32).reshape(-1)[rows] if part.bias else None
    return FloatLinear(part.name, weight, bias)


def read_norm(file: OnnxFile, norm: Norm) -> np.ndarray:
    """A matched norm's weight, float32 [hidden_size]. Raises UserError, with the node's name, if it is damaged."""
    return file.constant(norm.weight, norm.node).astype(np.float32)


def read_layer(file: OnnxFile, block: Block) -> DecoderLayer:
    """The weights of a matched block, as a checkpoint's DecoderSource has them. Raises UserError as `read_linear`."""
    projections: dict[str, Any] = {name: read_linear(file, getattr(block, name)) for name in PROJECTIONS}
    heads: dict[str, Any] = {
        name: None if norm is None else file.constant(norm.weight, name).astype(np.float32)
        for name, norm in (("q_norm", block.q_norm), ("k_norm", block.k_norm))
    }
    return DecoderLayer(
        input_norm=read_norm(file, block.input_norm),
        post_attention_norm=read_norm(file, block.post_attention_norm),
        **projections,
        **heads,
    )
