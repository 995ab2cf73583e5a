# SPDX-License-Identifier: Apache-2.0
"""Regular expressions in a model's settings. They come from another person, and must not make the reader hang."""

import re
from pathlib import Path

from sw.common.errors import UserError

MAX_REPEATS = 6
"""Repetitions (*, + and {}) in one pattern. A name has some 40 letters: the time grows by their number for each."""
REPEATED_GROUP = re.compile(r"\)[*+{]")
"""A repetition of a group may itself contain one, and then the time is exponential in the length of the name."""


def read_pattern(path: Path, where: str, text: str) -> re.Pattern[str]:
    """The compiled pattern. path, where: the file and the place in it, for messages.

    Raises UserError if it is no regular expression, or one that can take very long.
    """
    shown = f"{path}: {where} has {text[:80]!r}, which"
    if REPEATED_GROUP.search(text) or sum(map(text.count, "*+{")) > MAX_REPEATS:
        raise UserError(f"{shown} repeats a group or has more than {MAX_REPEATS} repetitions: it could take very long")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        raise UserError(f"{shown} is no regular expression") from None
