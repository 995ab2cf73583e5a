# SPDX-License-Identifier: Apache-2.0
"""float32 numbers that are hard to compute with, as bits."""

import numpy as np
from numpy.typing import ArrayLike

EXTREMES = (
    0x00000000,  # zero
    0x00000001,  # smallest subnormal
    0x00400000,
    0x007FFFFF,  # largest subnormal
    0x00800000,  # smallest normal
    0x00800001,
    0x00FFFFFF,
    0x01000000,
    0x0C000000,  # its square is far below the smallest normal
    0x1FFFFFFF,  # its square is just below it
    0x20000000,  # its square is the smallest normal
    0x33800000,  # 2**-24
    0x34000000,  # 2**-23
    0x3F000000,
    0x3F7FFFFF,  # below one
    0x3F800000,
    0x3F800001,
    0x3FFFFFFF,
    0x40490FDB,
    0x4B7FFFFF,  # odd integer of 24 bits
    0x4B800000,  # 2**24
    0x4B800001,
    0x5F7FFFFF,  # the largest whose square is finite
    0x5F800000,
    0x7E800000,
    0x7EFFFFFF,
    0x7F000000,
    0x7F7FFFFE,
    0x7F7FFFFF,  # largest
    0x7F800000,  # infinity
    0x7F800001,  # NaNs
    0x7FC00000,
    0x7FFFFFFF,
)
"""Bits of positive numbers. Use them with both signs."""


def extremes() -> np.ndarray:
    """:data:`EXTREMES` of both signs: uint32."""
    bits = np.array(EXTREMES, np.uint32)
    return np.concatenate([bits, bits | np.uint32(1 << 31)])


def pairs_of_extremes() -> tuple[np.ndarray, np.ndarray]:
    """Every pair of extremes: uint32."""
    a, b = np.meshgrid(extremes(), extremes())
    return a.ravel(), b.ravel()


def mostly_distant(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bits, of which most pairs have distant exponents; every eighth second operand is extreme: uint32."""
    a, b = random.integers(0, 1 << 32, (2, count), dtype=np.uint32)
    b[::8] = random.choice(extremes(), len(b[::8]))
    return a, b


def floats(bits: ArrayLike) -> np.ndarray:
    """uint32 bits as float32."""
    return np.asarray(bits, np.uint32).view(np.float32)


def near(random: np.random.Generator, count: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers, and others whose exponents differ by at most ``distance``: uint32."""
    a = random.integers(0, 1 << 32, count, dtype=np.uint32)
    exponent = (a >> 23 & 255).astype(np.int64) + random.integers(-distance, distance, count, endpoint=True)
    fields = random.integers(0, 1 << 23, count) | np.clip(exponent, 0, 254) << 23 | random.integers(0, 2, count) << 31
    return a, fields.astype(np.uint32)


def tie_sums(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Operands of which the small one is half a unit of the large one, or a little more or less; sums that carry."""
    large = random.integers(60, 250, count) << 23 | random.choice([0, 1, 2, 0x3FFFFF, 0x7FFFFE, 0x7FFFFF], count)
    distance = random.integers(22, 26, count, endpoint=True)
    small = ((large >> 23) - distance) << 23 | random.choice([0, 1, 0x400000, 0x7FFFFF], count)
    signs = random.integers(0, 4, count)
    return (large | (signs & 1) << 31).astype(np.uint32), (small | (signs >> 1) << 31).astype(np.uint32)


def tiny_sums(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Operands whose sums are below the smallest normal number, or near it."""
    a = random.integers(0x00800000, 0x02000000, count)
    return a.astype(np.uint32), (a + random.integers(-20, 20, count) | 1 << 31).astype(np.uint32)


def tie_products(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Significands of 12 bits and a leading one: their product has 25 bits or 26, the last of which is often a tie."""
    a, b = (random.integers(0, 1 << 12, count) << 11 | random.integers(90, 160, count) << 23 for _ in range(2))
    return a.astype(np.uint32), b.astype(np.uint32)


def tiny_products(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Operands whose product is 2**-126 or a little less: up to 2**-150 less, and up to half of that."""
    a = random.integers(1 << 23, 1 << 24, count)
    # Of 2**47 in units of 2**-173: what rounds up to 2**-126 is at most 2**22 below it.
    b = ((1 << 47) - random.integers(0, 3, count) * (1 << 22)) // a + random.integers(-1, 2, count)
    kept = (b >= 1 << 23) & (b < 1 << 24)
    a, b = a[kept], b[kept]
    for low, high in ((0, 1 << 22), (1 << 22, 1 << 23), (1 << 23, 1 << 25)):
        assert ((a * b < (1 << 47) - low) & (a * b > (1 << 47) - high)).any(), "the range between them does not occur"
    return (a - (1 << 23) | 60 << 23).astype(np.uint32), (b - (1 << 23) | 67 << 23).astype(np.uint32)


def ties_of_rsqrt(random: np.random.Generator, count: int) -> np.ndarray:
    """Numbers whose 1/sqrt lies next to the middle between two float32; they are computed from it: uint32."""
    odd = 2 * random.integers(1 << 23, 1 << 24, count).astype(object) + 1
    found = []
    for o in odd:
        # x = 2**74 / o**2, at both parities of the exponent, and its neighbours.
        x = (1 << 74) // (o * o)
        while x >= 1 << 24:
            x >>= 1
        found += [x - (1 << 23) | exponent << 23 for exponent in (126, 127) if x >= 1 << 23]
    return np.array(found, np.uint32)


def in_range(random: np.random.Generator, count: int, lowest: int, end: int) -> np.ndarray:
    """Random numbers of both signs, with exponents from ``lowest`` to below ``end``: uint32."""
    exponents = random.integers(127 + lowest, 127 + end, count)
    return (random.integers(0, 1 << 23, count) | exponents << 23 | random.integers(0, 2, count) << 31).astype(np.uint32)


def next_to(values: np.ndarray) -> np.ndarray:
    """The float32 next to positive values, and both neighbours of each: uint32."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return np.concatenate([bits - 1, bits, bits + 1])
