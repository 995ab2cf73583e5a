# SPDX-License-Identifier: Apache-2.0
"""Every form of quantized linear layer: sw.graph.linears reads it, and onnxruntime's results are the reference."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sw.common.errors import UserError
from sw.graph.linears import find_linears

K, N, TOKENS = 96, 24, 5
CONTRIB = "com.microsoft"


def make_model(nodes, tensors, k=K, outputs=("y",), dtype=TensorProto.FLOAT, opset=21) -> onnx.ModelProto:
    """A graph from x [TOKENS, k] to the named outputs; tensors are arrays by name."""
    initializers = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, [TOKENS, k])],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def run(path: Path, x: np.ndarray, name="y") -> np.ndarray:
    """onnxruntime's results with float32 arithmetic, independent of sw.ort.capture."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"x": x})[0], np.float64)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def noise(k=K, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((TOKENS, k)).astype(dtype)


def nbits_model(
    bits=4,
    block=32,
    k=K,
    zero_points="absent",
    flat=False,
    merged=False,
    bias="none",
    dtype: Any = np.float32,
    **changes,
) -> onnx.ModelProto:
    """One MatMulNBits node. zero_points: absent, packed, float. flat: 1-D scales and zero points. merged: B is 2-D."""
    rng = np.random.default_rng(bits * 1000 + block + k)
    blocks = -(-k // block)
    b = rng.integers(0, 256, (N, blocks, block * bits // 8), np.uint8)
    scales = (rng.standard_normal((N, blocks)) * 0.1).astype(dtype)
    tensors = {"B": b.reshape(N, -1) if merged else b, "s": scales}
    if zero_points == "packed":
        tensors["z"] = rng.integers(0, 256, (N, -(-blocks * bits // 8)), np.uint8)
    elif zero_points == "float":
        tensors["z"] = rng.uniform(-1, 1 << bits, (N, blocks)).astype(dtype)
    if flat:
        tensors |= {name: tensors[name].reshape(-1) for name in ("s", "z") if name in tensors}
    inputs = ["x", "B", "s", "z" if "z" in tensors else "", "", "b" if bias == "inside" else ""]
    if bias != "none":
        tensors["b"] = rng.standard_normal(N).astype(dtype)
    attributes: dict[str, Any] = {"K": k, "N": N, "bits": bits, "block_size": block, "accuracy_level": 0} | changes
    product = "y" if bias != "add" else "product"
    nodes = [helper.make_node("MatMulNBits", inputs, [product], "layer", domain=CONTRIB, **attributes)]
    if bias == "add":
        nodes.append(helper.make_node("Add", ["b", "product"], ["y"], "adder"))
    element = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    return make_model(nodes, tensors, k, dtype=element)


NBITS_CASES = {
    "symmetric": {},
    "packed zero points, odd number of blocks": {"zero_points": "packed"},
    "packed zero points, even number of blocks": {"zero_points": "packed", "k": 128},
    "float zero points": {"zero_points": "float"},
    "flat": {"zero_points": "packed", "flat": True},
    "flat float zero points": {"zero_points": "float", "flat": True},
    "short last group": {"k": 80, "zero_points": "packed"},
    "one group": {"block": 128, "zero_points": "packed"},
    "block 16": {"block": 16, "zero_points": "packed"},
    "8 bits": {"bits": 8},
    "8 bits, zero points": {"bits": 8, "zero_points": "packed"},
    "2 bits": {"bits": 2},
    "2 bits, zero points": {"bits": 2, "zero_points": "packed"},
    "bias inside": {"bias": "inside"},
    "bias added": {"bias": "add"},
}


@pytest.mark.parametrize("case", NBITS_CASES.values(), ids=NBITS_CASES.keys())
def test_matmul_nbits(case, tmp_path):
    path = save(nbits_model(**case), tmp_path)
    (layer,) = find_linears(path)
    x = noise(layer.k)
    ours = layer.float_output(x)
    if layer.bias is not None and not layer.bias_in_node:
        ours = ours + layer.bias
    assert relative_error(ours, run(path, x)) < 1e-5
    assert layer.bits == case.get("bits", 4)
    assert layer.k == case.get("k", K)
    assert layer.has_integer_zero_points == (case.get("zero_points") != "float")
    assert (layer.bias is not None) == (case.get("bias", "none") != "none")
    assert layer.bias_in_node == (case.get("bias") == "inside")
    assert (layer.input_name, layer.output_name) == ("x", "product" if case.get("bias") == "add" else "y")


def test_matmul_nbits_float16(tmp_path):
    path = save(nbits_model(zero_points="packed", dtype=np.float16), tmp_path)
    (layer,) = find_linears(path)
    x = noise(dtype=np.float16)
    assert layer.scales.dtype == np.float32
    assert relative_error(layer.float_output(x), run(path, x)) < 2e-3


def test_matmul_nbits_merged_axes(tmp_path):
    """onnxruntime's own kernel needs B with three axes; other writers merge the last two."""
    (expected,) = find_linears(save(nbits_model(zero_points="packed"), tmp_path))
    (layer,) = find_linears(save(nbits_model(zero_points="packed", merged=True), tmp_path))
    assert np.array_equal(layer.q, expected.q)


def test_matmul_nbits_group_index(tmp_path):
    model = nbits_model()
    model.graph.node[0].input[4] = "g"
    order = np.arange(K, dtype=np.int32) // 32
    model.graph.initializer.append(numpy_helper.from_array(order, "g"))
    (layer,) = find_linears(save(model, tmp_path))
    assert layer.group_size == 32
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(order[::-1].copy(), "g"))
    with pytest.raises(UserError, match="layer layer: g_idx puts weights into groups out of order"):
        list(find_linears(save(model, tmp_path)))


def test_constants_through_nodes(tmp_path):
    """Weights from a Constant node that pass a Reshape, as those that an embedding shares."""
    model = nbits_model()
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    model.graph.node[0].input[1] = "B3"
    front = [
        helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(tensors["s"])),
        helper.make_node("Reshape", ["B", "shape"], ["B3"]),
    ]
    tensors |= {"B": tensors["B"].reshape(N, -1), "shape": np.array([0, -1, 16], np.int64)}
    del tensors["s"]
    path = save(make_model([*front, *model.graph.node], tensors), tmp_path)
    (layer,) = find_linears(path)
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-5


def dequantize_model(
    kind, blocked=True, transposed=False, gemm=False, zero_points=True, block=32, axis=None
) -> onnx.ModelProto:
    """DequantizeLinear -> [Transpose ->] MatMul or Gemm. transposed: weights are [N, K], with a Transpose or transB."""
    rng = np.random.default_rng(len(kind) + blocked + 2 * transposed)
    low, high = {
        "int2": (-2, 2),
        "uint2": (0, 4),
        "int4": (-8, 8),
        "uint4": (0, 16),
        "int8": (-128, 128),
        "uint8": (0, 256),
    }[kind]
    dtype: Any = getattr(ml_dtypes, kind, np.dtype(kind) if kind in ("int8", "uint8") else None)
    groups = -(-K // block) if blocked else 1
    weights, shape = rng.integers(low, high, (K, N)), (groups, N)
    scales, zeros = rng.standard_normal(shape).astype(np.float32), rng.integers(low, high, shape)
    if transposed:
        weights, scales, zeros = weights.T, scales.T, zeros.T
    if not blocked:
        scales, zeros = scales.reshape(-1), zeros.reshape(-1)
    k_axis = int(transposed)
    attributes: dict[str, Any] = {"axis": k_axis, "block_size": block} if blocked else {"axis": 1 - k_axis}
    if axis is not None:
        attributes["axis"] = axis
    tensors = {"W": np.ascontiguousarray(weights).astype(dtype), "s": np.ascontiguousarray(scales)}
    if zero_points:
        tensors["z"] = np.ascontiguousarray(zeros).astype(dtype)
    nodes = [helper.make_node("DequantizeLinear", ["W", "s", *["z"] * zero_points], ["w"], **attributes)]
    if gemm:
        tensors["b"] = rng.standard_normal(N).astype(np.float32)
        nodes.append(helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=k_axis, beta=0.5))
    else:
        if transposed:
            nodes.append(helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", "wt" if transposed else "w"], ["y"], "layer"))
    return make_model(nodes, tensors, opset=25 if "int2" in kind else 21)


@pytest.mark.parametrize("kind", ["int2", "uint2", "int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("transposed", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("zero_points", [False, True], ids=["no zero points", "zero points"])
def test_dequantize_linear(kind, transposed, gemm, zero_points, tmp_path):
    path = save(dequantize_model(kind, transposed=transposed, gemm=gemm, zero_points=zero_points), tmp_path)
    (layer,) = find_linears(path)
    assert (layer.name, layer.k, layer.n, layer.group_size) == ("layer", K, N, 32)
    assert layer.bits == int(kind[-1])
    assert layer.bias_in_node == gemm
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-5


@pytest.mark.parametrize("transposed", [False, True], ids=["KN", "NK"])
def test_dequantize_linear_per_row(transposed, tmp_path):
    path = save(dequantize_model("int8", blocked=False, transposed=transposed), tmp_path)
    (layer,) = find_linears(path)
    assert layer.group_size == K
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-5


@pytest.mark.parametrize("zero_points", [False, True])
def test_dequantize_linear_per_tensor(zero_points, tmp_path):
    model = dequantize_model("uint8", blocked=False, zero_points=zero_points)
    for tensor in model.graph.initializer:
        if tensor.name in ("s", "z"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[0], tensor.name))
    path = save(model, tmp_path)
    (layer,) = find_linears(path)
    assert layer.group_size == K
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-5


def test_dequantize_linear_float16_through_cast(tmp_path):
    """The scales are in half precision, and the product is in single precision."""
    model = dequantize_model("int4")
    for tensor in model.graph.initializer:
        if tensor.name == "s":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), "s"))
    model.graph.node[0].output[0] = "half"
    model.graph.node.insert(1, helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT))
    path = save(model, tmp_path)
    (layer,) = find_linears(path)
    # onnxruntime rounds every weight to half precision before the cast.
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-3


def test_dequantize_linear_short_last_group(tmp_path):
    path = save(dequantize_model("uint4", block=64), tmp_path)
    (layer,) = find_linears(path)
    assert (layer.group_size, layer.groups) == (64, 2)
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-5


def test_dequantize_linear_wrong_axis(tmp_path):
    model = dequantize_model("uint4", axis=1)
    with pytest.raises(UserError, match="layer layer: blocks run along axis 1, the output features"):
        list(find_linears(save(model, tmp_path)))


def test_names_are_unique_and_access_is_lazy(tmp_path):
    one = nbits_model()
    chain = [helper.make_node("MatMulNBits", ["x", "B", "s"], [f"y{i}"], "same", domain=CONTRIB) for i in range(3)]
    for node in chain:
        node.attribute.extend(one.graph.node[0].attribute)
    chain[2].name = ""
    one.graph.node.extend(chain)
    linears = find_linears(save(one, tmp_path))
    assert len(linears) == 4
    assert linears.names == ["layer", "same", "same#2", "y2"]
    assert linears[1:3].names == ["same", "same#2"]
    assert linears[-1].name == "y2"
    assert linears.tensors[1] == ("x", "y0")
    with pytest.raises(IndexError):
        linears[4]


def test_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(nbits_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (layer,) = find_linears(path)
    assert relative_error(layer.float_output(noise()), run(path, noise())) < 1e-5
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"layer layer: external data file weights\.bin is truncated"):
        list(find_linears(path))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"layer layer: external data file weights\.bin is missing"):
        list(find_linears(path))


BAD_NBITS = {
    "wrong block size": ({"block_size": 64}, "layer layer: B is .* but N 24, K 96, bits 4, block_size 64 need 1536"),
    "wrong K": ({"K": 128}, "layer layer: B is "),
    "wrong N": ({"N": 25}, "layer layer: B is "),
    "block size no power of two": ({"block_size": 48}, "block_size is 48: MatMulNBits needs a power of two from 16"),
    "bits": ({"bits": 3}, "bits is 3: MatMulNBits defines its packing for 2, 4 and 8"),
    "prepacked": ({"weight_prepacked": 1}, "weights are prepacked"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_NBITS.values(), ids=BAD_NBITS.keys())
def test_wrong_attributes(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find_linears(save(nbits_model(**changes), tmp_path))


@pytest.mark.parametrize("tensor", ["s", "z", "b"])
def test_wrong_shapes(tensor, tmp_path):
    model = nbits_model(zero_points="packed", bias="inside")
    (bad,) = [item for item in model.graph.initializer if item.name == tensor]
    bad.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bad)[:-1], tensor))
    with pytest.raises(UserError, match=r"layer layer: .*(scales|zero_points|bias)"):
        find_linears(save(model, tmp_path))


def test_weights_that_are_not_constant(tmp_path):
    model = nbits_model()
    model.graph.node[0].input[2] = "x"
    with pytest.raises(UserError, match="layer layer: x is not a constant of the model"):
        find_linears(save(model, tmp_path))


def test_scales_that_are_not_finite(tmp_path):
    model = nbits_model()
    scales = numpy_helper.to_array(model.graph.initializer[1]).copy()
    scales[3, 1] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(scales, "s"))
    with pytest.raises(UserError, match="layer layer: a scale is not finite"):
        list(find_linears(save(model, tmp_path)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(share, tmp_path):
    path = save(nbits_model(zero_points="packed"), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="is not a complete ONNX file"):
        find_linears(path)


def test_no_layers(tmp_path):
    path = save(make_model([helper.make_node("MatMulInteger", ["x", "x"], ["y"])], {}), tmp_path)
    with pytest.raises(UserError, match=r"no quantized linear layers \(it has MatMulInteger"):
        find_linears(path)
    with pytest.raises(UserError, match="no such file"):
        find_linears(tmp_path / "absent.onnx")
