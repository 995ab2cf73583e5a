# SPDX-License-Identifier: Apache-2.0
"""Writes a decoder of one of sw.model.families as an ONNX graph for onnxruntime, from weights of any source.

Inputs and outputs carry the names that onnxruntime-genai and optimum use:
    input_ids int64 [batch, sequence], attention_mask int64 [batch, total_sequence] (1 = attend),
    past_key_values.{i}.key and .value float32 [batch, kv_heads, past_sequence, head_size]
    -> logits float32 [batch, sequence, vocab], present.{i}.key and .value
Quantized layers become MatMulNBits nodes named /model/layers.{i}/self_attn/q_proj/MatMulNBits and so on, with
accuracy_level 0 (float32 arithmetic); their biases are separate Add nodes. The head is /lm_head/MatMulNBits. A
quantized embedding is a GatherBlockQuantized node that shares its table with a tied head. Mixtures of experts are in
sw.graph.experts.write.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto

from sw.common.errors import UserError
from sw.graph.experts.write import write_experts
from sw.graph.matmul_nbits import PLANE_BITS, planes
from sw.graph.nodes import CONTRIB, LOGITS, TOKEN_IDS
from sw.graph.writer import GraphBuilder, OnnxWriter, tensor_name
from sw.model.decoder import GELU_TANH, PROJECTIONS, DecoderConfig, DecoderLayer, expect_shape
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import Linear, Table, head_layer, narrowest_exact


def write_decoder(
    directory: Path,
    config: DecoderConfig,
    embedding: Table,
    layers: Iterable[DecoderLayer],
    final_norm: np.ndarray,
    head: Table | None = None,
    metadata: dict[str, str] | None = None,
    *,
    lm_head: str = "int8",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes model.onnx and model.onnx.data into `directory` and returns the path of the former.

    embedding: float16 or float32 [vocab, hidden], or a QuantizedLinear without zero points of its own (all in the
    middle of the range). layers: consumed one by one. head: None ties the head to the embedding. lm_head: one of
    sw.model.lm_head.HEAD_MODES. progress: called with the number of layers written, and of all layers, including the
    head.
    Raises UserError where weights and config disagree.
    """
    expect_shape("embedding", _shape(embedding), (config.vocab_size, config.hidden_size))
    if head is not None:
        expect_shape("lm_head", _shape(head), (config.vocab_size, config.hidden_size))
    progress = progress or (lambda done, total: None)
    with OnnxWriter(directory, "decoder") as writer:
        graph = _DecoderGraph(writer, config)
        progress(0, config.layer_count + 1)
        # One table for embedding and head. A float one that becomes an int8 head does not count.
        shared = head is None and (isinstance(embedding, QuantizedLinear) or lm_head == "float")
        graph.begin(embedding, shared)
        count = 0
        for layer in layers:
            graph.layer(count, layer)
            count += 1
            progress(count, config.layer_count + 1)
        expect_shape("the number of layers", (count,), (config.layer_count,))
        graph.end(final_norm, head_layer(embedding, head, lm_head), shared)
        writer.save(metadata or {})
        progress(count + 1, config.layer_count + 1)
        return writer.path


