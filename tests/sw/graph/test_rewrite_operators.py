# SPDX-License-Identifier: Apache-2.0
"""Every kind of node that is a linear layer, quantized in a graph of its own; and nodes that only look like one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sw.common.errors import UserError
from sw.graph.linears import find_linears
from sw.model.lm_head import quantize_int8
from tests.sw.fixtures.checkpoints import relative_error
from tests.sw.fixtures.float_twins import round_to_nearest
from tests.sw.graph.test_rewrite import refused, rewritten, same_layers


def graph(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    path: Path,
    rank: int = 2,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """A graph from x [.., 32] to y."""
    shape = [None] * (rank - 1) + [32]
    values = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    x, y = (helper.make_tensor_value_info(name, kind, size) for name, size in (("x", shape), ("y", None)))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    if all(node.domain == "" for node in nodes):
        opsets.pop()
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], values), opset_imports=opsets, ir_version=10)
    onnx.save(model, path)
    return path


RNG = np.random.default_rng(8)
WEIGHT = RNG.standard_normal((24, 32)).astype(np.float32)
BIAS = RNG.standard_normal(24).astype(np.float32)


def product(kind: str, weight: str = "w", name: str = "p", x: str = "x", **attributes) -> onnx.NodeProto:
    domain = "com.microsoft" if kind == "FusedMatMul" else ""
    return helper.make_node(kind, [x, weight], ["y"], name=name, domain=domain, **attributes)


Case = tuple[list[onnx.NodeProto], dict[str, np.ndarray], int]
GEMM = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="/a/Gemm", transB=1)
CONSTANT = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT.T.copy()))
OPERATORS: dict[str, Case] = {
    "MatMul": ([product("MatMul")], {"w": WEIGHT.T}, 2),
    "rank 3": ([product("MatMul")], {"w": WEIGHT.T}, 3),
    "rank 4": ([product("MatMul", name="")], {"w": WEIGHT.T}, 4),
    "Gemm": ([GEMM], {"w": WEIGHT, "b": BIAS}, 2),
    "Gemm without bias": ([product("Gemm")], {"w": WEIGHT.T}, 2),
    "Gemm with one bias": ([GEMM], {"w": WEIGHT, "b": BIAS[:1]}, 2),
    "FusedMatMul": ([product("FusedMatMul", transB=1, alpha=1.0)], {"w": WEIGHT}, 3),
    "Transpose": ([helper.make_node("Transpose", ["v"], ["w"]), product("MatMul")], {"v": WEIGHT}, 3),
    "Identity": (
        [helper.make_node("Identity", ["v"], ["u"]), helper.make_node("Transpose", ["u"], ["w"], perm=[1, 0])]
        + [product("MatMul")],
        {"v": WEIGHT},
        3,
    ),
    "Cast": (
        [helper.make_node("Cast", ["v"], ["w"], to=TensorProto.FLOAT), product("MatMul")],
        {"v": WEIGHT.T.astype(np.float16)},
        3,
    ),
    "Constant": ([CONSTANT, product("MatMul")], {}, 3),
}


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(path).run(["y"], {"x": x})[0])


@pytest.mark.parametrize(("nodes", "tensors", "rank"), OPERATORS.values(), ids=OPERATORS)
def test_operators(nodes, tensors, rank, tmp_path):
    """Each kind of node computes the same, with its bias; the float weights and the nodes that made them are gone."""
    source = graph(
        nodes, {name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "g.onnx", rank
    )
    layer = round_to_nearest(WEIGHT, "x")
    name = nodes[-1].name or "y"
    path = rewritten(source, tmp_path / "out", {name: layer})
    x = np.random.default_rng(9).standard_normal([2] * (rank - 1) + [32]).astype(np.float32)
    expected = x @ layer.dequantize().T + tensors.get("b", 0)
    assert relative_error(run(path, x), expected) < 1e-5
    model = onnx.load(path)
    assert len(model.graph.node) == (2 if "b" in tensors else 1)
    assert {tensor.name for tensor in model.graph.initializer} & {"v", "w"} == set()
    assert [item.domain for item in model.opset_import] == ["", "com.microsoft"]
    (found,) = find_linears(path)
    assert np.array_equal(found.q, layer.q)
    if len(tensors.get("b", [])) == 24:
        assert np.array_equal(np.asarray(found.bias), BIAS)


def test_half_precision(tmp_path):
    """With float16 activations the scales are float16 as well, and must be exact in it."""
    source = graph([product("MatMul")], {"w": WEIGHT.T.astype(np.float16)}, tmp_path / "g.onnx", 3, TensorProto.FLOAT16)
    layer = round_to_nearest(WEIGHT, "x")
    path = rewritten(source, tmp_path / "out", {"p": layer})
    same_layers(path, {"p": layer})
    x = np.random.default_rng(9).standard_normal((1, 5, 32)).astype(np.float16)
    assert run(path, x).dtype == np.float16
    assert relative_error(run(path, x).astype(np.float64), x @ layer.dequantize().T.astype(np.float64)) < 5e-3
    scales = layer.scales.copy()
    scales[3, 0] = 0.1
    with pytest.raises(UserError, match=r"p: a scale is 0\.100000001, which float16 does not hold exactly"):
        rewritten(source, tmp_path / "bad", {"p": replace(layer, scales=scales)})


def test_what_others_read_stays(tmp_path):
    """A weight stays if another node, a branch or the graph's output reads it; so does a tensor made of constants."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["v", "v"], ["t"])],
        "t",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["v"], ["e"])],
        "e",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Transpose", ["v"], ["w"]),
        helper.make_node("Identity", ["gamma"], ["scale"]),
        helper.make_node("Mul", ["x", "scale"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["p0"], name="p"),
        helper.make_node("If", ["yes"], ["twice"], then_branch=branch, else_branch=other),
        helper.make_node("ReduceSum", ["twice"], ["sum"]),
        helper.make_node("Mul", ["x", "gamma"], ["unscaled"]),
        helper.make_node("ReduceSum", ["unscaled"], ["rest"]),
        helper.make_node("Add", ["sum", "rest"], ["more"]),
        helper.make_node("Add", ["p0", "more"], ["y"]),
    ]
    gamma = np.full(32, 2, np.float32)
    tensors = {"v": WEIGHT, "yes": np.array(True), "gamma": gamma}
    source = graph(nodes, tensors, tmp_path / "g.onnx")
    layer = round_to_nearest(WEIGHT, "x")
    path = rewritten(source, tmp_path / "out", {"p": layer}, {"scale": gamma / 4})
    x = np.random.default_rng(9).standard_normal((3, 32)).astype(np.float32)
    # The Identity's value has changed; nodes that read gamma itself still get the old one.
    expected = (x / 2) @ layer.dequantize().T + 2 * WEIGHT.sum() + (2 * x).sum()
    assert relative_error(run(path, x), expected) < 1e-5
    assert "Transpose" not in [node.op_type for node in onnx.load(path).graph.node]


