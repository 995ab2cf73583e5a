# SPDX-License-Identifier: Apache-2.0
"""Writes a quantized ONNX decoder as an AutoAWQ GEMM checkpoint: the inverse of sw.awq_export, and as exact.

The graph's layers, norms and biases are found by what they do, whatever their names (see sw.graph.match). The shape is
that of config.json beside the graph. The folder gets model.safetensors, config.json, the tokenizer's files and, for
tables of integers, their scales (see sw.checkpoints.integer_tables).

Layers keep q, zero points and scales. AutoAWQ and transformers compute in float16. Values that are not exact in float16
(folded norm weights, for example) are stored as float32, and these programs round them when they load them. They read
an integer table as float16 weights, like any head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from sw.checkpoints.autoawq import BITS, COLUMNS, pack_words
from sw.checkpoints.autoawq_folder import write_config, write_text_files
from sw.checkpoints.huggingface import decoder_config, family_of, text_settings
from sw.checkpoints.integer_tables import float_table, write_scales
from sw.checkpoints.safetensors_file import NewTensor, write_safetensors
from sw.checkpoints.settings import Settings, read_settings
from sw.common.atomic import atomic_directory
from sw.common.bits import unpack_bits
from sw.common.errors import UserError, one_line
from sw.common.status_line import Progress
from sw.graph.file import expect_names
from sw.graph.linears import find_linears, read_linear, read_norm
from sw.graph.match import match_decoder
from sw.graph.nodes import attributes, name_of
from sw.model.decoder import PROJECTIONS
from sw.model.families import FAMILIES
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import Table, narrowest_exact, quantize_int8
from sw.model.parts import Block, Decoder, Embedding, Mismatch, Norm, Projection

HEAD_MODULE = "lm_head"
EMBEDDING, HEAD = "model.embed_tokens.weight", f"{HEAD_MODULE}.weight"
HEAD_BITS = 8
ROTARY_TOLERANCE = 0.05
"""Tolerance of cosines and sines: tables made in float32 differ by 0.01 at the end of a long context."""


def check_family(settings: Settings) -> None:
    """Raises UserError for families that cannot be written. settings: config.json beside the ONNX model."""
    name, family = family_of(settings)
    if not family.autoawq:
        families = " and ".join(name for name, family in FAMILIES.items() if family.autoawq)
        problem = f"AutoAWQ folders are written for {families} alone, not for {name}; the ONNX format holds it"
        raise UserError(f"{settings.path.parent}: {problem}")


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

    group_size: that of all quantized layers. floats: modules that are not quantized. tables: integer tables. tied:
    whether the head is the embedding.
    """

    def __init__(self, path: Path):
        self.folder = path.parent
        self.settings = read_settings(self.folder / "config.json", required=True)
        check_family(self.settings)
        self.config = decoder_config(self.settings)
        # Raises UserError here, because a reader of the folder needs these settings.
        text_settings(self.folder, self.settings)
        self.file = find_linears(path).file
        expect_names(self.file)
        self._parts = match_decoder(self.file)
        self._check_rotary()
        self.group_size = 0
        self.floats: list[str] = []
        self.tables: dict[str, QuantizedLinear] = {}
        self.tied = False

    def block(self, index: int) -> Iterator[NewTensor]:
        """The tensors of one layer."""
        path = f"model.layers.{index}"
        parts = self._block(index)
        yield self._norm(f"{path}.input_layernorm.weight", parts.input_norm)
        for name, shape in self.config.projection_shapes().items():
            if name == "gate_proj":
                yield self._norm(f"{path}.post_attention_layernorm.weight", parts.post_attention_norm)
            yield from self._layer(f"{path}.{PROJECTIONS[name]}", getattr(parts, name), shape)

    def ends(self) -> Iterator[NewTensor]:
        """The tensors of embedding, last norm and head."""
        c = self.config
        parts = self._decoder()
        yield self._norm("model.norm.weight", parts.final_norm)
        table, source = self._embedding(parts.embedding)
        self._expect(EMBEDDING, _shape(table), (c.vocab_size, c.hidden_size))
        shared = self._source(self.file.producers[parts.head.product].input[1]) == source
        head = read_linear(self.file, parts.head)
        if isinstance(head, QuantizedLinear):
            if head.bits == BITS and not shared and not head.n % len(COLUMNS):
                yield self._table(EMBEDDING, table)
                yield from self._layer("lm_head", parts.head, (c.vocab_size, c.hidden_size))
                return
            if head.bits not in (BITS, HEAD_BITS) or head.bias is not None:
                self._refuse("lm_head", f"a head has {BITS} or {HEAD_BITS} bits and no bias, and not {head.bits} bits")
            self.tied = shared or _is_int8_of(head, table)
        elif head.bias is not None:
            self._refuse("lm_head", "it has a bias, and a checkpoint's head has none")
        else:
            self.tied = shared
            head = head.weight
        yield self._table(EMBEDDING, table)
        if not self.tied:
            self._expect(HEAD, _shape(head), (c.vocab_size, c.hidden_size))
            yield self._table(HEAD, head)

    def _decoder(self) -> Decoder:
        if isinstance(self._parts, Mismatch):
            part = self._parts.part if self._parts.part == HEAD_MODULE else f"model.{self._parts.part}"
            kind = "linear layer" if part.endswith(("_proj", HEAD_MODULE)) else "known form of"
            raise self._absent(f"{kind} {part}", f": {self._parts.what}")
        return self._parts

    def _block(self, index: int) -> Block:
        blocks = self._decoder().blocks
        if index >= len(blocks):
            raise self._absent(f"constant model.layers.{index}.input_layernorm.weight")
        if len(blocks) > self.config.layer_count:
            problem = f"the graph has {len(blocks)} layers, and config.json says {self.config.layer_count}"
            raise UserError(f"{self.file.path}: {problem}")
        block = blocks[index]
        if block.q_norm or block.k_norm:
            self._refuse(f"model.layers.{index}.self_attn", "it normalises its heads, and the family has no such norms")
        if block.rotary and block.rotary.interleaved:
            self._refuse(f"model.layers.{index}.self_attn", "it rotates neighbours (rotary_interleaved), not halves")
        return block

    def _layer(self, module: str, part: Projection, shape: tuple[int, int]) -> Iterator[NewTensor]:
        """The tensors of one linear layer [n, k], or of its part of a packed q, k and v."""
        layer = read_linear(self.file, part)
        self._expect(module, (layer.n, layer.k), shape)
        if isinstance(layer, QuantizedLinear):
            yield from self._quantized(module, part, layer)
            return
        self.floats.append(module)
        yield _float_tensor(f"{module}.weight", layer.weight)
        if layer.bias is not None:
            yield _float_tensor(f"{module}.bias", layer.bias)

    def _quantized(self, module: str, part: Projection, layer: QuantizedLinear) -> Iterator[NewTensor]:
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
            again = read_linear(self.file, part)
            assert isinstance(again, QuantizedLinear)
            yield pack_words(again.q)

        yield NewTensor(f"{module}.qweight", "I32", (k, n // len(COLUMNS)), weights)
        yield _held(f"{module}.qzeros", "I32", pack_words(layer.zero_points))
        yield _held(f"{module}.scales", "F16", np.ascontiguousarray(scales.T))
        if layer.bias is not None:
            yield _float_tensor(f"{module}.bias", layer.bias)

    def _embedding(self, part: Embedding) -> tuple[Table, str]:
        """The table that input_ids choose rows of, and the initializer that holds it."""
        node = next(node for node in self.file.consumers[part.ids] if name_of(node) == part.node)
        values = self._constant(node.input[0], node.name)
        source = self._source(node.input[0])
        if node.op_type == "Gather":
            return values if values.dtype == np.float16 else values.astype(np.float32, copy=False), source
        layout = attributes(node)
        bits, group = layout.get("bits", 4), layout.get("block_size", 128)
        if any(node.input[3:]) or values.dtype != np.uint8 or bits not in (BITS, HEAD_BITS):
            self._refuse(node.name, "a quantized embedding is uint8 without zero points of its own")
        scales = self._constant(node.input[2], node.name).astype(np.float32).reshape(len(values), -1)
        q = unpack_bits(values.reshape(len(values), -1), bits)[:, : self.config.hidden_size]
        zero_points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        return QuantizedLinear("embed_tokens", q, scales, zero_points, group, bits), source

    def _norm(self, name: str, norm: Norm) -> NewTensor:
        values = read_norm(self.file, norm)
        self._expect(name, values.shape, (self.config.hidden_size,))
        return _float_tensor(name, values)

    def _table(self, name: str, table: Table) -> NewTensor:
        if isinstance(table, QuantizedLinear):
            self.tables[name] = table
            return float_table(name, table)
        return _float_tensor(name, table)

    def _source(self, name: str) -> str:
        """The tensor that others only rename, reshape or transpose."""
        # At most one step per node, because a damaged graph may have a cycle.
        for _ in self.file.graph.node:
            node = self.file.producers.get(name)
            if node is None or node.op_type not in ("Identity", "Reshape", "Cast", "Transpose"):
                break
            name = node.input[0]
        return name

    def _check_rotary(self) -> None:
        """Checks the graph's rotary tables against config.json; no later step would detect a difference."""
        blocks = () if isinstance(self._parts, Mismatch) else self._parts.blocks
        found = [(block.rotary.cos, block.rotary.sin) for block in blocks if block.rotary]
        expected_tables = self.config.rotary_cache()
        tables = dict(pair for names in found for pair in zip(names, expected_tables))
        for name, expected in tables.items():
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

    def _absent(self, what: str, why: str = "") -> UserError:
        return UserError(f"{self.file.path} has no {what} that can be identified by its name or role{why}")

    def _refuse(self, module: str, problem: str) -> NoReturn:
        raise UserError(f"{self.file.path}: layer {module}: {problem}")


def _shape(table: Table) -> tuple[int, ...]:
    return (table.n, table.k) if isinstance(table, QuantizedLinear) else table.shape


def _is_int8_of(head: QuantizedLinear, table: Table) -> bool:
    """Whether a reader would make this head from the embedding itself (see sw.model.lm_head)."""
    if isinstance(table, QuantizedLinear) or table.shape != head.q.shape:
        return False
    made = quantize_int8(table)
    same = (made.bits, made.group_size) == (head.bits, head.group_size) and head.has_integer_zero_points
    pairs = ((made.q, head.q), (made.scales, head.scales), (made.zero_points, head.zero_points))
    return same and all(np.array_equal(a, b) for a, b in pairs)


def _float_tensor(name: str, values: np.ndarray) -> NewTensor:
    """A tensor as float16 if this is exact, else as float32."""
    values = narrowest_exact(values)
    return _held(name, "F16" if values.dtype == np.float16 else "F32", values)


def _held(name: str, kind: str, values: np.ndarray) -> NewTensor:
    return NewTensor(name, kind, values.shape, lambda: iter([values]))
