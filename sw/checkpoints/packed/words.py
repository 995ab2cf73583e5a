# SPDX-License-Identifier: Apache-2.0
"""What the formats of packed layers share: fields of 32-bit words, and groups that ONNX's MatMulNBits can hold."""

from typing import TypeGuard

import numpy as np

from sw.checkpoints.safetensors_file import Checkpoint
from sw.common.bits import unpack_bits
from sw.common.errors import UserError

WORD_BITS = 32
BITS = (2, 3, 4, 8)
"""Widths of packed weights that are read. 3 bits become 4 in MatMulNBits, which has no 3 (see sw.graph.decoder)."""
WIDTHS = "2, 3, 4 or 8"
"""BITS in messages."""
MIN_BLOCK = 16
"""The smallest group of ONNX MatMulNBits, whose groups are powers of two. Other groups must be multiples of it."""
MAX_SPLIT = 128
"""A group that is no power of two becomes equal groups of at most this size, so that few scales are repeated."""


def matrix(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor of packed words, int32 [R, C]. Raises UserError for other types and shapes."""
    words = checkpoint.integers(name)
    if words.ndim != 2 or 0 in words.shape:
        raise UserError(f"{checkpoint.folder}: tensor {name} is {list(words.shape)}, not a matrix")
    return words


def word_count(numbers: int, bits: int) -> int:
    """Words that hold some numbers one after the other, without a gap."""
    return -(-numbers * bits // WORD_BITS)


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, C] as uint8 [R, C * 32 // bits]: number i of a row is in bits `bits * i` and up of all its words.

    A number of 3 bits may begin in one word and end in the next. bits: one of BITS.
    """
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(len(words), -1)
    if bits == 3:
        count = octets.shape[1] * 8 // 3
        octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 3))).reshape(len(words), -1, 3).astype(np.uint32)
        runs = octets[..., 0] | octets[..., 1] << 8 | octets[..., 2] << 16
        fields = runs[..., None] >> np.arange(0, 24, 3, dtype=np.uint32) & 7
        return np.ascontiguousarray(fields.reshape(len(words), -1)[:, :count], np.uint8)
    return unpack_bits(octets, bits)


def unpack_separate(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, C] as uint8 [R, C * (32 // bits)]: every word holds whole numbers, and a rest of zeros."""
    shifts = np.arange(WORD_BITS // bits, dtype=np.uint32) * np.uint32(bits)
    fields = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return fields.reshape(len(words), -1).astype(np.uint8)


def is_width(bits: object) -> TypeGuard[int]:
    """Whether a setting is one of BITS; true and 4.0 are not."""
    return type(bits) is int and bits in BITS


def is_group(size: object) -> TypeGuard[int]:
    """Whether a setting is a size of groups that can be read."""
    return type(size) is int and size > 0 and size % MIN_BLOCK == 0


def block_size(k: int, group_size: int) -> int:
    """The size of the groups in which a layer is written whose groups have `group_size` features.

    group_size: a multiple of MIN_BLOCK, or at least k (in_features). A single group over all of K becomes several equal
    ones, and so does a group that is no power of two.
    """
    if group_size >= k:
        return max(MIN_BLOCK, min(k & -k, MAX_SPLIT))
    power = group_size & -group_size
    return power if power == group_size else min(power, MAX_SPLIT)


def split_groups(values: np.ndarray, k: int, group_size: int, block: int) -> np.ndarray:
    """Scales or zero points [N, ceil(K / group_size)] for groups of `block` features: [N, ceil(K / block)].

    block: see block_size.
    """
    if block == group_size:
        return values
    return np.ascontiguousarray(values[:, np.arange(0, k, block) // group_size])
