# SPDX-License-Identifier: Apache-2.0
"""Float decoder graphs of every exporter in tests/sw/data: its quantised layers become float ones again."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sw.awq.graph import constant
from sw.onnx_file import OnnxFile
from sw.onnx_import import find_linears

DATA = Path(__file__).parent / "data"
EXPORTERS = (
    "genai_qwen2_asymmetric",
    "genai_qwen2_qdq",
    "genai_qwen2_symmetric",
    "torch_qwen2_opset18",
    "torch_llama_opset20",
    "torch_qwen2_opset21",
    "torch_qwen2_opset23",
    "transformers_qwen2",
    "transformers_llama_fused",
    "optimum_qwen2",
    "optimum_qwen2_float16",
    "optimum_qwen2_unquantised",
)


def write_float_graph(exporter: str, path: Path) -> Path:
    """Writes the float model as a file of its own."""
    source = DATA / f"{exporter}.onnx"
    model = onnx.load(source)
    if exporter.endswith("_unquantised"):
        onnx.save(model, path)
        return path
    linears = find_linears(source)
    layers = {layer.output_name: layer for layer in linears}
    nodes = []
    for node in model.graph.node:
        layer = layers.get(node.output[0])
        if layer is None:
            nodes.append(node)
            continue
        name = f"{node.name}_float"
        # Of a float16 graph some layers are float32.
        kind = np.float16 if float_type(linears.file, node) == np.float16 else np.float32
        model.graph.initializer.append(numpy_helper.from_array(layer.dequantise().T.astype(kind), name))
        inner = layer.bias is not None and layer.bias_in_node
        product = f"{node.output[0]}_product" if inner else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], name=node.name))
        if inner and layer.bias is not None:
            model.graph.initializer.append(numpy_helper.from_array(layer.bias.astype(kind), f"{name}_bias"))
            nodes.append(helper.make_node("Add", [product, f"{name}_bias"], node.output, name=f"{node.name}_bias"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model)
    onnx.save(model, path)
    return path


def float_type(file: OnnxFile, node: onnx.NodeProto) -> np.dtype:
    """Of a layer's scales, or of its weight."""
    place = 2 if node.op_type == "MatMulNBits" else 1
    while (name := node.input[place]) in file.producers and not file.is_constant(name):
        node, place = file.producers[name], int(file.producers[name].op_type == "DequantizeLinear")
    return constant(file, name, "").dtype


def set_constant(model: onnx.ModelProto, node: onnx.NodeProto, place: int, values: np.ndarray) -> None:
    """Gives one node another constant."""
    name = f"{node.output[0]}_new_{place}"
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    node.input[place] = name


def _drop_unused(model: onnx.ModelProto) -> None:
    """Removes nodes whose outputs nobody reads: those that dequantised the weights."""
    while True:
        read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
        unused = [node for node in model.graph.node if not read.intersection(node.output)]
        if not unused:
            return
        for node in unused:
            model.graph.node.remove(node)
