# SPDX-License-Identifier: Apache-2.0
"""Reads nextpnr's JSON report: reached frequency, worst path, and used cells of the part."""

import json
from pathlib import Path

_WANTED = {
    "lut4": "TRELLIS_COMB",
    "ff": "TRELLIS_FF",
    "lutram": "TRELLIS_RAMW",
    "bram18": "DP16KD",
    "mult18": "MULT18X18D",
    "pll": "EHXPLLL",
}


class TimingError(RuntimeError):
    """The report is not valid, or the design does not meet its clock. The message is one line and names the path."""


def read_report(path: Path) -> dict:
    """The report that ``nextpnr-ecp5 --report`` writes.

    Raises
    ------
    TimingError : missing or damaged
    """
    try:
        report = json.loads(path.read_text())
        if not isinstance(report["fmax"], dict) or not isinstance(report["utilization"], dict):
            raise ValueError("fmax and utilization are objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TimingError(f"{path}: not a report of nextpnr ({error})") from error
    return report


def timing(report: dict, clock_hz: float) -> dict[str, float | str]:
    """The clock that is constrained to ``clock_hz``: its net, constraint and reached frequency in MHz, slack in ns,
    and the ends of its slowest path.

    Raises
    ------
    TimingError : no clock of the report has this constraint, so nothing was checked against it
    """
    try:
        for net, values in report["fmax"].items():
            achieved, constraint = float(values["achieved"]), float(values["constraint"])
            if abs(constraint - clock_hz / 1e6) <= 0.005 * clock_hz / 1e6:
                return {
                    "net": net,
                    "constraint_mhz": constraint,
                    "achieved_mhz": achieved,
                    "slack_ns": round(1e3 / constraint - 1e3 / achieved, 3),
                    **_worst_path(report, net),
                }
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise TimingError(f"nextpnr's report holds no clock as expected ({type(error).__name__}: {error})") from error
    seen = ", ".join(f"{net} at {values['constraint']:g} MHz" for net, values in report["fmax"].items()) or "none"
    raise TimingError(f"no clock was constrained to {clock_hz / 1e6:.2f} MHz; nextpnr knows {seen}")


def _worst_path(report: dict, net: str) -> dict[str, float | str]:
    """First cell, last cell, and the delays of logic and routing."""
    for path in report.get("critical_paths", []):
        # A path between two clocks has another clock at one end.
        if all(path[end].endswith(net) for end in ("from", "to")):
            steps = path["path"]
            delay = {True: 0.0, False: 0.0}
            for step in steps:
                delay[step["type"] == "routing"] += float(step["delay"])
            return {
                "from": steps[0]["from"]["cell"],
                "to": steps[-1]["to"]["cell"],
                "logic_ns": round(delay[False], 3),
                "routing_ns": round(delay[True], 3),
            }
    return {"from": "", "to": ""}


def check(clocks: dict[str, float | str], report: Path) -> None:
    """Refuse a design that does not meet its clock.

    Raises
    ------
    TimingError : negative slack; the message names the path
    """
    slack = clocks["slack_ns"]
    if not (isinstance(slack, float) and slack >= 0):
        raise TimingError(
            f"the clock is not met: {clocks['achieved_mhz']:.2f} of {clocks['constraint_mhz']:.2f} MHz, slack"
            f" {slack} ns from {clocks['from']} to {clocks['to']}; see {report}"
        )


def utilisation(report: dict) -> dict[str, dict[str, int]]:
    """Used and available cells of each kind."""
    found = report["utilization"]
    return {
        name: {"used": int(found[cell]["used"]), "available": int(found[cell]["available"])}
        for name, cell in _WANTED.items()
        if cell in found
    }
