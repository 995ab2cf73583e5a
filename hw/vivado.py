# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.vivado``: builds the KV260's bitstream, or packages the accelerator as an IP-XACT core, with Vivado.

Exit codes: 0 done; 1 Vivado failed, or the design misses its clock; 2 a tool is missing or an option is wrong.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from hw.flows.command_line import add_config_options, config_of, exit_code
from hw.flows.generate import generate, write
from hw.flows.overlay import overlay, shell
from hw.flows.tools import ToolError, run_logged
from hw.flows.vivado_report import check_platform, check_timing, read_facts, read_utilisation, timing
from hw.flows.vivado_wrapper import BOARD_MODULE, IP_MODULE, interface_names, wrapper
from hw.spec.cli import Parser, run_cli
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.kv260 import APP_NAME, CONTROL_ADDRESS, CONTROL_BYTES, FABRIC_HZ
from hw.spec.manifest import Manifest
from hw.spec.parts import BOARDS

SCRIPTS = Path(__file__).resolve().parent.parent / "constraints" / "kv260"
PART = BOARDS["kv260"]
BOARD_PARTS = "xilinx.com:kv260_som:part0:*"
"""Pattern of the board part; its version is 1.3 or 1.4 with most versions of Vivado, and 2.0 with 2026.1."""
OLDEST, NEWEST = (2023, 1), (2026, 1)
"""Versions of Vivado that the scripts are written for. The scripts were run with none of them."""
BITSTREAM_STEPS = ("project", "implement", "export")
"""Scripts of a bitstream, in order."""
_STEP_HOURS = 8
_INSTALL = (
    f"install Vivado {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} with Zynq UltraScale+ devices"
    " (the free Standard edition has the K26) and source its settings64.sh"
)


def find_tools(names: tuple[str, ...]) -> None:
    """Check that the tools are on PATH and that Vivado's version is supported.

    Raises
    ------
    ToolError : a tool is missing, or Vivado is older than OLDEST; for one newer than NEWEST stderr gets a warning only
    """
    missing = [name for name in names if not shutil.which(name)]
    if missing:
        raise ToolError(f"no {' and no '.join(missing)} on PATH: {_INSTALL}", 2)
    try:
        done = subprocess.run(["vivado", "-version"], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"vivado -version does not run ({error}): {_INSTALL}", 2) from error
    match = re.search(r"vivado v(\d{4})\.(\d)", done.stdout, re.IGNORECASE)
    if done.returncode or not match:
        raise ToolError(f"vivado -version names no version (exit code {done.returncode}): {_INSTALL}", 2)
    version = (int(match[1]), int(match[2]))
    if version < OLDEST:
        raise ToolError(f"Vivado {version[0]}.{version[1]} is too old: {_INSTALL}", 2)
    if version > NEWEST:
        print(
            f"warning: Vivado {version[0]}.{version[1]} is newer than the versions that the scripts were written for",
            file=sys.stderr,
        )


def prepare(config: AcceleratorConfig, folder: Path, module: str) -> tuple[Manifest, list[Path]]:
    """Generate the accelerator with the part's DSP slices, and its wrapper; returns manifest and Verilog files.

    Raises
    ------
    ConfigError, LowerError : the accelerator cannot be generated
    WrapperError : Verilog and manifest contradict each other
    """
    verilog, manifest = generate(config, target=PART.target)
    write(folder, verilog, manifest)
    around = folder / f"{module}.v"
    around.write_text(wrapper(manifest, verilog, module))
    return manifest, [folder / "gristmill.v", around]


def settings(manifest: Manifest, files: list[Path], module: str, out: Path, clock_hz: int, jobs: int) -> dict[str, str]:
    """The environment of the Tcl scripts; ``constraints/kv260/settings.tcl`` reads it."""
    values = {
        "SOURCES": "\n".join(str(path.resolve()) for path in files),
        "MODULE": module,
        "INTERFACES": " ".join(interface_names(manifest)),
        "PORTS": str(manifest.config.ports),
        "PORT_WIDTH": str(manifest.config.port_width),
        "CONFIG": manifest.config.digest[:16],
        "CLOCK_HZ": str(clock_hz),
        "CONTROL_ADDRESS": f"{CONTROL_ADDRESS:#x}",
        "CONTROL_BYTES": f"{CONTROL_BYTES:#x}",
        "PART": PART.name,
        "BOARD_PARTS": BOARD_PARTS,
        "XDC": str(SCRIPTS / "kv260.xdc"),
        "WORK": str(out.resolve() / "work"),
        "REPORTS": str(out.resolve() / "reports"),
        "OUT": str(out.resolve() / "out"),
        "JOBS": str(jobs),
    }
    return {f"GRISTMILL_{name}": value for name, value in values.items()}


