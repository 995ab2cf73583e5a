# SPDX-License-Identifier: Apache-2.0
"""The precision of cached keys: factors of rotary pairs, a vector that is subtracted, and the bits of mantissas.

Keys of Qwen2 and Qwen2.5 have biases that are many times larger than what distinguishes one key from another. In a
group of the cache they determine the power of two, and keys of 8 bits lose the rest. Three remedies, all by KV head:

- Factors: the keys' elements of a rotary pair are divided by a power of two, and those of the queries multiplied by it,
  as in SmoothAttention of QServe (Lin et al. 2024, arXiv 2405.04532). A rotation does not change a factor of both
  elements, so the factors are those of rows of the weights and of biases, and no score changes. With the factors all
  pairs are about as large, and then a pair with a large bias takes no bits from the others.
- The centre: the mean of the rotated bias over all positions of the context. All scores of a row change by the same
  number, the query times the centre, so the softmax does not change. In pairs that turn slowly the bias is nearly
  constant, and the centre takes all of it. In pairs that turn fast its mean is nearly 0, and it stays.
- 16 bits, if the rounding error of 8 bits in a score would be as large as with a bias of :data:`LIMIT` times the
  deviation of the keys' elements, without factors: then it is 1/55 of what distinguishes scores.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from sw.model.linear import QuantizedLinear

AUTO_BITS = "auto"
LIMIT = 8.0
"""A residual bias of this number of deviations has a step of 8 / 127, and an error of 8 / 127 / sqrt(12) = 1/55."""
PEAK = 3.0
"""What distinguishes keys is at most about this number of deviations."""
LARGEST = 10
"""The largest factor is 2**10, and the smallest 2**-10."""


class KeyHeads(NamedTuple):
    """What is known about a block's keys from its weights, in the order of a head's elements in memory.

    Members
    -------
    bias: float32 [kv_heads, head_size], before the rotation; None if there is none, or if a norm follows it.
    deviation: float64 [kv_heads, head_size]: the root of the mean square of what the layer adds to the bias, for an
        input whose elements have a mean square of 1 before the norm's weight.
    queries: float64 [kv_heads, head_size]: the mean square of the queries that share the keys, bias included.
    factors: float32 [kv_heads, head_size], powers of two by which the keys were divided: bias and deviation are those
        of the result, and queries those before they were multiplied.
    """

    bias: np.ndarray | None
    deviation: np.ndarray
    queries: np.ndarray
    factors: np.ndarray

    def folded(self, factors: np.ndarray) -> "KeyHeads":
        """The same keys, divided by factors."""
        bias = None if self.bias is None else self.bias / factors
        return self._replace(bias=bias, deviation=self.deviation / factors, factors=self.factors * factors)


class KeyForm(NamedTuple):
    """The form of one KV head's keys in the cache. bits: 8 or 16.

    centre: float32 [head_size] to subtract, after the division by the factors, or None. factors: float32 [head_size].
    """

    centre: np.ndarray | None
    bits: int
    factors: np.ndarray


def key_heads(
    keys: QuantizedLinear, queries: QuantizedLinear, norm: np.ndarray, heads: int, has_head_norm: bool
) -> KeyHeads:
    """The statistics of the layers of keys and queries. norm: float32 [k], the weight of the norm before them."""
    deviation = np.sqrt(_squares(keys, norm)).reshape(heads, -1)
    biased = keys.bias is not None and keys.bias.any() and not has_head_norm
    bias = keys.bias.reshape(heads, -1) if biased and keys.bias is not None else None
    squares = _squares(queries, norm) + (0 if queries.bias is None else np.square(queries.bias.astype(np.float64)))
    shared = squares.reshape(heads, -1, deviation.shape[1]).mean(axis=1)
    return KeyHeads(bias, deviation, shared, np.ones(deviation.shape, np.float32))


def pair_factors(heads: KeyHeads, rotary: np.ndarray | None, context: int) -> np.ndarray | None:
    """Powers of two by which the keys of each rotary pair are divided: float32 [kv_heads, head_size]; None without a
    bias. rotary: the table of `rotary_rows`.

    The rounding error of a score is proportional to `max(m / f) * sqrt(sum(f**2 q**2))`, with m the largest values of a
    pair's keys. For any q it is least if all m / f are equal.
    """
    if heads.bias is None:
        return None
    factors = np.ones(heads.bias.shape, np.float32)
    for found, bias, deviation in zip(factors, heads.bias, heads.deviation, strict=True):
        rotated = _rotated(bias, rotary, context)
        rest = np.abs(rotated - rotated.mean(axis=0)).max(axis=0)
        largest = (rest + PEAK * deviation).reshape(-1, 2).max(axis=1)
        # Padding has no keys.
        used = largest > 0
        if used.any():
            ratios = np.where(used, largest / np.median(largest[used]), 1)
            powers = np.clip(np.rint(np.log2(ratios)), -LARGEST, LARGEST)
            found[:] = np.repeat(2.0**powers, 2)
    return factors


def scale_rows(layer: QuantizedLinear, factors: np.ndarray) -> QuantizedLinear:
    """The layer with its rows times powers of two, float32 [N]: the results are exactly those times the factors."""
    bias = None if layer.bias is None else layer.bias * factors
    return replace(layer, scales=layer.scales * factors[:, None], bias=bias)


def key_forms(heads: KeyHeads, rotary: np.ndarray | None, context: int, bits: int | str) -> list[KeyForm]:
    """The form of each KV head's keys. rotary: the table of `rotary_rows`. bits: 8, 16, or AUTO_BITS for the rule."""
    if heads.bias is None:
        return [KeyForm(None, 8 if bits == AUTO_BITS else int(bits), factors) for factors in heads.factors]
    forms = []
    parts = heads.bias, heads.deviation, heads.queries, heads.factors
    for bias, deviation, queries, factors in zip(*parts, strict=True):
        rotated = _rotated(bias, rotary, context)
        centre = rotated.mean(axis=0).astype(np.float32)
        rest = np.abs(rotated - centre).max()
        # The error of an element, and what distinguishes keys there, as they count in a score: before the factors.
        error = rest**2 * (factors.astype(np.float64) ** 2 @ queries)
        content = (deviation * factors) ** 2 @ queries
        chosen = 16 if error > LIMIT**2 * content else 8
        forms.append(KeyForm(centre, chosen if bits == AUTO_BITS else int(bits), factors))
    return forms


def _squares(layer: QuantizedLinear, norm: np.ndarray) -> np.ndarray:
    """The mean square of each row's products, float64 [N], for inputs whose elements have a mean square of 1."""
    return np.square(layer.dequantize().astype(np.float64) * norm).sum(axis=1)


def _rotated(bias: np.ndarray, rotary: np.ndarray | None, context: int) -> np.ndarray:
    """The bias at every position of the context: float64 [context or 1, head_size]."""
    if rotary is None:
        return bias[None].astype(np.float64)
    table = rotary[:context].reshape(len(rotary[:context]), -1, 2).astype(np.float64)
    a, b = bias.reshape(-1, 2).astype(np.float64).T
    cosine, sine = table[..., 0], table[..., 1]
    return np.stack([a * cosine - b * sine, b * cosine + a * sine], axis=-1).reshape(len(table), -1)
