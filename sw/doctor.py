# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.doctor``: checks this board; prints one line for each check, with a fix for each fault."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from hw.spec.kv260 import FABRIC_HZ
from sw.board.checks import OK, WRONG, Finding, examine
from sw.common.command_line import Parser
from sw.common.errors import UserError, run_cli
from sw.devices.host import Host


def well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong and the self-test has passed."""
    good = {finding.check for finding in findings if finding.status == OK}
    return "self-test" in good and not any(finding.status == WRONG for finding in findings)


def line(finding: Finding) -> str:
    """A finding for a terminal."""
    text = f"{finding.status:<12}{finding.check:<16}{finding.text}"
    return f"{text} -> {finding.fix}" if finding.fix else text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 if all is well, 1 if something is wrong or the self-test could not be run."""
    parser = Parser(prog="python -m sw.doctor", description="Check this board, and print a fix for each fault.")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the lines")
    parser.add_argument(
        "--clock-mhz",
        type=float,
        default=FABRIC_HZ / 1e6,
        metavar="MHZ",
        help="clock that the bitstream is timed for (default: %(default)g)",
    )
    options = parser.parse_args(arguments)
    if not options.clock_mhz > 0:
        raise UserError(f"--clock-mhz is above 0, not {options.clock_mhz:g}")
    findings = []
    for finding in examine(Host(), 1e6 * options.clock_mhz):
        findings.append(finding)
        if not options.json:
            print(line(finding), flush=True)
    good = well(findings)
    if options.json:
        print(json.dumps({"well": good, "checks": [asdict(finding) for finding in findings]}, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    run_cli(main)
