# SPDX-License-Identifier: Apache-2.0
"""Float graphs after a rewrite with quantized layers: the layers are read back exactly, and nothing else changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from sw.awq.int8_head import quantize_head
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.graph.linears import find_linears
from sw.graph.rewrite import write_quantized
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import quantize_int8
from sw.synthetic import write_float
from tests.sw.export.test_gguf import write_gguf
from tests.sw.fixtures.checkpoints import (
    IDS,
    QWEN2,
    awq_config,
    empty_cache,
    read_tensors,
    reference_logits,
    relative_error,
    step,
)
from tests.sw.fixtures.float_twins import FOREIGN, float_graph, logits, products, quantize_all, round_to_nearest

HEAD = "/lm_head/FusedMatMul"


def rewritten(source: Path, out: Path, layers: dict[str, QuantizedLinear], updates=None, **options) -> Path:
    functions = {name: partial(lambda layer: layer, layer) for name, layer in layers.items()}
    return write_quantized(source, out, functions, updates or {}, {"exporter": "test"}, **options)


def same_layers(path: Path, layers: dict[str, QuantizedLinear]) -> list[str]:
    """Checks that the file has exactly these layers, in this order; returns their names."""
    linears = find_linears(path)
    assert len(linears) == len(layers)
    for found, layer in zip(linears, layers.values()):
        assert np.array_equal(found.q, layer.q)
        assert np.array_equal(found.scales, layer.scales)
        assert np.array_equal(found.zero_points, layer.zero_points)
        assert found.zero_points.dtype == layer.zero_points.dtype
        assert (found.group_size, found.bits) == (layer.group_size, layer.bits)
    return linears.names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Our own float graph of a tied Qwen2."""
    folder = tmp_path_factory.mktemp("float")
    write_float(folder / "in", QWEN2, seed=5)
    return float_model(folder / "in", folder / "out")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_own_graph(dtype, tied, tmp_path):
    """Names, layers and logits are those of the decoder with the quantized weights; the float weights are gone."""
    write_float(tmp_path / "in", awq_config(tie_word_embeddings=tied), seed=5, dtype=dtype)
    source = float_model(tmp_path / "in", tmp_path / "float")
    layers = quantize_all(source)
    layers[HEAD] = quantize_int8(products(source)[HEAD])
    done = []
    path = rewritten(source, tmp_path / "out", layers, progress=lambda *counts: done.append(counts))
    names = same_layers(path, layers)
    assert names == [name.replace("FusedMatMul", "MatMulNBits") for name in layers]
    assert done == [(i, len(layers) + 1) for i in range(len(layers) + 2)]
    model = onnx.load(path, load_external_data=False)
    assert {item.key: item.value for item in model.metadata_props} == {"source": "in", "exporter": "test"}
    kinds = [node.op_type for node in model.graph.node]
    assert "FusedMatMul" not in kinds
    assert all(item.i == 0 for node in model.graph.node for item in node.attribute if item.name == "accuracy_level")
    tensors = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    floats = {name for name in tensors if name.endswith("proj.weight") or name == "lm_head.weight"}
    assert floats == set()
    values = read_tensors(tmp_path / "in")
    for name, layer in layers.items():
        module = name.strip("/").replace("/", ".").removesuffix(".FusedMatMul")
        values[f"{module}.weight"] = layer.dequantize()
    if tied:
        assert "GatherBlockQuantized" in kinds
        assert "model.embed_tokens.weight" not in tensors
        assert "model.embed_tokens.qweight" in tensors
        values["model.embed_tokens.weight"] = layers[HEAD].dequantize()
    else:
        expected = TensorProto.FLOAT16 if dtype == "F16" else TensorProto.FLOAT
        assert tensors["model.embed_tokens.weight"] == expected
    config = decoder_config(read_settings(tmp_path / "in" / "config.json"))
    session = onnxruntime.InferenceSession(path)
    found = step(session, IDS, empty_cache(session), len(IDS))[0]
    assert relative_error(found, reference_logits(values, config, IDS)) < 1e-5
    assert relative_error(found, reference_logits(read_tensors(tmp_path / "in"), config, IDS)) > 1e-3


@pytest.mark.parametrize("name", FOREIGN)
def test_every_exporter(name, tmp_path):
    """Every exporter's float graph gets exact layers, and the logits of the same graph with these weights as floats."""
    source = float_graph(name, tmp_path)
    layers = quantize_all(source)
    assert len(layers) in (9, 11, 15)
    path = rewritten(source, tmp_path / "out", layers)
    same_layers(path, layers)
    types = {label: weight.dtype for label, weight in products(source).items()}
    half = np.float16 in types.values()
    model = onnx.load(source)
    nodes = {node.name: node for node in model.graph.node}
    for label, layer in layers.items():
        weight = layer.dequantize().T.astype(types[label])
        tensor = numpy_helper.from_array(np.ascontiguousarray(weight), f"{label}.other")
        model.graph.initializer.append(tensor)
        nodes[label].input[1] = tensor.name
    onnx.save(model, tmp_path / "dequantized.onnx")
    found, expected = logits(path), logits(tmp_path / "dequantized.onnx")
    assert relative_error(found, expected) < (5e-3 if half else 1e-5)
    assert relative_error(found, logits(source)) > (5e-3 if half else 1e-4)


