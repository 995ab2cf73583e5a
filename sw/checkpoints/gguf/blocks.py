# SPDX-License-Identifier: Apache-2.0
"""The blocks of GGUF's quantized formats as integers, scales and minimums, without any loss.

Source: ggml-common.h (layouts) and dequantize_row_* of ggml-quants.c in ggml. A block is 32 weights, in K-quants 256
weights in groups of 32 or 16; all numbers are little-endian. w = s (q - zero), or w = s q - m with a minimum.

    format   bytes  weights in a group of one scale             layout of the block
    Q4_0     18     w = d (q - 8)                       32      d:f16 qs[16]
    Q4_1     20     w = d q + m                         32      d:f16 m:f16 qs[16]
    Q5_0     22     w = d (q - 16)                      32      d:f16 qh:u32 qs[16]
    Q5_1     24     w = d q + m                         32      d:f16 m:f16 qh:u32 qs[16]
    Q8_0     34     w = d q                             32      d:f16 qs[32]:i8
    IQ4_NL   18     w = d VALUES[q]                     32      d:f16 qs[16]
    IQ4_XS   136    w = d (sc - 32) VALUES[q]           32      d:f16 sc_high:u16 sc_low[4] qs[128]
    Q2_K     84     w = d sc q - dmin m                 16      sc_m[16] qs[64] d:f16 dmin:f16
    Q3_K     110    w = d (sc - 32) (q - 4)             16      q_high[32] qs[64] sc[12] d:f16
    Q4_K     144    w = d sc q - dmin m                 32      d:f16 dmin:f16 sc_m[12] qs[128]
    Q5_K     176    w = d sc q - dmin m                 32      d:f16 dmin:f16 sc_m[12] q_high[32] qs[128]
    Q6_K     210    w = d sc (q - 32)                   16      ql[128] qh[64] sc[16]:i8 d:f16
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

VALUES = (np.array(IQ4_NL.kvalues) + 128).astype(np.uint8)
"""The 16 values of IQ4_NL and IQ4_XS, and 128."""
SUPER = 256
"""Weights of a block of a K-quant."""


class Groups(NamedTuple):
    """Quantized rows: ``w[n, k] = scales[n, g] * (q[n, k] - zero)``, less ``minimums[n, g]`` if there are any.

    Both are evaluated in float32, in this order, as in llama.cpp. q is raised by a constant where that puts `zero` into
    the middle of the range of 4 or 8 bits.
    """

    q: np.ndarray
    """uint8 [N, K]."""
    scales: np.ndarray
    """float32 [N, G]."""
    minimums: np.ndarray | None
    """float32 [N, G]."""
    zero: int


class Format(NamedTuple):
    """A block format. bits: of the field in which q is stored, 4 or 8. levels: values of q that blocks can hold."""

    group_size: int
    bits: int
    levels: int
    unpack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    """uint8 [N, B, bytes of a block] -> q [N, B, ...], scales [N, B, ...], minimums [N, B, ...] or None."""
    has_minimums: bool = False


def unpack_groups(rows: np.ndarray, kind: str) -> Groups:
    """Raw rows of one of FORMATS, uint8 [N, bytes of a row], as integers and scales."""
    form, n = FORMATS[kind], len(rows)
    q, scales, minimums = form.unpack(rows.reshape(n, -1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]))
    zero = 0 if form.has_minimums else 1 << (form.bits - 1)
    return Groups(q.reshape(n, -1), scales.reshape(n, -1), None if minimums is None else minimums.reshape(n, -1), zero)


def dequantize_groups(groups: Groups) -> np.ndarray:
    """The weights as llama.cpp has them, bit for bit: float32 [N, K]."""
    n, count = groups.scales.shape
    q = groups.q.reshape(n, count, -1).astype(np.float32) - np.float32(groups.zero)
    values = groups.scales[:, :, None] * q
    if groups.minimums is not None:
        values -= groups.minimums[:, :, None]
    return values.reshape(n, -1)


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """A float16 of every block as float32 [N, B, 1]."""
    return np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray, run: int) -> np.ndarray:
    """uint8 [N, B, bytes] in runs of `run` bytes, of which each holds a run of low nibbles and one of high nibbles."""
    runs = data.reshape(*data.shape[:2], -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=3).reshape(*data.shape[:2], -1)


def _pairs(data: np.ndarray) -> np.ndarray:
    """uint8 [N, B, bytes] of 2-bit fields, in runs of 32 bytes: all lowest fields of a run first."""
    runs = data.reshape(*data.shape[:2], -1, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (runs >> shifts & 3).reshape(*data.shape[:2], -1)


def _single_bits(data: np.ndarray) -> np.ndarray:
    """uint8 [N, B, 32], whose bit i belongs to weights 32 i to 32 i + 31 -> uint8 [N, B, 256]."""
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    return (data[:, :, None] >> shifts & 1).reshape(*data.shape[:2], -1)


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """uint8 [N, B, 4] -> uint8 [N, B, 32]: the bits, the lowest of the first byte first."""
    return np.unpackbits(data, axis=2, bitorder="little")


def _scales_and_minimums(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scales and minimums of Q4_K and Q5_K: uint8 [N, B, 12] -> float32 [N, B, 8] each."""
    first, second, third = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=2)
    minimums = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=2)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _q4_0(blocks):
    return _nibbles(blocks[:, :, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks):
    return _nibbles(blocks[:, :, 4:], 16), _half(blocks, 0), -_half(blocks, 2)


def _q5_0(blocks):
    q = _nibbles(blocks[:, :, 6:], 16) | _fifth_bits(blocks[:, :, 2:6]) << 4
    return q + np.uint8(128 - 16), _half(blocks, 0), None


def _q5_1(blocks):
    q = _nibbles(blocks[:, :, 8:], 16) | _fifth_bits(blocks[:, :, 4:8]) << 4
    return q, _half(blocks, 0), -_half(blocks, 2)


def _q8_0(blocks):
    return blocks[:, :, 2:] ^ 0x80, _half(blocks, 0), None


def _iq4_nl(blocks):
    return VALUES[_nibbles(blocks[:, :, 2:], 16)], _half(blocks, 0), None


def _iq4_xs(blocks):
    high = np.ascontiguousarray(blocks[:, :, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, :, 4:8] & 15, blocks[:, :, 4:8] >> 4], axis=3).reshape(high.shape)
    scales = (low | high << 4).astype(np.float32) - np.float32(32)
    return VALUES[_nibbles(blocks[:, :, 8:], 16)], _half(blocks, 0) * scales, None


