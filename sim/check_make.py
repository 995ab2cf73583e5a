# SPDX-License-Identifier: Apache-2.0
"""Checks make's variables and the checkout's path before a target installs or builds anything.

The Makefile runs it with the targets' names as arguments and the variables in the environment. It needs Python's
standard library alone, because a fresh machine has nothing else.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hw.spec.cli import Parser, UserError, run_cli
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.parts import BOARDS
from hw.spec.presets import SELFTEST_BOARDS
from sim.harness import SIMULATORS, SetupError, check_path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("TILE", "SIM", "BOARD", "PROMPT", "PYTHON", "BENCH", "SEED", "CHECK")
"""Every variable of the Makefile that a user may set; the Makefile itself looks for PYTHON."""
Check = Callable[[Mapping[str, str]], None]


def _any_of(values: Iterable[object]) -> str:
    return " or ".join(map(str, values))


def tile(values: Mapping[str, str]) -> None:
    """A tile that the generator has; none is each command's own."""
    text = values["TILE"]
    value: Any = int(text) if text.isascii() and text.isdecimal() else text
    try:
        if text:
            AcceleratorConfig(tile=value)
    except ConfigError as error:
        raise UserError(str(error)) from None
    tiles = SELFTEST_BOARDS.get(values["BOARD"], ())
    if tiles and text and value not in tiles:
        raise UserError(f"TILE is {_any_of(tiles)} for BOARD={values['BOARD']}, not {text}")


def board(boards: Iterable[str]) -> Check:
    """One of these boards."""
    known = tuple(boards)

    def check(values: Mapping[str, str]) -> None:
        if values["BOARD"] not in known:
            raise UserError(f"BOARD is {_any_of(known)}, not {values['BOARD']!r}")

    return check


def simulators(values: Mapping[str, str]) -> None:
    """Simulators with commas between them."""
    if set(values["SIM"].split(",")) - set(SIMULATORS):
        raise UserError(f"SIM is {_any_of(SIMULATORS)}, or several with a comma, not {values['SIM']!r}")


def prompt(values: Mapping[str, str]) -> None:
    """Something to ask."""
    if not values["PROMPT"]:
        raise UserError('PROMPT is empty; ask something with PROMPT="..."')


def bench(values: Mapping[str, str]) -> None:
    """The name of a bench, or a part of it; sim.wave finds it among the benches."""
    if not values["BENCH"]:
        raise UserError("BENCH is empty; name a bench with BENCH=tb_fifo (python -m sim.run --list prints all)")


def seed(values: Mapping[str, str]) -> None:
    """A whole number from 0; none is a new one for each run."""
    if values["SEED"] and not (values["SEED"].isascii() and values["SEED"].isdecimal()):
        raise UserError(f"SEED is a whole number from 0, not {values['SEED']!r}")


def compare(values: Mapping[str, str]) -> None:
    """1 or nothing."""
    if values["CHECK"] not in ("", "1"):
        raise UserError(f"CHECK is 1 or nothing, not {values['CHECK']!r}")


TARGETS: dict[str, dict[str, Check]] = {
    "demo": {"TILE": tile, "PROMPT": prompt},
    "sim": {"TILE": tile, "SIM": simulators},
    "wave": {"TILE": tile, "SEED": seed, "BENCH": bench},
    "bench": {"CHECK": compare},
    "bitstream": {"BOARD": board((*BOARDS, *SELFTEST_BOARDS)), "TILE": tile},
    "ip": {"BOARD": board(BOARDS), "TILE": tile},
    "resources": {"BOARD": board(BOARDS), "TILE": tile},
}
"""The variables that each target reads; targets that read none are not here."""


def misspelt(given: Iterable[str]) -> str:
    """What is wrong with the names of variables that were given to make, if one is nearly the name of a known one."""
    for name in given:
        near = difflib.get_close_matches(name.upper(), NAMES, 1, 0.8)
        if near and name not in NAMES:
            return f"make has no variable {name}; there is {near[0]}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or raises UserError."""
    parser = Parser(prog="python -m sim.check_make", description="Check make's variables, from the environment.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="what make was asked for")
    targets = parser.parse_args(arguments).targets
    try:
        check_path(ROOT)
    except SetupError as error:
        raise UserError(str(error)) from None
    if problem := misspelt(os.environ.get("GIVEN", "").split()):
        raise UserError(problem)
    values = {name: os.environ.get(name, "").strip() for name in NAMES}
    for target in targets:
        # A variable that the target does not read may mean something to another program.
        read = {name: values[name] if name in TARGETS.get(target, {}) else "" for name in NAMES}
        for check in TARGETS.get(target, {}).values():
            check(read)
    return 0


if __name__ == "__main__":
    run_cli(main)
