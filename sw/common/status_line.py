# SPDX-License-Identifier: Apache-2.0
"""How far long work has come, on stderr: one line that is rewritten on a terminal, otherwise a line now and then.

rich, which prints the tables, has a status line as well. It is not used here: without a terminal it is silent until the
work is done, and a board's machine may have numpy alone.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import Self

Progress = Callable[[int, int], None]
"""What long work calls with how much is done, and how much there is in all."""

COLUMNS = 80
"""Of a terminal that does not say how many."""
LINES = 10
"""Lines that a count has without a terminal."""
WITHOUT_SEQUENCES = ("dumb", "unknown")
"""Values of TERM."""


def _columns() -> int:
    try:
        # 0 where nobody has said it.
        return os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
    except (io.UnsupportedOperation, OSError):
        return COLUMNS


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
        # Others show the sequences below as text: an editor's shell, a log that pretends to be a terminal.
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") not in WITHOUT_SEQUENCES
        self._shown = False
        self._last: dict[str, int] = {}

    def count(self, form: str, done: int, total: int, more: str = "") -> None:
        """Shows a count and more. form: the text with {done} and {total}: "prompt {done} of {total} tokens"."""
        text = form.format(done=f"{done:,}", total=f"{total:,}") + more
        if self._terminal:
            # To the line's start, and nothing behind the text. A text of two lines would leave its first one behind.
            print(f"\r{text[: _columns() - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
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
