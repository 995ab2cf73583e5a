# SPDX-License-Identifier: Apache-2.0
"""Packs the bits of a layer's weights into the beats of the weight stream, and unpacks them."""

import numpy as np

from hw.spec.config import EXPONENT_BITS, SCALE_BITS, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout
from hw.spec.numerics.linear import Weights


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
    """Rows of one output tile's body: (runs of whole words, rows with weights per run, rows with padding per run)."""
    stream, tile = layer.stream, layer.config.tile
    if stream.slices_per_word > 1:
        return 1, layer.slices * tile, layer.body_words * stream.rows_per_word
    return layer.slices, tile, stream.words_per_slice * stream.rows_per_word


def _pair(words: np.ndarray, tile: int) -> np.ndarray:
    """Weights of words [..., rows * tile], so that one column of two successive rows comes first, then the next one."""
    pairs = words.reshape(*words.shape[:-1], -1, 2, tile)
    return np.ascontiguousarray(np.swapaxes(pairs, -1, -2)).reshape(words.shape)


def _unpair(words: np.ndarray, tile: int) -> np.ndarray:
    """Inverse of :func:`_pair`."""
    pairs = words.reshape(*words.shape[:-1], -1, tile, 2)
    return np.ascontiguousarray(np.swapaxes(pairs, -1, -2)).reshape(words.shape)


def _pack_body(layer: LayerLayout, q: np.ndarray, paired: bool) -> np.ndarray:
    config, stream, tile, tiles = layer.config, layer.stream, layer.config.tile, layer.out_tiles
    runs, used, padded = _body_shape(layer)
    rows = _pad(q, 0, tiles * tile).reshape(tiles, tile, layer.k).transpose(0, 2, 1)
    rows = _pad(np.ascontiguousarray(rows).reshape(tiles, runs, used, tile), 2, padded)
    words = rows.reshape(tiles, layer.body_words, stream.rows_per_word * tile)
    if paired:
        words = _pair(words, tile)
    width = config.weight_bits
    if 8 % width == 0:
        packed = words[..., 0 :: 8 // width].copy()
        for index in range(1, 8 // width):
            packed |= words[..., index :: 8 // width] << np.uint8(index * width)
    else:
        packed = np.packbits(_to_bits(words, width), axis=-1, bitorder="little")
    packed = _pad(packed, 2, stream.word_bits // 8)
    return packed.reshape(tiles, -1, config.beat_bytes)


def _unpack_body(layer: LayerLayout, body: np.ndarray, paired: bool) -> np.ndarray:
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
    if paired:
        words = _unpair(words, tile)
    rows = words.reshape(tiles, runs, padded, tile)[:, :, :used].reshape(tiles, layer.k, tile)
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(tiles * tile, layer.k)[: layer.n]


def pack(layer: LayerLayout, weights: Weights, paired: bool = False) -> np.ndarray:
    """The weight stream of a layer: uint8 [beats, beat_bytes]. Rows beyond N get zero scales.

    paired: the body's order is that of a cache of keys (:mod:`hw.spec.memory.kv_cache`): one column of two successive
    rows is adjacent.

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
    header, body = _pack_header(layer, weights), _pack_body(layer, weights.q, paired)
    return np.concatenate([header, body], axis=1).reshape(layer.beats, layer.config.beat_bytes)


def unpack(layer: LayerLayout, beats: np.ndarray, paired: bool = False) -> Weights:
    """Inverse of :func:`pack`."""
    shape = (layer.beats, layer.config.beat_bytes)
    if beats.shape != shape or beats.dtype != np.uint8:
        raise ConfigError(f"the layer's stream is uint8 {list(shape)}, not {beats.dtype} {list(beats.shape)}")
    tiles = beats.reshape(layer.out_tiles, layer.tile_beats, layer.config.beat_bytes)
    zeros, scales, exponents = _unpack_header(layer, tiles[:, : layer.header_beats])
    return Weights(_unpack_body(layer, tiles[:, layer.header_beats :], paired), zeros, scales, exponents)


def stripe(config: AcceleratorConfig, beats: np.ndarray) -> np.ndarray:
    """Split beats over the ports: uint8 [ports, beats * port_bytes], each row one linear region of memory."""
    parts = beats.reshape(len(beats), config.ports, config.port_width // 8)
    return np.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(config.ports, -1)


def unstripe(config: AcceleratorConfig, regions: np.ndarray) -> np.ndarray:
    """Inverse of :func:`stripe`."""
    parts = regions.reshape(config.ports, -1, config.port_width // 8)
    return np.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(-1, config.beat_bytes)
