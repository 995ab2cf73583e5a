# SPDX-License-Identifier: Apache-2.0
"""The precision of cached keys: a vector that is subtracted from them, and the bits of their mantissas.

Keys of Qwen2 and Qwen2.5 have biases that are many times larger than what distinguishes one key from another. In a
group of the cache they determine the power of two, and keys of 8 bits lose the rest. Two remedies, both by KV head:

- The centre: the mean of the rotated bias over all positions of the context. All scores of a row change by the same
  number, the query times the centre, so the softmax does not change. In pairs that turn slowly the bias is nearly
  constant, and the centre takes all of it. In pairs that turn fast its mean is nearly 0, and it stays.
- 16 bits, if what stays is more than :data:`LIMIT` times the deviation of the keys' elements. The step of 8 bits is
  then so large that the rounding error is more than about 1/55 of this deviation.
"""

from typing import NamedTuple

import numpy as np

from sw.model.linear import QuantizedLinear

AUTO_BITS = "auto"
LIMIT = 8.0
"""A residual bias of this number of deviations has a step of 8 / 127, and an error of 8 / 127 / sqrt(12) = 1/55."""


class KeyHeads(NamedTuple):
    """What is known about a block's keys from its weights, in the order of a head's elements in memory.

    Members
    -------
    bias: float32 [kv_heads, head_size], before the rotation; None if there is none, or if a norm follows it.
    deviation: float64 [kv_heads]: the root of the mean square of what the layer adds to the bias, for an input whose
        elements have a mean square of 1 before the norm's weight.
    """

    bias: np.ndarray | None
    deviation: np.ndarray


class KeyForm(NamedTuple):
    """The form of one KV head's keys in the cache. centre: float32 [head_size] to subtract, or None. bits: 8 or 16."""

    centre: np.ndarray | None
    bits: int


def key_heads(layer: QuantizedLinear, norm: np.ndarray, heads: int, has_head_norm: bool) -> KeyHeads:
    """The statistics of a layer of keys. norm: float32 [k], the weight of the norm before it."""
    weights = layer.dequantize().reshape(heads, -1, layer.k).astype(np.float64) * norm
    deviation = np.sqrt(np.square(weights).sum(axis=2).mean(axis=1))
    biased = layer.bias is not None and layer.bias.any() and not has_head_norm
    return KeyHeads(layer.bias.reshape(heads, -1) if biased and layer.bias is not None else None, deviation)


def key_forms(heads: KeyHeads, rotary: np.ndarray | None, context: int, bits: int | str) -> list[KeyForm]:
    """The form of each KV head's keys. rotary: the table of `rotary_rows`. bits: 8, 16, or AUTO_BITS for the rule."""
    if heads.bias is None:
        return [KeyForm(None, 8 if bits == AUTO_BITS else int(bits)) for _ in heads.deviation]
    forms = []
    for bias, deviation in zip(heads.bias, heads.deviation, strict=True):
        rotated = _rotated(bias, rotary, context)
        centre = rotated.mean(axis=0).astype(np.float32)
        rest = np.abs(rotated - centre).max()
        chosen = 16 if rest > LIMIT * deviation else 8
        forms.append(KeyForm(centre, chosen if bits == AUTO_BITS else int(bits)))
    return forms


def _rotated(bias: np.ndarray, rotary: np.ndarray | None, context: int) -> np.ndarray:
    """The bias at every position of the context: float64 [context or 1, head_size]."""
    if rotary is None:
        return bias[None].astype(np.float64)
    table = rotary[:context].reshape(len(rotary[:context]), -1, 2).astype(np.float64)
    a, b = bias.reshape(-1, 2).astype(np.float64).T
    cosine, sine = table[..., 0], table[..., 1]
    return np.stack([a * cosine - b * sine, b * cosine + a * sine], axis=-1).reshape(len(table), -1)
