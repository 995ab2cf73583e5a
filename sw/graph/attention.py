# SPDX-License-Identifier: Apache-2.0
"""Matches onnxruntime's attention with a KV cache, and its rotation, in an ONNX graph; names their tensors.

GroupQueryAttention (com.microsoft) appends keys and values to the cache in place, and may rotate queries and keys.
RotaryEmbedding (com.microsoft, and opset 23) rotates them before it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import onnx

from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB, STANDARD, attributes, made, name_of, read
from sw.graph.projections import Layers
from sw.model.parts import Attention, HeadNorm, Mismatch, Norm, Projection, Rotary

UNUSUAL = {
    "smooth_softmax": (-1, 0),
    "qk_output": (0,),
    "causal": (1,),
    "sliding_window_cache": (0,),
    "k_quant_type": (b"NONE",),
    "v_quant_type": (b"NONE",),
    "kv_cache_bit_width": (0,),
}
"""Attribute of GroupQueryAttention -> the values with which it is plain attention, its default first."""
UNUSUAL_INPUTS = ("attention_bias", "head_sink", "k_scale", "v_scale", "query_seqlens")
NORM_EPSILON = 1e-6
PLAIN = ("Add", "Reshape", "Transpose", "Concat", "Identity", "Cast", "Squeeze", "Unsqueeze")
"""Operators that may be between v's product and the cache, in attention that is not one node."""
ROTATION = (*PLAIN, "Mul", "Neg", "Slice", "Split", "Sub", "RotaryEmbedding")
"""Operators that may be between k's product and the cache."""
CORES = {"Attention": (1, 2), "MultiHeadAttention": (1, 2), "GroupQueryAttention": (1, 2), "Softmax": ()}
"""Operator that identifies attention -> its inputs that are keys and values, which it may rotate and cache itself."""
KEY, VALUE = 1, 2


class GroupQueryAttention(NamedTuple):
    """The inputs of a GroupQueryAttention node, in its order; "" for absent ones. query: queries of all heads, or q, k
    and v of all heads in one tensor if key and value are "".
    """

    query: str = ""
    key: str = ""
    value: str = ""
    past_key: str = ""
    past_value: str = ""
    seqlens_k: str = ""
    total_sequence_length: str = ""
    cos_cache: str = ""
    sin_cache: str = ""
    position_ids: str = ""
    attention_bias: str = ""
    head_sink: str = ""
    k_scale: str = ""
    v_scale: str = ""
    q_norm_weight: str = ""
    k_norm_weight: str = ""
    query_seqlens: str = ""

    @property
    def appended(self) -> dict[str, int]:
        """Cache tensor before the node -> index of the node's output that holds the old and the new rows."""
        return {self.past_key: 1, self.past_value: 2}


def group_query_attention(node: onnx.NodeProto) -> GroupQueryAttention | None:
    """A node's inputs by name; None for any other node."""
    if node.op_type != "GroupQueryAttention" or node.domain != CONTRIB:
        return None
    return GroupQueryAttention(*(read(node, index) for index in range(len(GroupQueryAttention._fields))))


class RotaryEmbedding(NamedTuple):
    """A node's tensors. cos, sin: [positions, size / 2], or [batch, tokens, size / 2] without position_ids."""

    x: str
    cos: str
    sin: str
    position_ids: str


def rotary_embedding(node: onnx.NodeProto) -> RotaryEmbedding | None:
    """A node's tensors; None for any other node."""
    if node.op_type != "RotaryEmbedding":
        return None
    if node.domain == CONTRIB:
        return RotaryEmbedding(read(node, 0), read(node, 2), read(node, 3), read(node, 1))
    if node.domain in STANDARD:
        return RotaryEmbedding(read(node, 0), read(node, 1), read(node, 2), read(node, 3))
    return None


def rotary_table(node: onnx.NodeProto) -> str:
    """The tensor with the cosines of every position that a node rotates by, or ""."""
    attention, rotary = group_query_attention(node), rotary_embedding(node)
    if attention is not None:
        return attention.cos_cache
    return rotary.cos if rotary is not None and rotary.position_ids else ""


def appended(file: OnnxFile, past: str) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Pairs (tensor that holds a cache tensor and new rows, the node that makes it), for each operator that appends."""
    for node in file.consumers.get(past, []):
        attention = group_query_attention(node)
        if attention is not None:
            places = attention.appended
        elif node.op_type == "Attention" and node.domain in STANDARD:
            places = {read(node, 4): 1, read(node, 5): 2}
        elif node.op_type == "Concat":
            places = {read(node, 0): 0}
        else:
            places = {}
        if name := made(node, places[past]) if past in places else "":
            yield name, node


@dataclass(frozen=True)
class Heads:
    """Queries or keys of the attention. norm, rotary: their norm and rotation, before the attention's node or in it."""

    layer: Projection
    norm: HeadNorm | None = None
    rotary: Rotary | None = None


