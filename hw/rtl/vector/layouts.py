# SPDX-License-Identifier: Apache-2.0
"""The payloads and ports of the vector unit."""

from amaranth.hdl import unsigned
from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.results import place_layout
from hw.spec.config import FLOAT_BITS, MAX_N, AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.ops.epilogue import FLAGS

COLUMN_BITS = MAX_N.bit_length()
"""Bits of a number of columns."""
MAX_PIECES = MAX_N // PIECE_FLOATS
"""Pieces of the longest row."""
OPERAND_LATENCY = 2
"""Cycles from the read of an operand to its data."""


class Operand(enum.IntEnum, shape=2):
    """The rows that the epilogue reads from memory as results pass."""

    SOURCE = 0
    ADDEND = 1
    TABLE = 2
    FACTOR = 3


class Target(enum.IntEnum, shape=2):
    """Where the results of an epilogue go, in hardware with attention."""

    MEMORY = 0
    SCORES = 1
    CACHE = 2


def result_unit(config: AcceleratorConfig) -> int:
    """Columns that the place of a transfer of results counts: SiLU makes half a transfer of a whole one."""
    return config.vector_lanes // 2


SECOND_UNIT = 2
"""Columns that the place of a transfer of the second output counts: maximum and argmax of a piece are two."""


def rows_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Rows: their number, and their columns."""
    return data.StructLayout({"tokens": unsigned(config.max_tokens.bit_length()), "columns": unsigned(COLUMN_BITS)})


def row_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A row of a bank of scores."""
    return data.StructLayout({"bank": 1, "token": range(config.max_tokens)})


def flag_layout() -> data.StructLayout:
    """The parts that an epilogue has."""
    return data.StructLayout({field.name: 1 for field in FLAGS})


def epilogue_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The epilogue of one descriptor.

    flags : its parts
    vector : the rows come from memory, not from the array
    tokens, columns : M and N
    rotated : with ``rotary``: the first columns, which are rotated; a multiple of 16
    eps : float32

    and with attention

    target : where the results go; those that do not go to memory have neither a second output nor squares
    factor : float32: with ``scale``, scores are multiplied by it instead of r
    inverse, bank : with ``scale``, multiply by 1/S of the row in this bank of scores instead of r, and release the bank
        after the last transfer
    """
    attention = {"target": Target, "factor": FLOAT, "inverse": 1, "bank": 1} if config.has_attention else {}
    return data.StructLayout(
        {
            "flags": flag_layout(),
            "vector": 1,
            **rows_layout(config).members,
            "rotated": unsigned(COLUMN_BITS),
            "eps": FLOAT,
            **attention,
        }
    )


def lane_place(config: AcceleratorConfig, lanes: int) -> data.StructLayout:
    """The place of a transfer, and which of its lanes have a column."""
    return data.StructLayout({"keep": lanes, **place_layout(config, lanes).members})


def taken_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What accompanies the values of a transfer through the pipeline.

    valid : there is a transfer
    flags : the parts of its epilogue
    vector : its values come from memory
    place, piece : its place, and the number of its piece in the row
    rotate : rotate its columns
    head : its columns are among the first 16 of the row
    target : with attention: where its results go
    """
    return data.StructLayout(
        {
            "valid": 1,
            "flags": flag_layout(),
            "vector": 1,
            "place": lane_place(config, config.vector_lanes),
            "piece": range(MAX_PIECES),
            "rotate": 1,
            "head": 1,
            **({"target": Target} if config.has_attention else {}),
        }
    )


def operand_members(config: AcceleratorConfig) -> dict[str, wiring.Member]:
    """The ports through which the epilogue reads its operands; see :class:`hw.rtl.memory.operand_fetch.OperandFetch`.

    available, read, release : one bit for each :class:`Operand`
    token, column : the place that is read, for all of them
    data : each operand's floats, ``OPERAND_LATENCY`` cycles later
    """
    lanes = config.vector_lanes
    return {
        "available": In(len(Operand)),
        "read": Out(len(Operand)),
        "release": Out(len(Operand)),
        "token": Out(range(config.max_tokens)),
        "column": Out(range(PIECE_FLOATS // lanes)),
        "data": In(data.ArrayLayout(FLOAT_BITS, lanes)).array(len(Operand)),
    }
