# SPDX-License-Identifier: Apache-2.0
"""Reads Vivado's reports: facts that the Tcl scripts wrote, utilisation, and whether the design may be used."""

import re
from pathlib import Path

from hw.spec.kv260 import CONTROL_ADDRESS, CONTROL_BYTES

_ROWS = {
    "lut": "CLB LUTs",
    "ff": "CLB Registers",
    "bram36": "Block RAM Tile",
    "uram": "URAM",
    "dsp": "DSPs",
}
_CLOCK_TOLERANCE = 0.01
"""Relative tolerance of pl_clk0: its divider makes few frequencies, and timing analysis uses the frequency it makes."""


class ReportError(RuntimeError):
    """The design was built, but must not be used. The message says why, in one line."""


def read_facts(path: Path) -> dict[str, str]:
    """``facts.txt``: one fact per line, name and value separated by a tab; the last of equal names counts.

    Raises
    ------
    ReportError : missing or damaged
    """
    try:
        lines = path.read_text().splitlines()
        return dict(line.split("\t", 1) for line in lines if line)  # type: ignore[misc]
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not the facts of a Vivado run ({error})") from error


def _number(facts: dict[str, str], name: str) -> float:
    try:
        return float(facts[name])
    except (KeyError, ValueError) as error:
        raise ReportError(f"Vivado's facts give no number for {name}, but {facts.get(name)!r}") from error


def read_utilisation(text: str) -> dict[str, dict[str, float] | None]:
    """Used and available sites from the tables of ``report_utilization``; None if the tables lack the row."""
    found: dict[str, dict[str, float] | None] = {}
    for name, row in _ROWS.items():
        match = re.search(rf"^\| *{row}\*? *\|(.*)\| *<?[\d.]+ *\| *$", text, re.MULTILINE)
        cells = [cell.strip() for cell in match[1].split("|")] if match else []
        numbers = [float(cell) for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)]
        found[name] = {"used": numbers[0], "available": numbers[-1]} if len(numbers) >= 2 else None
    return found


def timing(facts: dict[str, str]) -> dict[str, dict[str, float | str]]:
    """Slack in ns and ends of the worst setup and hold path."""
    return {
        kind: {
            "slack_ns": _number(facts, f"{kind}_slack_ns"),
            "from": facts.get(f"{kind}_from", ""),
            "to": facts.get(f"{kind}_to", ""),
        }
        for kind in ("setup", "hold")
    }


def check_platform(facts: dict[str, str], clock_hz: int) -> None:
    """Compare addresses and clock of the block design with the values that driver and overlay expect.

    Raises
    ------
    ReportError : they differ
    """
    for name, wanted in (("control_address", CONTROL_ADDRESS), ("control_bytes", CONTROL_BYTES)):
        value = facts.get(name, "")
        if _integer(value) != wanted:
            raise ReportError(f"{name} is {value or 'nothing'} in the block design, {wanted:#x} in hw/spec/kv260.py")
    clock = _number(facts, "clock_mhz") * 1e6
    if abs(clock - clock_hz) > _CLOCK_TOLERANCE * clock_hz:
        raise ReportError(
            f"the processor's divider makes {clock / 1e6:g} MHz of the {clock_hz / 1e6:g} MHz wanted; "
            f"use --clock-mhz {clock / 1e6:.6g}, which it can make"
        )


def _integer(text: str) -> int | None:
    """A number in Vivado's format of addresses and ranges: hexadecimal, decimal, or with K, M or G."""
    match = re.fullmatch(r"(0x[0-9a-fA-F]+|\d+)([KMG]?)", text.strip())
    return int(match[1], 0) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else None


def check_timing(facts: dict[str, str], report: Path) -> None:
    """Refuse a design that does not meet its clock.

    Raises
    ------
    ReportError : negative slack (the message names the path), a clock pulse that is too short, or nets without a route
    """
    for kind, path in timing(facts).items():
        slack = path["slack_ns"]
        if not isinstance(slack, float) or not slack >= 0:
            raise ReportError(f"{kind} slack {slack} ns from {path['from']} to {path['to']}; see {report}")
    if not _number(facts, "pulse_width_slack_sum_ns") >= 0:
        raise ReportError(f"a clock's pulse is too short by {facts['pulse_width_slack_sum_ns']} ns; see {report}")
    if _number(facts, "failed_nets"):
        raise ReportError(f"{facts['failed_nets']} nets have no route; see {report}")
