# SPDX-License-Identifier: Apache-2.0
"""An ONNX file whose tensors are read on request. Every kind of damage is reported as a UserError."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from sw.common.errors import UserError, one_line
from sw.graph.external_data import external_locations, place_external_data

GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
MAX_DEPTH = 32
"""Operators whose output is a constant if their inputs are."""


class OnnxFile:
    """An ONNX model: its graph in memory, its external data on disk.

    Members
    -------
    path, model, graph: the file and its protocol buffers.
    data_folder: the folder of the locations of external data, see sw.graph.external_data.
    producers: tensor name -> the node that makes it.
    consumers: tensor name -> the nodes that read it.
    branching: the nodes with subgraphs (If, Loop), whose nodes may read tensors too.

    Raises UserError if the file is missing, truncated or not an ONNX model.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no such file: {self.path}")
        try:
            self.model = onnx.load(str(self.path), load_external_data=False)
        except Exception as error:
            raise UserError(f"{self.path} is not a complete ONNX file ({one_line(error)})") from error
        self.data_folder = place_external_data(self.path, self.model)
        self.graph = self.model.graph
        # A file that is cut between two fields still parses; then the end of the graph is missing.
        if not self.graph.node or not self.graph.output:
            raise UserError(f"{self.path} is not a complete ONNX file (its graph has no nodes or no outputs)")
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        self.branching: list[onnx.NodeProto] = []
        for node in self.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
            if any(item.type in GRAPHS for item in node.attribute):
                self.branching.append(node)

    def digest(self) -> str:
        """SHA-256 of the file and of its external data, 64 hexadecimal digits. Raises UserError if data is missing."""
        whole = hashlib.sha256()
        for path in (self.path, *(self.data_folder / name for name in external_locations(self.model))):
            try:
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UserError(f"{path}: {one_line(error)}") from None
        return whole.hexdigest()

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The graph's inputs that are no initializers; the caller must feed them."""
        initializers = {tensor.name for tensor in self.graph.initializer}
        return [item for item in self.graph.input if item.name not in initializers]

    def is_constant(self, name: str, depth: int = 0) -> bool:
        """Whether `constant(name)` finds a tensor. depth: nodes followed so far; a damaged graph may have a cycle."""
        node = self.producers.get(name)
        if name in self._initializers:
            return True
        if node is None or node.domain not in ("", "ai.onnx") or depth == MAX_DEPTH:
            return False
        if node.op_type == "Constant":
            return len(node.attribute) == 1 and node.attribute[0].name == "value"
        inputs = {"Identity": 1, "Reshape": 2, "Cast": 1}.get(node.op_type)
        return len(node.input) == inputs and all(self.is_constant(part, depth + 1) for part in node.input)

    def constant(self, name: str, layer: str) -> np.ndarray:
        """The value of a constant tensor: an initializer, a Constant node, or Identity, Reshape or Cast of one.

        Elements keep their type (4-bit elements have the ml_dtypes of the onnx package). Raises UserError, with the
        layer's name, if the tensor is not constant or its data is missing or too short.
        """
        if name in self._initializers:
            return self._read(self._initializers[name], layer)
        if not self.is_constant(name):
            raise UserError(f"{self.path}: layer {layer}: {name or 'an input'} is not a constant of the model")
        node = self.producers[name]
        if node.op_type == "Constant":
            value = helper.get_node_attr_value(node, "value")
            return self._read(value, layer)
        values = self.constant(node.input[0], layer)
        try:
            if node.op_type == "Reshape":
                shape = [int(size) for size in self.constant(node.input[1], layer)]
                # In ONNX a zero copies the size of the input's axis.
                return values.reshape([size or values.shape[i] for i, size in enumerate(shape)])
            if node.op_type == "Cast":
                return values.astype(helper.tensor_dtype_to_np_dtype(helper.get_node_attr_value(node, "to")))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            problem = f"{node.op_type} {name} of a constant cannot be done ({one_line(error)})"
            raise UserError(f"{self.path}: layer {layer}: {problem}") from None
        return values

    def shape(self, name: str, layer: str) -> tuple[int, ...]:
        """The shape of a constant tensor, without reading an initializer's data."""
        if name in self._initializers:
            return tuple(self._initializers[name].dims)
        return self.constant(name, layer).shape

    def _read(self, tensor: onnx.TensorProto, layer: str) -> np.ndarray:
        try:
            if external_data_helper.uses_external_data(tensor):
                self._check_external(tensor)
            return numpy_helper.to_array(tensor, base_dir=str(self.data_folder))
        except UserError as error:
            raise UserError(f"{self.path}: layer {layer}: {error}") from None
        except Exception as error:
            problem = f"tensor {tensor.name} cannot be read ({one_line(error)})"
            raise UserError(f"{self.path}: layer {layer}: {problem}") from error

    def _check_external(self, tensor: onnx.TensorProto) -> None:
        info = external_data_helper.ExternalDataInfo(tensor)
        data = self.data_folder / info.location
        if not data.is_file():
            raise UserError(f"external data file {info.location} is missing")
        end = int(info.offset or 0) + int(info.length or 0)
        if data.stat().st_size < end:
            problem = f"has {data.stat().st_size} bytes, tensor {tensor.name} ends at {end}"
            raise UserError(f"external data file {info.location} is truncated: it {problem}")


def tensor_type(item: onnx.ValueInfoProto) -> str:
    """The type of a graph's input or output in onnxruntime's notation, as "tensor(float)"."""
    return f"tensor({onnx.TensorProto.DataType.Name(item.type.tensor_type.elem_type).lower()})"


def tensor_shape(item: onnx.ValueInfoProto) -> list[int | str]:
    """The sizes of a graph's input or output: a name for a symbolic size, "" for an unknown one."""
    sizes = item.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else size.dim_param for size in sizes]


def expect_names(file: OnnxFile) -> None:
    """Raises UserError if a name in the graph is not text, which is damage: protobuf returns it as bytes."""
    graph = file.graph
    names = [name for node in graph.node for name in (node.name, node.op_type, *node.input, *node.output)]
    names += [item.name for items in (graph.initializer, graph.input, graph.output) for item in items]
    names += [text for item in file.model.metadata_props for text in (item.key, item.value)]
    if not all(isinstance(name, str) for name in names) or not all(node.output for node in graph.node):
        raise UserError(f"{file.path} is damaged: a name in its graph is not text, or a node has no output")


def names_read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """The tensors that nodes and their subgraphs (If, Loop) read; some appear more than once."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from names_read(graph.node)
                # A branch may return a tensor of the graph around it.
                yield from (output.name for output in graph.output)
