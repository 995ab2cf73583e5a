# SPDX-License-Identifier: Apache-2.0
"""How far long work has come, on stderr: one line that is rewritten on a terminal, otherwise a line now and then."""

import io
import os
import sys
from collections.abc import Callable
from typing import Self

Progress = Callable[[int, int], None]
"""What long work calls with how much is done, and how much there is in all."""

LINES = 10
"""Lines that a count has without a terminal."""


def stderr_is_stdout() -> bool:
    """Whether both are one file, as after ``2>&1``: a line of progress would stand in the middle of a text."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno()))
    except (io.UnsupportedOperation, OSError):
        # No files: another program's streams, or closed.
        return False


class StatusLine:
    """A context manager that leaves nothing on the terminal behind."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = False
        self._last: dict[str, int] = {}

    def count(self, form: str, done: int, total: int, more: str = "") -> None:
        """Shows a count and more. form: the text with {done} and {total}: "prompt {done} of {total} tokens"."""
        text = form.format(done=f"{done:,}", total=f"{total:,}") + more
        if self._terminal:
            # To the line's start, and nothing behind the text.
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif done * LINES // total != self._last.get(form, 0) * LINES // total:
            print(text, file=sys.stderr, flush=True)
            self._last[form] = done

    def clear(self) -> None:
        """Makes room for other text."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
