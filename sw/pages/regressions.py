# SPDX-License-Identifier: Apache-2.0
"""Finds simulated cycles that have increased against docs/figures.json.

Simulated cycles are exact and the same on every machine, so one cycle more is a change of the hardware.
"""

from collections.abc import Iterator
from typing import Any

from sw.common.errors import UserError
from sw.pages.store import FILE, Sections

KEYS = ("name", "length", "memory", "tile", "key_bits", "m", "k", "n")
"""Members that identify a row; the others are measured."""


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name} {row[name]}" if name != "name" else row[name] for name in KEYS if name in row)


def _cycles(figures: Any) -> Iterator[tuple[str, float]]:
    """Every count of cycles in a section's figures, with a name that identifies its row."""
    if isinstance(figures, list):
        for row in figures:
            counts = {name: value for name, value in row.items() if _is_count(name) and value is not None}
            yield from ((f"{', '.join(_key(row))}: {name}", value) for name, value in counts.items())
    else:
        for name, value in figures.items():
            if _is_count(name):
                yield name, value
            elif isinstance(value, dict):
                yield from ((f"{name}: {inner}", count) for inner, count in _cycles(value))


def _is_count(name: str) -> bool:
    return name == "cycles" or (name.startswith("cycles_") and not name.endswith("second"))


def compare(sections: Sections, report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The counts that became worse and those that became better, one line each. Only sections in both arguments count.

    sections: those of docs/figures.json. report: measured figures by section.
    Raises UserError if a measured count is not in the file, because then there is nothing to compare it with.
    """
    worse, better = [], []
    for section, figures in report.items():
        if section in sections:
            known = dict(_cycles(sections[section]["figures"]))
            for name, count in _cycles(figures):
                if name not in known:
                    raise UserError(f"{FILE.name} has no figure for {section}, {name}; python -m sw.bench --update")
                if count != known[name]:
                    line = f"{section}, {name}: {count:,} cycles, {FILE.name} says {known[name]:,}"
                    (worse if count > known[name] else better).append(line)
    return worse, better
