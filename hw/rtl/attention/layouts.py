# SPDX-License-Identifier: Apache-2.0
"""The payloads of attention's blocks, and the words of scores on chip."""

from amaranth.hdl import unsigned
from amaranth.lib import data

from hw.rtl.common.float32 import FLOAT
from hw.rtl.vector.layouts import row_layout
from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.memory.kv_cache import LONGEST_CONTEXT

COUNT_BITS = LONGEST_CONTEXT.bit_length()
"""Bits of a number of positions."""


def word_floats(config: AcceleratorConfig) -> int:
    """Scores of a word: one token's K-slice."""
    return config.tile


def bank_words(config: AcceleratorConfig) -> int:
    """Words of a bank."""
    return config.score_words // word_floats(config)


def row_words(config: AcceleratorConfig, positions):
    """Words of a row with this number of scores; the next row follows at once."""
    per_unit = SCORE_UNIT // word_floats(config)
    return ((positions + (SCORE_UNIT - 1)) >> (SCORE_UNIT.bit_length() - 1)) * per_unit


def rows_members(config: AcceleratorConfig) -> dict:
    """The rows of a bank: which bank, how many rows, and how many scores each of them has."""
    return {"bank": 1, "tokens": unsigned(config.max_tokens.bit_length()), "positions": unsigned(COUNT_BITS)}


def bank_layout(config: AcceleratorConfig) -> data.StructLayout:
    """See :func:`rows_members`."""
    return data.StructLayout(rows_members(config))


def scores_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The scores of one descriptor; :mod:`hw.spec.ops.scores` has the definition of the last four fields."""
    counts = dict.fromkeys(("turn", "slots", "window"), unsigned(COUNT_BITS))
    return data.StructLayout({**rows_members(config), **counts, "causal": 1})


def place_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A part of a word, which has as many floats as the vector unit has lanes."""
    parts = word_floats(config) // config.vector_lanes
    return data.StructLayout({"bank": 1, "address": range(bank_words(config)), "part": range(parts)})


def write_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A write of a part of a word, in this cycle if ``valid``."""
    values = data.ArrayLayout(FLOAT, config.vector_lanes)
    return data.StructLayout({"valid": 1, "place": place_layout(config), "values": values})


def maximum_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The largest score of a row so far, in this cycle if ``valid``."""
    return data.StructLayout({"valid": 1, "row": row_layout(config), "number": FLOAT})
