# SPDX-License-Identifier: Apache-2.0
"""The next token from a model's logits."""

import math
from collections.abc import Callable

import numpy as np

from sw.common.errors import UserError
from sw.text.piece_sampling import draw_from_pieces


class Sampler:
    """Chooses tokens.

    Parameters
    ----------
    temperature: 0 takes the largest logit (greedy), and among equal logits the lowest id. Otherwise a token's
        probability is p[i] = exp((l[i] - max l) / temperature) / sum, in float64.
    top_p: a token may be drawn only if it is in the smallest set of most probable tokens whose probabilities sum to
        at least top_p. The set has at least one token. Tokens of equal probability are ordered by id.
    seed: seed of numpy.random.default_rng. Each token takes one uniform u in [0, 1) from the generator. The tokens of
        the set are ordered by falling probability; the first whose cumulative sum exceeds u times the total is drawn.

    Raises UserError for values outside these ranges: 0 <= temperature, 0 < top_p <= 1, 0 <= seed.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is a number from 0, not {temperature}")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is above 0 and at most 1, not {top_p}")
        if seed < 0:
            raise UserError(f"seed is a whole number from 0, not {seed}")
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self._rng = np.random.default_rng(seed)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the first of the likeliest ones."""
        return self.temperature == 0

    def __call__(self, logits: np.ndarray) -> int:
        """A token from logits, float [vocab]; a token with -infinity is excluded.

        Raises UserError for NaN, for +infinity, and if all tokens are excluded.
        """
        top = logits.max(initial=-np.inf)
        check_top(top)
        if self.is_greedy:
            return int(logits.argmax())
        return self._draw(logits, self._rng.random())

    def from_pieces(self, maxima: np.ndarray, size: int, columns: int, read: Callable[[np.ndarray], np.ndarray]) -> int:
        """The same token as from all logits, from the pieces that can matter; the temperature is above 0.

        maxima: float32 [P], the maximum of every piece of `size` logits. columns: number of all logits. read: indices
        of pieces, int [R], to their logits, float32 [R, size]. Raises UserError as a call does.
        """
        top = maxima.max(initial=-np.inf)
        check_top(top)
        u = self._rng.random()
        token = draw_from_pieces(maxima, size, columns, read, lambda part: self._weigh(part, top), self.top_p, u)
        if token is None:
            token = self._draw(read(np.arange(len(maxima))).reshape(-1)[:columns], u)
        return token

    def _draw(self, logits: np.ndarray, u: float) -> int:
        """The token from all logits with the uniform `u`."""
        order, probabilities = self._distribution(logits)
        sums = np.cumsum(probabilities)
        index = np.searchsorted(sums, u * sums[-1], side="right")
        # The product may be rounded up to the whole sum.
        return int(order[min(index, np.count_nonzero(probabilities) - 1)])

    def _weigh(self, logits: np.ndarray, top: float) -> np.ndarray:
        """exp((l - top) / temperature) in float64, where top is the largest of all logits."""
        # The largest logit becomes 0 before the division, so it is 0 at every temperature.
        with np.errstate(over="ignore", under="ignore"):
            return np.exp((logits.astype(np.float64) - np.float64(top)) / self.temperature)

    def _distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids that may be drawn, in order of falling probability; their probabilities, not normalised again)."""
        weights = self._weigh(logits, logits.max())
        order = np.argsort(-weights, kind="stable")
        probabilities = weights[order] / weights.sum()
        if self.top_p < 1:
            # The tokens whose sums stay below top_p, and the one that reaches it. Because of rounding, the sum of all
            # tokens may be below top_p.
            count = 1 + int(np.searchsorted(np.cumsum(probabilities), self.top_p, side="left"))
            order, probabilities = order[:count], probabilities[:count]
        # Tokens of probability 0 are at the end and are never drawn.
        return order, probabilities


def check_top(top: float) -> None:
    """Raises UserError unless the largest logit is a finite number."""
    if not np.isfinite(top):
        raise UserError(f"the model's logits are no numbers to choose a token by: their maximum is {top}")
