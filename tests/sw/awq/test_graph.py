# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a graph are float linear layers, what may be folded, and a complete decoder made of Gemm nodes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sw.awq.calibration import walk
from sw.awq.graph import group_sites
from sw.awq.quantizer import Texts, quantize
from sw.awq.rounding import Form
from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.float_linears import find_sites
from sw.graph.rewrite import write_quantized

HIDDEN, INNER, VOCAB = 32, 48, 64
IDS = np.random.default_rng(2).integers(0, VOCAB, 40).tolist()


def arrays() -> dict[str, np.ndarray]:
    """Weights whose inner channels differ in magnitude, so that the scales differ."""
    rng = np.random.default_rng(1)
    shapes = {"table": (VOCAB, HIDDEN), "gate": (HIDDEN, INNER), "up": (INNER, HIDDEN), "down": (INNER, HIDDEN)}
    values = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
    values |= {"head": rng.standard_normal((HIDDEN, VOCAB)) / 4, "gamma": np.exp(rng.standard_normal(HIDDEN))}
    values |= {"gate_bias": rng.standard_normal(INNER), "up_bias": rng.standard_normal(INNER)}
    values["up"] *= np.exp(rng.standard_normal((INNER, 1)))
    found = {name: value.astype(np.float32) for name, value in values.items()}
    return found | {"axis": np.array([0], np.int64)}


def write(path: Path, cache: bool = True, **more: list[onnx.NodeProto]) -> Path:
    """A decoder without attention. more: nodes to add, by the name of an additional output that they make."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["rows"]),
        node("Squeeze", ["rows", "axis"], ["flat"]),
        node("Mul", ["flat", "gamma"], ["x"]),
        node("Gemm", ["x", "gate", "gate_bias"], ["g"], name="gate"),
        node("Gemm", ["x", "up", "up_bias"], ["u"], name="up", transB=1),
        node("Sigmoid", ["g"], ["s"]),
        node("Mul", ["s", "u"], ["p"]),
        node("Gemm", ["p", "down"], ["d"], name="down"),
        node("Add", ["d", "flat"], ["y"]),
        node("MatMul", ["y", "head"], ["z"], name="head"),
        node("Unsqueeze", ["z", "axis"], ["three"]),
        node("Identity", ["three"], ["logits"]),
        *[part for parts in more.values() for part in parts],
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", VOCAB])]
    if cache:
        nodes.append(node("Identity", ["past"], ["present"]))
        for name, items in (("past", inputs), ("present", outputs)):
            items.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, "p", 4]))
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in more]
    tensors = [numpy_helper.from_array(value, name) for name, value in arrays().items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def groups(path: Path) -> dict[str, tuple[str, bool]]:
    """First layer of each group -> (gamma, only_readers)."""
    file = OnnxFile(path)
    return {group.sites[0].name: (group.gamma, group.only_readers) for group in group_sites(file, find_sites(file))}


def logits(path: Path) -> np.ndarray:
    feeds = {"input_ids": np.array([IDS]), "past": np.zeros((1, 1, 0, 4), np.float32)}
    return np.asarray(onnxruntime.InferenceSession(path).run(["logits"], feeds)[0])


def test_sites(tmp_path):
    file = OnnxFile(write(tmp_path / "m.onnx"))
    sites = {site.name: site for site in find_sites(file)}
    found = {name: (site.n, site.k, site.transposed, site.bias) for name, site in sites.items()}
    assert found == {
        "gate": (INNER, HIDDEN, False, "gate_bias"),
        "up": (INNER, HIDDEN, True, "up_bias"),
        "down": (HIDDEN, INNER, False, ""),
        "head": (VOCAB, HIDDEN, False, ""),
    }
    assert np.array_equal(sites["gate"].weight(file), arrays()["gate"].T)
    assert np.array_equal(sites["up"].weight(file), arrays()["up"])
    assert groups(file.path) == {"gate": ("gamma", True), "down": ("", True), "head": ("", True)}


OTHERS = {
    "another reader": {"o": [helper.make_node("Relu", ["x"], ["o"])]},
    "an output": {"x": []},
    "a shared weight": {"o": [helper.make_node("Mul", ["y", "gamma"], ["o"])]},
}


@pytest.mark.parametrize("more", OTHERS.values(), ids=OTHERS)
def test_tensors_with_other_readers_are_not_folded(more, tmp_path):
    assert groups(write(tmp_path / "m.onnx", **more))["gate"][0] == ""


def test_a_subgraph_reads(tmp_path):
    """A branch of an If counts as a reader."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    )
    flag = helper.make_node("Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True)))
    chosen = helper.make_node("If", ["flag"], ["o"], then_branch=inner, else_branch=inner)
    assert groups(write(tmp_path / "m.onnx", o=[flag, chosen]))["gate"] == ("", False)


SHAPES = {
    "more than a product": dict(alpha=0.5),
    "transposed activations": dict(transA=1),
}


@pytest.mark.parametrize("attributes", SHAPES.values(), ids=SHAPES)
def test_other_products(attributes, tmp_path):
    node = helper.make_node("Gemm", ["d", "gate"], ["o"], name="odd", **attributes)
    assert "odd" not in groups(write(tmp_path / "m.onnx", o=[node]))


def test_whole(tmp_path):
    """Layers that add their bias themselves, quantized to 8 bits and written: the logits change very little.

    down's scale is in up's rows and in up's bias.
    """
    path = write(tmp_path / "m.onnx")
    result = quantize(OnnxFile(path), Form(8, 32), Texts([IDS[:20], IDS[20:]]), tmp_path, int8_head=True)
    assert [report.fold for report in result.reports] == ["gamma", "gamma", "up"]
    assert set(result.updates) == {"gamma", "up_bias"}
    assert result.reports[2].ratio > 0
    written = write_quantized(path, tmp_path / "out", result.layers, result.updates, {})
    before, after = logits(path), logits(written)
    assert 0 < np.abs(after - before).max() < 1e-2 * np.abs(before).max()
    no_update = write_quantized(path, tmp_path / "other", result.layers, {}, {})
    assert np.abs(logits(no_update) - before).max() > 0.1 * np.abs(before).max()


def test_walk_computes_the_graph(tmp_path):
    """With float weights, the layers' inputs equal onnxruntime's results for the whole graph."""
    path = write(tmp_path / "m.onnx")
    file, found = OnnxFile(path), []
    for step in walk(file, find_sites(file), [IDS[:20], IDS], head=True):
        for group in step.groups:
            found.append(step.inputs(group)[1])
            for site in group.sites:
                bias = arrays()[site.bias] if site.bias else None
                step.compute(site, [site.weight(file)] * 2, bias)
    assert [x.shape for x in found] == [(40, HIDDEN), (40, INNER), (40, HIDDEN)]
    assert np.allclose(found[-1] @ arrays()["head"], logits(path)[0], rtol=1e-4, atol=1e-4)


def test_refused(tmp_path):
    path = write(tmp_path / "m.onnx", cache=False)
    with pytest.raises(UserError, match="has no KV cache: export it with past_key_values as inputs"):
        quantize(OnnxFile(path), Form(), Texts([IDS]), tmp_path)
    tensors = onnx.load(write(tmp_path / "m.onnx"))
    (gate,) = (item for item in tensors.graph.initializer if item.name == "gate")
    gate.CopyFrom(numpy_helper.from_array(arrays()["gate"] * np.float32(np.inf), "gate"))
    onnx.save(tensors, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="layer gate: a weight is not finite"):
        quantize(OnnxFile(tmp_path / "m.onnx"), Form(), Texts([IDS]), tmp_path)
