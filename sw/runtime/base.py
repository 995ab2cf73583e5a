# SPDX-License-Identifier: Apache-2.0
"""What all decoders have in common: tokens go in, logits come out, and the keys and values of past tokens stay."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from sw.common.errors import UserError
from sw.runtime.usage import Usage
from sw.text.sampling import Sampler, check_top

BLOCK = 64
"""Most tokens of one call without hardware, which would set the limit."""


class BaseDecoder(ABC):
    """A language model with a KV cache for one sequence. A context manager that closes it.

    Members
    -------
    path: the ONNX file.
    block: most tokens of one call.
    context, length: tokens that the cache can hold, and tokens that it holds.
    reached: the most tokens that it has held since it was empty.
    usage: sums since the decoder was opened.

    Every method raises UserError if the tokens are too many for one call or for the context, or if a layer's
    activations are not finite. An exception leaves the cache as it was before the call.
    """

    def __init__(self, path: Path, block: int, context: int):
        if context < 1:
            raise UserError(f"the context is 1 token or more, not {context}")
        self.path, self.block = Path(path), block
        self.context, self.length, self.reached = context, 0, 0
        self.usage = Usage()

    @abstractmethod
    def forward(self, ids: Sequence[int], every: bool = False) -> np.ndarray:
        """Logits after each of 1 to `block` more tokens if `every`, else after the last: float32 [M or 1, vocab]."""

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> None:
        """Appends 1 to `block` tokens without computing logits: computes only what the cache needs, so neither the head
        nor anything after the last block's keys and values.
        """

    def greedy(self, ids: Sequence[int]) -> int:
        """The first of the likeliest tokens after 1 to `block` more. Raises UserError if its logit is not finite."""
        logits = self.forward(ids)[-1]
        check_top(logits.max())
        return int(logits.argmax())

    def sample(self, ids: Sequence[int], sampler: Sampler) -> int:
        """The token that a sampler draws after 1 to `block` more. Its temperature is above 0.

        A decoder may read only a part of the logits for it. Raises UserError as the sampler does.
        """
        return sampler(self.forward(ids)[-1])

    def reset(self) -> None:
        """Empties the cache."""
        self.length = self.reached = 0

    @property
    @abstractmethod
    def cache_form(self) -> str:
        """Everything but the model that the arrays of the cache depend on."""

    @abstractmethod
    def cache_arrays(self) -> dict[str, np.ndarray]:
        """The cache by names that are unique: arrays of numbers, which the next call may change."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, np.ndarray], length: int, reached: int = 0) -> None:
        """Takes the first `length` tokens of a cache: the arrays of a decoder with the same model and form.

        reached: that of the decoder, if it is more than `length`.

        Raises ValueError if an array has another shape; then the cache is as before.
        """

    def can_shorten(self, reached: int, length: int) -> bool:
        """Whether a cache that has held `reached` tokens still has all that its first `length` tokens need."""
        return length <= reached

    def shorten(self, length: int) -> None:
        """Removes all but the first `length` tokens of the cache; `can_shorten` allows it."""
        assert length <= self.length
        self.length = length

    @abstractmethod
    def close(self) -> None:
        """Frees sessions and buffers of the host. Closing the device frees the buffers in its memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hold(self, total: int) -> None:
        """Notes that the cache holds these tokens."""
        self.length, self.reached = total, max(self.reached, total)

    def _total(self, ids: Sequence[int]) -> int:
        """Tokens in the cache after these ones. Raises UserError if they are too many."""
        tokens, total = len(ids), self.length + len(ids)
        if not 1 <= tokens <= self.block:
            raise UserError(f"a call takes 1 to {self.block} tokens, not {tokens}")
        if total > self.context:
            raise UserError(f"the context holds {self.context} tokens, and these would be {total}")
        return total
