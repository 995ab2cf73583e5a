# SPDX-License-Identifier: Apache-2.0
"""The order and the geometry of a layer's transfers of results, for every tile and number of lanes."""

import itertools

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig, choices
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.transfers import result_transfers, row_transfers

SIZES = [(tile, lanes) for tile, lanes in itertools.product(choices("tile"), choices("lanes")) if lanes <= tile]


@pytest.mark.parametrize(("tile", "lanes"), SIZES)
@pytest.mark.parametrize("n", [1, 3, 4, 31, 33, 255, 256, 257, 300, 512, 515])
@pytest.mark.parametrize("tokens", [1, 3])
def test_geometry_is_enough_to_place_every_result(tile: int, lanes: int, n: int, tokens: int):
    """A receiver that counts only ends of chunks stores every result once, in chunks of 256 columns."""
    transfers = result_transfers(AcceleratorConfig(tile=tile, lanes=lanes), tokens, n)
    stored = np.full((tokens, n), -1)
    chunk = tile_before = 0
    for number, item in enumerate(transfers):
        assert item.keep == (1 << len(item.columns)) - 1 and 1 <= len(item.columns) <= lanes
        first = chunk * PIECE_FLOATS + item.column * lanes
        assert first == item.columns.start and first // tile == (item.columns.stop - 1) // tile
        assert first // tile >= tile_before
        assert (stored[item.token, first : item.columns.stop] == -1).all()
        stored[item.token, first : item.columns.stop] = number
        tile_before = first // tile
        done = min(n, (chunk + 1) * PIECE_FLOATS)
        assert item.chunk_end == int((stored[:, :done] >= 0).all())
        chunk += item.chunk_end
    assert (stored >= 0).all()
    assert [item.last for item in transfers] == [0] * (len(transfers) - 1) + [1]
    # A token's pieces end with their last columns, each once.
    ends = [(item.token, item.columns.stop) for item in transfers if item.piece_end]
    stops = [*range(PIECE_FLOATS, n, PIECE_FLOATS), n]
    assert sorted(ends) == sorted(itertools.product(range(tokens), stops))
    # Within an output tile, token by token with ascending columns.
    for first in range(0, n, tile):
        part = stored[:, first : first + tile].reshape(-1)
        assert (np.diff(part) >= 0).all()


@pytest.mark.parametrize("lanes", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 16, 255, 256, 257, 515])
def test_rows_from_memory_go_piece_by_piece(lanes: int, n: int):
    """The order of rows from memory: pieces, in a piece tokens, in a token columns."""
    transfers = row_transfers(lanes, 3, n)
    keys = [(item.columns.start // PIECE_FLOATS, item.token, item.columns.start) for item in transfers]
    assert keys == sorted(keys) and len(set(keys)) == 3 * sum(
        -(-min(PIECE_FLOATS, n - start) // lanes) for start in range(0, n, PIECE_FLOATS)
    )
    assert all(item.column == item.columns.start % PIECE_FLOATS // lanes for item in transfers)
    assert [item.chunk_end for item in transfers].count(1) == -(-n // PIECE_FLOATS) and transfers[-1].last
    assert sum(item.piece_end for item in transfers) == 3 * -(-n // PIECE_FLOATS)
