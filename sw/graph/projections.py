# SPDX-License-Identifier: Apache-2.0
"""Finds every linear layer of an ONNX graph, quantized or float, without its weights: see linears and float_linears."""

from collections.abc import Iterator
from dataclasses import replace

import onnx

from sw.graph import dequantize_linear, matmul_nbits
from sw.graph.file import OnnxFile
from sw.graph.float_linears import float_form
from sw.graph.nodes import SHAPES, attributes, incomplete, is_pair, name_of, read, readers, separate_bias
from sw.graph.norms import find_norms
from sw.model.parts import Mismatch, Norm, Projection


def find_projections(file: OnnxFile) -> Iterator[Projection]:
    """The layers in the graph's order. Raises UserError if attributes and shapes of a quantized layer do not fit."""
    for node in file.graph.node:
        found = _shape(file, node)
        if found is not None:
            yield _projection(file, node, *found)


def _shape(file: OnnxFile, node: onnx.NodeProto) -> tuple[int, int, int | None, bool] | None:
    """(N, K, the node's input with a bias if it may have one, whether it is quantized) of a linear layer."""
    gemm_bias = dequantize_linear.BIAS if node.op_type == "Gemm" else None
    if matmul_nbits.matches(node):
        return *matmul_nbits.shape(file, node, name_of(node)), matmul_nbits.BIAS, True
    if dequantize_linear.matches(file, node):
        return *dequantize_linear.shape(file, node, name_of(node)), gemm_bias, True
    form = float_form(file, node)
    return None if form is None else (form[0], form[1], gemm_bias, False)


def _projection(file: OnnxFile, node: onnx.NodeProto, n: int, k: int, place: int | None, quantized: bool) -> Projection:
    product = output = node.output[0]
    bias = read(node, place) if place is not None else ""
    if not bias and (found := separate_bias(file, product, n)):
        bias, output = found[0], found[1].output[0]
    activations = matmul_nbits.activations(file, node) if matmul_nbits.matches(node) else node.input[0]
    return Projection(name_of(node), activations, product, output, k, n, 0, n, bias, quantized)


class NotThisShape(Exception):
    """Raised if a graph does not match. mismatch: the reason."""

    def __init__(self, mismatch: Mismatch):
        super().__init__(str(mismatch))
        self.mismatch = mismatch


class Layers:
    """A graph's layers and norms, with which the parts of a decoder are matched. `uncast` skips casts between parts.

    Members
    -------
    file: the graph. projections: linear layers in the graph's order. norms: norms by their output. by_input: norms by
    the tensor that they normalise, uncast.

    Raises NotThisShape if a node has too few inputs, and UserError if a quantized layer is damaged.
    """

    def __init__(self, file: OnnxFile):
        if (node := incomplete(file)) is not None:
            raise self.blame("graph", f"it has {len(node.input)} inputs, and needs more", node)
        self.file = file
        self.projections = list(find_projections(file))
        self.norms = {norm.output: norm for norm in find_norms(file)}
        self.by_input: dict[str, list[Norm]] = {}
        for norm in self.norms.values():
            self.by_input.setdefault(self.uncast(norm.input), []).append(norm)
        self._by_output = {layer.output: layer for layer in self.projections}

    def uncast(self, tensor: str) -> str:
        """The tensor whose cast this tensor is, or the tensor itself."""
        # The number of steps is limited, because a damaged graph may have cycles.
        for _ in self.file.graph.node:
            node = self.file.producers.get(tensor)
            if node is None or node.op_type not in ("Cast", "Identity"):
                break
            tensor = node.input[0]
        return tensor

    def rows(self, tensor: str, part: str) -> Projection:
        """The linear layer that makes a tensor; or some of its rows, if the tensor is an output of Split.

        part: name of the decoder's part. Raises NotThisShape if something else makes the tensor.
        """
        tensor = self.uncast(tensor)
        found = self._by_output.get(tensor)
        if found is not None:
            return found
        node = self.file.producers.get(tensor)
        whole = self._by_output.get(node.input[0]) if node is not None and node.op_type == "Split" else None
        if node is None or whole is None:
            raise self.wrong(part, "where the output of a linear layer is expected", tensor)
        sizes = self._split_sizes(node, whole.n)
        index = list(node.output).index(tensor)
        if not sizes:
            raise self.wrong(part, "it does not split the last axis into constant sizes", tensor)
        return replace(whole, output=tensor, n=sizes[index], first_row=sum(sizes[:index]))

    def makes(self, tensor: str) -> bool:
        """Whether a linear layer makes a tensor."""
        return self.uncast(tensor) in self._by_output

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor or a cast of it, or it beside itself (see sw.graph.matmul_nbits)."""
        found, left, seen = [], [tensor], set()
        while left:
            name = left.pop()
            for node in readers(self.file, name):
                if node.op_type in ("Cast", "Identity") or is_pair(node):
                    if node.output[0] not in seen:
                        left.append(node.output[0])
                        seen.add(node.output[0])
                elif node.op_type not in SHAPES:
                    found.append(node)
        return found

    def expect_input(self, layers: dict[str, Projection], tensor: str) -> None:
        """Raises NotThisShape unless exactly these layers (by their part of the decoder) read a tensor.

        No two of them may be the same rows.
        """
        taken: dict[tuple[str, int], str] = {}
        for part, layer in layers.items():
            if self.uncast(layer.input) != self.uncast(tensor):
                node = self.file.producers[layer.product]
                raise self.blame(part, f"it reads {layer.input}, not the norm's {tensor}", node)
            other = taken.setdefault((layer.product, layer.first_row), part)
            if other != part:
                raise self.blame(part, f"it is {other} too", self.file.producers[layer.product])
        products = {layer.product for layer in layers.values()}
        for node in self.readers(tensor):
            if node.output[0] not in products:
                part = next(iter(layers)).rpartition(".")[0]
                raise self.blame(part, f"it reads the norm's {tensor} too", node)

    def wrong(self, part: str, problem: str, tensor: str) -> NotThisShape:
        """An exception that names the node that makes a tensor."""
        node = self.file.producers.get(tensor)
        if node is not None:
            return self.blame(part, problem, node)
        what = "no node makes" if tensor else "a node has no"
        return NotThisShape(Mismatch(part, f"{what} the tensor {tensor or 'that is read here'}"))

    @staticmethod
    def blame(part: str, problem: str, node: onnx.NodeProto) -> NotThisShape:
        """An exception that names a node."""
        return NotThisShape(Mismatch(part, problem, node.op_type, name_of(node)))

    def _split_sizes(self, node: onnx.NodeProto, n: int) -> list[int]:
        """The number of rows of every output of a Split; empty if it is not known."""
        values = attributes(node)
        count = len(node.output)
        if values.get("axis", 0) not in (-1, 2):
            return []
        if not read(node, 1):
            return [n // count] * count if n % count == 0 else []
        if not self.file.is_constant(node.input[1]):
            return []
        sizes = [int(size) for size in self.file.constant(node.input[1], name_of(node)).reshape(-1)]
        return sizes if sum(sizes) == n and len(sizes) == count else []
