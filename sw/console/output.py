# SPDX-License-Identifier: Apache-2.0
"""Prints a report on stdout: a table for people, or one JSON document for programs."""

import json
import sys
from typing import Any, Protocol

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 120


class Report(Protocol):
    """The results of a command."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        ...


def print_json(report: Report) -> None:
    """Prints one JSON document on stdout."""
    print(json.dumps(report.to_dict(), indent=2))


def stdout_console(width: int = WIDTH_WITHOUT_TERMINAL) -> Console:
    """A console that prints on stdout, as wide as the terminal. width: characters of a line without a terminal."""
    return Console(width=None if sys.stdout.isatty() else width)