NOT_LINEAR: dict[str, tuple[onnx.NodeProto, str]] = {
    "alpha": (product("Gemm", alpha=0.5), "layer p: Gemm with alpha 0.5 is more than a linear layer"),
    "beta": (product("Gemm", beta=2.0), "layer p: Gemm with beta 2.0 is more"),
    "transA": (product("FusedMatMul", transA=1), "layer p: FusedMatMul with transA 1 is more"),
    "batches": (product("FusedMatMul", transBatchB=1), "layer p: FusedMatMul with transBatchB 1 is more"),
    "no constant": (product("MatMul", "x"), "layer p: its weight is not a constant"),
    "vector": (product("MatMul", "v"), r"layer p: its weight is FLOAT \[32\], not a FLOAT or FLOAT16 matrix"),
    "double": (product("MatMul", "d"), r"layer p: its weight is DOUBLE \[32, 24\], not a FLOAT"),
    "other": (product("MatMul", name="q"), "has no MatMul, Gemm or FusedMatMul named p"),
    "no product": (helper.make_node("Add", ["x", "w"], ["y"], name="p"), "has no MatMul, Gemm or FusedMatMul named p"),
    "shape": (product("MatMul", "t"), r"layer p: its weight is \[32, 24\], and the quantized layer \[24, 32\]"),
}


