# SPDX-License-Identifier: Apache-2.0
"""A program: descriptors in memory, one directly after the other, word 0 of each first."""

from collections.abc import Iterable, Sequence

import numpy as np

from hw.spec.ops.base import DESCRIPTOR_WORDS

PROGRAM_ALIGNMENT = 128
"""Alignment in bytes of a program."""
LENGTH_BITS = 24
"""Width of a program's length in descriptors: with 64 bytes each it cannot reach the end of the address space."""
DESCRIPTOR_BYTES = 4 * DESCRIPTOR_WORDS
"""Bytes of a descriptor."""


def program_image(descriptors: Iterable[Sequence[int]]) -> np.ndarray:
    """The words of descriptors in the layout of memory: uint8 [64 * number of descriptors]."""
    return np.array(list(descriptors), "<u4").reshape(-1).view(np.uint8)
