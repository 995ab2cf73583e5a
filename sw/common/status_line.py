# SPDX-License-Identifier: Apache-2.0
"""Progress of long work, on stderr: one line that is rewritten on a terminal, otherwise some separate lines."""

import sys
from collections.abc import Callable
from typing import Self

Progress = Callable[[int, int], None]
"""Long work calls this function with the amount that is done and the total amount."""

LINES = 10
"""Number of lines for one count if stderr is not a terminal."""


class StatusLine:
    """A context manager that clears its line on the terminal when it ends."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = False
        self._last: dict[str, int] = {}

    def count(self, form: str, done: int, total: int, more: str = "") -> None:
        """Shows a count. form: a text with {done} and {total}: "prompt {done} of {total} tokens"; more: its ending."""
        text = form.format(done=f"{done:,}", total=f"{total:,}") + more
        if self._terminal:
            # Go to the start of the line, and erase the rest of the line after the text.
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
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
