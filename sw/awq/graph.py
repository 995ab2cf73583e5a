# SPDX-License-Identifier: Apache-2.0
"""The float linear layers of a decoder graph: their weights, the layers that share an input, and the input's source.

A linear layer is a node whose second input is a constant float matrix and whose first is not:
    MatMul                       weight [K, N]
    Gemm                         weight [K, N], or [N, K] with transB; its third input is a bias
    FusedMatMul (com.microsoft)  the same without a bias
The matrix may be an initializer after Identity, Cast, Reshape and Transpose; torch writes a tied head in this form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from sw.common.errors import UserError
from sw.graph.file import OnnxFile

FLOATS = (np.float32, np.float16)
LEAST = 16
"""Least number of rows and columns of a layer: products of rotary tables with positions have fewer."""
LOGITS = "logits"
NORMS = {
    ("SimplifiedLayerNormalization", ""): 1,
    ("SimplifiedLayerNormalization", "com.microsoft"): 1,
    ("SkipSimplifiedLayerNormalization", "com.microsoft"): 2,
    ("RMSNormalization", ""): 1,
}
"""Operator -> its input with the weight that scales every channel of its first output."""
SAME_VALUES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
SHAPES = ("Shape", "Size")
"""Operators that do not read values."""


@dataclass(frozen=True, eq=False)
class FloatSite:
    """One float linear layer.

    Members
    -------
    name: the node's name, made unique. node: the graph's node.
    n, k: out_features, in_features.
    transposed: the constant that the node reads is [N, K], not [K, N].
    bias: name of the constant that is added to the product, by the node or by an Add after it; or "".
    is_head: whether the product is the model's logits.
    """

    name: str
    node: onnx.NodeProto
    n: int
    k: int
    transposed: bool
    bias: str
    is_head: bool

    def weight(self, file: OnnxFile) -> np.ndarray:
        """The weight, float32 [N, K]. Raises UserError if it cannot be read or is not finite."""
        values = constant(file, self.node.input[1], self.name)
        values = np.ascontiguousarray(values if self.transposed else values.T, dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{file.path}: layer {self.name}: a weight is not finite")
        return values


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and so share a scale of its channels.

    Members
    -------
    input_name: the tensor, [..., K].
    sites: the layers.
    gamma: the constant that scales every channel of the tensor, if only the layers depend on it; or "".
    only_readers: whether the layers are the only readers of the tensor's values.
    """

    input_name: str
    sites: Sequence[FloatSite] = field(default_factory=list)
    gamma: str = ""
    only_readers: bool = False

    @property
    def k(self) -> int:
        """Number of channels."""
        return self.sites[0].k


def find_sites(file: OnnxFile) -> list[FloatSite]:
    """The float linear layers of a graph, in its order. Raises UserError if there is none."""
    heads = _before_logits(file)
    sites, taken = [], set()
    for node in file.graph.node:
        form = _form(file, node)
        if form is None:
            continue
        k, n = form[0] if not form[1] else form[0][::-1]
        name = candidate = node.name or node.output[0]
        count = 1
        while candidate in taken:
            count += 1
            candidate = f"{name}#{count}"
        taken.add(candidate)
        sites.append(FloatSite(candidate, node, n, k, form[1], _bias(file, node, n), node.output[0] in heads))
    if not sites:
        raise UserError(f"{file.path} has no float linear layers (MatMul, Gemm or FusedMatMul with constant weights)")
    return sites


def group_sites(file: OnnxFile, sites: Sequence[FloatSite]) -> list[Group]:
    """The sites by the tensor that they read, in the graph's order."""
    by_input: dict[str, list[FloatSite]] = {}
    for site in sites:
        by_input.setdefault(site.node.input[0], []).append(site)
    outputs = {item.name for item in file.graph.output}
    groups = []
    for name, members in by_input.items():
        nodes = {id(site.node) for site in members}
        alone = name not in outputs and all(id(node) in nodes or node.op_type in SHAPES for node in readers(file, name))
        gamma = _gamma(file, name) if alone else ""
        groups.append(Group(name, members, gamma, alone))
    return groups


def readers(file: OnnxFile, name: str) -> list[onnx.NodeProto]:
    """The nodes that read a tensor, including those whose subgraphs read it."""
    found = list(file.consumers.get(name, []))
    found += [
        node for node in file.graph.node if any(_has_graph(item) for item in node.attribute) and name in _inner(node)
    ]
    return found


def constant(file: OnnxFile, name: str, layer: str) -> np.ndarray:
    """The value of a constant tensor, like OnnxFile.constant, but also after a Transpose."""
    node = file.producers.get(name)
    if node is not None and node.op_type == "Transpose" and not file.is_constant(name):
        values = constant(file, node.input[0], layer)
        order = _attributes(node).get("perm")
        return np.transpose(values, order)
    return file.constant(name, layer)


def _is_constant(file: OnnxFile, name: str) -> bool:
    node = file.producers.get(name)
    if node is not None and node.op_type == "Transpose" and node.domain in ("", "ai.onnx"):
        return _is_constant(file, node.input[0])
    return file.is_constant(name)