@pytest.mark.parametrize(("node", "message"), NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_not_a_linear_layer(node, message, tmp_path):
    tensors = {"w": np.ascontiguousarray(WEIGHT.T), "v": WEIGHT[0], "d": WEIGHT.T.astype(np.float64), "t": WEIGHT}
    source = graph([node], tensors, tmp_path / "g.onnx")
    refused(source, tmp_path / "out", message, {"p": round_to_nearest(WEIGHT, "x")})


def test_damaged_graphs(tmp_path):
    """A wrong byte in a graph that still parses gives one line."""
    source = graph([product("MatMul")], {"w": np.ascontiguousarray(WEIGHT.T)}, tmp_path / "g.onnx")
    good = source.read_bytes()
    layers = {"p": round_to_nearest(WEIGHT, "x")}

    def damaged(change) -> onnx.ModelProto:
        model = onnx.load_from_string(good)
        change(model.graph)
        return model

    def cycle(graph) -> None:
        del graph.initializer[:]
        graph.node.append(helper.make_node("Identity", ["w"], ["w"]))

    def external(key: str, value: str):
        def change(graph) -> None:
            graph.initializer[0].data_location = TensorProto.EXTERNAL
            for pair in {"location": "g.onnx", "offset": "0", "length": "9", key: value}.items():
                graph.initializer[0].external_data.add(key=pair[0], value=pair[1])

        return change

    cases = [
        (damaged(cycle), layers, "layer p: its weight comes from a cycle of nodes"),
        (
            damaged(lambda graph: setattr(graph.initializer[0], "data_type", 111)),
            layers,
            r"its weight is 111 \[32, 24\]",
        ),
        (damaged(lambda graph: graph.node[0].input.pop()), layers, "layer p: it has no weight"),
        (
            damaged(lambda graph: graph.node[0].output.pop()),
            {},
            "is damaged: a name in its graph is not text, or a node",
        ),
        (damaged(external("offset", "1x")), {}, "tensor w does not say where its external data is"),
        (damaged(external("length", "-")), {}, "tensor w does not say where its external data is"),
        (damaged(external("location", "a\0")), {}, "tensor w: external data file a.* cannot be read"),
    ]
    for model, chosen, message in cases:
        source.write_bytes(model.SerializeToString())
        refused(source, tmp_path / "out", message, chosen)
    source.write_bytes(good.replace(b"\x0a\x01x", b"\x0a\x01\xff"))
    refused(source, tmp_path / "out", "is damaged: a name in its graph is not text", layers)


def test_wrong_updates(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "g"], ["s"]), product("MatMul", x="s")]
    tensors = {"w": np.ascontiguousarray(WEIGHT.T), "g": WEIGHT[0].astype(np.float16)}
    source = graph(nodes, tensors, tmp_path / "g.onnx")
    for updates, message in (
        ({"s": WEIGHT[0]}, "has no constant s"),
        ({"g": WEIGHT}, r"g is \[32\], and its new value \[24, 32\]"),
        ({"g": np.full(32, 1e6, np.float32)}, "the new value of g is not finite in float16"),
    ):
        refused(source, tmp_path / "out", message, {}, updates)


def test_tensors_inside_nodes(tmp_path):
    """External data of a Constant and of a branch's initializer is copied too."""
    w, big = np.ascontiguousarray(WEIGHT.T), np.arange(3000, dtype=np.float32)
    values = np.arange(24, dtype=np.float32)
    branches = []
    for name, initializer in (
        ("t", numpy_helper.from_array(big, "inner")),
        ("e", numpy_helper.from_array(-big, "other")),
    ):
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        node = helper.make_node("ReduceSum", [initializer.name], [name], keepdims=0)
        branches.append(helper.make_graph([node], name, [], [output], [initializer]))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values)),
        helper.make_node("If", ["yes"], ["sum"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("MatMul", ["x", "w"], ["p0"], name="p"),
        helper.make_node("Add", ["p0", "c"], ["p1"]),
        helper.make_node("Add", ["p1", "sum"], ["y"]),
    ]
    source = graph(nodes, {"w": w, "yes": np.array(True)}, tmp_path / "g.onnx")
    model = onnx.load(source)
    constant = model.graph.node[0].attribute[0].t
    inner = next(item for item in model.graph.node[1].attribute if item.name == "then_branch").g.initializer[0]
    for tensor, name in ((constant, "constant.bin"), (inner, "inner.bin")):
        (tmp_path / name).write_bytes(bytes(64) + tensor.raw_data)
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": name, "offset": 64, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, source)
    layer = round_to_nearest(WEIGHT, "x")
    path = rewritten(source, tmp_path / "out", {"p": layer})
    (tmp_path / "constant.bin").unlink()
    (tmp_path / "inner.bin").unlink()
    model = onnx.load(path)
    (constant,) = [node for node in model.graph.node if node.op_type == "Constant"]
    assert np.array_equal(numpy_helper.to_array(constant.attribute[0].t, str(path.parent)), values)
    branch = next(node for node in model.graph.node if node.op_type == "If")
    inner = next(item for item in branch.attribute if item.name == "then_branch").g.initializer[0]
    assert np.array_equal(numpy_helper.to_array(inner, str(path.parent)), big)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_only_rows_of_the_weight_are_shared(dtype, by_rows, tmp_path):
    """A square table whose columns are the tokens is not shared with the embedding."""
    steps = np.random.default_rng(4).integers(-127, 128, (32, 32))
    np.fill_diagonal(steps, 127)
    weight = (steps / 64).astype(dtype)
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["rows"], name="/embed/Gather"),
        helper.make_node("FusedMatMul", ["rows", "w"], ["y"], name="p", domain="com.microsoft", transB=int(by_rows)),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    source = graph(nodes, {"w": weight}, tmp_path / "g.onnx", 3, kind)
    model = onnx.load(source)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"]))
    onnx.save(model, source)
    layer = quantize_int8(weight if by_rows else np.ascontiguousarray(weight.T))
    path = rewritten(source, tmp_path / "out", {"p": layer})
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert ("GatherBlockQuantized" in kinds) == by_rows
    ids = np.array([[3, 31, 0]])
    (found,) = onnxruntime.InferenceSession(path).run(["y"], {"ids": ids})
    assert np.asarray(found).dtype == dtype
    expected = weight.astype(np.float64)[ids] @ layer.dequantize().T
    assert relative_error(np.asarray(found), expected) < (1e-5 if dtype == np.float32 else 2e-3)
