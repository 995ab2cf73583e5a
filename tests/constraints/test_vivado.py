# SPDX-License-Identifier: Apache-2.0
"""The Vivado scripts build the design of manifest, board and overlay, and a change in one place only is detected.

Vivado itself is not used: the scripts run in a Tcl interpreter with a recorder.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hw import vivado
from hw.flows import overlay
from hw.flows.generate import generate
from hw.flows.vivado_wrapper import BOARD_MODULE, IP_MODULE, WrapperError, read_ports, wrapper
from hw.rtl.control.register_bank import CONTROL_ADDRESS_BITS
from hw.spec import kv260 as board
from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import WINDOW_BYTES
from hw.spec.manifest import Manifest
from tests.constraints.recorder import complaints, make_overlay, run_script

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"operators": "decoder", "tile": 4, "max_tokens": 2, "max_k": 256, "max_group_size": 32}


class Setup:
    """A generated accelerator with its wrapper, and a copy of the scripts that a test may change."""

    def __init__(self, folder: Path, verilog: str, manifest: Manifest, module: str = BOARD_MODULE):
        self.folder, self.manifest = folder, manifest
        self.scripts = folder / "scripts"
        self.scripts.mkdir(parents=True)
        for path in vivado.SCRIPTS.iterdir():
            (self.scripts / path.name).write_text(path.read_text())
        self.files = [folder / "gristmill.v", folder / f"{module}.v"]
        self.files[0].write_text(verilog)
        self.files[1].write_text(wrapper(manifest, verilog, module))
        self.environment = vivado.settings(manifest, self.files, module, folder, board.FABRIC_HZ, 1)
        self.dts = make_overlay(manifest)

    def change(self, path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text, f"{path.name} has no {old!r} to change"
        path.write_text(text.replace(old, new))

    def run(self, script: str = "project", **faults: str):
        return run_script(self.scripts / f"{script}.tcl", self.environment, self.folder / "record.txt", **faults)

    def complaints(self) -> list[str]:
        return complaints(self.run(), self.manifest, self.dts)


@pytest.fixture(scope="module")
def generated() -> tuple[str, Manifest]:
    return generate(AcceleratorConfig(**SMALL), target=vivado.PART.target)


@pytest.fixture
def setup(tmp_path: Path, generated: tuple[str, Manifest]) -> Setup:
    return Setup(tmp_path / "a folder", *generated)


def test_block_design_is_the_contract(setup: Setup):
    assert setup.complaints() == []


@pytest.mark.parametrize(("ports", "port_width"), [(1, 64), (2, 32)])
def test_other_ports(tmp_path: Path, ports: int, port_width: int):
    config = AcceleratorConfig(**SMALL, ports=ports, port_width=port_width)
    assert Setup(tmp_path / "x", *generate(config)).complaints() == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        # A port.
        ("ps/S_AXI_HP${port}_FPD", "ps/S_AXI_HP[expr {($port + 1) % 4}]_FPD", "interfaces"),
        ("[get_bd_intf_pins accelerator/m_axi_hp$port]", "[get_bd_intf_pins accelerator/m_axi_mem$port]", "m_axi_mem0"),
        ("set ports [setting PORTS]", "set ports 3", "accelerator/m_axi_hp3"),
        ("CONFIG.PSU__SAXIGP${gp}__DATA_WIDTH [setting PORT_WIDTH]", "CONFIG.PSU__SAXIGP${gp}__DATA_WIDTH 64", "width"),
        ("$gp >= 2 && $gp < 2 + $ports", "$gp >= 1 && $gp < 2 + $ports", "memory ports"),
        ("CONFIG.PSU__USE__M_AXI_GP1 0", "CONFIG.PSU__USE__M_AXI_GP1 1", "maxihpm1_fpd_aclk is not connected"),
        ("[get_bd_pins ps/pl_ps_irq0]", "[get_bd_pins ps/pl_ps_irq1]", "pl_ps_irq1"),
        ("reset/peripheral_reset]", "reset/peripheral_aresetn]", "nets"),
        # A clock.
        ("[setting CLOCK_HZ] / 1.0e6", "100", "clock"),
        ("lappend clocked ps/saxihp${port}_fpd_aclk", "", "saxihp0_fpd_aclk is not connected"),
        ("[get_bd_pins ps/pl_clk0]", "[get_bd_pins ps/pl_clk1]", "pl_clk1"),
        # An address.
        ("-offset [setting CONTROL_ADDRESS]", "-offset 0xA0010000", "addresses"),
        ("-offset [setting CONTROL_ADDRESS]", "-offset 0x80000000", "cannot reach"),
        ("-range [setting CONTROL_BYTES]", "-range 0x1000", "addresses"),
        ("-range [setting CONTROL_BYTES]", "-range 0x20000", "has 65536 bytes"),
        ("HP${port}_DDR_LOW]", "HP${port}_QSPI]", "addresses"),
        # Commands that do not exist, or that Vivado would refuse.
        ("validate_bd_design", "validate_design", "unknown command validate_design"),
        ("save_bd_design", "ls", "unknown command ls"),
        ("-norecurse [list [setting XDC]]", "-recurse [list [setting XDC]]", "no option -recurse"),
        ("CONFIG.PSU__USE__IRQ0 1", "CONFIG.PSU__USE__IRQ 1", "no property"),
        ("PSU__MAXIGP0__DATA_WIDTH 128", "PSU__MAXIGP0__DATA_WIDTH 256", "is 32, 64 or 128"),
        ("target_language Verilog", "language Verilog", "no property language"),
    ],
)  # fmt: skip
def test_change_in_the_script_is_found(setup: Setup, old: str, new: str, found: str):
    setup.change(setup.scripts / "project.tcl", old, new)
    wrong = setup.complaints()
    assert any(found in text for text in wrong), wrong


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("m_axi_hp3 RDATA", "m_axi_hp2 RDATA", "m_axi_hp"),
        ("aximm:1.0 m_axi_hp1 ", "aximm:1.0 m_axi_mem1 ", "parameters of another interface"),
        ("  output [127:0] m_axi_hp0_wdata", "  output [63:0] m_axi_hp0_wdata", "ports"),
        ("  input [127:0] m_axi_hp0_rdata", "  input [63:0] m_axi_hp0_rdata", "DATA_WIDTH 128"),
        ("output m_axi_hp0_arvalid", "input m_axi_hp0_arvalid", "neither a master nor a slave"),
        ("m_axi_hp2:m_axi_hp3", "m_axi_hp2", "belongs to no clock"),
        ("signal:clock:1.0 clk", "signal:reset:1.0 clk", "is no reset"),
        ("signal:interrupt:1.0 irq", "signal:reset:1.0 irq", "is no interrupt"),
        ("[15:0] s_axi_ctrl_a", "[11:0] s_axi_ctrl_a", "ADDR_WIDTH 16"),
        (f"module {BOARD_MODULE} ", "module gristmill_top ", "no module"),
        ("PROTOCOL AXI4,", "PROTOCOL AXI4LITE,", "lacks signals or has too many"),
    ],
)
def test_change_in_the_wrapper_is_found(setup: Setup, old: str, new: str, found: str):
    setup.change(setup.files[1], old, new)
    wrong = setup.complaints()
    assert any(found in text for text in wrong), wrong


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("CONTROL_ADDRESS", 0xA001_0000, "addresses"),
        ("CONTROL_BYTES", 0x1000, "addresses"),
        ("FABRIC_HZ", 200_000_000, "clock"),
        ("UIO_NAME", "mill", "linux,uio-name"),
        ("BUFFER_NAME", "udmabuf0", "device-name"),
        ("BUFFER_BYTES", 0x1000_0000, "size"),
        ("APP_NAME", "mill", "firmware-name"),
    ],
)
def test_change_in_the_board_alone_is_found(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, name: str, value: object, found: str
):
    record = setup.run()
    monkeypatch.setattr(board, name, value)
    wrong = complaints(record, setup.manifest, setup.dts, board.FABRIC_HZ)
    assert any(found in text for text in wrong), wrong


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("<250000000>", "<100000000>", "assigned-clock-rates"),
        ("zynqmp_clk 71>;\n\t\tassigned-clock-rates", "zynqmp_clk 72>;\n\t\tassigned-clock-rates", "assigned-clocks"),
        ("0xa0000000", "0xa0010000", "reg"),
        ("0 89 4", "0 90 4", "interrupts"),
        ("<4 0>", "<4 1>", "config-afi"),
    ],
)
def test_change_in_the_overlay_is_found(setup: Setup, old: str, new: str, found: str):
    assert old in setup.dts
    setup.dts = setup.dts.replace(old, new)
    wrong = setup.complaints()
    assert any(found in text for text in wrong), wrong


def test_change_in_the_manifest_is_found(setup: Setup):
    record = setup.run()
    changes: list[dict[str, Any]] = [{"ports": 2}, {"port_width": 64}]
    for change in changes:
        other = replace(setup.manifest, config=AcceleratorConfig(**SMALL, **change))
        assert complaints(record, other, setup.dts)


def test_wrapper_refuses_other_ports(generated: tuple[str, Manifest]):
    verilog, manifest = generated
    for old, new, message in (
        (
            "  output [39:0] m_axi_hp0_araddr;",
            "  output [31:0] m_axi_hp0_araddr;",
            "m_axi_hp0_araddr is an output of 32",
        ),
        ("  input m_axi_hp3_rlast;", "", "lacks port m_axi_hp3_rlast"),
        ("  input m_axi_hp3_rlast;", "  input m_axi_hp3_rlast;\n  input m_axi_hp4_rlast;", "has port m_axi_hp4_rlast"),
        ("  output irq;", "  input irq;", "port irq is an input"),
        ("module gristmill_accelerator(", "module gristmill(", "no module gristmill_accelerator"),
    ):
        assert old in verilog
        with pytest.raises(WrapperError, match=message):
            wrapper(manifest, verilog.replace(old, new))
    with pytest.raises(WrapperError, match="takes the accelerator"):
        core = replace(manifest, block="core")
        wrapper(core, verilog.replace("module gristmill_accelerator(", "module gristmill_core("))


def test_wrapper_connects_every_port(generated: tuple[str, Manifest]):
    verilog, manifest = generated
    text = wrapper(manifest, verilog)
    connected = [line.split("(")[0].strip(" .") for line in text.splitlines() if line.startswith("    .")]
    assert sorted(connected) == sorted(read_ports(verilog, manifest.top))


def test_addresses_beyond_the_registers_do_not_alias(generated: tuple[str, Manifest]):
    # Every higher address bit sets the top bit of the accelerator's address, and no register has this bit.
    assert WINDOW_BYTES <= 1 << (CONTROL_ADDRESS_BITS - 1)
    for channel in ("aw", "ar"):
        name = f"s_axi_ctrl_{channel}addr"
        assert f".{name}({{|{name}[15:11], {name}[10:0]}})" in wrapper(generated[1], generated[0])


def test_yosys_reads_the_wrapper(tmp_path: Path, generated: tuple[str, Manifest]):
    """Every connection has the width of its port, and every output one driver."""
    verilog, manifest = generated
    ports = read_ports(verilog, manifest.top).values()
    declared = ", ".join(f"{port.direction} [{port.width - 1}:0] {port.name}" for port in ports)
    assigned = "".join(f"assign {port.name} = {port.width}'d1;" for port in ports if port.direction == "output")
    design = tmp_path / "design.v"
    design.write_text(f"module {manifest.top}({declared}); {assigned} endmodule\n{wrapper(manifest, verilog)}")
    script = f"read_verilog {design}; hierarchy -check -top {BOARD_MODULE}; proc; flatten; check -assert"
    program = "import sys; from pyosys import libyosys; [libyosys.run_pass(p) for p in sys.argv[1].split(';')]"
    done = subprocess.run([sys.executable, "-c", program, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr


def test_ip_script(tmp_path: Path, generated: tuple[str, Manifest]):
    setup = Setup(tmp_path / "ip", *generated, module=IP_MODULE)
    record = setup.run("package_ip")
    assert record.error == ""
    assert (tmp_path / "ip" / "out" / "component.xml").exists()
    assert record.properties("core:ip")["name"] == IP_MODULE
    assert [name for module, name, *_ in record.facts["port"] if module == IP_MODULE and name == "fan_en_b"] == []
    setup.change(setup.files[1], "interrupt:1.0 irq INTERRUPT", "interrupt:1.0 intr INTERRUPT")
    setup.change(setup.files[1], "XIL_INTERFACENAME irq", "XIL_INTERFACENAME intr")
    assert "did not infer the interface irq" in setup.run("package_ip").error


def test_missing_setting_is_named(setup: Setup):
    del setup.environment["GRISTMILL_CLOCK_HZ"]
    assert "GRISTMILL_CLOCK_HZ is not in the environment" in setup.run().error


def test_missing_board_files_are_named(setup: Setup):
    assert "install the Kria KV260 board files" in setup.run(BOARD_PARTS="xilinx.com:zcu104:part0:1.1").error


def test_newest_board_part_is_taken(setup: Setup):
    record = setup.run(BOARD_PARTS="xilinx.com:kv260_som:part0:2.0 xilinx.com:kv260_som:part0:1.10")
    assert record.properties(f"project:{setup.environment['GRISTMILL_WORK']}/project")["board_part"].endswith("2.0")


def test_overlay_width_follows_the_ports():
    text = overlay.overlay(AcceleratorConfig(ports=1, port_width=32), 200_000_000)
    assert "config-afi = <4 2>, <5 2>, <14 0xa00>;" in text
    assert "assigned-clock-rates = <200000000>;" in text
