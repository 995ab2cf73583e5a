# SPDX-License-Identifier: Apache-2.0
"""The KV cache in memory: the place of every byte of a position's key and value. Only this file defines it.

Keys and values of one KV head are two weight streams (:mod:`hw.spec.memory.geometry`), striped over the ports like all
others, so the array reads them at the bus's rate. A mantissa of ``bits`` bits is stored unsigned, with the offset
``2**(bits - 1)``, in planes of ``weight_bits``: plane 0 is the highest.

- keys: the layer ``scores = q keys``. N is positions; K is elements of the head, in groups of 32, each group once for
  every plane. Row exponents and scales hold the powers of two.
- values: the layer ``output = p values``, once for every chunk of 256 positions and every ``tile`` columns of the head.
  K is positions, in groups, each group once for every plane. All scales are the planes' powers of two. So its output
  tiles are, in the stream's order: all chunks of the first ``tile`` columns, all chunks of the next ones, ...
- the values' powers of two are a table of their own, int8 [groups of 32 columns, positions], because they are factors
  of the activations p.

A position is appended by writing whole bytes. With planes of 4 bits, a value's bytes hold two neighbouring columns, as
in all weight streams. A key is one column of its stream, so the nibbles of the keys' stream have another order: a byte
holds one column of two successive rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hw.spec.config import SCALE_BITS, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, StreamLayout, ceil_div
from hw.spec.memory.operands import DATA_ALIGNMENT, weight_bytes, weights_stride
from hw.spec.memory.packing import pack, stripe
from hw.spec.numerics.attention import CHUNK, VALUE_BITS
from hw.spec.numerics.block_float import BLOCK, BlockFloat
from hw.spec.numerics.linear import Weights

LONGEST_CONTEXT = 1 << 15
"""Maximum number of positions of a cache."""
VALUE_GROUP = 64
"""Positions that share a record of the values' header, at most. Longer groups have shorter headers; shorter ones waste
less of a chunk that is not full."""
KEY_BITS = (8, 16)
"""Bits of a key's mantissas."""
PLANE_WIDTHS = (4, 8)
"""``weight_bits`` of hardware with attention: a byte holds whole planes."""
PAIRED_BITS = 4
"""``weight_bits`` with which a byte of the keys' stream holds one column of two successive rows."""
PLANE_COUNTS = (1, 2, 4)
"""Planes of a mantissa: 8 or 16 bits in planes of 4 or 8."""
_BUNDLE = 4
"""Positions that an append writes together, at most. Four keys of 64 columns are written as fast as their rows come."""


def value_group(config: AcceleratorConfig) -> int:
    """Positions that share a record of the values' header."""
    return min(VALUE_GROUP, config.max_group_size)


def value_chunk(config: AcceleratorConfig) -> LayerLayout:
    """The part of a stream of values that is one chunk of ``tile`` columns."""
    return LayerLayout(config, CHUNK * value_planes(config), config.tile, value_group(config))


def value_planes(config: AcceleratorConfig) -> int:
    """Planes of a value."""
    return VALUE_BITS // config.weight_bits


def chunk_groups(config: AcceleratorConfig) -> int:
    """Groups of positions in a chunk, each with all planes."""
    return value_chunk(config).groups // value_planes(config)


def group_beats(config: AcceleratorConfig) -> int:
    """Beats of the body of one group of positions, with all planes."""
    chunk = value_chunk(config)
    return chunk.body_words * chunk.stream.beats_per_word // chunk_groups(config)