@pytest.mark.parametrize("name", ["optimum_qwen2_unquantized", "torch_llama_opset20"])
def test_transposed_table_is_shared(name, tmp_path):
    """If a head multiplies by the transposed embedding, the result has one int8 table and no float table."""
    source = float_graph(name, tmp_path)
    weights = products(source)
    head = list(weights)[-1]
    assert weights[head].shape == (263, 64)
    model = onnx.load(source)
    if name.startswith("torch"):
        assert any(node.op_type == "Transpose" and "lm_head" in node.input[0] for node in model.graph.node)
    layers = {head: quantize_int8(weights[head])}
    path = rewritten(source, tmp_path / "out", layers)
    same_layers(path, layers)
    written = onnx.load(path, load_external_data=False)
    shapes = [list(tensor.dims) for tensor in written.graph.initializer]
    assert [263, 64] not in shapes
    assert [263, 1, 64] in shapes
    # No node transposes the table any more.
    assert all(item in _read(written) for node in written.graph.node[:3] for item in node.output)
    apart = rewritten(source, tmp_path / "apart", layers, share_tied=False)
    same_layers(apart, layers)
    shapes = {tuple(tensor.dims): tensor.data_type for tensor in onnx.load(apart).graph.initializer}
    # Multiples of 1/32 are exact in float16.
    assert shapes[263, 64] == TensorProto.FLOAT16
    assert relative_error(logits(apart), logits(source)) < 2e-2
    assert 1e-4 < relative_error(logits(path), logits(apart)) < 0.1


def _read(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}


def test_q8_0_of_a_gguf_survives(tmp_path):
    """The file's blocks become floats and then the quantized graph, with embedding and head; no value changes."""
    write_gguf(tmp_path / "m.gguf", table="Q8_0", kind="Q4_0")
    source = float_model(tmp_path / "m.gguf", tmp_path / "float")
    layers = {HEAD: quantize_head(products(source)[HEAD])}
    path = rewritten(source, tmp_path / "out", layers)
    same_layers(path, layers)
    assert layers[HEAD].group_size == 32
    # No weight has changed, so the logits are equal except for the order of additions.
    assert relative_error(logits(path), logits(source)) < 1e-6


@pytest.mark.parametrize(
    "head",
    [
        lambda weight: round_to_nearest(weight, "head", 32),
        lambda weight: replace(round_to_nearest(weight, "head", 64), zero_points=np.full((264, 1), 8, np.uint8)),
        lambda weight: round_to_nearest(weight, "head", 32, 8),
        lambda weight: replace(quantize_int8(weight), zero_points=np.full((264, 1), 127, np.uint8)),
    ],
    ids=["4 bits", "4 bits without zero points", "8 bits with zero points", "8 bits with others in the middle"],
)
def test_tied_head_that_cannot_be_shared(head, tiny, tmp_path):
    """The embedding keeps its exact float values."""
    layer = head(products(tiny)[HEAD])
    path = rewritten(tiny, tmp_path / "out", {HEAD: layer})
    same_layers(path, {HEAD: layer})
    tables = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    before = {tensor.name: tensor for tensor in onnx.load(tiny).graph.initializer}
    table, expected = (numpy_helper.to_array(t["model.embed_tokens.weight"]) for t in (tables, before))
    assert np.array_equal(table, expected)
    assert "lm_head.qweight" in tables


def variants(weight: np.ndarray) -> dict[str, QuantizedLinear]:
    """One layer in every form that MatMulNBits has."""
    plain = round_to_nearest(weight, "x")
    middle = replace(plain, zero_points=np.full_like(plain.zero_points, 8))
    half_steps = plain.zero_points.astype(np.float32) + np.float32(0.3)
    return {
        "integer": plain,
        "middle": middle,
        "float": replace(plain, zero_points=half_steps),
        "8 bits": round_to_nearest(weight, "x", 32, 8),
        "2 bits": round_to_nearest(weight, "x", 32, 2),
        "short group": round_to_nearest(weight, "x", 64),
        "one group": round_to_nearest(weight, "x", 128),
    }