def match_attention(
    layers: Layers, part: str, norm: Norm, o: Projection
) -> tuple[Heads, Heads, Projection, Attention | Mismatch]:
    """q, k, v and the attention between a norm and o_proj. part: name of the decoder's part, as layers.0.self_attn.

    Attention by other operators than GroupQueryAttention is a Mismatch, as long as q, k and v are certain. Raises
    NotThisShape if they are not.
    """
    node = layers.file.producers.get(o.input)
    tensors = None if node is None else group_query_attention(node)
    if node is None or tensors is None:
        return _of_operators(layers, part, norm, o)
    return _grouped(layers, part, norm, node, tensors, o)


def _grouped(
    layers: Layers, part: str, norm: Norm, node: onnx.NodeProto, tensors: GroupQueryAttention, o: Projection
) -> tuple[Heads, Heads, Projection, Attention | Mismatch]:
    values = attributes(node)
    heads, kv_heads = values.get("num_heads", 0), values.get("kv_num_heads", 0)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise layers.blame(part, f"{heads} heads are not a multiple of {kv_heads} key-value heads", node)
    if tensors.key or tensors.value:
        q = _heads(layers, f"{part}.q_proj", tensors.query)
        k = _heads(layers, f"{part}.k_proj", tensors.key)
        v = layers.rows(tensors.value, f"{part}.v_proj")
    else:
        joined = layers.rows(tensors.query, f"{part}.qkv_proj")
        size = joined.n // (heads + 2 * kv_heads)
        sizes = (heads * size, kv_heads * size, kv_heads * size)
        first = (0, heads * size, (heads + kv_heads) * size)
        rows = [replace(joined, n=n, first_row=joined.first_row + row) for n, row in zip(sizes, first)]
        q, k, v = Heads(rows[0]), Heads(rows[1]), rows[2]
        if sum(sizes) != joined.n:
            raise layers.blame(part, f"{joined.n} rows are not {heads} + 2 * {kv_heads} heads", node)
    layers.expect_input({f"{part}.q_proj": q.layer, f"{part}.k_proj": k.layer, f"{part}.v_proj": v}, norm.output)
    size = q.layer.n // heads
    if (q.layer.n, k.layer.n, v.n, o.k) != (heads * size, kv_heads * size, kv_heads * size, heads * size):
        problem = f"{heads} and {kv_heads} heads do not divide q, k, v and o of {q.layer.n}, {k.layer.n}, {v.n}, {o.k}"
        raise layers.blame(part, problem, node)
    before = q, k
    q, k = _in_node(layers.file, node, tensors, q, k)
    problem = _unusual(node, tensors, q, k)
    weights = tensors.q_norm_weight, tensors.k_norm_weight
    if any(weight and (heads.norm or heads.rotary) for weight, heads in zip(weights, before)):
        problem = problem or "it has a norm of heads that a norm or a rotation before it has changed"
    if problem:
        return q, k, v, Mismatch(part, problem, node.op_type, name_of(node))
    window = values.get("local_window_size", -1)
    attention = Attention(
        node=name_of(node),
        output=node.output[0],
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        scale=values.get("scale", 0.0) or 1 / math.sqrt(size),
        softcap=values.get("softcap", 0.0),
        window=None if window < 0 else window,
        past_key=tensors.past_key,
        past_value=tensors.past_value,
        present_key=made(node, 1),
        present_value=made(node, 2),
        seqlens_k=tensors.seqlens_k,
        total_sequence_length=tensors.total_sequence_length,
    )
    return q, k, v, attention


def _heads(layers: Layers, part: str, tensor: str) -> Heads:
    """The layer, norm of every head and rotation that make queries or keys; norm and rotation may be absent."""
    file = layers.file
    node = file.producers.get(tensor)
    rotation = None if node is None else rotary_embedding(node)
    rotary = None
    if node is not None and rotation is not None:
        interleaved = bool(attributes(node).get("interleaved", 0))
        size = _rotated(file, rotation.cos)
        rotary = Rotary(rotation.cos, rotation.sin, size, interleaved, rotation.position_ids, False)
        tensor = rotation.x
    norm = layers.norms.get(_reshaped(file, tensor))
    if norm is None:
        return Heads(layers.rows(tensor, part), None, rotary)
    return Heads(layers.rows(_reshaped(file, norm.input), part), HeadNorm(norm.weight, norm.epsilon), rotary)


