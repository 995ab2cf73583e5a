# SPDX-License-Identifier: Apache-2.0
"""The order in which a layer's results leave the array: output tile by output tile, token by token, columns ascending.

A transfer has up to ``lanes`` neighbouring columns. Its fields besides the values are those of
:func:`hw.rtl.common.results.result_payload`.
"""

from typing import NamedTuple

from hw.spec.config import AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS


class Transfer(NamedTuple):
    """One transfer of results.

    Attributes
    ----------
    token : the row
    columns : the columns, counted from the beginning of the row
    column : the first column, counted from the beginning of its piece of 256 columns in transfers
    keep : bit i is set if lane i has a column
    piece_end : 1 for the last transfer of the token's piece
    chunk_end : 1 for the last transfer of a piece of all tokens
    last : 1 for the last transfer of the layer
    """

    token: int
    columns: range
    column: int
    keep: int
    piece_end: int
    chunk_end: int
    last: int

    @property
    def fields(self) -> dict[str, int]:
        """The fields of the payload besides the values."""
        names = ("keep", "token", "column", "piece_end", "chunk_end", "last")
        return {name: getattr(self, name) for name in names}


def result_transfers(config: AcceleratorConfig, tokens: int, n: int) -> list[Transfer]:
    """All transfers of a layer with M = ``tokens`` and ``n`` results a token, in order."""
    return tile_transfers(config.tile, config.lanes, tokens, n)


def row_transfers(lanes: int, tokens: int, n: int) -> list[Transfer]:
    """All transfers of M = ``tokens`` rows of ``n`` floats from memory, in order: piece by piece, token by token."""
    return tile_transfers(PIECE_FLOATS, lanes, tokens, n)


def tile_transfers(tile: int, lanes: int, tokens: int, n: int) -> list[Transfer]:
    """All transfers of M = ``tokens`` rows of ``n`` columns, in tiles of ``tile`` columns, in order."""
    transfers = []
    for start in range(0, n, tile):
        for token in range(tokens):
            for first in range(start, min(start + tile, n), lanes):
                columns = range(first, min(first + lanes, n))
                final, last = token == tokens - 1, columns.stop == n
                piece_end = last or columns.stop % PIECE_FLOATS == 0
                transfers.append(
                    Transfer(
                        token,
                        columns,
                        first % PIECE_FLOATS // lanes,
                        (1 << len(columns)) - 1,
                        int(piece_end),
                        int(final and piece_end),
                        int(final and last),
                    )
                )
    return transfers
