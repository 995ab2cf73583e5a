# SPDX-License-Identifier: Apache-2.0
"""Matrices too large to be converted as a whole: some rows at a time."""

import numpy as np

ROWS_AT_ONCE = 4096
"""Rows of a model's matrices: few enough that their float32 or float64 copies are small, enough that numpy is busy."""


def slices(count: int, size: int | None = None) -> list[slice]:
    """0 to count in pieces of `size`, by default ROWS_AT_ONCE; the last may be shorter."""
    size = size or ROWS_AT_ONCE
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def is_finite(table: np.ndarray) -> bool:
    """Whether every value of a matrix is finite, found in the memory of some rows."""
    return all(np.isfinite(table[rows]).all() for rows in slices(len(table)))
