# SPDX-License-Identifier: Apache-2.0
"""The Verilog between the accelerator and a Vivado block design: it adds port attributes and the processor's widths.

The generated accelerator is independent of vendors. Vivado infers AXI interfaces, clock, reset and interrupt of a
module from the attributes X_INTERFACE_INFO and X_INTERFACE_PARAMETER on its ports (UG994, "Inferring interfaces";
UG1118).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hw.rtl.control.register_bank import CONTROL_ADDRESS_BITS
from hw.spec.control.descriptor import ADDRESS_BITS
from hw.spec.kv260 import CONTROL_BYTES
from hw.spec.manifest import Manifest

BOARD_MODULE = "gristmill_kv260"
"""The module that goes into the KV260's block design."""
IP_MODULE = "gristmill_axi"
"""The module that is packaged as an IP-XACT core."""
FAN = "fan_en_b"
"""The KV260's fan, active low. Its pin belongs to the fabric: with a design that does not drive it, the board may
overheat."""
HP_ID_BITS = 6
"""AxID of S_AXI_HP*_FPD (UG1085, PS-PL AXI interfaces)."""
HP_ADDRESS_BITS = 49
"""AxADDR of S_AXI_HP*_FPD."""

_READ = {
    "ar": ("id", "addr", "len", "size", "burst", "cache", "prot", "valid", "ready"),
    "r": ("id", "data", "resp", "last", "valid", "ready"),
}
_WRITE = {
    "aw": ("id", "addr", "len", "size", "burst", "cache", "prot", "valid", "ready"),
    "w": ("data", "strb", "last", "valid", "ready"),
    "b": ("id", "resp", "valid", "ready"),
}
_LITE_ABSENT = ("id", "len", "size", "burst", "cache", "last")
_WIDTHS = {"len": 8, "size": 3, "burst": 2, "cache": 4, "prot": 3, "resp": 2}
_DECLARATION = re.compile(r"^ *(input|output) (?:\[(\d+):0\] )?(\w+);$", re.MULTILINE)


class WrapperError(ValueError):
    """The Verilog's ports are not those of manifest and board. The message names the port."""


@dataclass(frozen=True)
class VerilogPort:
    """One port of a Verilog module; ``direction`` is ``"input"`` or ``"output"``, ``width`` is in bits."""

    name: str
    direction: str
    width: int


def read_ports(verilog: str, module: str) -> dict[str, VerilogPort]:
    """The ports of a module, by name, in Verilog that :mod:`hw.flows.lower` wrote.

    Raises
    ------
    WrapperError : there is no module of this name
    """
    body = re.search(rf"^module {re.escape(module)}\(.*?^endmodule", verilog, re.MULTILINE | re.DOTALL)
    if not body:
        raise WrapperError(f"the Verilog has no module {module}")
    found = _DECLARATION.findall(body[0])
    return {name: VerilogPort(name, direction, int(high or 0) + 1) for direction, high, name in found}


@dataclass(frozen=True)
class _Interface:
    """An AXI interface: the accelerator's ports (``inner``) and the ports for the block design (``outer``)."""

    name: str
    inner: tuple[VerilogPort, ...]
    outer: tuple[VerilogPort, ...]
    parameters: str


def _axi_ports(name: str, channels: dict[str, tuple[str, ...]], widths: dict[str, int]) -> Iterator[VerilogPort]:
    manager = name.startswith("m_")
    for channel, signals in channels.items():
        for signal in signals:
            forward = (channel in ("ar", "aw", "w")) != (signal == "ready")
            direction = "output" if forward == manager else "input"
            yield VerilogPort(f"{name}_{channel}{signal}", direction, widths.get(signal, 1))


