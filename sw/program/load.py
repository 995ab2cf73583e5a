# SPDX-License-Identifier: Apache-2.0
"""Writes the weights of a matched decoder into a device's memory, joined and ordered for its programs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from hw.spec.numerics.block_float import BLOCK
from sw.devices.base import Buffer, Device
from sw.devices.pack import LayerPlan, load
from sw.graph.file import OnnxFile
from sw.graph.linears import read_linear, read_norm
from sw.model.linear import QuantizedLinear
from sw.model.parts import Attention, Block, Decoder, HeadNorm, Mismatch, Norm, Projection
from sw.program.heads import pad_columns, pad_keys, pad_rows, padded_size
from sw.program.keys import KeyHeads, key_heads, pair_factors, scale_rows
from sw.program.obstacles import ALIGNED, Obstacle
from sw.program.weights import can_join, interleave, join, rotary_rows, rotated_rows

Progress = Callable[[int, int, str], None]
STEPS = 4
"""Layers of a block, for the progress: q, k and v; o; gate and up; down."""


@dataclass(frozen=True, eq=False)
class LoadedLayer:
    """A layer in the device's memory. name: for messages. bias: float32 [n], or None.

    first: its first column in the results of all layers with the same activations. rotated: heads, from the first one
    on, that the layer's own epilogue rotates.
    """

    name: str
    plan: LayerPlan
    weights: Buffer
    bias: Buffer | None
    first: int = 0
    rotated: int = 0


@dataclass(frozen=True)
class LoadedNorm:
    """A norm. weight: float32 [hidden_size]."""

    name: str
    weight: Buffer
    epsilon: float


@dataclass(frozen=True)
class LoadedHeadNorm:
    """The norm of every head of q or k. weight: float32 [head_size], in the order of the head's elements in memory.

    first: the first column of these heads in q, k and v.
    """

    name: str
    weight: Buffer
    epsilon: float
    first: int
    heads: int
    head_size: int


@dataclass(frozen=True)
class LoadedBlock:
    """One block. qkv: one layer if q, k and v have the same format, else up to three. head_norms: of q and of k.

    keys: what is known about the keys, if the device computes attention; else None. rotary: index of its rotary table
    among the decoder's, or None without a rotation.
    """

    name: str
    input_norm: LoadedNorm
    qkv: tuple[LoadedLayer, ...]
    head_norms: tuple[LoadedHeadNorm, ...]
    o: LoadedLayer
    post_attention_norm: LoadedNorm
    gate_up: LoadedLayer
    down: LoadedLayer
    keys: KeyHeads | None
    rotary: int | None


@dataclass(frozen=True, eq=False)
class LoadedDecoder:
    """A decoder in a device's memory.

    Members
    -------
    head: None if it is not quantized. hidden: hidden_size. qkv_columns: results of q, k and v. vocab: rows of the head.
    head_size: elements of a head. rotaries: tables of the blocks' rotations, each float32 [positions, head_size], see
        `rotary_rows`.
    """

    blocks: tuple[LoadedBlock, ...]
    final_norm: LoadedNorm
    head: LoadedLayer | None
    hidden: int
    qkv_columns: int
    vocab: int
    head_size: int
    rotaries: tuple[np.ndarray, ...]


class Loader:
    """Loads a decoder that `check_decoder` accepts. Use `load`; it raises Obstacle if formats do not fit together.

    context: positions, if attention is on the device, else None. With it heads are padded to a multiple of 32 elements,
    and keys with a bias are divided by factors.
    """

    def __init__(
        self,
        device: Device,
        file: OnnxFile,
        decoder: Decoder,
        progress: Progress | None,
        context: int | None = None,
    ):
        self._context = context
        self._pad = context is not None and attention_of(decoder.blocks[0]).head_size % BLOCK > 0
        self._device, self._file, self._decoder, self._progress = device, file, decoder, progress
        self._buffers: list[Buffer] = []
        # Of all blocks, in the order of their first blocks: those with the same tables have the same index.
        names = [(block.rotary.cos, block.rotary.sin) for block in decoder.blocks if block.rotary]
        self._names = list(dict.fromkeys(names))
        self._tables: list[np.ndarray] = []
        self._done, self._total = 0, STEPS * len(decoder.blocks) + decoder.head.quantized

    def load(self) -> LoadedDecoder:
        """The decoder in the device's memory. Raises Obstacle, UserError if a layer does not fit the hardware, and
        DeviceError if the memory is full; then the memory that it has used is free again.
        """
        try:
            return self._load()
        except BaseException:
            for buffer in self._buffers:
                self._device.free(buffer)
            raise

    def _load(self) -> LoadedDecoder:
        decoder = self._decoder
        first = decoder.blocks[0]
        attention = attention_of(first)
        size = padded_size(attention.head_size) if self._pad else attention.head_size
        self._tables = [self._table(*names, size) for names in self._names]
        blocks = tuple(self._block(index, block) for index, block in enumerate(decoder.blocks))
        return LoadedDecoder(
            blocks=blocks,
            final_norm=self._norm("norm", decoder.final_norm),
            head=self._place("lm_head", [self._read(decoder.head)]) if decoder.head.quantized else None,
            hidden=decoder.head.k,
            qkv_columns=(attention.heads + 2 * attention.kv_heads) * size,
            vocab=decoder.head.n,
            head_size=size,
            rotaries=tuple(self._tables),
        )

    def _block(self, index: int, block: Block) -> LoadedBlock:
        name = f"layers.{index}"
        gate, up = self._read(block.gate_proj), self._read(block.up_proj)
        if not can_join(self._device.config, [gate, up]):
            raise Obstacle(Mismatch(f"{name}.mlp", "gate_proj and up_proj have different bits or groups"))
        qkv, keys = self._qkv(f"{name}.self_attn", block)
        o = self._read(block.o_proj)
        if self._pad:
            o = pad_columns(o, attention_of(block).head_size, self._device.config.tile)
        return LoadedBlock(
            name=name,
            input_norm=self._norm(f"{name}.input_layernorm", block.input_norm),
            qkv=qkv,
            keys=keys,
            rotary=self._index(block),
            head_norms=tuple(self._head_norms(f"{name}.self_attn", block)),
            o=self._place(f"{name}.self_attn.o_proj", [o]),
            post_attention_norm=self._norm(f"{name}.post_attention_layernorm", block.post_attention_norm),
            gate_up=self._place(f"{name}.mlp.gate_up_proj", [interleave("", gate, up)]),
            down=self._place(f"{name}.mlp.down_proj", [self._read(block.down_proj)]),
        )

    def _index(self, block: Block) -> int | None:
        """The index of a block's rotary table."""
        return self._names.index((block.rotary.cos, block.rotary.sin)) if block.rotary else None

    def _table(self, cos: str, sin: str, head_size: int) -> np.ndarray:
        cosines, sines = (self._file.constant(name, name).astype(np.float32) for name in (cos, sin))
        return rotary_rows(cosines, sines, head_size)

    def _qkv(self, part: str, block: Block) -> tuple[tuple[LoadedLayer, ...], KeyHeads | None]:
        """q, k and v, in this order; neighbours are joined where their formats allow it. And what is known of k."""
        attention, rotary = attention_of(block), block.rotary
        layers = [self._read(layer) for layer in (block.q_proj, block.k_proj, block.v_proj)]
        # Heads that the layer's epilogue rotates; those with a norm are rotated after it.
        heads = [0, 0, 0]
        if rotary:
            for index, (count, norm) in enumerate(_heads(attention, block)):
                order = rotated_rows(count, attention.head_size, rotary.size, rotary.interleaved)
                layers[index] = layers[index].with_rows(order)
                heads[index] = 0 if norm else count
        keys = None
        if self._context is not None:
            norm = read_norm(self._file, block.input_norm)
            keys = key_heads(layers[1], layers[0], norm, attention.kv_heads, block.k_norm is not None)
            if self._pad:
                layers = [pad_rows(layer, attention.head_size) for layer in layers]
                keys = pad_keys(keys, attention.head_size)
            index = self._index(block)
            factors = pair_factors(keys, None if index is None else self._tables[index], self._context)
            if factors is not None:
                shared = np.repeat(factors, attention.heads // attention.kv_heads, axis=0)
                layers[:2] = scale_rows(layers[0], shared.reshape(-1)), scale_rows(layers[1], 1 / factors.reshape(-1))
                keys = keys.folded(factors)
        groups = [[0]]
        for index in (1, 2):
            # The rotated heads of a layer are its first ones.
            is_first = heads[index] and not heads[index - 1]
            if not is_first and can_join(self._device.config, [layers[groups[-1][0]], layers[index]]):
                groups[-1].append(index)
            else:
                groups.append([index])
        columns = [0, *accumulate(layer.n for layer in layers)]
        found = []
        for number, group in enumerate(groups):
            name = f"{part}.{''.join('qkv'[index] for index in group)}_proj"
            first = columns[group[0]]
            if first % ALIGNED:
                raise Obstacle(Mismatch(name, f"its first column {first} is no multiple of {ALIGNED}"))
            layer = self._place(
                name,
                [layers[index] for index in group],
                step=not number,
                first=first,
                rotated=sum(heads[index] for index in group),
            )
            found.append(layer)
        return tuple(found), keys

    def _head_norms(self, part: str, block: Block) -> Iterator[LoadedHeadNorm]:
        attention, rotary = attention_of(block), block.rotary
        size, first = attention.head_size, 0
        for name, (heads, norm) in zip(("q_norm", "k_norm"), _heads(attention, block)):
            if norm:
                weight = self._file.constant(norm.weight, f"{part}.{name}").astype(np.float32)
                if rotary:
                    weight = weight[rotated_rows(1, size, rotary.size, rotary.interleaved)]
                yield LoadedHeadNorm(f"{part}.{name}", self._write(weight), norm.epsilon, first, heads, size)
            first += heads * size

    def _read(self, part: Projection) -> QuantizedLinear:
        layer = read_linear(self._file, part)
        assert isinstance(layer, QuantizedLinear), "check_decoder refuses other layers"
        return layer

    def _place(
        self, name: str, layers: Sequence[QuantizedLinear], *, step: bool = True, first: int = 0, rotated: int = 0
    ) -> LoadedLayer:
        """Writes a layer, joined from several. step: whether it counts for the progress."""
        if step and self._progress:
            self._progress(self._done, self._total, name)
        self._done += step
        joined = join(name, layers)
        plan, weights = load(self._device, joined)
        self._buffers.append(weights)
        if (plan.layout.k // plan.planes) % ALIGNED:
            problem = f"its K of {plan.layout.k // plan.planes} with padding is no multiple of {ALIGNED}"
            raise Obstacle(Mismatch(name, problem))
        bias = None if joined.bias is None else self._write(joined.bias)
        return LoadedLayer(name, plan, weights, bias, first, rotated)

    def _norm(self, name: str, norm: Norm) -> LoadedNorm:
        return LoadedNorm(name, self._write(read_norm(self._file, norm)), norm.epsilon)

    def _write(self, values: np.ndarray) -> Buffer:
        buffer = self._device.alloc(values.nbytes)
        self._buffers.append(buffer)
        self._device.write(buffer, values)
        return buffer


def attention_of(block: Block) -> Attention:
    """The attention of a block that `check_decoder` accepts."""
    assert isinstance(block.attention, Attention), "check_decoder refuses other attention"
    return block.attention


def _heads(attention: Attention, block: Block) -> tuple[tuple[int, HeadNorm | None], ...]:
    """The number of heads of queries and of keys, and their norms."""
    return (attention.heads, block.q_norm), (attention.kv_heads, block.k_norm)
