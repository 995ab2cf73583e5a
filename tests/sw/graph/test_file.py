# SPDX-License-Identifier: Apache-2.0
"""Constants of a damaged graph: each kind of damage gives one line, and no search runs for ever."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sw.common.errors import UserError
from sw.graph.file import MAX_DEPTH, OnnxFile


def graph(tmp_path, nodes, tensors: dict[str, np.ndarray] | None = None) -> OnnxFile:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(values, name) for name, values in (tensors or {}).items()]
    model = helper.make_model(helper.make_graph(nodes, "damaged", [], [out], initializers))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return OnnxFile(path)


def node(op: str, inputs: list[str], output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def test_a_cycle_is_no_constant(tmp_path):
    file = graph(tmp_path, [node("Identity", ["b"], "a"), node("Identity", ["a"], "b"), node("Relu", ["a"], "y")])
    assert not file.is_constant("a")
    with pytest.raises(UserError, match="layer l: a is not a constant of the model"):
        file.constant("a", "l")


@pytest.mark.parametrize("length, found", [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_a_chain(length: int, found: bool, tmp_path):
    nodes = [node("Identity", [f"t{i}"], f"t{i + 1}") for i in range(length)]
    file = graph(tmp_path, nodes, {"t0": np.ones(1, np.float32)})
    assert file.is_constant(f"t{length}") == found


@pytest.mark.parametrize(
    "damaged",
    [
        node("Reshape", ["w", "shape"], "y"),
        node("Reshape", ["w", "zeros"], "y"),
        node("Cast", ["w"], "y", to=999),
        node("Cast", ["w"], "y"),
    ],
)
def test_impossible(damaged, tmp_path):
    tensors = {"w": np.zeros((2, 3), np.float32), "shape": np.array([4, 4]), "zeros": np.array([2, 3, 0])}
    with pytest.raises(UserError, match=f"layer l: {damaged.op_type} y of a constant cannot be done"):
        graph(tmp_path, [damaged], tensors).constant("y", "l")


@pytest.mark.parametrize("damaged", [node("Reshape", ["w"], "y"), node("Identity", [], "y"), node("Constant", [], "y")])
def test_missing_parts(damaged, tmp_path):
    assert not graph(tmp_path, [damaged], {"w": np.zeros(3, np.float32)}).is_constant("y")
