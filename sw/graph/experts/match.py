# SPDX-License-Identifier: Apache-2.0
"""Finds the mixtures of experts of a graph, in the form of sw.graph.experts.write, by operators and not by names."""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from sw.graph.file import OnnxFile
from sw.graph.nodes import attributes, is_output, made, name_of, read, readers
from sw.graph.projections import find_projections
from sw.model.parts import Projection


@dataclass(frozen=True)
class Expert:
    """The products of an expert's linear layers: names of tensors."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Members
    -------
    name: of the node that makes the output. input, output: tensors [.., hidden].
    weights: tensor [.., experts], with at most `used` elements of a row that are not 0.
    experts: in ascending order.
    """

    name: str
    input: str
    weights: str
    output: str
    used: int
    experts: tuple[Expert, ...]

    @property
    def products(self) -> set[str]:
        """The products of all linear layers."""
        return {product for expert in self.experts for product in (expert.gate, expert.up, expert.down)}


def find_mixtures(file: OnnxFile) -> list[Mixture]:
    """The graph's mixtures, in its order. Reads no weights; raises UserError as `find_projections` does."""
    routers = [node for node in file.graph.node if node.op_type == "Split" and _used(file, read(node, 0))]
    if not routers:
        return []
    layers = {layer.product: layer for layer in find_projections(file)}
    return [mixture for node in routers if (mixture := _mixture(file, node, layers)) is not None]


def _used(file: OnnxFile, weights: str) -> int:
    """The number of experts of a token, if a tensor is what a router scatters; else 0."""
    scatter = file.producers.get(weights)
    if scatter is None or scatter.op_type != "ScatterElements" or len(scatter.input) != 3:
        return 0
    zeros, indices = (file.producers.get(name) for name in scatter.input[:2])
    if zeros is None or zeros.op_type != "ConstantOfShape":
        return 0
    value = attributes(zeros).get("value")
    if value is not None and numpy_helper.to_array(value).any():
        return 0
    if indices is None or indices.op_type != "TopK" or scatter.input[1] != made(indices, 1):
        return 0
    used = read(indices, 1)
    k = file.constant(used, name_of(indices)) if file.is_constant(used) else np.zeros(0)
    axes = (attributes(node).get("axis", default) for node, default in ((scatter, 0), (indices, -1)))
    return int(k.reshape(-1)[0]) if k.size == 1 and all(axis == -1 for axis in axes) else 0


def _mixture(file: OnnxFile, split: onnx.NodeProto, layers: dict[str, Projection]) -> Mixture | None:
    """The mixture whose weights a node splits; None if what follows is something else."""
    if attributes(split).get("axis", 0) != -1:
        return None
    total, source, experts = "", "", []
    for weight in split.output:
        weighted = _only_reader(file, weight, "Mul")
        if weighted is None:
            return None
        found = _expert(file, _other(weighted, weight), layers)
        if found is None or source not in ("", found[1]):
            return None
        experts.append(found[0])
        source = found[1]
        if not total:
            total = weighted.output[0]
            continue
        add = _only_reader(file, total, "Add")
        if add is None or readers(file, weighted.output[0]) != [add]:
            return None
        total = add.output[0]
    name = name_of(file.producers[total])
    return Mixture(name, source, split.input[0], total, _used(file, split.input[0]), tuple(experts))


def _expert(file: OnnxFile, product: str, layers: dict[str, Projection]) -> tuple[Expert, str] | None:
    """The expert whose result a tensor is, and its input."""
    down = layers.get(product)
    node = None if down is None else file.producers.get(down.input)
    if down is None or node is None or node.op_type != "Mul" or len(node.input) != 2:
        return None
    for activated, other in (tuple(node.input), tuple(node.input)[::-1]):
        gate, up = layers.get(silu_of(file, activated) or ""), layers.get(other)
        if gate is None or up is None:
            continue
        if gate.input != up.input or gate.bias or up.bias or down.bias:
            return None
        return Expert(gate.product, up.product, down.product), gate.input
    return None


def silu_of(file: OnnxFile, tensor: str) -> str | None:
    """x, if a tensor is x * Sigmoid(x)."""
    node = file.producers.get(tensor)
    if node is None or node.op_type != "Mul" or len(node.input) != 2:
        return None
    for x, sigmoid in (tuple(node.input), tuple(node.input)[::-1]):
        source = file.producers.get(sigmoid)
        if source is not None and source.op_type == "Sigmoid" and read(source, 0) == x:
            return x
    return None


def _only_reader(file: OnnxFile, tensor: str, operator: str) -> onnx.NodeProto | None:
    """The node that alone reads a tensor, if it is this operator with two inputs."""
    found = readers(file, tensor)
    if len(found) != 1 or found[0].op_type != operator or len(found[0].input) != 2 or is_output(file, tensor):
        return None
    return found[0]


def _other(node: onnx.NodeProto, tensor: str) -> str:
    """The other input of a node with two."""
    return node.input[1] if node.input[0] == tensor else node.input[0]
