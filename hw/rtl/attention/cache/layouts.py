# SPDX-License-Identifier: Apache-2.0
"""The payloads of the parts of a cache writer."""

import enum

from amaranth.hdl import signed, unsigned
from amaranth.lib import data

from hw.rtl.attention.cache.geometry import PAGE_SHIFT, SLOT_BITS, TABLE_SHIFT, CacheGeometry, log2
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.spec.config import EXPONENT_BITS, AcceleratorConfig
from hw.spec.control.program import LENGTH_BITS
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.kv_cache import PLANE_COUNTS
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops.base import WEIGHT_FIELDS
from hw.spec.ops.epilogue import MAX_HEAD

PLANE_BITS = log2(max(PLANE_COUNTS))
"""Bits of the index of a plane."""
GROUP_BITS = log2(MAX_HEAD // BLOCK)
"""Bits of the index of a group of 32 elements."""
STRIDE_BITS = next(field.limit for field in WEIGHT_FIELDS if field.name == "weights_stride").bit_length() - 1
"""Bits of the bytes from one port's region to the next."""
CHUNK_BITS = SLOT_BITS - log2(CHUNK) + 1
"""Bits of a number of chunks."""


class Part(enum.IntEnum):
    """The parts of a position, in the order in which they are written: the first three of a key, the others of a
    value.
    """

    EXPONENT = 0
    """The row exponent."""
    SCALES = 1
    """The scale of each group and plane."""
    BODY = 2
    """The mantissas of a key."""
    VALUES = 3
    """The mantissas of a value."""
    TABLE = 4
    """The exponents of a value."""


def job_layout(config: AcceleratorConfig) -> data.StructLayout:
    """An append; :mod:`hw.spec.ops.append` has the definition.

    keys : keys, not values
    planes : planes of a mantissa, 1, 2 or 4
    tokens : number of positions
    columns : elements of a head
    slot : slot of the first position
    slots : positions that the cache can hold
    address : of port 0's region, a multiple of 4,096
    stride : bytes from one port's region to the next, a multiple of 4,096
    exponents : values: address of their exponents, a multiple of 128
    """
    return data.StructLayout(
        {
            "keys": 1,
            "planes": unsigned(PLANE_BITS + 1),
            "tokens": unsigned(config.max_tokens.bit_length()),
            "columns": unsigned(MAX_HEAD.bit_length()),
            "slot": unsigned(SLOT_BITS),
            "slots": unsigned(SLOT_BITS + 1),
            "address": unsigned(ADDRESS_BITS),
            "stride": unsigned(STRIDE_BITS),
            "exponents": unsigned(ADDRESS_BITS),
        }
    )


def append_layout(config: AcceleratorConfig) -> data.StructLayout:
    """An append, the address of its rows, and the index of its descriptor: for error messages."""
    return data.StructLayout({"job": job_layout(config), "rows": ADDRESS_BITS, "index": LENGTH_BITS})


def region_layout() -> data.StructLayout:
    """Where a cache is: the page of port 0's region, pages to the next port's, and the table, in units of 128 bytes."""
    return data.StructLayout(
        {
            "page": unsigned(ADDRESS_BITS - PAGE_SHIFT),
            "stride": unsigned(STRIDE_BITS - PAGE_SHIFT),
            "table": unsigned(ADDRESS_BITS - TABLE_SHIFT),
        }
    )


def placed_layout(config: AcceleratorConfig, shape: CacheGeometry) -> data.StructLayout:
    """An append with the place of its first position.

    keys, slot, slots : as in the job
    top : index of the lowest plane: their number minus 1
    last_group, last_record : index of the last group of 32 elements, and of the last group and plane
    last_token : number of positions minus 1
    region : where the cache is
    origin : first beat of the output tile with the first position; of values, of the tile with the first columns
    tile_beats, header_beats : beats of an output tile, and of its header
    columns_step : values: beats from the tiles of one ``tile`` columns to those of the next
    chunks : chunks of the cache
    """
    return data.StructLayout(
        {
            "keys": 1,
            "slot": unsigned(SLOT_BITS),
            "slots": unsigned(SLOT_BITS + 1),
            "top": unsigned(PLANE_BITS),
            "last_group": unsigned(GROUP_BITS),
            "last_record": range(len(shape.key_layers)),
            "last_token": range(config.max_tokens),
            "region": region_layout(),
            "origin": unsigned(shape.origin_bits),
            "tile_beats": unsigned(shape.tile_beats_bits),
            "header_beats": unsigned(max(*shape.key_header_beats, shape.value_header_beats).bit_length()),
            "columns_step": unsigned(shape.origin_bits),
            "chunks": unsigned(CHUNK_BITS),
        }
    )


def step_layout(shape: CacheGeometry) -> data.StructLayout:
    """A beat of one port.

    part : one bit for each :class:`Part`
    first : it begins a piece of ``last_beat`` + 1 beats; ``last``: the last piece of the job
    origin : the first beat of its output tile in a port's region
    inside : its first byte in the header or the body of the tile
    header_beats : beats of the header
    table : its byte in the table of exponents
    address, byte, plane : the first byte of its mantissas: word of the memory, byte of one plane of a word, and plane,
        where 0 is the lowest one
    wide : mantissas have 16 bits
    exponent, largest : by position of the bundle: of its group, and of the head
    member : of a value, its index in the bundle
    mask : by position of the bundle: it is written
    """
    exponent = data.ArrayLayout(signed(EXPONENT_BITS), shape.bundle)
    return data.StructLayout(
        {
            "part": len(Part),
            "first": 1,
            "last": 1,
            "last_beat": range(PIECE_FLOATS * FLOAT_BYTES // shape.port_bytes),
            "origin": unsigned(shape.origin_bits),
            "inside": unsigned(shape.inside_bits),
            "table": unsigned(shape.table_bits),
            "address": range(2 * shape.words),
            "byte": unsigned(log2(shape.word // shape.per_byte)),
            "plane": unsigned(PLANE_BITS),
            "wide": 1,
            "exponent": exponent,
            "largest": exponent,
            "member": unsigned(shape.bundle_bits),
            "mask": unsigned(shape.bundle),
        }
    )
