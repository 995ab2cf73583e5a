# SPDX-License-Identifier: Apache-2.0
"""AWQ's first search: a scale for every input channel that several layers share.

Channel k of the input is divided by s[k] and column k of every layer's weights multiplied by it, which changes nothing
but how the weights are rounded: those of large activations lose less (Lin et al. 2023, arXiv 2306.00978).
    s = mean|x|^ratio,   normalised so that its largest times its least is 1
The ratio is that of a grid with which the layers' real outputs err least, after the ranges have been searched too (see
sw.awq.clipping), on some of their rows. To choose it by rounding to nearest alone is faster, but SmolLM2's perplexity
then scattered from trial to trial (other grids, samples and texts): 29.6 to 30.4, and 29.6 to 29.8 this way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sw.awq.clipping import clip_rows
from sw.awq.rounding import Form
from sw.awq.threads import threaded

RATIOS = tuple(i / 10 for i in range(11))
SAMPLE = 64
"""Rows of each layer that the search looks at, taken evenly."""
LEAST = np.float32(1e-6)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration saw of a tensor [tokens, K].

    Members
    -------
    gram: X^T X / tokens, float32 [K, K]. magnitude: mean of |x|, float32 [K]. tokens: seen.
    """

    gram: np.ndarray
    magnitude: np.ndarray
    tokens: int


@dataclass(frozen=True, eq=False)
class Scale:
    """A choice. values: s, float32 [K]. ratio: its exponent."""

    values: np.ndarray
    ratio: float


def output_error(difference: np.ndarray, gram: np.ndarray) -> float:
    """Mean over tokens of |x dW^T|^2, of dW float32 [N, K]."""
    return float(np.einsum("nk,nk->", difference @ gram, difference))


def search_scale(
    weights: Sequence[np.ndarray], statistics: Statistics, form: Form, classes: np.ndarray | None = None
) -> Scale:
    """The best scale for layers that share an input. The ratio 0, which is no scale at all, is among those tried.

    weights: float32 [N, K] each. classes: int [K], channels of one class get one scale; None: each has its own.
    """
    samples = [weight[np.unique(np.linspace(0, len(weight) - 1, SAMPLE).astype(int))] for weight in weights]
    classes = np.arange(len(statistics.magnitude)) if classes is None else classes
    magnitude = _by_class(statistics.magnitude, classes)
    candidates = [Scale(_values(magnitude, ratio)[classes], ratio) for ratio in RATIOS]

    def loss(scale: Scale) -> float:
        gram = scaled_gram(statistics.gram, scale.values)
        differences = ((clip_rows(w * scale.values, gram, form).values() / scale.values - w) for w in samples)
        return sum(output_error(difference, statistics.gram) for difference in differences)

    losses = threaded(loss, candidates)
    return candidates[int(np.argmin(losses))]


def scaled_gram(gram: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The Gram matrix of inputs that are divided by a scale."""
    return gram / scale[:, None] / scale


def _by_class(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Root mean square of each class's values."""
    squares = np.bincount(classes, np.square(values, dtype=np.float64)) / np.bincount(classes)
    return np.maximum(np.sqrt(squares), LEAST)


def _values(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    values = magnitude**ratio
    return (values / np.sqrt(values.max() * values.min())).astype(np.float32)