class _DecoderGraph:
    """The nodes of one decoder. `residual` and `branch` are the two tensors that the next norm adds."""

    def __init__(self, writer: OnnxWriter, config: DecoderConfig):
        self.writer = writer
        self.config = config
        self.residual = ""
        self.branch = ""
        self.table: list[str] = []

    def begin(self, embedding: Table, shared: bool) -> None:
        w = self.writer
        ids = w.input(TOKEN_IDS, TensorProto.INT64, ["batch_size", "sequence_length"])
        mask = w.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        w.output(LOGITS, TensorProto.FLOAT, ["batch_size", "sequence_length", self.config.vocab_size])
        rotations = [self.config.rotation(index) for index in range(self.config.layer_count)]
        for name in sorted({rotation for rotation in rotations if rotation is not None}):
            for kind, table in zip(("cos", "sin"), self.config.rotary_cache(name)):
                w.tensor(f"{name}{kind}_cache", table)
        one = w.tensor("one", np.array([1], np.int64))
        # GroupQueryAttention needs the index of the last token of every sequence, and the padded length.
        path = "/model/attention_mask"
        total = w.node(f"{path}/ReduceSum", "ReduceSum", [mask, one], keepdims=0)
        last = w.node(f"{path}/Sub", "Sub", [total, one])
        w.node(f"{path}/Cast", "Cast", [last], ["seqlens_k"], to=TensorProto.INT32)
        shape = w.node(f"{path}/Shape", "Shape", [mask], start=1, end=2)
        scalar = w.node(f"{path}/Squeeze", "Squeeze", [shape])
        w.node(f"{path}/Cast_1", "Cast", [scalar], ["total_sequence_length"], to=TensorProto.INT32)
        path = "/model/embed_tokens"
        self.residual = self.embed(path, embedding, ids, shared)
        if self.config.embedding_scale != 1:
            scale = w.tensor(f"{tensor_name(path)}.scale", np.array(self.config.embedding_scale, np.float32))
            self.residual = w.node(f"{path}/Mul", "Mul", [self.residual, scale])

    def embed(self, path: str, embedding: Table, ids: str, shared: bool) -> str:
        """The embedding's rows for these ids. `table` keeps its tensors, for a head that shares it."""
        w = self.writer
        tensor = tensor_name(path)
        if not isinstance(embedding, QuantizedLinear):
            # onnxruntime multiplies only float32 matrices.
            values = embedding.astype(np.float32, copy=False) if shared else narrowest_exact(embedding)
            self.table = [w.tensor(f"{tensor}.weight", values)]
            rows = w.node(f"{path}/Gather", "Gather", [*self.table, ids])
            return rows if values.dtype == np.float32 else w.node(f"{path}/Cast", "Cast", [rows], to=TensorProto.FLOAT)
        if not can_gather(embedding):
            raise UserError(f"{path}: GatherBlockQuantized needs whole groups without zero points of their own")
        self.table = layer_tensors(w, path, tensor, embedding)
        return gather_rows(w, path, tensor, embedding, self.table, ids)

    def layer(self, index: int, layer: DecoderLayer) -> None:
        w = self.writer
        path = f"/model/layers.{index}"
        shapes = self.config.projection_shapes()

        def linear(name: str, x: str) -> str:
            module = PROJECTIONS[name].replace(".", "/")
            return self.linear(f"{path}/{module}", x, getattr(layer, name), shapes[name])

        x = self.norm(f"{path}/input_layernorm", layer.input_norm)
        q, k, v = (linear(name, x) for name in ("q_proj", "k_proj", "v_proj"))
        q = self.head_norm(f"{path}/self_attn/q_norm", q, layer.q_norm, self.config.head_count)
        k = self.head_norm(f"{path}/self_attn/k_norm", k, layer.k_norm, self.config.kv_head_count)
        attended = self.attention(index, f"{path}/self_attn/GroupQueryAttention", q, k, v)
        self.branch = self.plain_norm(
            f"{path}/attention_out_norm", linear("o_proj", attended), layer.attention_out_norm
        )

        x = self.norm(f"{path}/post_attention_layernorm", layer.post_attention_norm)
        if layer.experts is not None:
            assert self.config.routing is not None, "a layer has experts only where the configuration has"
            parts = self.config.hidden_size, layer.experts, self.config.routing
            down = write_experts(w, self.linear, self.activation, f"{path}/mlp", x, *parts)
        else:
            gate, up = linear("gate_proj", x), linear("up_proj", x)
            activated = self.activation(f"{path}/mlp/act_fn", gate)
            down = linear("down_proj", w.node(f"{path}/mlp/Mul", "Mul", [activated, up]))
        self.branch = self.plain_norm(f"{path}/mlp_out_norm", down, layer.mlp_out_norm)

    def activation(self, path: str, gate: str) -> str:
        """The activation of gate."""
        w = self.writer
        if self.config.activation == GELU_TANH:
            return w.node(f"{path}/Gelu", "Gelu", [gate], approximate="tanh")
        return silu(w, path, gate)

    def end(self, final_norm: np.ndarray, head: Linear, shared: bool) -> None:
        c = self.config
        x = self.norm("/model/norm", final_norm)
        self.linear("/lm_head", x, head, (c.vocab_size, c.hidden_size), LOGITS, self.table if shared else None)

    def attention(self, index: int, name: str, q: str, k: str, v: str) -> str:
        w, c = self.writer, self.config
        for kind in ("key", "value"):
            for way, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length")):
                declare = w.input if way == "past_key_values" else w.output
                shape = ["batch_size", c.kv_head_count, length, c.head_size]
                declare(f"{way}.{index}.{kind}", TensorProto.FLOAT, shape)
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        rotation, window = c.rotation(index), c.window(index)
        tables = [] if rotation is None else [f"{rotation}cos_cache", f"{rotation}sin_cache"]
        # Only what is not the default, so that plain decoders have plain nodes.
        extra = {} if window is None else {"local_window_size": window}
        extra |= {} if c.attention_scale is None else {"scale": c.attention_scale}
        return w.node(
            name,
            "GroupQueryAttention",
            [q, k, v, *past, "seqlens_k", "total_sequence_length", *tables],
            [f"{name}/output_0", f"present.{index}.key", f"present.{index}.value"],
            CONTRIB,
            num_heads=c.head_count,
            kv_num_heads=c.kv_head_count,
            do_rotary=int(rotation is not None),
            **extra,
        )

    def head_norm(self, path: str, x: str, weight: np.ndarray | None, heads: int) -> str:
        """Normalises every head of queries or keys [batch, sequence, heads * head_size]; None: x itself."""
        if weight is None:
            return x
        w, size = self.writer, self.config.head_size
        expect_shape(path, weight.shape, (size,))
        apart = w.tensor(f"{tensor_name(path)}.heads", np.array([0, -1, size]))
        together = w.tensor(f"{tensor_name(path)}.columns", np.array([0, -1, heads * size]))
        normed = self.plain_norm(path, w.node(f"{path}/Reshape", "Reshape", [x, apart]), weight, size)
        return w.node(f"{path}/Reshape_1", "Reshape", [normed, together])

    def plain_norm(self, path: str, x: str, weight: np.ndarray | None, size: int = 0) -> str:
        """Normalises a tensor along its last axis of `size` elements (0: hidden_size); None: x itself."""
        if weight is None:
            return x
        w, c = self.writer, self.config
        expect_shape(path, weight.shape, (size or c.hidden_size,))
        gamma = w.tensor(f"{tensor_name(path)}.weight", weight.astype(np.float32))
        operator = "SimplifiedLayerNormalization"
        return w.node(f"{path}/{operator}", operator, [x, gamma], axis=-1, stash_type=1, epsilon=c.norm_epsilon)

    def norm(self, name: str, weight: np.ndarray) -> str:
        """Adds branch to residual (except before the first norm, which has no branch) and normalises the sum."""
        w, c = self.writer, self.config
        expect_shape(name, weight.shape, (c.hidden_size,))
        gamma = w.tensor(f"{tensor_name(name)}.weight", weight.astype(np.float32))
        outputs = [f"{name}/output_0"]
        if not self.branch:
            inputs = [self.residual, gamma]
            op, domain = "SimplifiedLayerNormalization", ""
        else:
            inputs = [self.residual, self.branch, gamma]
            op, domain = "SkipSimplifiedLayerNormalization", CONTRIB
            self.residual = f"{name}/output_3"
            outputs += ["", "", self.residual]
        extra = {} if domain else {"axis": -1, "stash_type": 1}
        return w.node(f"{name}/{op}", op, inputs, outputs, domain, epsilon=c.norm_epsilon, **extra)

    def linear(
        self,
        path: str,
        x: str,
        layer: Linear,
        shape: tuple[int, int],
        output: str = "",
        weights: list[str] | None = None,
    ) -> str:
        """shape: (N, K). weights: tensors of the layer that are written already."""
        expect_shape(path, (layer.n, layer.k), shape)
        w = self.writer
        tensor = tensor_name(path)
        outputs = [output] if output and layer.bias is None else []
        if isinstance(layer, QuantizedLinear):
            weights = weights or layer_tensors(w, path, tensor, layer)
            y = matmul_node(w, f"{path}/MatMulNBits", x, layer, weights, outputs)
        else:
            weights = weights or [w.tensor(f"{tensor}.weight", layer.weight)]
            y = w.node(f"{path}/FusedMatMul", "FusedMatMul", [x, *weights], outputs, CONTRIB, transB=1)
        if layer.bias is not None:
            bias = w.tensor(f"{tensor}.bias", layer.bias)
            y = w.node(f"{path}/Add", "Add", [y, bias], [output] if output else [])
        return y


