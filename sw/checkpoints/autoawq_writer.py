# SPDX-License-Identifier: Apache-2.0
"""Writes a quantised ONNX decoder as an AutoAWQ GEMM checkpoint: the inverse of sw.awq_export, and as exact.

The graph's layers, norms and biases are found by the names of Hugging Face's modules (model.layers.0.mlp.up_proj, also
with slashes), which our exporters, optimum and onnxruntime-genai keep. torch.onnx does not keep the names of layers;
there they are found by their role (see sw.graph.roles). The shape is that of config.json beside the graph. The folder
gets model.safetensors, config.json, the tokenizer's files and, for integer tables, their scales (see
sw.checkpoints.integer_tables).

Layers keep q, zero points and scales. AutoAWQ and transformers compute in float16. Values that are not exact in float16
(folded norm weights, for example) are stored as float32, and these programs round them when they load them. They read
an integer table as float16 weights, like any head.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx

from sw.checkpoints.autoawq import BITS, COLUMNS, pack_words
from sw.checkpoints.autoawq_folder import write_config, write_text_files
from sw.checkpoints.huggingface import decoder_config, read_settings, text_settings
from sw.checkpoints.integer_tables import float_table, write_scales
from sw.checkpoints.safetensors_file import NewTensor, write_safetensors
from sw.common.atomic import atomic_directory
from sw.common.errors import UserError, one_line
from sw.common.status_line import Progress
from sw.graph.file import expect_names
from sw.graph.linears import find_linears
from sw.graph.matmul_nbits import unpack_bits
from sw.graph.roles import find_roles
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import Table, narrowest_exact, quantise_int8

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD_BITS = 8
PRODUCTS = ("MatMul", "FusedMatMul")
MODULE = re.compile(r"(?:^|\.)(?:layers\.(\d+)\.(?:(?:self_)?attn|mlp)\.(\w+_proj)|(lm_head))(?:\.|$)")
ROTARY_TOLERANCE = 0.05
"""Tolerance of cosines and sines: tables made in float32 differ by 0.01 at the end of a long context."""


def write_autoawq_folder(model: Path, out: Path, progress: Progress | None = None) -> None:
    """Writes directory `out`. After an error none of its files has changed.

    model: the ONNX file, with config.json and tokenizer.json beside it. progress: called with the steps that are done
    and all steps. Raises UserError, with the layer and the value, if the format cannot hold a layer: widths other than
    4 bits, float zero points, scales not exact in float16, group sizes that differ or do not divide K, N not a multiple
    of 8. Also raises it for layers or weights that are missing or do not match config.json.
    """
    progress = progress or (lambda done, total: None)
    decoder = _Decoder(Path(model))
    count = decoder.config.layer_count
    # Every layer is read twice: first for the header, which needs all shapes, and again when its tensors are written.
    tensors: list[NewTensor] = []
    for i in range(count):
        progress(i, 2 * count)
        tensors += decoder.block(i)
    tensors += decoder.ends()
    if not decoder.group_size:
        raise UserError(f"{model} has no 4-bit layers, and AutoAWQ GEMM has nothing else")
    written = 0

    def advance() -> None:
        nonlocal written
        written += 1
        progress(count + count * written // len(tensors), 2 * count)

    with atomic_directory(out) as work:
        write_safetensors(work / "model.safetensors", tensors, advance)
        write_config(
            work,
            decoder.settings,
            group_size=decoder.group_size,
            tied=decoder.tied,
            biased=any(tensor.name.endswith(".bias") for tensor in tensors),
            floats=decoder.floats,
            tables={name: write_scales(work, name, table) for name, table in decoder.tables.items()},
        )
        write_text_files(decoder.folder, work, decoder.settings)


class _Decoder:
    """The graph's weights under Hugging Face's names. Members for the layers read so far:

    group_size: that of all quantised layers. floats: modules that are not quantised. tables: integer tables. tied:
    whether the head is the embedding.
    """

    def __init__(self, path: Path):
        self.folder = path.parent
        self.settings = read_settings(self.folder / "config.json", required=True)
        self.config = decoder_config(self.settings)
        # Raises UserError here, because a reader of the folder needs these settings.
        text_settings(self.folder, self.settings)
        self._linears = find_linears(path)
        self.file = self._linears.file
        expect_names(self.file)
        self._check_rotary()
        self._indices = {_module(name): index for index, name in enumerate(self._linears.names)}
        if not any(MODULE.search(_dotted(name)) for name in self._linears.names):
            self._indices |= find_roles(self._linears, self.config.layer_count)
        products = [node for node in self.file.graph.node if node.op_type in PRODUCTS]
        self._products = {_module(node.name): node for node in products if self.file.is_constant(node.input[1])}
        self.group_size = 0
        self.floats: list[str] = []
        self.tables: dict[str, QuantizedLinear] = {}
        self.tied = False

    def block(self, index: int) -> Iterator[NewTensor]:
        """The tensors of one layer."""
        c = self.config
        path = f"model.layers.{index}"
        heads, kv_heads = c.head_count * c.head_size, c.kv_head_count * c.head_size
        yield self._norm(f"{path}.input_layernorm.weight")
        start = 0
        for name, n in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            yield from self._layer(f"{path}.self_attn.{name}", n, c.hidden_size, start)
            start += n
        yield from self._layer(f"{path}.self_attn.o_proj", c.hidden_size, heads)
        yield self._norm(f"{path}.post_attention_layernorm.weight")
        yield from self._layer(f"{path}.mlp.gate_proj", c.intermediate_size, c.hidden_size)
        yield from self._layer(f"{path}.mlp.up_proj", c.intermediate_size, c.hidden_size)
        yield from self._layer(f"{path}.mlp.down_proj", c.hidden_size, c.intermediate_size)

    def ends(self) -> Iterator[NewTensor]:
        """The tensors of embedding, last norm and head."""
        c = self.config
        yield self._norm("model.norm.weight", f"model.layers.{c.layer_count}.final_norm_layernorm.weight")
        table, source = self._embedding()
        self._expect(EMBEDDING, _shape(table), (c.vocab_size, c.hidden_size))
        index, product = self._indices.get("lm_head"), self._products.get("lm_head")
        if index is not None:
            head = self._linears[index]
            shared = self._source(self._linears.nodes[index].input[1]) == source
            if head.bits == BITS and not shared and not head.n % len(COLUMNS):
                yield self._table(EMBEDDING, table)
                yield from self._layer("lm_head", c.vocab_size, c.hidden_size)
                return
            if head.bits not in (BITS, HEAD_BITS) or head.bias is not None:
                self._refuse("lm_head", f"a head has {BITS} or {HEAD_BITS} bits and no bias, and not {head.bits} bits")
            self.tied = shared or _is_int8_of(head, table)
        elif product is not None:
            head, bias = self._float_weight(product)
            if bias is not None:
                self._refuse("lm_head", "it has a bias, and a checkpoint's head has none")
            self.tied = self._source(product.input[1]) == source
        else:
            raise self._absent("linear layer lm_head")
        yield self._table(EMBEDDING, table)
        if not self.tied:
            self._expect(HEAD, _shape(head), (c.vocab_size, c.hidden_size))
            yield self._table(HEAD, head)

    def _layer(self, module: str, n: int, k: int, start: int = 0) -> Iterator[NewTensor]:
        """The tensors of one linear layer [n, k]. start: its first row, if it is part of a packed q, k and v."""
        key = _module(module)
        packed = re.sub(r"[qkv]_proj$", "qkv_proj", key)
        rows = slice(None)
        if key not in self._indices and key not in self._products and packed in self._indices:
            key, rows = packed, slice(start, start + n)
        if key in self._indices:
            index = self._indices[key]
            layer = self._linears[index].with_rows(rows)
            self._expect(module, (layer.n, layer.k), (n, k))
            yield from self._quantised(module, index, rows, layer)
        elif key in self._products:
            weight, bias = self._float_weight(self._products[key])
            self._expect(module, weight.shape, (n, k))
            self.floats.append(module)
            yield _float_tensor(f"{module}.weight", weight)
            if bias is not None:
                yield _float_tensor(f"{module}.bias", bias)
        else:
            raise self._absent(f"linear layer {module}")

    def _quantised(self, module: str, index: int, rows: slice, layer: QuantizedLinear) -> Iterator[NewTensor]:
        n, k, group = layer.n, layer.k, layer.group_size
        if layer.bits != BITS:
            self._refuse(module, f"its weights have {layer.bits} bits, and AutoAWQ GEMM holds {BITS}")
        if not layer.has_integer_zero_points:
            self._refuse(module, "its zero points are floats, and AutoAWQ GEMM holds integers")
        if n % len(COLUMNS):
            self._refuse(module, f"N is {n}, and AutoAWQ GEMM holds multiples of {len(COLUMNS)}")
        if k % group:
            self._refuse(module, f"K is {k}, no multiple of group_size {group}")
        if group != (self.group_size or group):
            self._refuse(module, f"group_size is {group}, that of layers before {self.group_size}; AutoAWQ has one")
        self.group_size = group
        with np.errstate(over="ignore"):
            scales = layer.scales.astype(np.float16)
        wrong = scales.astype(np.float32) != layer.scales
        if wrong.any():
            self._refuse(module, f"a scale is {layer.scales[wrong][0]:.9g}, which float16 does not hold exactly")

        def weights() -> Iterator[np.ndarray]:
            yield pack_words(self._linears[index].q[rows])

        yield NewTensor(f"{module}.qweight", "I32", (k, n // len(COLUMNS)), weights)
        yield _held(f"{module}.qzeros", "I32", pack_words(layer.zero_points))
        yield _held(f"{module}.scales", "F16", np.ascontiguousarray(scales.T))
        if layer.bias is not None:
            yield _float_tensor(f"{module}.bias", layer.bias)

    def _float_weight(self, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 [N, K], and the bias if an Add is the only reader of the product and adds a constant."""
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        weight = self._constant(node.input[1], node.name).astype(np.float32, copy=False)
        readers = self.file.consumers.get(node.output[0], [])
        bias = None
        if len(readers) == 1 and readers[0].op_type == "Add":
            others = [name for name in readers[0].input if self.file.is_constant(name)]
            bias = self._constant(others[0], node.name).astype(np.float32).reshape(-1) if others else None
        return weight if transposed else np.ascontiguousarray(weight.T), bias

    def _embedding(self) -> tuple[Table, str]:
        """The table whose rows input_ids select, and the initializer that holds it."""
        kinds = ("Gather", "GatherBlockQuantized")
        nodes = [node for node in self.file.consumers.get("input_ids", []) if node.op_type in kinds]
        if len(nodes) != 1 or nodes[0].input[1] != "input_ids" or not self.file.is_constant(nodes[0].input[0]):
            raise self._absent("embedding, a table that input_ids choose rows of")
        node = nodes[0]
        values = self._constant(node.input[0], node.name)
        source = self._source(node.input[0])
        if node.op_type == "Gather":
            return values if values.dtype == np.float16 else values.astype(np.float32, copy=False), source
        layout = {item.name: item.i for item in node.attribute}
        bits, group = layout.get("bits", 4), layout.get("block_size", 128)
        if any(node.input[3:]) or values.dtype != np.uint8 or bits not in (BITS, HEAD_BITS):
            self._refuse(node.name, "a quantised embedding is uint8 without zero points of its own")
        scales = self._constant(node.input[2], node.name).astype(np.float32).reshape(len(values), -1)
        q = unpack_bits(values.reshape(len(values), -1), bits)[:, : self.config.hidden_size]
        zero_points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        return QuantizedLinear("embed_tokens", q, scales, zero_points, group, bits), source

    def _norm(self, *names: str) -> NewTensor:
        """A norm's weight, by one of several names; torch writes a second "model." before the name."""
        for name in names:
            for found in (name, f"model.{name}"):
                if self.file.is_constant(found):
                    values = self._constant(found, found)
                    self._expect(name, values.shape, (self.config.hidden_size,))
                    return _float_tensor(names[0], values.astype(np.float32))
        raise self._absent(f"constant {names[0]}")

    def _table(self, name: str, table: Table) -> NewTensor:
        if isinstance(table, QuantizedLinear):
            self.tables[name] = table
            return float_table(name, table)
        return _float_tensor(name, table)

    def _source(self, name: str) -> str:
        """The original of a tensor that was only renamed, reshaped or cast."""
        # At most one step per node, because a damaged graph may have a cycle.
        for _ in self.file.graph.node:
            node = self.file.producers.get(name)
            if node is None or node.op_type not in ("Identity", "Reshape", "Cast"):
                break
            name = node.input[0]
        return name

    def _check_rotary(self) -> None:
        """Checks that config.json matches the graph's rotary tables: a difference would not be noticed later."""
        for name, expected in zip(("cos_cache", "sin_cache"), self.config.rotary_cache()):
            if self.file.is_constant(name):
                values = self._constant(name, name)[: len(expected)].astype(np.float32)
                fits = values.shape[1:] == expected.shape[1:]
                if not fits or np.abs(values - expected[: len(values)]).max() > ROTARY_TOLERANCE:
                    problem = "are not those of config.json's rope_theta and rope_scaling"
                    raise UserError(f"{self.file.path}: the rotary tables ({name}) {problem}")

    def _constant(self, name: str, layer: str) -> np.ndarray:
        try:
            return self.file.constant(name, layer)
        except ValueError as error:
            raise UserError(f"{self.file.path}: {name} cannot be read ({one_line(error)})") from None

    def _expect(self, what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise UserError(f"{self.file.path}: {what} is {list(shape)}, and config.json asks for {list(expected)}")

    def _absent(self, what: str) -> UserError:
        return UserError(f"{self.file.path} has no {what} that can be identified by its name or role")

    def _refuse(self, module: str, problem: str) -> NoReturn:
        raise UserError(f"{self.file.path}: layer {module}: {problem}")


def _module(name: str) -> str:
    """The common part of all names of a layer: 0.q_proj, lm_head. Other names are returned unchanged."""
    found = MODULE.search(_dotted(name))
    if found is None:
        return name
    return found[3] or f"{found[1]}.{found[2]}"


def _dotted(name: str) -> str:
    return name.strip("/").replace("/", ".")


def _shape(table: Table) -> tuple[int, ...]:
    return (table.n, table.k) if isinstance(table, QuantizedLinear) else table.shape


def _is_int8_of(head: QuantizedLinear, table: Table) -> bool:
    """Whether a reader would make this head from the embedding itself (see sw.model.lm_head)."""
    if isinstance(table, QuantizedLinear) or table.shape != head.q.shape:
        return False
    made = quantise_int8(table)
    same = (made.bits, made.group_size) == (head.bits, head.group_size) and head.has_integer_zero_points
    pairs = ((made.q, head.q), (made.scales, head.scales), (made.zero_points, head.zero_points))
    return same and all(np.array_equal(a, b) for a, b in pairs)


def _float_tensor(name: str, values: np.ndarray) -> NewTensor:
    """A tensor as float16 if this is exact, else as float32."""
    values = narrowest_exact(values)
    return _held(name, "F16" if values.dtype == np.float16 else "F32", values)


def _held(name: str, kind: str, values: np.ndarray) -> NewTensor:
    return NewTensor(name, kind, values.shape, lambda: iter([values]))