def _interfaces(manifest: Manifest) -> list[_Interface]:
    """The interfaces of the manifest's accelerator, with names and widths of the AXI specification (IHI 0022)."""
    lite = {c: tuple(s for s in signals if s not in _LITE_ABSENT) for c, signals in {**_WRITE, **_READ}.items()}
    widths = {**_WIDTHS, "data": 32, "strb": 4, "addr": CONTROL_ADDRESS_BITS}
    outer_bits = (CONTROL_BYTES - 1).bit_length()
    if outer_bits < CONTROL_ADDRESS_BITS:
        raise WrapperError(f"CONTROL_BYTES is at least {1 << CONTROL_ADDRESS_BITS:#x}, not {CONTROL_BYTES:#x}")
    inner = tuple(_axi_ports("s_axi_ctrl", lite, widths))
    outer = tuple(_axi_ports("s_axi_ctrl", lite, {**widths, "addr": outer_bits}))
    found = [_Interface("s_axi_ctrl", inner, outer, f"PROTOCOL AXI4LITE, DATA_WIDTH 32, ADDR_WIDTH {outer_bits}")]
    width = manifest.config.port_width
    widths = {**_WIDTHS, "data": width, "strb": width // 8, "addr": ADDRESS_BITS, "id": 1}
    for port in range(manifest.config.ports):
        name = f"m_axi_hp{port}"
        inner = tuple(_axi_ports(name, _READ if port else {**_WRITE, **_READ}, widths))
        # A read-only port gets write channels that are never valid, so that Vivado reliably infers AXI4.
        outer = tuple(
            _axi_ports(name, {**_WRITE, **_READ}, {**widths, "addr": HP_ADDRESS_BITS, "id": HP_ID_BITS})
        )  # fmt: skip
        parameters = (
            f"PROTOCOL AXI4, DATA_WIDTH {width}, ADDR_WIDTH {HP_ADDRESS_BITS}, ID_WIDTH {HP_ID_BITS}, "
            "MAX_BURST_LENGTH 256, SUPPORTS_NARROW_BURST 0"
        )
        found.append(_Interface(name, inner, outer, parameters))
    return found


def _check(manifest: Manifest, ports: dict[str, VerilogPort], interfaces: list[_Interface]) -> None:
    if manifest.block != "accelerator":
        raise WrapperError(f"the manifest is of the block {manifest.block}; a board takes the accelerator")
    wanted = {port.name: port for interface in interfaces for port in interface.inner}
    wanted |= {name: VerilogPort(name, "input", 1) for name in ("clk", "rst")}
    wanted |= {name: VerilogPort(name, f"{p.direction}put", p.width) for name, p in manifest.ports.items()}
    for name in sorted(wanted.keys() | ports.keys()):
        if name not in ports:
            raise WrapperError(f"the Verilog lacks port {name}")
        if name not in wanted:
            raise WrapperError(f"the Verilog has port {name}, which is not in the manifest")
        if ports[name] != wanted[name]:
            have, want = ports[name], wanted[name]
            raise WrapperError(
                f"port {name} is an {have.direction} of {have.width} bits in the Verilog, "
                f"but an {want.direction} of {want.width} bits in the manifest"
            )
    if set(manifest.ports) != {"irq"}:
        raise WrapperError(f"the manifest's ports outside AXI are irq alone, not {', '.join(sorted(manifest.ports))}")


def _attributes(info: str, parameters: str = "") -> str:
    text = f'X_INTERFACE_INFO = "{info}"'
    if parameters:
        text += f', X_INTERFACE_PARAMETER = "XIL_INTERFACENAME {info.split()[1]}, {parameters}"'
    return f"  (* {text} *)"


def _declare(port: VerilogPort) -> str:
    return f"  {port.direction} {f'[{port.width - 1}:0] ' if port.width > 1 else ''}{port.name}"


def _join(inner: VerilogPort | None, outer: VerilogPort) -> tuple[str | None, str | None]:
    """The signal that is connected to the accelerator's port, and an additional assignment; either may be None."""
    if inner is None:
        return None, f"  assign {outer.name} = {outer.width}'d0;" if outer.direction == "output" else None
    if inner.width == outer.width:
        return outer.name, None
    low, high = inner.width - 1, outer.width - 1
    if outer.direction == "output":
        rest = f"  assign {outer.name}[{high}:{low + 1}] = {outer.width - inner.width}'d0;"
        return f"{outer.name}[{low}:0]" if low else f"{outer.name}[0]", rest
    if outer.name.endswith("addr"):
        # An address beyond the accelerator's own space must not alias a register.
        return f"{{|{outer.name}[{high}:{low}], {outer.name}[{low - 1}:0]}}", None
    return f"{outer.name}[{low}:0]" if low else f"{outer.name}[0]", None


def wrapper(manifest: Manifest, verilog: str, module: str = BOARD_MODULE) -> str:
    """Verilog of the module around the accelerator that is used in Vivado.

    Its ports have the accelerator's names and the processor's widths: memory ports have IDs and addresses as wide as
    those of S_AXI_HP*_FPD, and all channels; the control port's addresses cover ``CONTROL_BYTES``.

    Parameters
    ----------
    verilog : text of the accelerator's own Verilog, whose ports are compared with the manifest's
    module : BOARD_MODULE, which also drives the fan's pin, or IP_MODULE, which does not

    Raises
    ------
    WrapperError : a port is missing, unknown, or of another width or direction than in the manifest
    """
    ports = read_ports(verilog, manifest.top)
    interfaces = _interfaces(manifest)
    _check(manifest, ports, interfaces)
    busses = ":".join(interface.name for interface in interfaces)
    clock = _attributes("xilinx.com:signal:clock:1.0 clk CLK", f"ASSOCIATED_BUSIF {busses}, ASSOCIATED_RESET rst")
    reset = _attributes("xilinx.com:signal:reset:1.0 rst RST", "POLARITY ACTIVE_HIGH")
    interrupt = _attributes("xilinx.com:signal:interrupt:1.0 irq INTERRUPT", "SENSITIVITY LEVEL_HIGH")
    declared = [f"{clock}\n  input clk", f"{reset}\n  input rst", f"{interrupt}\n  output irq"]
    joined, assigned = [(name, name) for name in ("clk", "rst", "irq")], []
    if module == BOARD_MODULE:
        declared.append(_declare(VerilogPort(FAN, "output", 1)))
        assigned.append(f"  assign {FAN} = 1'b0;")
    for interface in interfaces:
        inner = {port.name: port for port in interface.inner}
        parameters = interface.parameters
        for port in interface.outer:
            signal = port.name.removeprefix(f"{interface.name}_").upper()
            info = f"xilinx.com:interface:aximm:1.0 {interface.name} {signal}"
            declared.append(f"{_attributes(info, parameters)}\n{_declare(port)}")
            parameters = ""
            target, assignment = _join(inner.get(port.name), port)
            if target:
                joined.append((port.name, target))
            if assignment:
                assigned.append(assignment)
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        f"// Config {manifest.config.digest[:16]}. Generated by python -m hw.vivado around {manifest.top}.",
        f"module {module} (",
        ",\n".join(declared),
        ");",
        *assigned,
        f"  {manifest.top} accelerator (",
        ",\n".join(f"    .{name}({target})" for name, target in joined),
        "  );",
        "endmodule",
    ]
    return "\n".join(lines) + "\n"


def interface_names(manifest: Manifest) -> list[str]:
    """AXI interfaces of the wrapper: the control port, then the memory ports."""
    return ["s_axi_ctrl", *(f"m_axi_hp{port}" for port in range(manifest.config.ports))]
