# SPDX-License-Identifier: Apache-2.0
"""Progress of long work, on stderr: one line that is rewritten on a terminal, otherwise some separate lines.

rich, which prints the tables, has a status line as well. It is not used here: without a terminal it is silent until the
work is done, and a board's machine may have numpy alone.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import Self

Progress = Callable[[int, int], None]
"""Long work calls this function with the amount that is done and the total amount."""

COLUMNS = 80
"""Of a terminal that does not say how many."""
LINES = 10
"""Number of lines for one count if stderr is not a terminal."""
WITHOUT_SEQUENCES = ("dumb", "unknown")
"""Values of TERM."""


def _columns() -> int:
    try:
        # 0 if it is not known.
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
    """A context manager that clears its line on the terminal when it ends."""

    def __init__(self) -> None:
        # Others show the sequences below as text: an editor's shell, a log that pretends to be a terminal.
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") not in WITHOUT_SEQUENCES
        self._shown = False
        self._last: dict[str, int] = {}

    def count(self, form: str, done: int, total: int, more: str = "") -> None:
        """Shows a count. form: a text with {done} and {total}: "prompt {done} of {total} tokens"; more: its ending."""
        text = form.format(done=f"{done:,}", total=f"{total:,}") + more
        if self._terminal:
            # Go to the start of the line, and erase the rest of it. A text longer than the line would leave its first
            # part on the terminal.
            print(f"\r{text[: _columns() - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif done * LINES // total != self._last.get(form, 0) * LINES // total:
            print(text, file=sys.stderr, flush=True)
            self._last[form] = done

    def clear(self) -> None:
        """Clears the line, so that other text can be printed."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
