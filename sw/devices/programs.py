# SPDX-License-Identifier: Apache-2.0
"""The code of a batch for an accelerator: its descriptors, and for a prepared batch a program in memory."""

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hw.spec.control.descriptor import DESCRIPTOR_WORDS
from hw.spec.ops import OPS
from hw.spec.ops.base import OPCODE_BITS, DescriptorField
from sw.devices.base import Buffer, Job
from sw.devices.jobs import Move

_WORD = 32


@dataclass(eq=False)
class Code:
    """The descriptors of a batch.

    Members
    -------
    descriptors: the words of each job's descriptor, as they were prepared.
    beats: int64 [jobs], beats of each job's weight stream; they change when the batch moves.
    program: the descriptors in memory, or None if they are pushed one by one.
    patch: what changes in a program's words when the batch moves.
    """

    descriptors: list[list[int]]
    beats: np.ndarray
    program: Buffer | None = None
    patch: "Patch | None" = None


class _Group(NamedTuple):
    """Fields with the same place in a descriptor, of jobs that depend on the position in the same way.

    Members
    -------
    move: the law, and the field's name.
    word, shift, unit: the field's place: a word of the descriptor, a bit of this word, and what 1 is worth.
    jobs: int64 [F], the jobs. start, size, origin: int64 [F], see Move. rest: int64 [F], all other bits of their words.
    """

    move: Move
    word: int
    shift: int
    unit: int
    jobs: np.ndarray
    start: np.ndarray
    size: np.ndarray
    origin: np.ndarray
    rest: np.ndarray

    def words(self, by: int) -> np.ndarray:
        """The words, int64 [F], for a position that is `by` after that of the jobs."""
        return self.rest | (self.origin + self.move.law(self.start + by, self.size)) // self.unit << self.shift


class Patch:
    """The words of a program's descriptors that depend on the position. It writes whole words, and reads none.

    Each word is what `job.moved(by).descriptor()` has there, because a moved job differs from its job in the fields of
    `job.moves()` alone, and both have their values from the same functions: see sw.devices.jobs.moves, which also says
    why the moved jobs need no check.
    """

    def __init__(self, jobs: Sequence[Job], descriptors: Sequence[Sequence[int]]):
        found: dict[tuple[Callable, int, int, int], list[tuple[int, Move]]] = {}
        for index, job in enumerate(jobs):
            for move in job.moves():
                place = _field(descriptors[index], move.field)
                found.setdefault((move.law, place.low, place.width, place.unit), []).append((index, move))
        self._groups = [_group(low, width, unit, moves, descriptors) for (_, low, width, unit), moves in found.items()]
        streams: dict[Hashable, list[int]] = {}
        for index, job in enumerate(jobs):
            if (stream := job.moving_stream) is not None:
                streams.setdefault(stream, []).append(index)
        self._streams = [(jobs[same[0]], np.array(same)) for same in streams.values()]

    def apply(self, image: np.ndarray, beats: np.ndarray, by: int) -> None:
        """Changes a program's words, uint8 [64 * descriptors] in memory, and its jobs' beats. It is not running."""
        words = image.view("<u4").reshape(-1, DESCRIPTOR_WORDS)
        for group in self._groups:
            words[group.jobs, group.word] = group.words(by)
        for job, same in self._streams:
            beats[same] = job.moved(by).beats


def beats_of(jobs: Sequence[Job]) -> np.ndarray:
    """Beats of each job's weight stream: int64 [jobs]."""
    return np.array([job.beats for job in jobs], np.int64)


def _field(words: Sequence[int], name: str) -> DescriptorField:
    """A descriptor's field by name."""
    fields = next(op.fields for op in OPS.values() if op.opcode == words[0] % (1 << OPCODE_BITS))
    return next(item for item in fields if item.name == name)


def _group(
    low: int, width: int, unit: int, moves: Sequence[tuple[int, Move]], descriptors: Sequence[Sequence[int]]
) -> _Group:
    word, shift = divmod(low, _WORD)
    assert shift + width <= _WORD, "a field that moves is in one word"
    others = ~(((1 << width) - 1) << shift)
    return _Group(
        moves[0][1],
        word,
        shift,
        unit,
        *(
            np.array(values, np.int64)
            for values in (
                [index for index, _ in moves],
                [move.start for _, move in moves],
                [move.size for _, move in moves],
                [move.origin for _, move in moves],
                [descriptors[index][word] & others for index, _ in moves],
            )
        ),
    )


class Programs:
    """Keeps a program in memory as long as its code exists.

    When the garbage collector deletes the code, in any thread and at any moment, its buffer only becomes abandoned. The
    owner of the memory frees it later, when the accelerator cannot be reading it any more.
    """

    def __init__(self) -> None:
        self._abandoned: deque[Buffer] = deque()

    def __bool__(self) -> bool:
        """Whether there are abandoned programs."""
        return bool(self._abandoned)

    def keep(self, code: Code, program: Buffer) -> None:
        """Makes a buffer the program of a code."""
        code.program = program
        # The callback has no reference to the device, so it does not keep it alive.
        weakref.finalize(code, self._abandoned.append, program).atexit = False

    def take(self) -> list[Buffer]:
        """The abandoned programs. The caller frees them."""
        return [self._abandoned.popleft() for _ in range(len(self._abandoned))]
