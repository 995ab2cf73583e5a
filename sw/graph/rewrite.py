# SPDX-License-Identifier: Apache-2.0
"""Rewrites a float ONNX graph with quantized linear layers, and leaves the rest of the graph as it is.

A MatMul, Gemm or FusedMatMul becomes a MatMulNBits node (com.microsoft, accuracy_level 0) in its place, with its
activations, output and bias. The node /model/layers.0/mlp/up_proj/MatMul is renamed to .../up_proj/MatMulNBits, as in
our own exporters; names of other forms stay. Nodes that only the float weights needed are left out.

If an int8 head and the embedding share a table (tied), the new ones share one as well: the embedding's Gather becomes
the GatherBlockQuantized of sw.graph.decoder. Any other table that only Gather nodes read is stored as float16 if that
is exact. Tensors are copied piece by piece, so the memory needed is that of the largest layer or of such a table.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper

from sw.common.atomic import atomic_directory
from sw.common.errors import UserError
from sw.graph.decoder import can_gather, gather_rows, layer_tensors, matmul_node
from sw.graph.external_data import external_inside
from sw.graph.file import OnnxFile, expect_names, names_read
from sw.graph.nodes import CONTRIB, attributes, name_of
from sw.graph.tensor_data import INLINE_BYTES, TensorData
from sw.graph.writer import GraphBuilder, tensor_name
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import narrowest_exact

PLAIN: dict[str, dict[str, float]] = {
    "MatMul": {},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
    "FusedMatMul": {"alpha": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0},
}
"""Operator -> attributes and their defaults; with other values the node is more than a linear layer."""
FLOATS: dict[int, type[np.floating]] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
TIED_BITS = 8
BIAS = 2
"""Gemm's input."""

Progress = Callable[[int, int], None]


def write_quantized(
    source: Path,
    out: Path,
    layers: Mapping[str, Callable[[], QuantizedLinear]],
    updates: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    *,
    share_tied: bool = True,
) -> Path:
    """Writes model.onnx and model.onnx.data into directory `out`, complete or not at all; returns the former's path.

    source: the float ONNX file. layers: name of a node (or of its first output, if it has none) -> a function that
    returns its quantized layer; called once, in the graph's order. The layer's q, scales and zero points are written;
    the bias is the one that the graph adds to the product. Layers of 3 bits are stored in fields of 4.
    updates: name of an initializer, or of a tensor that a node makes of constants -> its new value, of the same shape.
    metadata: new properties of the ONNX model; those it has are kept. progress: called with steps done, and steps in
    all: one for each layer and one for the rest. share_tied: whether a tied int8 head and the embedding share a table.
    Raises UserError for names that the graph does not have, shapes that differ, nodes that are more than a linear
    layer, scales that a float16 graph cannot hold, damaged files and a directory that cannot be written.
    """
    file = OnnxFile(source)
    expect_names(file)
    progress = progress or (lambda done, total: None)
    with atomic_directory(out) as work:
        with TensorData(work / "model.onnx.data", file.data_folder) as data:
            rewriter = Rewriter(file, data, share_tied)
            nodes = {name_of(node): node for node in rewriter.nodes if node.op_type in PLAIN}
            if missing := [name for name in layers if name not in nodes]:
                raise UserError(f"{file.path} has no MatMul, Gemm or FusedMatMul named {missing[0]}")
            wanted = [(node, layers[name]) for name, node in nodes.items() if name in layers]
            for done, (node, make) in enumerate(wanted):
                progress(done, len(wanted) + 1)
                rewriter.replace(node, make())
            progress(len(wanted), len(wanted) + 1)
            rewriter.finish(updates)
        rewriter.save(work / "model.onnx", metadata)
    progress(len(wanted) + 1, len(wanted) + 1)
    return Path(out) / "model.onnx"


class _Weight(NamedTuple):
    """A layer's float weight. base: the constant from which it is made. by_rows: whether that is [N, K]. dtype: element
    type of the node's input.
    """

    base: str
    by_rows: bool
    n: int
    k: int
    dtype: type[np.floating]


