# SPDX-License-Identifier: Apache-2.0
"""The weight stream: where every bit of a layer's weights, scales and zero points lies. No other file knows.

A layer is one sequential stream of beats. For each output tile (``tile`` consecutive output rows):

- header: ``tile`` row exponents; then per group one *record*: ``tile`` scale mantissas, ``tile`` zero points.
  Packed without gaps, padded once to a beat.
- body: for each group, for each K-slice, ``tile x tile`` weights, row (along K) major, column n in ascending bits.

Everything is little-endian: the first element lies in the lowest bits of the first byte. The RTL handles the body in
*words*: as many whole K rows as a beat holds (and at least one, taking several beats where ports are narrow).
"""

from dataclasses import dataclass
from math import gcd

import numpy as np

from hw.spec.config import EXPONENT_BITS, MAX_N, SCALE_BITS, AcceleratorConfig, ConfigError
from hw.spec.numerics.linear import Weights


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class StreamLayout:
    """What one config fixes about the stream, whatever the layer."""

    config: AcceleratorConfig

    # Body

    @property
    def row_bits(self) -> int:
        """Bits of one K row of a slice: ``tile`` weights."""
        return self.config.tile * self.config.weight_bits

    @property
    def beats_per_word(self) -> int:
        """Beats that make one word; more than 1 only where a beat is shorter than a row."""
        return ceil_div(self.row_bits, self.config.beat_bits)

    @property
    def word_bits(self) -> int:
        """Bits of a word, unused ones included."""
        return self.beats_per_word * self.config.beat_bits

    @property
    def slices_per_word(self) -> int:
        """Slices in one word; more than 1 only where a slice is smaller than half a beat."""
        return max(1, self.word_bits // self.row_bits // self.config.tile)

    @property
    def rows_per_word(self) -> int:
        """Rows in one word: a part of one slice, or all of ``slices_per_word`` slices."""
        rows = self.word_bits // self.row_bits
        return min(rows, self.slices_per_word * self.config.tile)

    @property
    def words_per_slice(self) -> int:
        """Words of one slice (1 where a word holds several slices): the cycles that a slice takes at M = 1."""
        return ceil_div(self.config.tile, self.rows_per_word)

    def row_delay(self, row: int) -> int:
        """Cycles between the pop of the word that holds ``row`` and the arrival of the first token at that row."""
        return row - row // self.rows_per_word

    @property
    def word_fifo_depth(self) -> int:
        """Words that wait for the array: two slices, and what arrives while a header is being read."""
        return 1 << (2 * self.words_per_slice + 15).bit_length()

    # Header

    @property
    def exponents_bits(self) -> int:
        """Bits of the row exponents that open a header."""
        return self.config.tile * EXPONENT_BITS

    @property
    def record_bits(self) -> int:
        """Bits of one group's scale mantissas and zero points."""
        return self.config.tile * (SCALE_BITS + self.config.zero_point_bits)

    @property
    def unit_bits(self) -> int:
        """Granule of the header: exponents, records and beats are whole multiples of it."""
        return gcd(self.exponents_bits, self.record_bits, self.config.beat_bits)

    @property
    def beat_units(self) -> int:
        """Units of one beat."""
        return self.config.beat_bits // self.unit_bits

    @property
    def exponents_units(self) -> int:
        """Units of the row exponents."""
        return self.exponents_bits // self.unit_bits

    @property
    def record_units(self) -> int:
        """Units of one record."""
        return self.record_bits // self.unit_bits

    @property
    def exponents_cycles(self) -> int:
        """Cycles that it takes to read the row exponents: one to see that they are there, and one a beat's worth."""
        return 1 + ceil_div(self.exponents_units, self.beat_units)

    @property
    def record_cycles(self) -> int:
        """Cycles that it takes to read one record, as of the exponents."""
        return 1 + ceil_div(self.record_units, self.beat_units)

    @property
    def min_group_slices(self) -> int:
        """Slices of the shortest group during whose body the next group's record can be read."""
        return ceil_div(self.record_cycles, self.words_per_slice)

    @property
    def overhead(self) -> float:
        """Stream bits over ideal bits of the typical layer, less one: ideal is weights, scales, zero points alone."""
        layer = self.typical_layer
        ideal = self.config.tile * layer.k * self.config.weight_bits + layer.groups * self.record_bits
        return layer.beats * self.config.beat_bits / ideal - 1

    @property
    def typical_layer(self) -> "LayerLayout":
        """One output tile of K = 896 in groups of 128, or as much of either as the config holds."""
        config = self.config
        size = min(128, config.max_group_size, config.max_k)
        return LayerLayout(config, k=min(896, config.max_k) // size * size, n=config.tile, group_size=size)

    @property
    def array_factor(self) -> float:
        """Slices that a beat holds over the one that the array takes per cycle; above 1 the array is the limit."""
        return self.slices_per_word / self.beats_per_word


@dataclass(frozen=True)
class LayerLayout:
    """One layer's share of the stream. ``k`` is padded to whole groups already; ``n`` is the true N.

    Raises
    ------
    ConfigError : the layer does not fit the config; the message names rule and value
    """

    config: AcceleratorConfig
    k: int
    n: int
    group_size: int

    def __post_init__(self) -> None:
        config, size = self.config, self.group_size
        if not 1 <= self.n <= MAX_N:
            raise ConfigError(f"N is 1 to {MAX_N:,}, not {self.n:,}")
        if size < 1 or size % config.tile:
            raise ConfigError(f"group_size is a multiple of the tile ({config.tile}), not {size}")
        if size > config.max_group_size:
            raise ConfigError(f"group_size is at most max_group_size ({config.max_group_size}), not {size}")
        if self.k < 1 or self.k % size:
            raise ConfigError(f"K is a whole number of groups of {size}, not {self.k:,}")
        if self.k > config.max_k:
            raise ConfigError(f"K is at most max_k ({config.max_k:,}), not {self.k:,}")
        # Records are read from the header while the group before streams.
        least = self.stream.min_group_slices
        if self.group_slices < least:
            raise ConfigError(
                f"group_size is at least {least * config.tile} at tile {config.tile}, so that a group's scales are read"
                f" in the time that its weights take, not {size}"
            )

    @property
    def stream(self) -> StreamLayout:
        """The config's part of the layout."""
        return StreamLayout(self.config)

    @property
    def groups(self) -> int:
        """Groups along K."""
        return self.k // self.group_size

    @property
    def group_slices(self) -> int:
        """Slices of one group."""
        return self.group_size // self.config.tile

    @property
    def out_tiles(self) -> int:
        """Output tiles, the last one perhaps partly filled."""
        return ceil_div(self.n, self.config.tile)

    @property
    def last_columns(self) -> int:
        """Columns in use in the last output tile."""
        return self.n - (self.out_tiles - 1) * self.config.tile

    @property
    def slices(self) -> int:
        """K-slices of one output tile."""
        return self.groups * self.group_slices

    @property
    def header_cycles(self) -> int:
        """Cycles that it takes to read one output tile's header."""
        return self.stream.exponents_cycles + self.groups * self.stream.record_cycles

    @property
    def header_beats(self) -> int:
        """Beats of one output tile's header."""
        units = self.stream.exponents_units + self.groups * self.stream.record_units
        return ceil_div(units, self.stream.beat_units)

    @property
    def body_words(self) -> int:
        """Words of one output tile's body."""
        return ceil_div(self.slices, self.stream.slices_per_word) * self.stream.words_per_slice

    @property
    def tile_beats(self) -> int:
        """Beats of one output tile."""
        return self.header_beats + self.body_words * self.stream.beats_per_word

    @property
    def beats(self) -> int:
        """Beats of the whole layer."""
        return self.out_tiles * self.tile_beats


def fit_layer(config: AcceleratorConfig, k: int, n: int, group_size: int) -> LayerLayout:
    """The cheapest layout, in beats, of a layer with in_features ``k`` and groups of ``group_size``.

    A group may be split into equal parts that share scale and zero point: all sums are exact, so no result changes.
    That is how groups longer than ``max_group_size`` fit, one group over all of K among them, and how a K that is not
    a whole number of groups needs less padding.

    Raises
    ------
    ConfigError : no layout fits; the message names rule and value
    """
    if k < 1 or group_size < 1:
        raise ConfigError(f"K and group_size are at least 1, not {k} and {group_size}")
    if group_size >= k:
        sizes = range(config.tile, config.max_group_size + 1, config.tile)
    elif group_size % config.tile:
        raise ConfigError(f"group_size is a multiple of the tile ({config.tile}), not {group_size}")
    else:
        sizes = [
            size
            for size in range(config.tile, min(group_size, config.max_group_size) + 1, config.tile)
            if group_size % size == 0
        ]
    layouts, reason = [], None
    for size in sizes:
        try:
            layouts.append(LayerLayout(config, ceil_div(k, size) * size, n, size))
        except ConfigError as error:
            reason = error
    if not layouts:
        assert reason is not None
        raise reason
    return min(layouts, key=lambda layout: (layout.beats, -layout.group_size))


# Packing


def _to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """[..., n] integers -> [..., n * width] bits as uint8, little-endian, two's complement."""
    raw = np.ascontiguousarray(values.astype("<i8")).view(np.uint8)
    bits = np.unpackbits(raw.reshape(*values.shape, 8), axis=-1, bitorder="little", count=width)
    return bits.reshape(*values.shape[:-1], values.shape[-1] * width)


def _from_bits(bits: np.ndarray, width: int, signed: bool) -> np.ndarray:
    """Inverse of :func:`_to_bits`: int64."""
    bits = bits.reshape(*bits.shape[:-1], -1, width)
    fill = bits[..., -1:] if signed else np.zeros_like(bits[..., -1:])
    whole = np.concatenate([bits, np.repeat(fill, 64 - width, axis=-1)], axis=-1)
    return np.packbits(whole, axis=-1, bitorder="little").view("<i8")[..., 0].astype(np.int64)


def _pad(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def _pack_header(layer: LayerLayout, weights: Weights) -> np.ndarray:
    config, tile, tiles = layer.config, layer.config.tile, layer.out_tiles
    rows = tiles * tile
    exponents = _pad(weights.exponents, 0, rows).reshape(tiles, tile)

    def per_group(values: np.ndarray) -> np.ndarray:
        return _pad(values, 0, rows).reshape(tiles, tile, layer.groups).transpose(0, 2, 1)

    records = np.concatenate(
        [
            _to_bits(per_group(weights.scale_mantissas), SCALE_BITS),
            _to_bits(per_group(weights.zero_points), config.zero_point_bits),
        ],
        axis=-1,
    )
    bits = np.concatenate([_to_bits(exponents, EXPONENT_BITS), records.reshape(tiles, -1)], axis=1)
    bits = _pad(bits, 1, layer.header_beats * config.beat_bits)
    return np.packbits(bits, axis=1, bitorder="little").reshape(tiles, layer.header_beats, config.beat_bytes)


def _unpack_header(layer: LayerLayout, header: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    config, tile, tiles, stream = layer.config, layer.config.tile, layer.out_tiles, layer.stream
    bits = np.unpackbits(np.ascontiguousarray(header).reshape(tiles, -1), axis=1, bitorder="little")
    exponents = _from_bits(bits[:, : stream.exponents_bits], EXPONENT_BITS, signed=True)
    records = bits[:, stream.exponents_bits :][:, : layer.groups * stream.record_bits]
    records = records.reshape(tiles, layer.groups, stream.record_bits)
    scales = _from_bits(records[..., : tile * SCALE_BITS], SCALE_BITS, signed=True)
    zeros = _from_bits(records[..., tile * SCALE_BITS :], config.zero_point_bits, config.zero_point_signed)

    def per_row(values: np.ndarray) -> np.ndarray:
        return values.transpose(0, 2, 1).reshape(tiles * tile, layer.groups)[: layer.n]

    return per_row(zeros), per_row(scales), exponents.reshape(-1)[: layer.n]


def _body_shape(layer: LayerLayout) -> tuple[int, int, int]:
    """Rows of one output tile's body as (runs, rows with weights, rows with padding) per run of whole words."""
    stream, tile = layer.stream, layer.config.tile
    if stream.slices_per_word > 1:
        return 1, layer.slices * tile, layer.body_words * stream.rows_per_word
    return layer.slices, tile, stream.words_per_slice * stream.rows_per_word


def _pack_body(layer: LayerLayout, q: np.ndarray) -> np.ndarray:
    config, stream, tile, tiles = layer.config, layer.stream, layer.config.tile, layer.out_tiles
    runs, used, padded = _body_shape(layer)
    rows = _pad(q, 0, tiles * tile).reshape(tiles, tile, layer.k).transpose(0, 2, 1)
    rows = _pad(np.ascontiguousarray(rows).reshape(tiles, runs, used, tile), 2, padded)
    words = rows.reshape(tiles, layer.body_words, stream.rows_per_word * tile)
    width = config.weight_bits
    if 8 % width == 0:
        packed = words[..., 0 :: 8 // width].copy()
        for index in range(1, 8 // width):
            packed |= words[..., index :: 8 // width] << np.uint8(index * width)
    else:
        packed = np.packbits(_to_bits(words, width), axis=-1, bitorder="little")
    packed = _pad(packed, 2, stream.word_bits // 8)
    return packed.reshape(tiles, -1, config.beat_bytes)


def _unpack_body(layer: LayerLayout, body: np.ndarray) -> np.ndarray:
    config, stream, tile, tiles = layer.config, layer.stream, layer.config.tile, layer.out_tiles
    runs, used, padded = _body_shape(layer)
    packed = np.ascontiguousarray(body).reshape(tiles, layer.body_words, stream.word_bits // 8)
    width, count = config.weight_bits, stream.rows_per_word * tile
    if 8 % width == 0:
        words = np.empty((*packed.shape[:2], count), np.uint8)
        used_bytes = packed[..., : count * width // 8]
        for index in range(8 // width):
            words[..., index :: 8 // width] = (used_bytes >> np.uint8(index * width)) & np.uint8(config.weight_max)
    else:
        bits = np.unpackbits(packed, axis=-1, bitorder="little", count=count * width)
        words = _from_bits(bits, width, signed=False).astype(np.uint8)
    rows = words.reshape(tiles, runs, padded, tile)[:, :, :used].reshape(tiles, layer.k, tile)
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(tiles * tile, layer.k)[: layer.n]


def pack(layer: LayerLayout, weights: Weights) -> np.ndarray:
    """The weight stream of a layer: uint8 [beats, beat_bytes]. Rows beyond N get zero scales.

    Raises
    ------
    ConfigError : the arrays do not have the layer's shape, or a weight does not fit ``weight_bits``
    """
    if weights.q.shape != (layer.n, layer.k) or weights.scale_mantissas.shape != (layer.n, layer.groups):
        raise ConfigError(
            f"the layer is [{layer.n}, {layer.k}] in {layer.groups} groups, "
            f"not {list(weights.q.shape)} in {weights.scale_mantissas.shape[1]}"
        )
    if weights.q.size and int(weights.q.max()) > layer.config.weight_max:
        raise ConfigError(f"a weight is at most {layer.config.weight_max}, not {int(weights.q.max())}")
    header, body = _pack_header(layer, weights), _pack_body(layer, weights.q)
    return np.concatenate([header, body], axis=1).reshape(layer.beats, layer.config.beat_bytes)


def unpack(layer: LayerLayout, beats: np.ndarray) -> Weights:
    """Inverse of :func:`pack`."""
    shape = (layer.beats, layer.config.beat_bytes)
    if beats.shape != shape or beats.dtype != np.uint8:
        raise ConfigError(f"the layer's stream is uint8 {list(shape)}, not {beats.dtype} {list(beats.shape)}")
    tiles = beats.reshape(layer.out_tiles, layer.tile_beats, layer.config.beat_bytes)
    zeros, scales, exponents = _unpack_header(layer, tiles[:, : layer.header_beats])
    return Weights(_unpack_body(layer, tiles[:, layer.header_beats :]), zeros, scales, exponents)


def stripe(config: AcceleratorConfig, beats: np.ndarray) -> np.ndarray:
    """Split beats over the ports: uint8 [ports, beats * port_bytes], each row one linear region of memory."""
    parts = beats.reshape(len(beats), config.ports, config.port_width // 8)
    return np.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(config.ports, -1)


def unstripe(config: AcceleratorConfig, regions: np.ndarray) -> np.ndarray:
    """Inverse of :func:`stripe`."""
    parts = regions.reshape(config.ports, -1, config.port_width // 8)
    return np.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(-1, config.beat_bytes)
