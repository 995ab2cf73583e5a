# SPDX-License-Identifier: Apache-2.0
"""Scores how well a decoder predicts a text: -ln of the probability of each token, window by window."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sw.runtime.base import BaseDecoder
from sw.text.scoring import negative_log_likelihood

MOST = 700.0
"""float64 holds e to this power; the limit is at 709.8."""


@dataclass
class Score:
    """A model's score on one device.

    Members
    -------
    tokens: number of scored tokens.
    nll: sum of -ln p over them.
    cycles: cycles of the device's jobs, 0 without hardware.
    seconds: wall time.
    """

    device: str
    tokens: int = 0
    nll: float = 0.0
    cycles: int = 0
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean -ln p of a token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean), or infinity if float64 cannot hold it."""
        return math.exp(self.mean) if self.mean < MOST else math.inf


def score_window(decoder: BaseDecoder, beginning: Sequence[int], window: Sequence[int]) -> np.ndarray:
    """-ln p of a window's tokens 2 to L, float64 [L - 1]. beginning: tokens that are read before the window."""
    decoder.reset()
    # The token after the last one is not scored.
    ids = [*beginning, *window[:-1]]
    targets = np.array(window[1:])
    parts = []
    for start in range(0, len(ids), decoder.block):
        block = ids[start : start + decoder.block]
        logits = decoder.forward(block, every=True)
        # Row i predicts token i + 1 of the sequence; the first target is the window's second token.
        first = start - len(beginning)
        rows = logits[max(0, -first) :]
        if len(rows):
            first = max(0, first)
            parts.append(negative_log_likelihood(rows, targets[first : first + len(rows)]))
    return np.concatenate(parts)


def score(
    decoder: BaseDecoder,
    device: str,
    beginning: Sequence[int],
    windows: Sequence[Sequence[int]],
    scored: Callable[[int, Score], None] = lambda done, score: None,
) -> Score:
    """The score over windows of at least 2 tokens each. scored: called with windows done and the score so far."""
    result, start = Score(device), time.perf_counter()
    for done, window in enumerate(windows, 1):
        values = score_window(decoder, beginning, window)
        result.tokens += len(values)
        result.nll += float(values.sum())
        result.cycles, result.seconds = decoder.usage.cycles, time.perf_counter() - start
        scored(done, result)
    return result
