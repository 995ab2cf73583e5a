# SPDX-License-Identifier: Apache-2.0
"""AWQ's first search: a scale for every input channel, shared by all layers that read the input.

Channel k of the input is divided by s[k], and column k of every layer's weights is multiplied by it. This changes only
the rounding of the weights: weights of large activations get smaller errors (Lin et al. 2023, arXiv 2306.00978).
    s = mean|x|^ratio,   normalised so that its largest value times its least value is 1
The ratio is the one of a grid that gives the least error of the layers' real outputs on some of their rows, after the
search for ranges (see sw.awq.clipping). A choice by rounding to nearest alone is faster, but SmolLM2's perplexity then
varied from trial to trial (with other grids, samples and texts) between 29.6 and 30.4; with this method it varied
between 29.6 and 29.8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sw.awq.clipping import clip_rows
from sw.awq.rounding import Form
from sw.awq.threads import threaded

RATIOS = tuple(i / 10 for i in range(11))
SAMPLE = 64
"""Number of rows of each layer that the search uses, evenly spaced."""
LEAST = np.float32(1e-6)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a tensor [tokens, K] over the calibration text.

    Members
    -------
    gram: X^T X / tokens, float32 [K, K]. magnitude: mean of |x|, float32 [K]. tokens: number of tokens.
    drift: (Y - X)^T X / tokens, float32 [K, K], with the inputs Y of the float model; None if they are not known.
    """

    gram: np.ndarray
    magnitude: np.ndarray
    tokens: int
    drift: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scale:
    """A scale. values: s, float32 [K]. ratio: its exponent."""

    values: np.ndarray
    ratio: float


def output_error(difference: np.ndarray, gram: np.ndarray) -> float:
    """Mean over tokens of |x dW^T|^2, for dW float32 [N, K]."""
    return float(np.einsum("nk,nk->", difference @ gram, difference))


def search_scale(
    weights: Sequence[np.ndarray], statistics: Statistics, form: Form, classes: np.ndarray | None = None
) -> Scale:
    """The best scale for layers that share an input. The ratio 0, which means no scale, is one of the candidates.

    weights: float32 [N, K] each. classes: int [K], channels of the same class share a scale; None: no sharing.
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
