# SPDX-License-Identifier: Apache-2.0
"""Runs the Vivado scripts in a Tcl interpreter with the recorder, and compares the result with the contract."""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hw import vivado
from hw.flows import overlay
from hw.spec import kv260 as board
from hw.spec.manifest import Manifest

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 60
_IN_PYTHON = """
import os, sys, tkinter
tcl = tkinter.Tcl()
tcl.createcommand("exit", lambda code="0": os._exit(int(code)))
tcl.setvar("argv", tcl.call("list", *sys.argv[2:]))
tcl.call("source", sys.argv[1])
"""


def interpreter() -> list[str]:
    """Command of a Tcl interpreter; the test is skipped, with what to install, if the machine has none."""
    if tclsh := shutil.which("tclsh"):
        return [tclsh]
    if subprocess.run(
        [sys.executable, "-c", "import tkinter; tkinter.Tcl()"], capture_output=True, check=False
    ).returncode:
        pytest.skip("no Tcl on this machine, so the Vivado scripts cannot be checked: install Debian package tcl")
    return [sys.executable, "-c", _IN_PYTHON]


@dataclass
class Record:
    """The recorder's record; every list holds tuples of words in order."""

    facts: dict[str, list[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, path: Path) -> "Record":
        record = cls()
        for line in path.read_text().splitlines():
            kind, *words = line.split("\t")
            record.facts[kind].append(tuple(words))
        return record

    def properties(self, thing: str) -> dict[str, str]:
        """Properties set on an object such as ``cell:ps``."""
        return {name: value for owner, name, value in self.facts["property"] if owner == thing}

    @property
    def error(self) -> str:
        return self.facts["error"][-1][0] if self.facts["error"] else ""


def run_script(script: Path, environment: dict[str, str], out: Path, **faults: str) -> Record:
    """Run one script; ``environment`` is hw.vivado's, ``faults`` are for the recorder."""
    for name in ("WORK", "REPORTS", "OUT"):
        Path(environment[f"GRISTMILL_{name}"]).mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    planted = {f"RECORDER_{name}": value for name, value in faults.items()}
    done = subprocess.run(
        [*interpreter(), str(FOLDER / "recorder.tcl"), str(script)],
        env={**os.environ, **environment, **planted, "RECORDER_OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    record = Record.read(out)
    assert bool(record.error) == bool(done.returncode), done.stdout + done.stderr
    return record


def install_tools(folder: Path, version: str = "2023.2") -> None:
    """Put a ``vivado`` that runs scripts with the recorder, and a ``bootgen``, into a folder for PATH."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "design.xsa", "w") as archive:
        archive.writestr("system.hwh", "<hardware/>")
    command = " ".join(f"'{word}'" for word in (*interpreter(), str(FOLDER / "recorder.tcl")))
    tools = {
        "vivado": f"""\
[ "$1" = -version ] && {{ echo "vivado v{version} (64-bit)"; exit 0; }}
while [ "$1" != -source ]; do shift; done
export RECORDER_OUT='{folder}'/record.txt RECORDER_XSA='{folder}'/design.xsa
exec {command} "$2"
""",
        "bootgen": """\
while [ "$1" != -image ]; do shift; done
bit=$(sed -n 's/.*\\[destination_device = pl\\] //p' "$2")
[ -f "$bit" ] && cp "$bit" "$bit.bin"
""",
    }
    for name, text in tools.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


_HP = {"AWID": 6, "AWADDR": 49, "AWLEN": 8, "AWSIZE": 3, "AWBURST": 2, "AWCACHE": 4, "AWPROT": 3, "AWVALID": 1,
       "AWREADY": 1, "WLAST": 1, "WVALID": 1, "WREADY": 1, "BID": 6, "BRESP": 2, "BVALID": 1, "BREADY": 1, "ARID": 6,
       "ARADDR": 49, "ARLEN": 8, "ARSIZE": 3, "ARBURST": 2, "ARCACHE": 4, "ARPROT": 3, "ARVALID": 1, "ARREADY": 1,
       "RID": 6, "RRESP": 2, "RLAST": 1, "RVALID": 1, "RREADY": 1}  # fmt: skip
_CONTROL = {"AWADDR": 16, "AWPROT": 3, "AWVALID": 1, "AWREADY": 1, "WDATA": 32, "WSTRB": 4, "WVALID": 1, "WREADY": 1,
            "BRESP": 2, "BVALID": 1, "BREADY": 1, "ARADDR": 16, "ARPROT": 3, "ARVALID": 1, "ARREADY": 1, "RDATA": 32,
            "RRESP": 2, "RVALID": 1, "RREADY": 1}  # fmt: skip
"""Ports of S_AXI_HP*_FPD (UG1085) and of the control port, written down a second time on purpose."""


def wanted_ports(manifest: Manifest) -> set[tuple[str, str]]:
    """Name and width of every port of the module in the block design."""
    width = manifest.config.port_width
    ports = {(f"s_axi_ctrl_{name.lower()}", str(bits)) for name, bits in _CONTROL.items()}
    for port in range(manifest.config.ports):
        signals = {**_HP, "WDATA": width, "RDATA": width, "WSTRB": width // 8}
        ports |= {(f"m_axi_hp{port}_{name.lower()}", str(bits)) for name, bits in signals.items()}
    return ports | {("clk", "1"), ("rst", "1"), ("irq", "1"), ("fan_en_b", "1")}


def complaints(record: Record, manifest: Manifest, dts: str, clock_hz: int = board.FABRIC_HZ) -> list[str]:
    """Differences of the recorded block design, or of the overlay, from manifest and ``hw.spec.kv260``."""
    if record.error:
        return [record.error]
    count, width = manifest.config.ports, manifest.config.port_width
    wrong = []

    def compare(what: str, found: object, wanted: object) -> None:
        if found != wanted:
            wrong.append(f"{what}: {found}, not {wanted}")

    ports = {(name, bits) for module, name, _, bits, *_ in record.facts["port"] if module == vivado.BOARD_MODULE}
    compare("ports", sorted(ports ^ wanted_ports(manifest)), [])
    hp = {(f"accelerator/m_axi_hp{p}", f"ps/S_AXI_HP{p}_FPD") for p in range(count)}
    control = {("ps/M_AXI_HPM0_FPD", "control/S00_AXI"), ("control/M00_AXI", "accelerator/s_axi_ctrl")}
    compare("interfaces", set(record.facts["intf_net"]), hp | control)
    clocked = {"accelerator/clk", "reset/slowest_sync_clk", "control/aclk", "ps/maxihpm0_fpd_aclk"}
    clocked |= {f"ps/saxihp{p}_fpd_aclk" for p in range(count)}
    nets = {("ps/pl_clk0", pin) for pin in clocked} | {
        ("ps/pl_resetn0", "reset/ext_reset_in"),
        ("reset/peripheral_reset", "accelerator/rst"),
        ("reset/interconnect_aresetn", "control/aresetn"),
        ("accelerator/irq", "ps/pl_ps_irq0"),
        ("accelerator/fan_en_b", "port/fan_en_b"),
    }
    compare("nets", sorted(set(record.facts["net"]) ^ nets), [])
    ps = record.properties("cell:ps")
    compare("clock", round(float(ps["CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ"]) * 1e6), clock_hz)
    used = {gp for gp in range(7) if ps.get(f"CONFIG.PSU__USE__S_AXI_GP{gp}") != "0"}
    compare("memory ports", used, set(range(2, 2 + count)))
    for gp in used:
        compare(f"width of S_AXI_GP{gp}", ps.get(f"CONFIG.PSU__SAXIGP{gp}__DATA_WIDTH"), str(width))
    addresses = {(space, segment, offset, size) for space, segment, offset, size in record.facts["address"]}
    registers = ("ps/Data", "accelerator/s_axi_ctrl/reg0", f"{board.CONTROL_ADDRESS:#x}", f"{board.CONTROL_BYTES:#x}")
    memory = {
        (f"accelerator/m_axi_hp{p}", f"ps/SAXIGP{p + 2}/HP{p}_DDR_{part}", offset, "0x80000000")
        for p in range(count)
        for part, offset in (("LOW", "0x0"), ("HIGH", "0x800000000"))
    }
    compare("addresses", sorted(addresses ^ ({registers} | memory)), [])
    compare("validated", len(record.facts["valid"]), 1)
    return wrong + overlay_complaints(dts, manifest, clock_hz)


def overlay_complaints(dts: str, manifest: Manifest, clock_hz: int) -> list[str]:
    """Differences of the overlay's source from manifest and ``hw.spec.kv260``."""
    found = dict(re.findall(r'^\s*([\w,#-]+) = ["<]+(.*?)[">]+;$', dts, re.MULTILINE))
    address, size = board.CONTROL_ADDRESS, board.CONTROL_BYTES
    width = {128: 0, 64: 1, 32: 2}[manifest.config.port_width]
    wanted = {
        "firmware-name": f"{board.APP_NAME}.bit.bin",
        "assigned-clocks": "&zynqmp_clk 71",
        "assigned-clock-rates": str(clock_hz),
        "reg": f"{address >> 32:#x} {address % 2**32:#x} {size >> 32:#x} {size % 2**32:#x}",
        "interrupts": "0 89 4",
        "linux,uio-name": board.UIO_NAME,
        "device-name": board.BUFFER_NAME,
        "size": f"{board.BUFFER_BYTES:#x}",
        "config-afi": ">, <".join([f"{r} {width}" for r in range(4, 4 + 2 * manifest.config.ports)] + ["14 0xa00"]),
    }
    wrong = [f"overlay: {k} is {found.get(k)}, not {v}" for k, v in wanted.items() if found.get(k) != v]
    nodes = [f"{board.UIO_NAME}@{address:x} {{", f"{board.BUFFER_NAME} {{"]
    wrong += [f"overlay: no node {node}" for node in nodes if node not in dts]
    if dts.count("{") != dts.count("}") or not dts.count("{"):
        wrong.append("overlay: braces do not match")
    return wrong


def make_overlay(manifest: Manifest, clock_hz: int = board.FABRIC_HZ) -> str:
    return overlay.overlay(manifest.config, clock_hz)
