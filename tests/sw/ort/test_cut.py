# SPDX-License-Identifier: Apache-2.0
"""Cutting graphs: the stage of every node and constant, and the tensors that go from one stage to another."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sw.graph.file import OnnxFile
from sw.ort.cut import Stage, cut


def graph(tmp_path, nodes, outputs, inputs=("x",), initializers=("w",)):
    """(file, its nodes named Linear) of a graph whose nodes are given as (type, inputs, outputs)."""
    made = [
        helper.make_node(kind, source.split(), target.split(), name=f"{kind}{index}")
        for index, (kind, source, target) in enumerate(nodes)
    ]
    model = helper.make_model(
        helper.make_graph(
            made,
            "g",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.ones(1, np.float32), name) for name in initializers],
        )
    )
    onnx.save(model, tmp_path / "model.onnx")
    file = OnnxFile(tmp_path / "model.onnx")
    return file, [node for node in file.graph.node if node.op_type == "Linear"]


def shape(stages: list[Stage]):
    """(outputs of nodes, inputs, outputs, constants, accelerated) of every stage, as text."""
    return [
        (
            " ".join(name for node in stage.nodes for name in node.output),
            " ".join(stage.inputs),
            " ".join(stage.outputs),
            " ".join(stage.constants),
            stage.accelerated,
        )
        for stage in stages
    ]


def test_chain(tmp_path):
    """A residual goes through two stages; three layers share an input and follow the same stage."""
    file, linears = graph(
        tmp_path,
        [
            ("Norm", "x w", "n"),
            ("Linear", "n", "q"),
            ("Linear", "n", "k"),
            ("Attention", "q k", "t"),
            ("Linear", "t", "o"),
            ("Add", "o x", "r"),
            ("Add", "r n", "y"),
        ],
        ["y"],
    )
    assert shape(cut(file, linears, ["y"])) == [
        ("n", "x", "n", "w", [0, 1]),
        ("t", "q k", "t", "", [2]),
        ("r y", "o x n", "y", "", []),
    ]


def test_linear_after_linear(tmp_path):
    """A stage may have no nodes, and a layer's output may be an output of the graph."""
    file, linears = graph(tmp_path, [("Linear", "x", "a"), ("Linear", "a", "b")], ["a", "b"])
    assert shape(cut(file, linears, ["a", "b"])) == [
        ("", "", "", "", [0]),
        ("", "", "", "", [1]),
        ("", "", "", "", []),
    ]


def test_constants_are_in_the_stages_that_read_them(tmp_path):
    """A node that depends only on constants is in every stage that reads it, and in no other."""
    file, linears = graph(
        tmp_path,
        [
            ("Transpose", "w", "c"),
            ("Cast", "c", "d"),
            ("Transpose", "w", "unread"),
            ("Mul", "x d", "n"),
            ("Linear", "n", "a"),
            ("Add", "a v", "b"),
            ("Mul", "b d", "y"),
        ],
        ["y"],
        initializers=("w", "v", "u"),
    )
    assert shape(cut(file, linears, ["y"])) == [
        ("c d n", "x", "n", "w", [0]),
        ("c d b y", "a", "y", "w v", []),
    ]


def test_nodes_without_use_are_removed(tmp_path):
    """Nodes that no requested output needs are removed, including layers."""
    nodes = [
        ("Norm", "x", "n"),
        ("Linear", "n", "a"),
        ("Linear", "n", "unwanted"),
        ("Abs", "a", "y"),
        ("Abs", "unwanted", "z"),
    ]
    file, linears = graph(tmp_path, nodes, ["y", "z"])
    assert shape(cut(file, linears, ["y"])) == [("n", "x", "n", "", [0]), ("y", "a", "y", "", [])]


def test_output_that_a_stage_reads_itself(tmp_path):
    """A tensor that only its own stage reads is no output of the stage, unless it is an output of the graph."""
    nodes = [("Abs", "x", "p"), ("Abs", "p", "n"), ("Linear", "n", "a"), ("Abs", "a", "y")]
    file, linears = graph(tmp_path, nodes, ["y", "p"])
    assert cut(file, linears, ["y"])[0].outputs == ["n"]
    assert cut(file, linears, ["y", "p"])[0].outputs == ["p", "n"]


def test_subgraphs_read_tensors_too(tmp_path):
    """A tensor that only the branches of an If read is an input of the stage; tensors made in the branches are not."""
    branch = helper.make_graph(
        [helper.make_node("Abs", ["early"], ["inner"]), helper.make_node("Add", ["inner", "w"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    file, _ = graph(tmp_path, [("Abs", "x", "early"), ("Linear", "early", "a")], ["y"])
    file.graph.node.append(helper.make_node("If", ["a"], ["y"], then_branch=branch, else_branch=branch))
    onnx.save(file.model, tmp_path / "model.onnx")
    file = OnnxFile(tmp_path / "model.onnx")
    assert shape(cut(file, [file.graph.node[1]], ["y"])) == [
        ("early", "x", "early", "", [0]),
        ("y", "a early", "y", "w", []),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs(tmp_path, seed):
    """In every graph, a stage's inputs exist when it runs, and every requested tensor is made once."""
    rng = np.random.default_rng(seed)
    nodes, tensors = [], ["x", "w"]
    for index in range(30):
        kind = "Linear" if rng.random() < 0.3 else "Add"
        dynamic = [name for name in tensors if name != "w"]
        source = [str(rng.choice(dynamic if kind == "Linear" else tensors)) for _ in range(1 + (kind == "Add"))]
        nodes.append((kind, " ".join(source), f"t{index}"))
        tensors.append(f"t{index}")
    wanted = [str(name) for name in rng.choice(tensors[2:], 3, replace=False)]
    file, linears = graph(tmp_path, nodes, wanted)
    there, run = {"x"}, []
    for stage in cut(file, linears, wanted):
        assert set(stage.inputs) <= there
        inside = set(stage.inputs) | set(stage.constants)
        for node in stage.nodes:
            assert set(node.input) <= inside
            inside.update(node.output)
        assert not there.intersection(stage.outputs)
        there.update(stage.outputs)
        for index in stage.accelerated:
            assert linears[index].input[0] in there
            run.append(index)
        there.update(linears[index].output[0] for index in stage.accelerated)
    assert len(run) == len(set(run))
    constant = {"w"}
    for _, source, target in nodes:
        if set(source.split()) <= constant:
            constant.add(target)
    assert set(wanted) - constant <= there
