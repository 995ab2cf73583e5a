# SPDX-License-Identifier: Apache-2.0
"""The reasons why a graph cannot be compiled, found without reading its weights."""

from collections.abc import Iterator

from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.numerics.vector import PARTIAL_SUMS
from hw.spec.ops.epilogue import HEAD_UNIT, MAX_HEAD
from sw.graph.file import OnnxFile
from sw.graph.nodes import SAME_VALUES
from sw.model.parts import Attention, Block, Decoder, HeadNorm, Mismatch, Projection, Rotary

ALIGNED = DATA_ALIGNMENT // FLOAT_BYTES
"""Rows of float32 numbers follow each other without a gap if they have a multiple of this number of columns."""
POSITION_IDS = "position_ids"
"""Input of the graph with the position of each token."""


class Obstacle(Exception):
    """Raised if a decoder cannot be compiled. mismatch: the reason."""

    def __init__(self, mismatch: Mismatch):
        super().__init__(str(mismatch))
        self.mismatch = mismatch


def check_decoder(file: OnnxFile, decoder: Decoder | Mismatch, context: int) -> Decoder:
    """The decoder, if its programs compute what the graph does; context: positions. Raises Obstacle if not."""
    if isinstance(decoder, Mismatch):
        raise Obstacle(decoder)
    for mismatch in _mismatches(file, decoder, context):
        raise Obstacle(mismatch)
    return decoder


def _mismatches(file: OnnxFile, decoder: Decoder, context: int) -> Iterator[Mismatch]:
    hidden = decoder.head.k
    if hidden % ALIGNED or hidden % PARTIAL_SUMS:
        yield Mismatch("model", f"its hidden size {hidden} is no multiple of {ALIGNED}")
    shapes = set()
    for index, block in enumerate(decoder.blocks):
        attention = block.attention
        if isinstance(attention, Mismatch):
            yield attention
        else:
            shapes.add((attention.heads, attention.kv_heads, attention.head_size))
            yield from _block(file, f"layers.{index}", block, attention, context)
    if len(shapes) > 1:
        yield Mismatch("layers", "their numbers or sizes of heads differ")
    # A head that is not quantized stays in the graph.
    if decoder.head.quantized and decoder.head.output not in _same(file, decoder.logits):
        yield Mismatch("lm_head", f"its output {decoder.head.output} is not the logits")


def _block(file: OnnxFile, part: str, block: Block, attention: Attention, context: int) -> Iterator[Mismatch]:
    for module, projection in block.projections.items():
        yield from _quantized(file, f"{part}.{module}", projection)
    for name, norm in (("q_norm", block.q_norm), ("k_norm", block.k_norm)):
        if norm is not None:
            yield from _head_norm(file, f"{part}.self_attn.{name}", norm, attention.head_size)
    for name, projection in (("self_attn.o_proj", block.o_proj), ("mlp.down_proj", block.down_proj)):
        if projection.bias:
            yield Mismatch(f"{part}.{name}", "a bias besides the residual")
    size = attention.head_size
    columns = block.q_proj.n + block.k_proj.n + block.v_proj.n
    if size % HEAD_UNIT or size > MAX_HEAD or columns % ALIGNED:
        problem = f"heads of {size} elements, {columns} in all: not a multiple of {HEAD_UNIT} and {ALIGNED}"
        yield Mismatch(f"{part}.self_attn", problem)
    for name, projection in (("self_attn.q_proj", block.q_proj), ("mlp.down_proj", block.down_proj)):
        if projection.k % ALIGNED:
            yield Mismatch(f"{part}.{name}", f"its in_features {projection.k} are no multiple of {ALIGNED}")
    if block.rotary:
        yield from _rotary(file, f"{part}.self_attn", block.rotary, context)


def _head_norm(file: OnnxFile, part: str, norm: HeadNorm, size: int) -> Iterator[Mismatch]:
    if size % ALIGNED:
        yield Mismatch(part, f"a norm of every head, of {size} elements: not a multiple of {ALIGNED}")
    if not file.is_constant(norm.weight) or file.shape(norm.weight, part) != (size,):
        yield Mismatch(part, f"its weight {norm.weight} is no constant of the {size} elements of a head")


def _quantized(file: OnnxFile, part: str, projection: Projection) -> Iterator[Mismatch]:
    if not projection.quantized:
        node = file.producers[projection.product]
        yield Mismatch(part, "its weights are not quantized", node.op_type, projection.name)


def _rotary(file: OnnxFile, part: str, rotary: Rotary, context: int) -> Iterator[Mismatch]:
    tables = rotary.cos, rotary.sin
    if not rotary.size or not all(map(file.is_constant, tables)):
        yield Mismatch(part, "the tables of its rotation are not constants")
    elif (positions := min(file.shape(table, table)[0] for table in tables)) < context:
        yield Mismatch(part, f"the tables of its rotation have {positions} positions, and the context {context}")
    if rotary.position_ids not in ("", POSITION_IDS):
        yield Mismatch(part, f"its rotation reads positions from {rotary.position_ids}")


def _same(file: OnnxFile, tensor: str) -> set[str]:
    """A tensor, and those with the same values before it."""
    found = {tensor}
    # The number of steps is limited, because a damaged graph may have cycles.
    for _ in file.graph.node:
        node = file.producers.get(tensor)
        if node is None or node.op_type not in SAME_VALUES:
            break
        tensor = node.input[0]
        found.add(tensor)
    return found
