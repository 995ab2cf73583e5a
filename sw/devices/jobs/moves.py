# SPDX-License-Identifier: Apache-2.0
"""What depends on a call's position: fields of its jobs' descriptors, as functions of the position.

A batch for the call at one position is, with other values of these fields, the batch for the same call at another one.
`Job.moved` makes the job of the other position, and `Job.moves` says which fields differ. Both use the functions here,
so a driver that changes the words of a descriptor gives what a batch has that is built for this position.

A batch that `check_jobs` accepts is accepted at every other position within its reach, because the check depends on the
position in the following ways only, and the reach excludes what they refuse:

- slot of APPEND is a remainder, so it is below the number of slots.
- out_features (slots that are seen), turn and slots of SCORES: seen and turn are 1 to the number of slots. Without a
  window the reach ends with the last slot, so seen equals turn. All other fields follow from the cache's layout, and
  the region of fewer positions is not larger.
- the room of the scores grows with the slots that are seen, and the reach ends where the bank is full.
- positions of VALUES: the same function of the same position as those of the scores in its bank, so they are equal, and
  the batch's banks are as before.
- the rotary table's address: the reach ends with the table. It has the same alignment in every row, because the pitch
  has it; it is read only, and what a job writes overlaps no row of it.
- reads and writes of caches count as those of the whole cache, so no other overlap depends on the position.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from hw.spec.memory.kv_cache import LONGEST_CONTEXT

Number = TypeVar("Number", int, np.ndarray)


def slot_of(position: Number, capacity: Number) -> Number:
    """The slot of a position in a cache for `capacity` positions."""
    return position % capacity


def turn_of(total: Number, capacity: Number) -> Number:
    """The slot after that of position `total - 1`, at most `capacity`."""
    return (total - 1) % capacity + 1


def seen_of(total: Number, capacity: Number) -> Number:
    """Slots in use when `total` positions were appended."""
    return total - (total - capacity) * (total > capacity)


def row_of(position: Number, pitch: Number) -> Number:
    """Bytes from a table's first row to that of a position."""
    return position * pitch


class Move(NamedTuple):
    """A field of a job's descriptor that depends on the position: `origin + law(start + by, size)` for a call that is
    `by` positions later than the job's own.
    """

    field: str
    law: Callable
    start: int
    size: int
    origin: int = 0


class Reach(NamedTuple):
    """The least and the greatest `by` for which a moved job is possible."""

    least: int = -LONGEST_CONTEXT
    most: int = 1 << 40

    def both(self, other: "Reach") -> "Reach":
        """What is in both."""
        return Reach(max(self.least, other.least), min(self.most, other.most))