def matmul_node(
    w: GraphBuilder, name: str, x: str, layer: QuantizedLinear, weights: Sequence[str], outputs: Sequence[str] = ()
) -> str:
    """Adds the MatMulNBits node that multiplies `x` with the tensors of `layer`, and returns its output.

    weights: what `layer_tensors` returned. Two planes (see sw.graph.matmul_nbits) have a Concat node before it.
    """
    shape = {"K": layer.k, "N": layer.n, "bits": stored_bits(layer.bits), "block_size": layer.group_size}
    if _in_planes(layer):
        shape |= {"K": 2 * layer.k, "bits": PLANE_BITS}
        x = w.node(f"{name.removesuffix('/MatMulNBits')}/Concat", "Concat", [x, x], axis=-1)
    return w.node(name, "MatMulNBits", [x, *weights], outputs, CONTRIB, **shape, accuracy_level=0)


def silu(w: GraphBuilder, path: str, x: str) -> str:
    """Adds x * Sigmoid(x)."""
    return w.node(f"{path}/Mul", "Mul", [x, w.node(f"{path}/Sigmoid", "Sigmoid", [x])])


def can_gather(table: QuantizedLinear) -> bool:
    """Whether GatherBlockQuantized can read this table for MatMulNBits: whole groups, zero points in the middle."""
    return not table.k % table.group_size and _has_default_zero_points(table)


