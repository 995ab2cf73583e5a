# SPDX-License-Identifier: Apache-2.0
"""Rewrites a graph with QMoE nodes into one with experts in the form of sw.graph.experts.write.

The rest of the graph stays as it is. The weights are the same integers, so that results differ only by the order of
float operations.
"""

from functools import partial
from pathlib import Path

import numpy as np
import onnx

from sw.common.atomic import atomic_directory
from sw.common.errors import UserError
from sw.common.status_line import Progress
from sw.graph.decoder import layer_tensors, matmul_node, silu
from sw.graph.experts.qmoe import QMoE, matches
from sw.graph.experts.write import write_choice, write_sum
from sw.graph.file import OnnxFile, expect_names
from sw.graph.nodes import STANDARD, name_of
from sw.graph.rewrite import Rewriter
from sw.graph.tensor_data import TensorData
from sw.graph.writer import GraphBuilder, tensor_name
from sw.model.lm_head import Linear

LEAST_OPSET = 15
"""The first with start and end of Shape."""


def has_qmoe(path: Path) -> bool:
    """Whether an ONNX file has a QMoE node. Other files are only searched for the name, which takes little time."""
    with path.open("rb") as file:
        before = b""
        while piece := file.read(1 << 24):
            if b"QMoE" in before + piece:
                return any(matches(node) for node in OnnxFile(path).graph.node)
            before = piece[-3:]
    return False


def write_without_qmoe(source: Path, out: Path, texts: list[Path], progress: Progress | None = None) -> Path:
    """Writes model.onnx and its data into directory `out`, complete or not at all; returns the former's path.

    texts: files that are copied. progress: called with the nodes that are done and all nodes.
    Raises UserError for nodes that are not read, and as OnnxFile does.
    """
    file = OnnxFile(source)
    expect_names(file)
    opset = max((item.version for item in file.model.opset_import if item.domain in STANDARD), default=0)
    nodes = [QMoE(file, node) for node in file.graph.node if matches(node)]
    if opset < LEAST_OPSET:
        raise UserError(f"{file.path}: QMoE is read from opset {LEAST_OPSET} on, and the graph has {opset}")
    with atomic_directory(out) as work:
        for text in texts:
            (work / text.name).write_bytes(text.read_bytes())
        with TensorData(work / "model.onnx.data", file.data_folder) as data:
            rewriter = Rewriter(file, data, share_tied=False)
            for done, node in enumerate(nodes):
                if progress:
                    progress(done, len(nodes))
                _write(rewriter, node)
                rewriter.close(node.node)
            rewriter.finish({})
        rewriter.save(work / "model.onnx", {"converted_from": source.name})
    return Path(out) / "model.onnx"


def _write(w: GraphBuilder, mixture: QMoE) -> None:
    node, routing, path = mixture.node, mixture.routing, name_of(mixture.node)
    x, logits = node.input[:2]
    # x may have an axis more than the logits.
    count = w.tensor(f"{tensor_name(path)}.count", np.array([routing.count], np.int64))
    rows = w.node(f"{path}/Shape_1", "Shape", [x], start=0, end=-1)
    shape = w.node(f"{path}/Concat", "Concat", [rows, count], axis=0)
    logits = w.node(f"{path}/Reshape", "Reshape", [logits, shape])
    weights = write_choice(w, path, logits, routing, _dtype(mixture, x))

    def linear(name: str, tensor: str, layer: Linear, shape: tuple[int, int]) -> str:
        tensors = layer_tensors(w, name, tensor_name(name), layer, _dtype(mixture, x))  # pyright: ignore[reportArgumentType]
        return matmul_node(w, f"{name}/MatMulNBits", tensor, layer, tensors)  # pyright: ignore[reportArgumentType]

    layers = mixture.experts(), routing.shapes(mixture.hidden), routing.count
    write_sum(w, linear, partial(silu, w), path, x, weights, *layers, node.output[:1])


def _dtype(mixture: QMoE, x: str) -> type[np.floating]:
    """Element type of the activations."""
    graph = mixture.file.graph
    kinds = {item.name: item.type.tensor_type.elem_type for item in (*graph.value_info, *graph.input)}
    if x in kinds:
        return np.float16 if kinds[x] == onnx.TensorProto.FLOAT16 else np.float32
    return mixture.dtype