def _q2_k(blocks):
    packed = blocks[:, :, :16]
    minimums = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    return _pairs(blocks[:, :, 16:80]), _half(blocks, 80) * (packed & 15).astype(np.float32), minimums


def _q3_k(blocks):
    # q - 4 is the low two bits, less 4 where the high bit is 0.
    q = (_pairs(blocks[:, :, 32:96]) | _single_bits(blocks[:, :, :32]) << 2) + np.uint8(8 - 4)
    low, high = blocks[:, :, 96:104], blocks[:, :, 104:108]
    low = np.concatenate([low & 15, low >> 4], axis=2)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    return q, _half(blocks, 108) * ((low | high << 4).astype(np.float32) - np.float32(32)), None


def _q4_k(blocks):
    scales, minimums = _scales_and_minimums(blocks[:, :, 4:16])
    return _nibbles(blocks[:, :, 16:], 32), _half(blocks, 0) * scales, _half(blocks, 2) * minimums


def _q5_k(blocks):
    scales, minimums = _scales_and_minimums(blocks[:, :, 4:16])
    q = _nibbles(blocks[:, :, 48:], 32) | _single_bits(blocks[:, :, 16:48]) << 4
    return q, _half(blocks, 0) * scales, _half(blocks, 2) * minimums


def _q6_k(blocks):
    q = _nibbles(blocks[:, :, :128], 64) | _pairs(blocks[:, :, 128:192]) << 4
    scales = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8).astype(np.float32)
    return q + np.uint8(128 - 32), _half(blocks, 208) * scales, None


FORMATS: dict[str, Format] = {
    "Q4_0": Format(32, 4, 16, _q4_0),
    "Q4_1": Format(32, 4, 16, _q4_1, has_minimums=True),
    "Q5_0": Format(32, 8, 32, _q5_0),
    "Q5_1": Format(32, 8, 32, _q5_1, has_minimums=True),
    "Q8_0": Format(32, 8, 256, _q8_0),
    "IQ4_NL": Format(32, 8, 16, _iq4_nl),
    "IQ4_XS": Format(32, 8, 16, _iq4_xs),
    "Q2_K": Format(16, 4, 4, _q2_k, has_minimums=True),
    "Q3_K": Format(16, 4, 8, _q3_k),
    "Q4_K": Format(32, 4, 16, _q4_k, has_minimums=True),
    "Q5_K": Format(32, 8, 32, _q5_k, has_minimums=True),
    "Q6_K": Format(16, 8, 64, _q6_k),
}
"""ggml's name of a format -> how it is read."""
