# SPDX-License-Identifier: Apache-2.0
"""The stream of results, from the array through the vector unit to the gatherers."""

from amaranth.lib import data

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS


def place_layout(config: AcceleratorConfig, lanes: int) -> data.StructLayout:
    """The place of a transfer of results in its layer, which users of the results need not count.

    A piece is 256 neighbouring columns of a token, or the rest of its row.

    token : the row
    column : the first column of the transfer, counted from the beginning of its piece in transfers
    piece_end : the last transfer of this token's piece
    chunk_end : the last transfer of this piece of all tokens
    last : the last transfer of the layer
    """
    flags = dict.fromkeys(("piece_end", "chunk_end", "last"), 1)
    return data.StructLayout({"token": range(config.max_tokens), "column": range(PIECE_FLOATS // lanes), **flags})


def result_payload(config: AcceleratorConfig, lanes: int) -> data.StructLayout:
    """One transfer of results: float32 bits of neighbouring columns, which of them are valid, and its place.

    The valid ones come first. The values of the others are undefined.
    """
    values = {"values": data.ArrayLayout(FLOAT_BITS, lanes), "keep": lanes}
    return data.StructLayout({**values, **place_layout(config, lanes).members})


def output_payload(config: AcceleratorConfig, lanes: int, unit: int) -> data.StructLayout:
    """One transfer to a gatherer, as :func:`result_payload`, but ``column`` counts ``unit`` columns.

    A transfer may have fewer than ``lanes`` columns in the middle of a piece. Then it has a multiple of ``unit``, and
    they are repeated in the other lanes: the value of column c is in every lane that
    is equal to c modulo the number of these columns.
    """
    values = {"values": data.ArrayLayout(FLOAT_BITS, lanes), "keep": lanes}
    place = {"token": range(config.max_tokens), "column": range(PIECE_FLOATS // unit), "chunk_end": 1, "last": 1}
    return data.StructLayout({**values, **place})