def chunk_bits() -> int:
    """Width of a number of chunks of a cache."""
    return (LONGEST_CONTEXT // CHUNK).bit_length()


def tile_step_bits(config: AcceleratorConfig) -> int:
    """Width of the number of bytes on a port from one column tile of the cache to the next."""
    beats = LONGEST_CONTEXT // CHUNK * value_chunk(config).tile_beats
    return beats.bit_length() + (config.port_width // 8).bit_length() - 1


def key_layer(config: AcceleratorConfig, groups: int) -> LayerLayout | None:
    """An output tile of keys with this number of groups, over all planes; None if there is no such stream."""
    try:
        return LayerLayout(config, groups * BLOCK, config.tile, BLOCK)
    except ConfigError:
        return None


def append_bundle(config: AcceleratorConfig) -> int:
    """Positions that an append writes together: neighbours whose bytes are in the same beats of a port.

    Their row exponents, scales, and the bytes of their mantissas are next to each other, at multiples of the bundle's
    bytes. Bundles begin at multiples of this number.
    """
    bundle, record = _BUNDLE, StreamLayout(config).record_bits // 8
    while bundle > 1 and (
        bundle > config.max_tokens
        or config.tile % (2 * bundle)
        or record % (2 * bundle)
        or 2 * bundle > config.port_width // 8
    ):
        bundle //= 2
    return bundle


def check_cache(config: AcceleratorConfig) -> None:
    """Raises ConfigError, with rule and value, unless hardware of this config can have a KV cache at all.

    The smallest caches exist: ``weight_bits`` is 4 or 8, with 8 zero points are integer; with 4 a beat over all ports
    holds two rows of an output tile; a group of 32 elements has time for its scales; and ``max_k`` is at least a chunk
    of 256 positions for all planes of a value. The ports may have any width.
    """
    for cache in (KeyCache(config, BLOCK, 1, max(KEY_BITS)), ValueCache(config, BLOCK, 1)):
        _ = cache.layer


class Bytes(NamedTuple):
    """Bytes to write: ``offsets``, int64 [B], from the beginning of a region; ``values``, uint8 [B]."""

    offsets: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class CacheStream(ABC):
    """What keys and values have in common: the weight stream of one KV head.

    Attributes
    ----------
    head_size : elements of a head, a multiple of 32
    positions : number of positions that the cache can hold

    Raises
    ------
    ConfigError : no cache of this shape exists for this hardware; the message names rule and value
    """

    config: AcceleratorConfig
    head_size: int
    positions: int

    def __post_init__(self) -> None:
        config = self.config
        if config.weight_bits not in PLANE_WIDTHS:
            raise ConfigError(f"a KV cache takes weight_bits of 4 or 8, not {config.weight_bits}")
        if self.mantissa_bits not in KEY_BITS:
            raise ConfigError(f"keys in a KV cache have 8 or 16 bits, not {self.mantissa_bits}")
        if self._sign_offset >> config.zero_point_bits - config.zero_point_signed:
            raise ConfigError("with weight_bits of 8, a KV cache takes integer zero points, not fixed ones")
        if self.head_size < 1 or self.head_size % BLOCK:
            raise ConfigError(f"the head size in a KV cache is a multiple of {BLOCK}, not {self.head_size}")
        if not 1 <= self.positions <= LONGEST_CONTEXT:
            raise ConfigError(f"a KV cache holds 1 to {LONGEST_CONTEXT:,} positions, not {self.positions:,}")
        if self.paired and self.layer.stream.rows_per_word % 2:
            least = 2 * self.layer.stream.row_bits
            raise ConfigError(f"a KV cache takes weight ports of {least} bits together, not {config.beat_bits}")

    @property
    @abstractmethod
    def mantissa_bits(self) -> int:
        """Bits of a mantissa."""

    @property
    @abstractmethod
    def paired(self) -> bool:
        """Whether a byte holds one column of two successive rows, instead of two columns of one row."""

    @property
    @abstractmethod
    def layer(self) -> LayerLayout:
        """The whole stream."""

    @property
    def planes(self) -> int:
        """Planes of a mantissa."""
        return self.mantissa_bits // self.config.weight_bits

    @property
    def plane_factors(self) -> np.ndarray:
        """What a plane's lowest bit is worth, plane 0 first: int64 [planes]."""
        return 1 << self.config.weight_bits * np.arange(self.planes, dtype=np.int64)[::-1]

    @cached_property
    def stride(self) -> int:
        """Bytes from one port's region to the next, unless a descriptor has more."""
        return weights_stride(self.layer)

    @property
    def region_bytes(self) -> int:
        """Bytes of one port's region."""
        return self.layer.beats * self.config.port_width // 8

    @cached_property
    def bytes(self) -> int:
        """Bytes of the stream in memory."""
        return weight_bytes(self.layer)

    @property
    def _sign_offset(self) -> int:
        """The zero point of plane 0; those of the others are 0."""
        return 1 << (self.config.weight_bits - 1 + self.config.fraction_bits)

    def _split(self, mantissas: np.ndarray) -> np.ndarray:
        """Planes of signed mantissas [...]: uint8 [..., planes]."""
        unsigned = mantissas + (1 << (self.mantissa_bits - 1))
        shifts = self.config.weight_bits * np.arange(self.planes)[::-1]
        return (unsigned[..., None] >> shifts & self.config.weight_max).astype(np.uint8)

    def _image(self, scale_mantissas: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """A stream with these scales, and all constant zero points, in the layout of memory: uint8 [bytes]."""
        layer, zeros = self.layer, np.zeros(self.planes, np.int64)
        zeros[0] = self._sign_offset
        weights = Weights(
            np.broadcast_to(np.uint8(0), (layer.n, layer.k)),
            np.broadcast_to(np.tile(zeros, layer.groups // self.planes), (layer.n, layer.groups)),
            np.broadcast_to(scale_mantissas, (layer.n, layer.groups)),
            np.broadcast_to(exponents, layer.n),
        )
        image = np.zeros(self.bytes, np.uint8)
        for port, part in enumerate(stripe(self.config, pack(layer, weights, self.paired))):
            image[port * self.stride :][: len(part)] = part
        return image

    def _offsets(self, tile: int | np.ndarray, inside: np.ndarray, stride: int) -> np.ndarray:
        """Offsets in memory of byte ``inside`` of output tile ``tile``; int64, broadcast."""
        port_bytes = self.config.port_width // 8
        beat, rest = np.divmod(inside, self.config.beat_bytes)
        port, byte = np.divmod(rest, port_bytes)
        return port * stride + (tile * self.layer.tile_beats + beat) * port_bytes + byte

    def _row(self, k: np.ndarray) -> np.ndarray:
        """The first byte of row ``k`` in an output tile's part of the stream; of an even row if rows are paired."""
        stream = self.layer.stream
        if stream.slices_per_word > 1:
            word, row = np.divmod(k, stream.rows_per_word)
        else:
            slices, inside = np.divmod(k, self.config.tile)
            word, row = np.divmod(inside, stream.rows_per_word)
            word = word + slices * stream.words_per_slice
        header = self.config.beat_bytes * self.layer.header_beats
        return header + (word * stream.word_bits + row * stream.row_bits) // 8


@dataclass(frozen=True)
class KeyCache(CacheStream):
    """Keys of one KV head. bits: 8 or 16, of a mantissa."""

    bits: int

    @property
    def mantissa_bits(self) -> int:
        """See :class:`CacheStream`."""
        return self.bits

    @property
    def paired(self) -> bool:
        """See :class:`CacheStream`."""
        return self.config.weight_bits == PAIRED_BITS

    @cached_property
    def layer(self) -> LayerLayout:
        """K: elements of the head, each group of 32 for every plane; N: positions."""
        return LayerLayout(self.config, self.head_size * self.planes, self.positions, BLOCK)

    @property
    def factor_bits(self) -> int:
        """log2 of the lowest plane's scale in the group with the largest exponent: then the highest plane's fits."""
        return SCALE_BITS - 2 - (self.bits - self.config.weight_bits)

    def image(self) -> np.ndarray:
        """An empty cache: uint8 [bytes]."""
        return self._image(np.zeros(1, np.int64), np.zeros(1, np.int64))

    def append(self, slot: int, key: BlockFloat, stride: int) -> Bytes:
        """The bytes of one position: a key with mantissas [head_size] and exponents [head_size / 32].

        The exponents differ by at most :func:`hw.spec.numerics.attention.key_spread`.
        """
        stream, (tile, column) = self.layer.stream, divmod(slot, self.config.tile)
        largest = int(key.exponents.max())
        # A scale mantissa is worth 2**(E - 15).
        exponent = largest - self.factor_bits + SCALE_BITS - 1
        factors = (1 << self.factor_bits) >> (largest - key.exponents)
        scales = (factors[:, None] * self.plane_factors).reshape(-1).astype("<i2")
        records = (stream.exponents_bits + np.arange(self.layer.groups) * stream.record_bits) // 8
        scale_bytes = SCALE_BITS // 8
        # [groups, elements, planes] -> the rows of the stream.
        rows = self._split(key.mantissas).reshape(-1, BLOCK, self.planes).transpose(0, 2, 1).reshape(-1)
        k = np.arange(self.layer.k)
        if self.paired:
            rows, k = rows[::2] | rows[1::2] << np.uint8(4), k[::2]
        places = [
            np.array([column]),
            (records[:, None] + column * scale_bytes + np.arange(scale_bytes)).reshape(-1),
            self._row(k) + column,
        ]
        values = [np.array([exponent], np.int8).view(np.uint8), scales.view(np.uint8), rows]
        return Bytes(self._offsets(tile, np.concatenate(places), stride), np.concatenate(values))

    def repeat(self, activations: np.ndarray) -> np.ndarray:
        """Activations [M, head_size] in the order of K, each group for every plane: [M, layer.k]."""
        groups = activations.reshape(len(activations), -1, 1, BLOCK)
        return np.repeat(groups, self.planes, axis=2).reshape(len(activations), -1)


@dataclass(frozen=True)
class ValueCache(CacheStream):
    """Values of one KV head, of 8 bits."""

    @property
    def mantissa_bits(self) -> int:
        """See :class:`CacheStream`."""
        return VALUE_BITS

    @property
    def paired(self) -> bool:
        """See :class:`CacheStream`."""
        return False

    @property
    def group(self) -> int:
        """Positions of a group."""
        return value_group(self.config)

    @property
    def chunks(self) -> int:
        """Chunks of 256 positions."""
        return ceil_div(self.positions, CHUNK)

    @property
    def column_tiles(self) -> int:
        """Output tiles that hold the columns of a head, for each chunk."""
        return ceil_div(self.head_size, self.config.tile)

    @cached_property
    def layer(self) -> LayerLayout:
        """K: the positions of a chunk, each group for every plane; an output tile for every chunk of a column tile."""
        tiles = self.column_tiles * self.chunks
        return LayerLayout(self.config, CHUNK * self.planes, tiles * self.config.tile, self.group)

    def beats_of(self, positions: int) -> int:
        """Beats that the array takes for the first positions: the last chunk ends with its last group."""
        layer, (whole, rest) = self.layer, divmod(positions, CHUNK)
        beats = whole * layer.tile_beats
        if rest:
            beats += layer.header_beats + ceil_div(rest, self.group) * group_beats(self.config)
        return beats * self.column_tiles

    @property
    def exponent_pitch(self) -> int:
        """Bytes from the exponents of one group of 32 columns to those of the next."""
        return ceil_div(self.chunks * CHUNK, DATA_ALIGNMENT) * DATA_ALIGNMENT

    @property
    def exponent_bytes(self) -> int:
        """Bytes of the table of exponents."""
        return self.exponent_pitch * (self.head_size // BLOCK)

    def image(self) -> np.ndarray:
        """An empty cache: uint8 [bytes]. An empty table of exponents may have any contents."""
        # A scale mantissa is worth 2**(E - 15), and a mantissa's unit 1.
        return self._image(np.tile(self.plane_factors, self.layer.groups // self.planes), np.array([SCALE_BITS - 1]))

    def append(self, slot: int, value: BlockFloat, stride: int) -> Bytes:
        """The bytes of one position: a value's mantissas [head_size]."""
        tile, (chunk, position) = self.config.tile, divmod(slot, CHUNK)
        group, inside = divmod(position, self.group)
        k = (group * self.planes + np.arange(self.planes)) * self.group + inside
        columns = np.zeros((self.column_tiles * tile, self.planes), np.uint8)
        columns[: self.head_size] = self._split(value.mantissas)
        rows = columns.reshape(self.column_tiles, tile, self.planes).transpose(0, 2, 1)
        if self.config.weight_bits == 4:
            rows = rows[..., ::2] | rows[..., 1::2] << np.uint8(4)
        places = self._row(k)[:, None] + np.arange(rows.shape[-1])
        tiles = np.arange(self.column_tiles) * self.chunks + chunk
        return Bytes(self._offsets(tiles[:, None, None], places, stride).reshape(-1), rows.reshape(-1))

    def append_exponents(self, slot: int, value: BlockFloat) -> Bytes:
        """The bytes of one position in the table of exponents: one for each group of 32 columns."""
        groups = np.arange(self.head_size // BLOCK)
        return Bytes(groups * self.exponent_pitch + slot, value.exponents.astype(np.int8).view(np.uint8))

    def mantissas(self, weights: Weights, positions: int) -> np.ndarray:
        """The signed mantissas of the first positions: int64 [positions, head_size]. weights: of :attr:`layer`."""
        chunks, tile = self.chunks, self.config.tile
        planes = weights.q.reshape(self.column_tiles, chunks, tile, -1, self.planes, self.group)
        whole = (planes * self.plane_factors[:, None].astype(np.int16)).sum(axis=-2, dtype=np.int16)
        # [column tiles, chunks, columns, groups, positions] -> [positions, columns]
        rows = whole.transpose(1, 3, 4, 0, 2).reshape(chunks * CHUNK, -1)[:positions, : self.head_size]
        return rows.astype(np.int64) - (1 << (VALUE_BITS - 1))

    def exponents(self, table: np.ndarray, positions: int) -> np.ndarray:
        """The exponents of the first positions: int64 [positions, head_size / 32]. table: uint8 [exponent_bytes]."""
        return table.view(np.int8).reshape(-1, self.exponent_pitch)[:, :positions].T.astype(np.int64)