@pytest.mark.parametrize("kind", variants(np.ones((16, 96), np.float32)))
def test_forms(kind, tiny, tmp_path):
    name = "/model/layers.1/mlp/down_proj/FusedMatMul"
    layer = variants(products(tiny)[name])[kind]
    path = rewritten(tiny, tmp_path / "out", {name: layer})
    same_layers(path, {name: layer})
    node = next(node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits")
    assert len(node.input) == (3 if kind == "middle" else 4)
    # The other layers stay float.
    assert len(products(path)) == 14


def test_three_bits(tiny, tmp_path):
    """Weights and zero points of three bits are stored in fields of four."""
    name = "/model/layers.0/mlp/up_proj/FusedMatMul"
    layer = round_to_nearest(products(tiny)[name], "x", 32, 3)
    middle = replace(layer, zero_points=np.full_like(layer.zero_points, 4))
    for case in (layer, middle):
        path = rewritten(tiny, tmp_path / "out", {name: case})
        same_layers(path, {name: replace(case, bits=4)})


def test_layers_come_one_by_one(tiny, tmp_path):
    """Each layer is requested once, in the graph's order, and only after the previous one is written."""
    weights = products(tiny)
    order: list[str] = []
    sizes: list[int] = []

    def make(name: str) -> QuantizedLinear:
        order.append(name)
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob(".out.*/model.onnx.data")))
        return round_to_nearest(weights[name], name)

    functions = {name: partial(make, name) for name in reversed(weights)}
    write_quantized(tiny, tmp_path / "out", functions, {}, {})
    assert order == list(weights)
    assert sizes[-1] > 0
    assert sizes == sorted(sizes)


def test_updates(tiny, tmp_path):
    rng = np.random.default_rng(3)
    gamma = rng.uniform(0.5, 2, 64)
    bias = rng.standard_normal(64).astype(np.float32)
    names = ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias")
    layers = quantize_all(tiny)
    path = rewritten(tiny, tmp_path / "out", layers, dict(zip(names, (gamma, bias))))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert np.array_equal(found[names[0]], gamma.astype(np.float32))
    assert np.array_equal(found[names[1]], bias)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tiny).graph.initializer}
    others = set(found) & set(before) - set(names)
    assert len(others) > 8
    assert all(np.array_equal(found[name], before[name]) for name in others)
    (layer,) = [layer for layer in find_linears(path) if layer.name.endswith("0/self_attn/q_proj/MatMulNBits")]
    assert np.array_equal(np.asarray(layer.bias), bias)


def refused(source: Path, out: Path, message: str, layers: dict[str, QuantizedLinear], updates=None) -> None:
    """The error is one line, and no file is left."""
    before = sorted(item.name for item in out.parent.iterdir())
    with pytest.raises(UserError, match=message) as error:
        rewritten(source, out, layers, updates)
    assert "\n" not in str(error.value)
    assert sorted(item.name for item in out.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.write_bytes(data.read_bytes()[:9000]),
            r"model\.onnx\.data is truncated: \d+ bytes are missing",
        ),
        (lambda data: data.unlink(), r"model\.onnx\.data cannot be read"),
    ],
    ids=["truncated", "missing"],
)
def test_damaged_data(change: Callable[[Path], None], message, tiny, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "in" / name).write_bytes(tiny.with_name(name).read_bytes())
    change(tmp_path / "in" / "model.onnx.data")
    refused(tmp_path / "in" / "model.onnx", tmp_path / "out", message, {})


def test_data_elsewhere(tiny, tmp_path):
    """A path out of the model's folder is not followed."""
    model = onnx.load(tiny, load_external_data=False)
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    for location in ("../secret", str(tmp_path / "secret")):
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                if item.key == "location":
                    item.value = location
        onnx.save(model, tmp_path / "in" / "model.onnx")
        refused(tmp_path / "in" / "model.onnx", tmp_path / "out", "is not beside the model", {})


def test_an_interrupted_layer_leaves_nothing(tiny, tmp_path):
    def interrupt() -> QuantizedLinear:
        raise KeyboardInterrupt

    functions = dict.fromkeys(products(tiny), interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_quantized(tiny, tmp_path / "new" / "out", functions, {}, {})
    assert not list(tmp_path.iterdir())


def test_generates_from_the_result(tiny, tmp_path):
    """A rewritten model answers a prompt on the exact reference device."""
    from sw.generate import main

    path = rewritten(tiny, tmp_path / "out", {**quantize_all(tiny), HEAD: quantize_int8(products(tiny)[HEAD])})
    for name in ("config.json", "tokenizer.json"):
        path.with_name(name).write_bytes(tiny.with_name(name).read_bytes())
    assert json.loads(path.with_name("config.json").read_text())["num_hidden_layers"] == 2
    options = ["--device", "reference", "--prompt", "Hello", "--max-new-tokens", "3", "--tile", "8", "--json"]
    assert main(["--model", str(path.parent), *options]) == 0