class Rewriter(GraphBuilder):
    """The graph during its conversion. The added nodes replace nodes of the source."""

    def __init__(self, file: OnnxFile, data: TensorData, share_tied: bool):
        super().__init__(data)
        self.file = file
        self.nodes = list(file.graph.node)
        self._share_tied = share_tied
        self._sources = {tensor.name: tensor for tensor in file.graph.initializer}
        self._names = {name for node in self.nodes for name in (*node.input, *node.output)} | set(self._sources)
        # The key is the first output of the replaced node, which is unique.
        self._instead: dict[str, list[onnx.NodeProto]] = {}

    def replace(self, node: onnx.NodeProto, layer: QuantizedLinear) -> None:
        """Puts a MatMulNBits node in place of a float one."""
        weight = self._weight(node)
        if (layer.n, layer.k) != (weight.n, weight.k):
            self._refuse(node, f"its weight is {[weight.n, weight.k]}, and the quantized layer {[layer.n, layer.k]}")
        path, _, last = name_of(node).rpartition("/")
        name = f"{path}/MatMulNBits" if path and last in PLAIN else name_of(node)
        prefix = tensor_name(path) if path and last in PLAIN else name
        gathers = self._tied_gathers(weight, layer)
        if gathers:
            prefix = weight.base.removesuffix(".weight")
        tensors = layer_tensors(self, name, prefix, layer, weight.dtype)
        if node.op_type == "Gemm" and len(node.input) > BIAS and node.input[BIAS]:
            product = matmul_node(self, name, node.input[0], layer, tensors)
            self.node(f"{name.removesuffix('/MatMulNBits')}/Add", "Add", [product, node.input[BIAS]], node.output)
        else:
            matmul_node(self, name, node.input[0], layer, tensors, node.output)
        self.close(node)
        for gather in gathers:
            path = name_of(gather).removesuffix("/Gather")
            gather_rows(self, path, prefix, layer, tensors, gather.input[1], gather.output[0])
            self.close(gather)

    def finish(self, updates: Mapping[str, np.ndarray]) -> None:
        """Writes the other tensors of the new graph."""
        constants = [node for node in self.nodes if set(node.output) & set(updates)]
        for name in (name for node in constants for name in node.output):
            self._instead[name] = []
        nodes, unused = self._without_unused()
        tensors = [self._updated(name, values) for name, values in updates.items() if name not in unused]
        kept = [tensor for name, tensor in self._sources.items() if name not in unused and name not in updates]
        tensors += [self._narrow(tensor, nodes) or self._data.copy(tensor) for tensor in kept]
        for tensor in external_inside(nodes):
            tensor.CopyFrom(self._data.copy(tensor))
        graph = self.file.graph
        for field, values in (("node", nodes), ("initializer", tensors + self._tensors)):
            graph.ClearField(field)
            getattr(graph, field).extend(values)
        for items in (graph.input, graph.value_info):
            kept = [item for item in items if item.name not in unused]
            del items[:]
            items.extend(kept)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the graph, with com.microsoft among its operator sets."""
        model = self.file.model
        if all(item.domain != CONTRIB for item in model.opset_import):
            model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        helper.set_model_props(model, {item.key: item.value for item in model.metadata_props} | dict(metadata))
        onnx.save(model, path)

    def _weight(self, node: onnx.NodeProto) -> _Weight:
        values = attributes(node)
        if len(node.input) <= 1:
            self._refuse(node, "it has no weight")
        for name, value in PLAIN[node.op_type].items():
            if values.get(name, value) != value:
                self._refuse(node, f"{node.op_type} with {name} {values[name]} is more than a linear layer")
        transposed, dtype, name = bool(values.get("transB", 0)), 0, node.input[1]
        # The number of steps is limited, because a damaged graph may have cycles.
        for _ in range(len(self.nodes) + 1):
            source = self.file.producers.get(name)
            if name in self._sources or source is None or source.op_type not in ("Transpose", "Cast", "Identity"):
                break
            values = attributes(source)
            transposed ^= source.op_type == "Transpose" and list(values.get("perm", [1, 0])) == [1, 0]
            dtype = dtype or values.get("to", 0)
            name = source.input[0]
        else:
            self._refuse(node, "its weight comes from a cycle of nodes")
        if not (name in self._sources or self.file.is_constant(name)):
            self._refuse(node, "its weight is not a constant")
        shape = self.file.shape(name, name_of(node))
        if name in self._sources:
            dtype = dtype or self._sources[name].data_type
        else:
            dtype = dtype or helper.np_dtype_to_tensor_dtype(self.file.constant(name, name_of(node)).dtype)
        if len(shape) != 2 or dtype not in FLOATS:
            kind = TensorProto.DataType.Name(dtype) if dtype in TensorProto.DataType.values() else dtype
            self._refuse(node, f"its weight is {kind} {list(shape)}, not a FLOAT or FLOAT16 matrix")
        n, k = shape if transposed else shape[::-1]
        return _Weight(name, transposed, n, k, FLOATS[dtype])

    def _tied_gathers(self, weight: _Weight, layer: QuantizedLinear) -> list[onnx.NodeProto]:
        """The embedding's Gather nodes that share a table with an int8 head, if they can share the quantized one."""
        source = self._sources.get(weight.base)
        if source is None or not self._share_tied or layer.bits != TIED_BITS or not can_gather(layer):
            return []
        gathers = self._gathers(weight.base, self.file.consumers[weight.base])
        fits = FLOATS.get(source.data_type) is weight.dtype and weight.by_rows
        ids = {item.name for item in self.file.inputs if len(item.type.tensor_type.shape.dim) == 2}
        usable = all(node.input[1] in ids and node.output[0] not in self._instead for node in gathers)
        return gathers if fits and usable else []

    @staticmethod
    def _gathers(table: str, nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """The nodes that gather rows of a table."""
        return [
            node
            for node in nodes
            if node.op_type == "Gather"
            and node.input[0] == table
            and all(helper.get_attribute_value(item) == 0 for item in node.attribute)
        ]

    def _without_unused(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The new graph's nodes, and the tensors of the old graph that no node makes or reads any more."""
        nodes = [new for node in self.nodes for new in self._instead.get(node.output[0], [node])]
        reads = Counter(names_read(nodes))
        outputs = {item.name for item in self.file.graph.output}
        unused: set[str] = set()
        left = list(names_read(node for node in self.nodes if node.output[0] in self._instead))
        while left:
            name = left.pop()
            source = self.file.producers.get(name)
            made = [name] if source is None else list(source.output)
            if made[0] in self._instead or made[0] in unused or any(reads[item] or item in outputs for item in made):
                continue
            if source is not None:
                reads.subtract(names_read([source]))
                left += names_read([source])
            elif name not in self._sources:
                continue
            unused.update(made)
        return [node for node in nodes if node.output[0] not in unused], unused

    def _updated(self, name: str, values: np.ndarray) -> TensorProto:
        if name in self._sources:
            dtype = helper.tensor_dtype_to_np_dtype(self._sources[name].data_type)
        elif self.file.is_constant(name):
            dtype = self.file.constant(name, name).dtype
        else:
            raise UserError(f"{self.file.path} has no constant {name}")
        shape = self.file.shape(name, name)
        if values.shape != shape:
            raise UserError(f"{self.file.path}: {name} is {list(shape)}, and its new value {list(values.shape)}")
        with np.errstate(over="ignore"):
            converted = values.astype(dtype)
        if not np.isfinite(converted).all():
            raise UserError(f"{self.file.path}: the new value of {name} is not finite in {dtype}")
        return self._data.store(name, converted)

    def _narrow(self, tensor: TensorProto, nodes: list[onnx.NodeProto]) -> TensorProto | None:
        """The table as float16, if that is exact and only Gather nodes read it; `nodes` then get casts after them."""
        size = 4 * int(np.prod(tensor.dims))
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or size <= INLINE_BYTES:
            return None
        gathers = self._gathers(tensor.name, nodes)
        is_output = any(item.name == tensor.name for item in self.file.graph.output)
        if not gathers or is_output or Counter(names_read(nodes))[tensor.name] != len(gathers):
            return None
        values = narrowest_exact(self.file.constant(tensor.name, tensor.name))
        if values.dtype != np.float16:
            return None
        for gather in gathers:
            output = gather.output[0]
            gather.output[0] = self._unique(f"{output}_float16")
            path = name_of(gather).removesuffix("/Gather")
            cast = helper.make_node("Cast", [gather.output[0]], [output], name=f"{path}/Cast", to=TensorProto.FLOAT)
            nodes.insert(nodes.index(gather) + 1, cast)
        return self._data.store(tensor.name, values)

    def close(self, node: onnx.NodeProto) -> None:
        """Puts the nodes that were made since the last call in the place of `node`."""
        self._instead[node.output[0]], self._made = self._made, []

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def _refuse(self, node: onnx.NodeProto, problem: str) -> NoReturn:
        raise UserError(f"{self.file.path}: layer {name_of(node)}: {problem}")
