# SPDX-License-Identifier: Apache-2.0
"""A token drawn from a part of a model's logits: the one that :class:`sw.text.sampling.Sampler` draws from all of them.

The logits are in pieces, and the maximum of every piece is known. A piece is read only if it can matter.

Why the token is the same. Let w[i] = exp((l[i] - max l) / temperature) be the weight of token i. The draw depends on
the order of the weights, on their sums in this order, and on the sum Z of all weights.

- Order: a token that is read and heavier than every maximum of the unread pieces is heavier than all unread tokens. So
  the first tokens of the order, and the sums of their weights, are those of all logits.
- Z: an unread piece weighs at least as much as its maximum, and at most as much as its number of tokens times its
  maximum. This gives bounds of Z.
- Every decision is a search for a bound, such as u Z, in the sums. If the lowest and the highest possible bound lie
  between the same two sums, all values between do. If not, more pieces are read.
- Rounding: sums of n positive float64 numbers, in any order, are within n 2^-53 of each other: 3e-11 for 2^18 tokens. A
  bound that is nearer than MARGIN to a sum counts as undecided. If all pieces are read and it is still undecided, the
  definition decides.
"""

from collections.abc import Callable

import numpy as np

MARGIN = 1e-9
"""Relative distance from a sum below which rounding may decide."""
FIRST = 8
"""Pieces that are read first; then twice as many each time."""


def draw_from_pieces(
    maxima: np.ndarray,
    size: int,
    columns: int,
    read: Callable[[np.ndarray], np.ndarray],
    weigh: Callable[[np.ndarray], np.ndarray],
    top_p: float,
    u: float,
) -> int | None:
    """The token that a draw with the uniform ``u`` gives, or None if all logits are needed to know.

    Parameters
    ----------
    maxima : float32 [P], the maximum of every piece; the largest one is finite.
    size, columns : tokens of a piece, and of all pieces; the last piece may be shorter.
    read : indices [R] of pieces to their logits, float32 [R, size]; after the last token anything.
    weigh : logits to weights in float64, elementwise and monotone; the largest logit has weight 1.
    top_p : see :class:`sw.text.sampling.Sampler`.
    """
    heaviest = weigh(maxima)
    order = np.argsort(-heaviest, kind="stable")
    widths = np.minimum(size, columns - size * np.arange(len(maxima)))
    ids, weights = np.empty(0, np.int64), np.empty(0)
    done, count = 0, FIRST
    while done < len(order):
        chosen, rest = np.sort(order[done : done + count]), order[done + count :]
        places = size * chosen[:, None] + np.arange(size)
        exists = places < columns
        ids = np.concatenate([ids, places[exists]])
        weights = np.concatenate([weights, weigh(read(chosen)[exists])])
        done, count = done + len(chosen), 2 * count
        known = weights > (heaviest[rest[0]] if len(rest) else 0.0)
        unsorted = weights[known]
        # Falling weight, then rising id.
        sorting = np.lexsort((ids[known], -unsorted))
        sums = np.cumsum(unsorted[sorting])
        read_total = sums[-1:].sum() + weights[~known].sum()
        total = read_total + heaviest[rest].sum(), read_total + (heaviest[rest] * widths[rest]).sum()
        place = _place(sums, total, top_p, u)
        if place is not None:
            return int(ids[known][sorting][place])
    return None


def _place(sums: np.ndarray, total: tuple[float, float], top_p: float, u: float) -> int | None:
    """The place of the drawn token in the order, or None if it is not certain. total: bounds of the sum of all."""
    if top_p < 1:
        last = _search(sums, top_p * total[0], top_p * total[1])
        if last is None:
            return None
        total = sums[last], sums[last]
    return _search(sums, u * total[0], u * total[1])


def _search(sums: np.ndarray, low: float, high: float) -> int | None:
    """The first place whose sum exceeds a bound between ``low`` and ``high``, if there is one and it is certain."""
    first, last = np.searchsorted(sums, [low * (1 - MARGIN), high * (1 + MARGIN)], side="right")
    return int(first) if first == last and first < len(sums) else None