def _run(command: list[str], name: str, folder: Path, environment: dict[str, str], place: str = "work") -> None:
    """Run a tool in ``folder/place`` with its log in ``folder/logs``."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    took = run_logged(
        command,
        log,
        f"step {name}",
        folder=folder / place,
        seconds=3600 * _STEP_HOURS,
        limit=f"{_STEP_HOURS} hours",
        environment=environment,
    )
    print(f"{name:>12}  done after {took / 60:.0f} minutes", file=sys.stderr, flush=True)


def _vivado(step: str, folder: Path, environment: dict[str, str]) -> None:
    script = str(SCRIPTS / f"{step}.tcl")
    _run(["vivado", "-mode", "batch", "-nojournal", "-nolog", "-notrace", "-source", script], step, folder, environment)


def _fresh(out: Path) -> None:
    """Remove the files of an earlier run, so that a failed run leaves nothing that looks like a result."""
    for name in ("work", "reports", "out", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    for path in (out / "summary.json", out / f"{APP_NAME}.xsa", out / f"{APP_NAME}.hwh", out / f"{APP_NAME}.bit"):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / APP_NAME, ignore_errors=True)


def bitstream(config: AcceleratorConfig, out: Path, clock_hz: int = FABRIC_HZ, jobs: int = 2) -> dict:
    """Build the KV260's bitstream; returns the summary, which is also ``out/summary.json``.

    Files in ``out``: ``gristmill.bit``, ``.xsa``, ``.hwh``, ``reports/``, ``logs/``, and the Kria app ``gristmill/``.
    A design that misses its clock leaves reports and logs and none of the others.

    Raises
    ------
    ToolError : a tool is missing or failed
    ReportError : the design does not meet its clock, or its addresses are others than the driver's
    ConfigError, LowerError, WrapperError : as of :func:`prepare`
    """
    find_tools(("vivado", "bootgen"))
    _fresh(out)
    manifest, files = prepare(config, out / "work" / "hw", BOARD_MODULE)
    environment = settings(manifest, files, BOARD_MODULE, out, clock_hz, jobs)
    for step in BITSTREAM_STEPS:
        _vivado(step, out, environment)
        if step == "project":
            check_platform(read_facts(out / "reports" / "facts.txt"), clock_hz)
    facts = read_facts(out / "reports" / "facts.txt")
    check_timing(facts, out / "reports" / "timing.rpt")
    products = out / "out"
    _hardware_handoff(products)
    _app(config, clock_hz, products, out, environment)
    shutil.copy(out / "work" / "hw" / "manifest.json", products / APP_NAME / "manifest.json")
    summary = {
        "board": "kv260",
        "config": config.to_dict(),
        "config_digest": config.digest,
        "board_part": facts.get("board_part"),
        "clock_hz": clock_hz,
        "clock_made_mhz": float(facts["clock_mhz"]),
        "control_address": CONTROL_ADDRESS,
        "timing": timing(facts),
        "utilisation": read_utilisation((out / "reports" / "utilisation.rpt").read_text()),
    }
    (products / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for path in sorted(products.iterdir()):
        path.rename(out / path.name)
    products.rmdir()
    return summary


def _hardware_handoff(products: Path) -> None:
    """Take the .hwh out of the .xsa, which is a zip archive, so that its place in the project does not matter."""
    try:
        with zipfile.ZipFile(products / f"{APP_NAME}.xsa") as archive:
            name = next(name for name in archive.namelist() if name.endswith("system.hwh"))
            (products / f"{APP_NAME}.hwh").write_bytes(archive.read(name))
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise ToolError(f"Vivado wrote no usable {APP_NAME}.xsa ({type(error).__name__})") from error


def _app(config: AcceleratorConfig, clock_hz: int, products: Path, out: Path, environment: dict[str, str]) -> None:
    """The folder for ``/lib/firmware/xilinx``; the overlay is compiled here if there is a ``dtc``."""
    folder = products / APP_NAME
    folder.mkdir()
    (folder / f"{APP_NAME}.dts").write_text(overlay(config, clock_hz))
    (folder / "shell.json").write_text(shell())
    bit = products / f"{APP_NAME}.bit"
    image = out / "work" / f"{APP_NAME}.bif"
    image.write_text(f"all:\n{{\n  [destination_device = pl] {bit.name}\n}}\n")
    command = ["bootgen", "-w", "-arch", "zynqmp", "-process_bitstream", "bin", "-image", str(image.resolve())]
    # Beside the bitstream, because names in a .bif may not have spaces.
    _run(command, "bootgen", out, environment, products.name)
    made = bit.with_name(bit.name + ".bin")
    if not made.exists():
        raise ToolError(f"bootgen wrote no {made.name}; see {out / 'logs' / 'bootgen.log'}")
    made.rename(folder / made.name)
    if shutil.which("dtc"):
        source, target = (str((folder / f"{APP_NAME}.{ending}").resolve()) for ending in ("dts", "dtbo"))
        _run(["dtc", "-@", "-I", "dts", "-O", "dtb", "-o", target, source], "dtc", out, environment)


def package(config: AcceleratorConfig, out: Path) -> None:
    """Package the accelerator as an IP-XACT core in ``out/ip``, a folder for Vivado's ``ip_repo_paths``.

    Raises
    ------
    ToolError : Vivado is missing or failed
    ConfigError, LowerError, WrapperError : as of :func:`prepare`
    """
    find_tools(("vivado",))
    _fresh(out)
    manifest, files = prepare(config, out / "work" / "hw", IP_MODULE)
    _vivado("package_ip", out, settings(manifest, files, IP_MODULE, out, FABRIC_HZ, 1))
    if not (out / "out" / "component.xml").exists():
        raise ToolError(f"Vivado wrote no component.xml; see {out / 'logs' / 'package_ip.log'}")
    shutil.rmtree(out / "ip", ignore_errors=True)
    (out / "out").rename(out / "ip")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hw.vivado", description="Build the KV260's bitstream, or package the accelerator.")
    parser.add_argument("product", choices=("bitstream", "ip"))
    add_config_options(parser)
    parser.add_argument(
        "--clock-mhz", type=float, default=FABRIC_HZ / 1e6, help="clock of the fabric (default: %(default)g)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that Vivado may start")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: build/kv260 or build/ip")
    return parser


def _screen(summary: dict, out: Path) -> str:
    rows = [
        f"{'clock':>12}  {summary['clock_made_mhz']:g} MHz, setup slack {summary['timing']['setup']['slack_ns']} ns"
    ]
    for name, sites in summary["utilisation"].items():
        text = f"{sites['used']:g} of {sites['available']:g}" if sites else "not in Vivado's report"
        rows.append(f"{name.upper():>12}  {text}")
    rows.append(f"{'app':>12}  {out / APP_NAME}")
    if not (out / APP_NAME / f"{APP_NAME}.dtbo").exists():
        rows.append(f"{'to do':>12}  no dtc here; on the board: dtc -@ -I dts -O dtb -o {APP_NAME}.dtbo {APP_NAME}.dts")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    product, jobs, clock_hz = options.product, options.jobs, options.clock_mhz * 1e6
    out = options.out or Path("build", "ip" if product == "ip" else "kv260")

    def run() -> int:
        config = config_of(options, PART.target)
        if not 10e6 <= clock_hz <= 600e6:
            raise ConfigError(f"clock_mhz is from 10 to 600, not {clock_hz / 1e6:g}")
        if jobs < 1:
            raise ConfigError(f"jobs is at least 1, not {jobs}")
        if product == "ip":
            package(config, out)
            print(f"{'IP core':>12}  {out / 'ip'}")
        else:
            print(_screen(bitstream(config, out, round(clock_hz), jobs), out))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    run_cli(main)