def _in_node(
    file: OnnxFile, node: onnx.NodeProto, tensors: GroupQueryAttention, q: Heads, k: Heads
) -> tuple[Heads, Heads]:
    """Queries and keys, with the norm and rotation that the attention's node applies."""
    values = attributes(node)
    if values.get("do_rotary", 0):
        interleaved = bool(values.get("rotary_interleaved", 0))
        size = _rotated(file, tensors.cos_cache)
        rotary = Rotary(tensors.cos_cache, tensors.sin_cache, size, interleaved, tensors.position_ids, True)
        q = replace(q, rotary=q.rotary or rotary)
        k = replace(k, rotary=k.rotary or rotary)
    epsilon = values.get("qk_norm_epsilon", NORM_EPSILON)
    if tensors.q_norm_weight:
        q = replace(q, norm=q.norm or HeadNorm(tensors.q_norm_weight, values.get("q_norm_epsilon", epsilon)))
    if tensors.k_norm_weight:
        k = replace(k, norm=k.norm or HeadNorm(tensors.k_norm_weight, values.get("k_norm_epsilon", epsilon)))
    return q, k


def _unusual(node: onnx.NodeProto, tensors: GroupQueryAttention, q: Heads, k: Heads) -> str:
    """Text about the first property of a node that plain causal attention over all tokens does not have; or ""."""
    values = attributes(node)
    for name, plain in UNUSUAL.items():
        if values.get(name, plain[0]) not in plain:
            return f"{name} is {values[name]!r}"
    if q.rotary != k.rotary:
        return "queries and keys are rotated differently"
    if not (tensors.past_key and tensors.past_value and made(node, 1) and made(node, 2)):
        return "it has no KV cache"
    return next((f"it has an input {name}" for name in UNUSUAL_INPUTS if getattr(tensors, name)), "")


def _of_operators(layers: Layers, part: str, norm: Norm, o: Projection) -> tuple[Heads, Heads, Projection, Mismatch]:
    """Attention of several operators. v and the rotated k go into the cache, q does not; all else is a mismatch."""
    group = [layer for layer in layers.projections if layers.uncast(layer.input) == layers.uncast(norm.output)]
    if len(group) != 3:
        problem = f"{len(group)} linear layers read the norm's {norm.output}, not q, k and v"
        followers = layers.readers(group[0].output) if group else []
        raise layers.blame(f"{part}.q_proj", problem, (followers or layers.readers(norm.output))[0])
    cached = [layer for layer in group if _is_cached(layers.file, layer.output, ROTATION, (KEY, VALUE))]
    plain = [layer for layer in cached if _is_cached(layers.file, layer.output, PLAIN, (VALUE,))]
    core, seen = _core(layers.file, o.input, {layer.output for layer in group})
    if core is None or len(cached) != 2 or len(plain) != 1 or seen != {layer.output for layer in group}:
        raise layers.wrong(part, "it is not certain which of three linear layers are q, k and v", o.input)
    (q,) = (layer for layer in group if layer not in cached)
    (k,) = (layer for layer in cached if layer not in plain)
    (v,) = plain
    layers.expect_input({f"{part}.q_proj": q, f"{part}.k_proj": k, f"{part}.v_proj": v}, norm.output)
    if k.n != v.n or q.n % k.n or q.n != o.k:
        problem = f"q, k, v and o of {q.n}, {k.n}, {v.n} and {o.k} channels do not fit together"
        raise layers.wrong(part, problem, o.input)
    problem = "attention by operators that are not GroupQueryAttention"
    if group_query_attention(core) is not None:
        core, problem = layers.file.producers[o.input], "where the output of GroupQueryAttention is expected"
    return Heads(q), Heads(k), v, Mismatch(part, problem, core.op_type, name_of(core))


def _core(file: OnnxFile, tensor: str, sources: set[str]) -> tuple[onnx.NodeProto | None, set[str]]:
    """Goes back from attention's output: the node that identifies attention, and which of the sources are reached."""
    core, reached, left, passed = None, set(), [tensor], set()
    while left:
        name = left.pop(0)
        if name in sources:
            reached.add(name)
            continue
        node = file.producers.get(name)
        if node is None or name in passed:
            continue
        passed.update(node.output)
        core = core or (node if node.op_type in CORES else None)
        left += node.input
    return core, reached


def _is_cached(file: OnnxFile, product: str, operators: Sequence[str], inputs: Sequence[int]) -> bool:
    """Whether a product reaches the cache, or one of these inputs of an attention, through these operators alone."""
    outputs = {item.name for item in file.graph.output}
    left, seen = [product], set()
    while left:
        name = left.pop()
        if name in outputs:
            return True
        for node in file.consumers.get(name, []):
            places = CORES.get(node.op_type, ())
            if any(read(node, index) == name for index in inputs if index in places):
                return True
            if node.op_type in operators:
                left += [item for item in node.output if item not in seen]
                seen |= set(node.output)
    return False


def _reshaped(file: OnnxFile, tensor: str) -> str:
    """The tensor of which this one is a reshaped form."""
    node = file.producers.get(tensor)
    return node.input[0] if node is not None and node.op_type == "Reshape" else tensor


def _rotated(file: OnnxFile, table: str) -> int:
    """Elements of a head that a table of cosines rotates; 0 if it is no constant."""
    shape = file.shape(table, table) if table and file.is_constant(table) else ()
    return 2 * shape[1] if len(shape) == 2 else 0
