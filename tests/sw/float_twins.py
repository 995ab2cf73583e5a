# SPDX-License-Identifier: Apache-2.0
"""Float graphs to quantise: every exporter's graph of tests/sw/data before its quantisation, and round-to-nearest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sw.feeds import build_feeds
from sw.linear import QuantizedLinear
from sw.onnx_file import OnnxFile
from sw.onnx_import import find_linears
from sw.onnx_session import exact_session

DATA = Path(__file__).parent / "data"
FOREIGN = sorted(path.stem for path in DATA.glob("*.onnx"))
FLOAT = ("optimum_qwen2_unquantised",)
"""Those that are float as they are."""


def float_twin(source: Path, path: Path) -> Path:
    """Writes the graph with a float MatMul in place of every quantised layer: the weights are the dequantised ones."""
    linears = find_linears(source)
    model = onnx.load(source)
    nodes = {node.output[0]: node for node in model.graph.node}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for layer in linears:
        node = nodes[layer.output_name]
        half = node.op_type == "MatMulNBits" and types[node.input[2]] == onnx.TensorProto.FLOAT16
        weight = layer.dequantise().T.astype(np.float16 if half else np.float32)
        assert len(node.input) < 6 or not node.input[5]
        name = f"{node.name}.weight"
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
        # Exporters call the float product what quantisers then add _Q4 to.
        label = node.name.removesuffix("_Q4").removesuffix("_matmul")
        node.CopyFrom(helper.make_node("MatMul", [node.input[0], name], list(node.output), name=label))
    kept = _used(model)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    onnx.save(model, path)
    return path


def _used(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    wanted = {item.name for item in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def float_graph(name: str, folder: Path) -> Path:
    """A float graph of the exporter that wrote tests/sw/data/`name`.onnx."""
    source = DATA / f"{name}.onnx"
    return source if name in FLOAT else float_twin(source, folder / f"{name}.onnx")


def products(path: Path) -> dict[str, np.ndarray]:
    """Every float linear layer's weight [N, K], by the name of its node, in the graph's order."""
    file = OnnxFile(path)

    def weight(name: str) -> np.ndarray | None:
        node = file.producers.get(name)
        if node is not None and node.op_type == "Transpose":
            values = weight(node.input[0])
            return None if values is None else values.T
        return file.constant(name, name) if file.is_constant(name) else None

    found = {}
    for node in file.graph.node:
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            values = weight(node.input[1])
            # Rotary embeddings multiply positions with a constant too.
            if values is not None and values.ndim == 2 and min(values.shape) >= 16:
                transposed = any(item.name == "transB" and item.i for item in node.attribute)
                found[node.name or node.output[0]] = values if transposed else np.ascontiguousarray(values.T)
    return found


def round_to_nearest(weight: np.ndarray, name: str, group_size: int = 32, bits: int = 4) -> QuantizedLinear:
    """Integer zero points, scales in float16."""
    n, k = weight.shape
    top, groups = (1 << bits) - 1, -(-k // group_size)
    values = np.zeros((n, groups * group_size), np.float32)
    values[:, :k] = weight
    values = values.reshape(n, groups, group_size)
    high, low = np.maximum(values.max(2), 0), np.minimum(values.min(2), 0)
    scales = np.maximum((high - low) / top, 1e-4).astype(np.float16).astype(np.float32)
    zero_points = np.clip(np.rint(-low / scales), 0, top)
    q = np.clip(np.rint(values / scales[:, :, None]) + zero_points[:, :, None], 0, top).astype(np.uint8)
    q = np.ascontiguousarray(q.reshape(n, -1)[:, :k])
    return QuantizedLinear(name, q, scales, zero_points.astype(np.uint8), group_size, bits)


def quantise_all(
    path: Path, how: Callable[[np.ndarray, str], QuantizedLinear] = round_to_nearest
) -> dict[str, QuantizedLinear]:
    """All layers of a float graph."""
    return {name: how(weight, name) for name, weight in products(path).items()}


def logits(path: Path, tokens: int = 12) -> np.ndarray:
    """What onnxruntime computes, in float64, for some tokens: the output with the most columns."""
    file = OnnxFile(path)
    session = exact_session(file, file.model, threads=1)
    feeds = build_feeds(file, session, [3 + 7 * i for i in range(tokens)], tokens, 0)
    outputs = [np.asarray(values, np.float64) for values in session.run(None, feeds)]
    return max(outputs, key=lambda values: values.shape[-1])