def gather_rows(
    w: GraphBuilder, path: str, tensor: str, table: QuantizedLinear, weights: Sequence[str], ids: str, output: str = ""
) -> str:
    """Adds the nodes that gather, as floats, the rows of a table whose tensors are `weights`.

    tensor: prefix for the names of new tensors. ids: a tensor of two axes. Returns the tensor [.., .., K].
    """
    # MatMulNBits needs weights [N, groups, bytes]; GatherBlockQuantized needs as many axes in the scales. The scales
    # and the gathered rows are reshaped, because onnxruntime would copy a reshaped table.
    axes = w.tensor(f"{tensor}.scales_shape", np.array([table.n, table.groups, 1]))
    scales = w.node(f"{path}/Reshape", "Reshape", [weights[1], axes])
    layout = {"gather_axis": 0, "quantize_axis": 2, "block_size": table.group_size, "bits": table.bits}
    name = f"{path}/GatherBlockQuantized"
    rows = w.node(name, "GatherBlockQuantized", [weights[0], ids, scales], (), CONTRIB, **layout)
    shape = w.tensor(f"{tensor}.rows_shape", np.array([0, 0, -1]))
    return w.node(f"{path}/Reshape_1", "Reshape", [rows, shape], [output] if output else [])


def layer_tensors(
    w: GraphBuilder, path: str, tensor: str, layer: QuantizedLinear, dtype: type[np.floating] = np.float32
) -> list[str]:
    """Writes the inputs of MatMulNBits: weights, scales and, where they are not the default, zero points.

    path: name of the layer in errors. tensor: prefix of the tensors' names. dtype: type of the layer's activations, and
    so of scales and float zero points; float16 must hold them exactly. Weights of 3 bits are stored in fields of 4,
    because onnxruntime has no kernel for 3. Returns the tensors' names. Raises UserError for a layer that MatMulNBits
    cannot hold.
    """
    layer = planes(layer) if _in_planes(layer) else replace(layer, bits=stored_bits(layer.bits))
    if layer.bits not in (2, 4, 8):
        raise UserError(f"{path}: MatMulNBits stores 2, 4 or 8 bits, not {layer.bits}")
    block = layer.group_size
    if block < 16 or block & (block - 1):
        raise UserError(f"{path}: MatMulNBits needs a group size that is a power of two from 16, not {block}")
    padding = layer.groups * block - layer.k
    q = np.pad(layer.q, ((0, 0), (0, padding))) if padding else layer.q
    names = [
        w.tensor(f"{tensor}.qweight", pack_bits(q, layer.bits).reshape(layer.n, layer.groups, -1)),
        w.tensor(f"{tensor}.scales", _exactly(layer.scales, dtype, f"{path}: a scale")),
    ]
    if not layer.has_integer_zero_points:
        names.append(
            w.tensor(f"{tensor}.zero_points", _exactly(layer.zero_points, dtype, f"{path}: a float zero point"))
        )
    elif not _has_default_zero_points(layer):
        names.append(w.tensor(f"{tensor}.qzeros", pack_bits(layer.zero_points, layer.bits)))
    return names


def stored_bits(bits: int) -> int:
    """The width of the fields in which MatMulNBits stores weights of these bits."""
    return 4 if bits == 3 else bits


def _in_planes(layer: QuantizedLinear) -> bool:
    """Whether onnxruntime's MatMulNBits needs two planes for a layer: 8 bits with float zero points."""
    return layer.bits == 2 * PLANE_BITS and not layer.has_integer_zero_points


def _has_default_zero_points(layer: QuantizedLinear) -> bool:
    return layer.has_integer_zero_points and bool(np.all(layer.zero_points == 1 << (stored_bits(layer.bits) - 1)))


def _exactly(values: np.ndarray, dtype: type[np.floating], what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    wrong = converted.astype(values.dtype) != values
    if wrong.any():
        raise UserError(f"{what} is {values[wrong][0]:.9g}, which {np.dtype(dtype)} does not hold exactly")
    return converted


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, C] values of 2, 4 or 8 bits as uint8 [N, ceil(C * bits / 8)], the first in the low bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return values
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    packed = np.zeros((values.shape[0], values.shape[1] // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= values[:, i::per_byte] << (i * bits)
    return packed


def _shape(table: Table) -> tuple[int, ...]:
    return (table.n, table.k) if isinstance(table, QuantizedLinear) else table.shape
