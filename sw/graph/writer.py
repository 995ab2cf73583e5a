# SPDX-License-Identifier: Apache-2.0
"""Writes an ONNX graph node by node, and its large tensors directly to an external data file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sw.graph.nodes import CONTRIB
from sw.graph.tensor_data import TensorData


def tensor_name(path: str) -> str:
    """The prefix of the names of a module's tensors: /model/layers.0/mlp gives model.layers.0.mlp."""
    return path.strip("/").replace("/", ".")


class GraphBuilder:
    """Collects nodes and tensors. data: receives large tensors immediately."""

    def __init__(self, data: TensorData):
        self._data = data
        self._made: list[onnx.NodeProto] = []
        self._tensors: list[TensorProto] = []

    def tensor(self, name: str, values: np.ndarray) -> str:
        """Adds an initializer and returns its name."""
        name = self._unique(name)
        self._tensors.append(self._data.store(name, values))
        return name

    def node(
        self,
        name: str,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node and returns its first output, by default `name`/output_0."""
        outputs = list(outputs) or [self._unique(f"{name}/output_0")]
        self._made.append(helper.make_node(op, list(inputs), outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def _unique(self, name: str) -> str:
        """A name for a new tensor: by default the requested one."""
        return name


class OnnxWriter(GraphBuilder):
    """Builds a graph; `save` writes model.onnx. Tensors above 1 KiB are written to model.onnx.data immediately, so that
    a model of any size needs the memory of one tensor. Use as a context manager.
    """

    def __init__(self, directory: Path, graph_name: str):
        super().__init__(TensorData(directory / "model.onnx.data"))
        self.path = directory / "model.onnx"
        self._graph_name = graph_name
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> "OnnxWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._data.__exit__(*exception)

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declares a graph input; dtype is a TensorProto element type."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declares a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def save(self, metadata: dict[str, str]) -> None:
        """Writes model.onnx: opset 21, IR version 10, the given metadata properties."""
        graph = helper.make_graph(self._made, self._graph_name, self._inputs, self._outputs, self._tensors)
        model = helper.make_model(
            graph,
            ir_version=10,
            producer_name="gristmill",
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)],
        )
        helper.set_model_props(model, metadata)
        onnx.save(model, self.path)