def _shape(file: OnnxFile, name: str) -> tuple[int, ...]:
    """The shape of a constant. An initializer's data is read only if a Reshape follows it."""
    node = file.producers.get(name)
    if node is not None and node.op_type == "Transpose":
        inner = _shape(file, node.input[0])
        order = _attributes(node).get("perm") or range(len(inner))[::-1]
        return tuple(inner[axis] for axis in order)
    if node is not None and node.op_type in ("Identity", "Cast"):
        return _shape(file, node.input[0])
    return file.shape(name, name)


def _dtype(file: OnnxFile, name: str) -> np.dtype | None:
    """The type of an initializer or Constant, or the result type of a Cast."""
    node = file.producers.get(name)
    if node is None:
        kind = next((item.data_type for item in file.graph.initializer if item.name == name), 0)
    elif node.op_type == "Cast":
        kind = _attributes(node)["to"]
    elif node.op_type == "Constant":
        kind = node.attribute[0].t.data_type
    else:
        return _dtype(file, node.input[0])
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind)) if kind else None


def _form(file: OnnxFile, node: onnx.NodeProto) -> tuple[tuple[int, int], bool] | None:
    """(shape of the constant, whether it is [N, K]), or None if the node is not a linear layer."""
    contrib = node.op_type == "FusedMatMul" and node.domain == "com.microsoft"
    if not contrib and not (node.op_type in ("MatMul", "Gemm") and node.domain in ("", "ai.onnx")):
        return None
    if len(node.input) < 2 or not _is_constant(file, node.input[1]) or _is_constant(file, node.input[0]):
        return None
    shape = _shape(file, node.input[1])
    if len(shape) != 2 or min(shape) < LEAST or _dtype(file, node.input[1]) not in FLOATS:
        return None
    values = _attributes(node)
    plain = values.get("alpha", 1.0) == 1 and not values.get("transA") and not values.get("transBatchA")
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        plain = plain and values.get("beta", 1.0) == 1 and _is_constant(file, node.input[2])
    if not plain or values.get("transBatchB"):
        return None
    return (shape[0], shape[1]), bool(values.get("transB", 0))


def _bias(file: OnnxFile, node: onnx.NodeProto, n: int) -> str:
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        return node.input[2]
    following = readers(file, node.output[0])
    outputs = {item.name for item in file.graph.output}
    if len(following) != 1 or following[0].op_type != "Add" or node.output[0] in outputs:
        return ""
    (other,) = [name for name in following[0].input if name != node.output[0]] or [""]
    if not file.is_constant(other) or int(np.prod(file.shape(other, node.name))) != n:
        return ""
    return other


def logits_name(file: OnnxFile) -> str:
    """The output with the logits: the one with this name, or else the first."""
    outputs = [item.name for item in file.graph.output]
    return LOGITS if LOGITS in outputs else outputs[0]


def _before_logits(file: OnnxFile) -> set[str]:
    """The logits, and the tensors that become the logits by a bias, a cast or a change of shape."""
    names = {logits_name(file)}
    for node in reversed(file.graph.node):
        if node.op_type in (*SAME_VALUES, "Add") and names.intersection(node.output):
            read = node.input if node.op_type == "Add" else node.input[:1]
            names.update(name for name in read if not file.is_constant(name))
    return names


def _gamma(file: OnnxFile, name: str) -> str:
    """The constant whose elements scale only the channels of tensor `name`; or ""."""
    node = file.producers.get(name)
    if node is None or node.output[0] != name:
        return ""
    place = NORMS.get((node.op_type, "" if node.domain == "ai.onnx" else node.domain))
    if place is not None:
        # The fourth input of the skip norm is a bias before the norm, so the weight scales it as well.
        gamma = node.input[place] if len(node.input) > place else ""
    elif node.op_type == "Mul":
        gamma = next((part for part in node.input if file.is_constant(part)), "")
    else:
        return ""
    if not gamma or not is_own(file, gamma):
        return ""
    shape = _shape(file, gamma)
    # A single factor for all channels is not a norm's weight.
    return gamma if len(shape) and shape[-1] == np.prod(shape) > 1 else ""


def is_own(file: OnnxFile, name: str) -> bool:
    """Whether a constant is read in one place only, so that a new value changes nothing else.

    It need not be an initializer: if an exporter merged equal tensors, they are read through Identity nodes.
    """
    return (
        file.is_constant(name)
        and len(readers(file, name)) == 1
        and not any(item.name == name for item in (*file.graph.output, *file.graph.input))
    )


def _attributes(node: onnx.NodeProto) -> dict:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _has_graph(attribute: onnx.AttributeProto) -> bool:
    return attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _inner(node: onnx.NodeProto) -> set[str]:
    """Every tensor that a node's subgraphs read, including their own tensors."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for part in graph.node:
                found.update(part.input)
                found |= _inner(part)
            found.update(item.name for item in graph.output)
    return found
