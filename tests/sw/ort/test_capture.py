# SPDX-License-Identifier: Apache-2.0
"""Activations and outputs of real graphs: every layer's output must equal its input times the imported weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sw.common.errors import UserError
from sw.graph.linears import find_linears
from sw.ort.capture import Captured, capture_inputs

DATA = Path(__file__).parents[1] / "fixtures" / "data"
GENAI = ["genai_qwen2_symmetric", "genai_qwen2_asymmetric", "genai_qwen2_qdq", "genai_qwen2_tied"]
IDS = [17, 3, 200, 45, 45, 9, 0]


def relative_error(work: Captured) -> float:
    expected = work.layer.float_output(work.x)
    return float(np.abs(work.y - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", GENAI)
def test_genai_builder(name):
    """Qwen2 from onnxruntime-genai's builder: fused qkv with a separate bias, packed zero points, DequantizeLinear,
    a head whose weights the embedding shares (GatherBlockQuantized)."""
    linears = find_linears(DATA / f"{name}.onnx")
    captured = list(capture_inputs(linears, IDS))
    # Two layers of qkv, o, gate, up and down, and the head.
    assert [work.layer.name for work in captured] == linears.names
    assert len(captured) == 11
    assert max(relative_error(work) for work in captured) < 1e-5
    assert all(work.x.shape == (len(IDS), work.layer.k) for work in captured)
    assert all(work.x.dtype == work.y.dtype == np.float32 for work in captured)
    assert sum(work.layer.bias is not None for work in captured) == 2
    zero_points = np.concatenate([work.layer.zero_points.ravel() for work in captured])
    assert (len(np.unique(zero_points)) > 1) == ("asymmetric" in name)


def test_accuracy_level_of_the_builder():
    """The reason for accuracy_level 0: with the builder's value, onnxruntime rounds activations to 8 bits."""
    path = DATA / "genai_qwen2_symmetric.onnx"
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    levels = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert levels == {4}


def noise_model(bias="inside", dtype=TensorProto.FLOAT, scale=0.1) -> onnx.ModelProto:
    """x [batch, tokens, 64] -> MatMulNBits 64 x 32 -> Relu -> MatMulNBits 32 x 32."""
    rng = np.random.default_rng(3)
    element = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    tensors, nodes = {}, []
    for i, (k, source, target) in enumerate([(64, "x", "h"), (32, "r", "y")]):
        tensors[f"B{i}"] = rng.integers(0, 256, (32, k // 32, 16), np.uint8)
        tensors[f"s{i}"] = (rng.standard_normal((32, k // 32)) * scale).astype(element)
        tensors[f"b{i}"] = rng.standard_normal(32).astype(element)
        inputs = [source, f"B{i}", f"s{i}", "", "", f"b{i}" if bias == "inside" else ""]
        attributes: dict[str, Any] = {"K": k, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": 4}
        nodes.append(
            helper.make_node("MatMulNBits", inputs, [target], f"layer{i}", domain="com.microsoft", **attributes)
        )
        if not i:
            nodes.append(helper.make_node("Relu", ["h"], ["r"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["batch", "tokens", 64])],
        [helper.make_tensor_value_info("y", dtype, ["batch", "tokens", 32])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_noise_for_float_inputs(tmp_path):
    """A layer at the graph's input and one at its output, biases inside the nodes."""
    onnx.save(noise_model(), tmp_path / "model.onnx")
    linears = find_linears(tmp_path / "model.onnx")
    first, second = capture_inputs(linears, tokens=6, seed=11)
    assert first.x.shape == (6, 64)
    assert first.layer.bias_in_node
    assert max(relative_error(first), relative_error(second)) < 1e-5
    assert np.array_equal(np.maximum(first.y, 0), second.x)
    again, _ = capture_inputs(linears, tokens=6, seed=11)
    other, _ = capture_inputs(linears, tokens=6, seed=12)
    assert np.array_equal(again.x, first.x)
    assert not np.array_equal(other.x, first.x)


def test_batches_agree(tmp_path):
    """With a small memory limit there are more runs, and the numbers are the same."""
    linears = find_linears(DATA / "genai_qwen2_asymmetric.onnx")
    together = list(capture_inputs(linears, IDS))
    apart = list(capture_inputs(linears, IDS, limit_mib=0))
    assert [work.layer.name for work in apart] == linears.names
    assert all(np.array_equal(a.x, b.x) and np.array_equal(a.y, b.y) for a, b in zip(together, apart, strict=True))
    (one,) = capture_inputs(linears[4:5], IDS)
    assert np.array_equal(one.y, together[4].y)


def test_float16(tmp_path):
    onnx.save(noise_model(dtype=TensorProto.FLOAT16), tmp_path / "model.onnx")
    captured = list(capture_inputs(find_linears(tmp_path / "model.onnx")))
    assert all(work.x.dtype == work.y.dtype == np.float32 for work in captured)
    assert max(relative_error(work) for work in captured) < 2e-3


def test_external_data(tmp_path):
    """External weights are found although the changed graph has no file of its own; no file is written."""
    path = tmp_path / "model.onnx"
    onnx.save(noise_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert max(relative_error(work) for work in capture_inputs(find_linears(path))) < 1e-5
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]


def test_activations_that_are_not_finite(tmp_path):
    """The first layer's output overflows, so the second layer's input is infinite."""
    onnx.save(noise_model(bias="none", scale=5e37), tmp_path / "model.onnx")
    linears = find_linears(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"layer layer0: its outputs are not finite \(NaN or infinity\)"):
        list(capture_inputs(linears))
    with pytest.raises(UserError, match="layer layer1: its activations are not finite"):
        list(capture_inputs(linears[1:]))


def test_token_ids_are_needed(capfd):
    linears = find_linears(DATA / "genai_qwen2_symmetric.onnx")
    with pytest.raises(UserError, match=r"reads token ids \(input_ids\), and none were given"):
        list(capture_inputs(linears))
    with pytest.raises(UserError, match="onnxruntime failed to run it"):
        list(capture_inputs(linears, [100_000]))
    assert capfd.readouterr().err == ""


def test_model_that_onnxruntime_refuses(tmp_path):
    model = noise_model()
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="onnxruntime refuses the model") as refused:
        list(capture_inputs(find_linears(tmp_path / "model.onnx")))
    assert "\n" not in str(refused.value)
