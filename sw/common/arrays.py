# SPDX-License-Identifier: Apache-2.0
"""Helpers for matrices that are too large to be converted as a whole: they are converted in slices of rows."""

import numpy as np

ROWS_AT_ONCE = 4096
"""Rows of a slice: few enough that their float32 or float64 copies are small, many enough for numpy to be efficient."""


def slices(count: int, size: int | None = None) -> list[slice]:
    """0 to count in pieces of `size`, by default ROWS_AT_ONCE; the last may be shorter."""
    size = size or ROWS_AT_ONCE
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def is_finite(table: np.ndarray) -> bool:
    """Whether every value of a matrix is finite. Needs temporary memory for one slice of rows only."""
    return all(np.isfinite(table[rows]).all() for rows in slices(len(table)))
