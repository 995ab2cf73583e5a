# SPDX-License-Identifier: Apache-2.0
"""The code of a batch for an accelerator: its descriptors, and for a prepared batch a program in memory."""

import weakref
from collections import deque
from dataclasses import dataclass

from sw.devices.base import Buffer


@dataclass(eq=False)
class Code:
    """The descriptors of a batch.

    Members
    -------
    descriptors: the words of each job's descriptor.
    beats: beats of each job's weight stream.
    program: the descriptors in memory, or None if they are pushed one by one.
    """

    descriptors: list[list[int]]
    beats: list[int]
    program: Buffer | None = None


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
