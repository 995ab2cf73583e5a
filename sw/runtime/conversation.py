# SPDX-License-Identifier: Apache-2.0
"""Several turns with one decoder: a turn computes only the tokens that its prompt does not share with the cache."""

from collections.abc import Sequence

from sw.runtime.base import BaseDecoder


class Conversation:
    """The tokens whose keys and values a decoder's cache holds.

    A turn's prompt is the whole conversation so far. Usually it begins with the prompt and the answer of the turn
    before; a template may also write an earlier answer in another way, or an earlier message may have been changed.
    """

    def __init__(self, decoder: BaseDecoder):
        self._decoder = decoder
        self._ids: list[int] = []

    def begin(self, prompt_ids: Sequence[int]) -> int:
        """Keeps the tokens of the cache that the prompt begins with, all but its last one at most, and no others.

        Returns their number: `prompt_ids` from there on are to be computed. The cache is empty if it cannot be
        shortened, see BaseDecoder.can_shorten.
        """
        decoder = self._decoder
        held = self._ids[: decoder.length]
        same = common(held, prompt_ids[:-1])
        if decoder.can_shorten(decoder.reached, same):
            decoder.shorten(same)
        else:
            decoder.reset()
        self._ids = held[: decoder.length]
        return decoder.length

    def end(self, ids: Sequence[int]) -> None:
        """Takes the tokens of prompt and answer. The answer's last one may not be in the cache."""
        self._ids = list(ids[: self._decoder.length])


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of first ids that are equal."""
    for index, (mine, yours) in enumerate(zip(one, other)):
        if mine != yours:
            return index
    return min(len(one), len(other))
