# SPDX-License-Identifier: Apache-2.0
"""The numbers of :mod:`hw.spec.memory.kv_cache` from which the places of a position's bytes follow."""

from functools import cached_property

from amaranth.hdl import Const, Value

from hw.spec.config import EXPONENT_BITS, SCALE_BITS, AcceleratorConfig
from hw.spec.memory.geometry import LayerLayout, StreamLayout
from hw.spec.memory.kv_cache import (
    KEY_BITS,
    LONGEST_CONTEXT,
    KeyCache,
    ValueCache,
    append_bundle,
    check_cache,
    key_layer,
)
from hw.spec.memory.operands import DATA_ALIGNMENT, WEIGHT_ALIGNMENT
from hw.spec.numerics.attention import CHUNK, VALUE_BITS
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops.epilogue import MAX_HEAD

_WORD = 32
"""Mantissas of a word, if tile and port do not need more or less."""


def log2(number: int) -> int:
    """The logarithm of a power of two."""
    assert number > 0 and number & (number - 1) == 0, number
    return number.bit_length() - 1


class CacheGeometry:
    """The shape of caches in hardware of one config. Everything but ``scale_stride`` is a power of two.

    The body of an output tile has no padding, so byte ``inside`` of it is in beat ``inside // beat_bytes`` of the
    stream. A byte of a key is at ``unit * tile + column``, where a unit is one row, or two if rows are paired.

    Attributes
    ----------
    port_bytes, beat_bytes : bytes of a beat on one port, and on all of them
    per_byte : mantissas of one plane in a byte
    units : units of a group of 32 elements and one plane
    run : bytes of a key in a beat of one port
    turns : ports of which each holds bytes of a key, in a beat of the stream
    group_beats : beats of the stream with units of one group and plane, at least 1
    spaced : a unit takes several beats of the stream, so a key has no byte in most of them
    value_bytes, parts : bytes of a value in a beat of one port, and such beats of a row
    word : mantissas of a word of the memory
    bundle : positions that are written together, :func:`hw.spec.memory.kv_cache.append_bundle`
    scale_stride : bytes from the scales of one group and plane to those of the next
    """

    def __init__(self, config: AcceleratorConfig):
        check_cache(config)
        self.config, tile = config, config.tile
        self.port_bytes, self.beat_bytes = config.port_width // 8, config.beat_bytes
        self.per_byte = 8 // config.weight_bits
        self.units = BLOCK // self.per_byte
        self.run = max(1, self.port_bytes // tile)
        self.turns = max(1, self.beat_bytes // max(tile, self.port_bytes))
        self.group_beats = self.units // (self.turns * self.run)
        self.spaced = tile > self.beat_bytes
        row_bytes = tile // self.per_byte
        self.word = max(config.vector_lanes, self.run * self.per_byte, min(tile, _WORD))
        self.value_bytes = min(row_bytes, self.port_bytes, self.word // self.per_byte)
        self.parts = row_bytes // self.value_bytes
        self.scale_stride = StreamLayout(config).record_bits // 8
        self.bundle = append_bundle(config)
        self.value = ValueCache(config, BLOCK, 1)

    @property
    def bundle_bits(self) -> int:
        """Bits of the index of a position in its bundle."""
        return log2(self.bundle)

    def member(self, slot) -> Value:
        """The index of a slot in its bundle."""
        return slot[: self.bundle_bits] if self.bundle > 1 else Const(0, 0)

    @property
    def words(self) -> int:
        """Words of the longest head."""
        return MAX_HEAD // self.word

    @property
    def value_planes(self) -> int:
        """Planes of a value."""
        return VALUE_BITS // self.config.weight_bits

    @property
    def value_tiles(self) -> int:
        """Output tiles with 32 columns of values."""
        return BLOCK // self.config.tile

    @cached_property
    def key_layers(self) -> list[LayerLayout | None]:
        """The stream of keys with 1, 2, ... groups, over all planes; None if max_k does not allow it."""
        most = MAX_HEAD // BLOCK * max(KEY_BITS) // self.config.weight_bits
        return [key_layer(self.config, groups) for groups in range(1, most + 1)]

    @cached_property
    def key_tile_beats(self) -> list[int]:
        """Beats of an output tile of keys with 1, 2, ... groups."""
        return [layer.tile_beats if layer else 0 for layer in self.key_layers]

    @cached_property
    def key_header_beats(self) -> list[int]:
        """Beats of the header of an output tile of keys with 1, 2, ... groups."""
        return [layer.header_beats if layer else 0 for layer in self.key_layers]

    @property
    def value_beats(self) -> int:
        """Beats of an output tile of values."""
        return self.value.layer.tile_beats

    @property
    def value_header_beats(self) -> int:
        """Beats of the header of an output tile of values."""
        return self.value.layer.header_beats

    @property
    def tile_beats_bits(self) -> int:
        """Bits of the number of beats of an output tile."""
        return max(*self.key_tile_beats, self.value_beats).bit_length()

    @property
    def inside_bits(self) -> int:
        """Bits of a byte's place in the header or in the body of an output tile."""
        header = self.beat_bytes * max(self.key_header_beats)
        body = self.config.tile * self.units * len(self.key_layers)
        return max(header, body, self.beat_bytes * self.value_beats).bit_length()

    @property
    def origin_bits(self) -> int:
        """Bits of the first beat of an output tile in a port's region."""
        keys = LONGEST_CONTEXT // self.config.tile * max(self.key_tile_beats)
        values = (MAX_HEAD // self.config.tile + 1) * (LONGEST_CONTEXT // CHUNK) * self.value_beats
        return max(keys, values).bit_length()

    @property
    def table_bits(self) -> int:
        """Bits of an offset in the table of exponents."""
        return (MAX_HEAD // BLOCK * LONGEST_CONTEXT).bit_length()

    def scale_offset(self, wide: bool) -> int:
        """log2 of the lowest plane's scale in the group with the largest exponent, for keys of 16 or 8 bits."""
        return KeyCache(self.config, BLOCK, 1, KEY_BITS[wide]).factor_bits

    def exponent_offset(self, wide: bool) -> int:
        """A row exponent minus the largest exponent of its key."""
        return SCALE_BITS - 1 - self.scale_offset(wide)


SLOT_BITS = log2(LONGEST_CONTEXT)
PAGE_SHIFT, TABLE_SHIFT = log2(WEIGHT_ALIGNMENT), log2(DATA_ALIGNMENT)
assert EXPONENT_BITS == 8 and SCALE_BITS == 16, "an exponent is one byte, a scale two"
