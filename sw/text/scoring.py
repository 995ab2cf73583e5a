# SPDX-License-Identifier: Apache-2.0
"""The parts of a text's perplexity: windows of its tokens, and the probability of each token."""

from collections.abc import Sequence

import numpy as np

from sw.common.errors import UserError


def cut_windows(ids: Sequence[int], windows: int, length: int) -> list[list[int]]:
    """At most `windows` windows of `length` tokens; the last may be shorter, but has at least 2 tokens."""
    starts = range(0, min(len(ids), windows * length), length)
    return [list(ids[start : start + length]) for start in starts if len(ids) - start >= 2]


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln softmax(logits)[target], float64 [M], of float [M, vocab] logits and int [M] targets.

    Raises UserError if logits are not finite, or if a target is not below vocab.
    """
    if targets.max() >= logits.shape[1]:
        raise UserError(f"the text has token {targets.max()}, and the model's vocabulary has {logits.shape[1]}")
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite (NaN or infinity)")
    steps = logits.astype(np.float64)
    steps -= steps.max(axis=1, keepdims=True)
    return np.log(np.exp(steps).sum(axis=1)) - steps[np.arange(len(targets)), targets]
