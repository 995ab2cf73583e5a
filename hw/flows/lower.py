# SPDX-License-Identifier: Apache-2.0
"""Converts an Amaranth component to Verilog: elaborates it, shares equal modules, and lowers it with yosys."""

import gc
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amaranth.back import rtlil
from amaranth.hdl import Elaboratable, Fragment, Module, Signal, Value, ValueCastable
from amaranth.hdl._ast import SignalDict
from amaranth.hdl._ir import PortDirection, build_netlist
from amaranth.hdl._nir import Memory as NetlistMemory
from amaranth.lib import wiring

from hw.flows.errors import FlowError
from hw.flows.tools import run_yosys
from hw.rtl.common.clock_gate import ClockGates
from hw.rtl.memory.axi import is_axi
from hw.spec.parts import SIMULATION, TARGETS

_PASSES = ("proc", "opt -full", "clean", "check -assert")
"""Processes become registers and multiplexers, then everything is simplified: Verilator runs the result about eight
times as fast as Verilog that contains Amaranth's processes."""

_SPLIT = "splitnets -driver"
"""After it no net has several drivers: for Verilator a net in which one bit depends on another one is a loop. Hardware
with attention has some; in all other hardware it would only change names."""

_MODULE = re.compile(r"^(?:attribute [^\n]*\n)*module \\(\S+)\n(.*?)^end\n", re.MULTILINE | re.DOTALL)
_MEMORY_INIT = re.compile(r"^  cell \$meminit_v2 .*?^  end\n", re.MULTILINE | re.DOTALL)
_CELL = re.compile(r"^(  cell )\\(\S+) ", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^ *\(\* (?!ram_style)[^\n]*\*\)\n|\(\* (?!ram_style)[^\n]*?\*\) ", re.MULTILINE)
"""Attributes that only yosys needs. Other tools need only ram_style, the kind of memory."""
_DUMPED = "Dumping module "
"""yosys prints this for each module that it writes."""
INSIDE = "inside"
"""Name of a component with AXI ports in the module that has a port for each AXI signal."""
_MEMORY_PORT, _MEMORY_HALVES = "hp", ("reads", "write")
"""Members of the accelerator that are the halves of memory ports, and the prefix of the ports' names: hp0, hp1 ..."""
_TIMEOUT = 300
"""Timeout of yosys in seconds; tile 32 takes about 10."""


class LowerError(FlowError):
    """yosys failed; the message ends with the end of its output."""


def port_map(component: wiring.Component) -> dict[str, tuple]:
    """Name, value and direction of every port. The parts of a name are joined by one underscore.

    Amaranth's own flattening joins them by two underscores, and Verilator changes such names in C++.
    """
    ports = {}
    for path, member, value in component.signature.flatten(component):
        if isinstance(value, ValueCastable):
            value = value.as_value()
        ports["_".join(map(str, path))] = (value, _direction(member.flow))
    return ports


def _direction(flow: wiring.Flow) -> PortDirection:
    return PortDirection.Input if flow == wiring.In else PortDirection.Output


def _axi_name(name: str, index: int = 0) -> str:
    """The part of an AXI port's name between prefix and channel; both halves of a memory port have the KV260's name."""
    return f"{_MEMORY_PORT}{index}" if name in _MEMORY_HALVES else name


class _AxiPorts(Elaboratable):
    """A component with one port for each AXI signal, so that tools recognise the interfaces by the names of ports.

    ``ports`` has the form of :func:`port_map`'s result. :class:`hw.rtl.memory.axi.AxiSignature` gives the names of AXI
    signals.
    """

    def __init__(self, component: wiring.Component):
        self.component = component
        self.ports: dict[str, tuple] = {}
        self._parts: list[tuple] = []
        members = component.signature.members
        axi = [name for name, member in members.items() if is_axi(member)]
        channels = []
        for path, member, value in component.signature.flatten(component):
            if path[0] not in axi:
                self._add("_".join(map(str, path)), value, member.flow)
                continue
            (*port, channel, part), side = path, "m" if members[path[0]].flow == wiring.Out else "s"
            channels.append((_axi_name(*port), side, channel, part, member, value))
        # The channels of a port together, also where its halves are two members.
        for name, side, channel, part, member, value in sorted(channels, key=lambda item: item[0]):
            prefix = f"{side}_axi_{name}_{channel}"
            if part == "payload":
                for field, _ in member.shape:
                    self._add(f"{prefix}{field}", value[field], member.flow)
            else:
                self._add(f"{prefix}{part}", value, member.flow)

    def _add(self, name: str, value, flow: wiring.Flow) -> None:
        value = Value.cast(value)
        port = Signal(value.shape(), name=name)
        self.ports[name] = (port, _direction(flow))
        self._parts.append((value, port) if flow == wiring.In else (port, value))

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules[INSIDE] = self.component
        m.d.comb += [target.eq(source) for target, source in self._parts]
        return m


def share_modules(text: str, top: str) -> str:
    """Keep one of each set of equal modules, bottom up: one PE module instead of one for every place in the array."""
    bodies = {match[1]: match[2] for match in _MODULE.finditer(text)}
    while renamed := _equal_modules(bodies, top):
        bodies = {name: _rename_cells(body, renamed) for name, body in bodies.items() if name not in renamed}
    return "".join(f"module \\{name}\n{body}end\n" for name, body in bodies.items())


def _equal_modules(bodies: dict[str, str], top: str) -> dict[str, str]:
    """Name of each module that equals an earlier one -> name of the earlier one."""
    kept: dict[str, str] = {}
    return {
        name: first for name, body in bodies.items() if (first := kept.setdefault(body, name)) != name and name != top
    }


def _rename_cells(text: str, names: dict[str, str]) -> str:
    return _CELL.sub(lambda cell: f"{cell[1]}\\{names.get(cell[2], cell[2])} ", text)


def _shorten(text: str, top: str) -> str:
    """Rename modules: the top's name and the last part of the path, instead of the whole path."""
    names = [match[1] for match in _MODULE.finditer(text)]
    short: dict[str, str] = {top: top}
    for name in names:
        if name != top:
            last = re.sub(r"(_\d+)+$", "", name.rsplit(".", 1)[-1])
            candidate, count = f"{top}_{last}", 1
            while candidate in short.values():
                count += 1
                candidate = f"{top}_{last}_{count}"
            short[name] = candidate
    text = re.sub(r"^(module )\\(\S+)$", lambda m: f"{m[1]}\\{short[m[2]]}", text, flags=re.MULTILINE)
    return _rename_cells(text, short)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector is off: it would search all of a growing netlist again and again.

    Elaboration takes a quarter less time without it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def to_rtlil(component: wiring.Component, name: str, platform=None) -> str:
    """RTLIL text of ``component`` with module ``name`` on top, elaborated for ``platform``.

    Like ``amaranth.back.rtlil.convert``, but the initial contents of memories are undefined: their zeros would be most
    of the text and take most of the time, and the design reads no entry before it has written it.
    """
    top, ports = component, None
    if any(is_axi(member) for member in component.signature.members.values()):
        top = _AxiPorts(component)
        ports = top.ports
    gates = ClockGates() if platform is TARGETS[SIMULATION] else None
    fragment = Fragment.get(top, gates or platform)
    ports = {**(ports or port_map(component)), **(gates.ports(fragment) if gates else {})}
    netlist = build_netlist(fragment, ports=ports, name=name)
    for cell in netlist.cells:
        if isinstance(cell, NetlistMemory):
            if any(cell.init):
                raise ValueError("a memory has initial contents that are not zero")
            cell.init = ()
    checker = rtlil.EmptyModuleChecker(netlist)
    design, names = rtlil.Design(emit_src=False), SignalDict()
    for index, module in enumerate(netlist.modules):
        if not checker.is_empty(index):
            builder = design.module(".".join(module.name))
            rtlil.ModuleEmitter(builder, netlist, module, names, empty_checker=checker).emit()
    return _shorten(share_modules(_MEMORY_INIT.sub("", str(design)), name), name)


def _has_attention(component: wiring.Component) -> bool:
    config = getattr(component, "config", None)
    return config is not None and config.has_attention


def to_verilog(component: wiring.Component, name: str, platform=None) -> str:
    """Verilog-2005 of ``component``, the same for simulation and synthesis, and byte-identical in every run.

    For a ``platform`` it may contain the vendor's primitives, and its memories have attributes for their kind.

    Raises
    ------
    LowerError : yosys failed, took longer than its timeout, or could not write everything
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target, script = (Path(folder, f"design{ending}") for ending in (".il", ".v", ".ys"))
        source.write_text(to_rtlil(component, name, platform))
        split = (_SPLIT,) if _has_attention(component) else ()
        passes = (f"read_rtlil {source.name}", f"hierarchy -check -top {name}", *_PASSES, *split)
        write = f"write_verilog -noattr -simple-lhs {target.name}"
        if platform is not None and platform.family:
            # This file has black boxes for all primitives that a block may contain.
            passes = ("read_verilog -lib +/xilinx/cells_xtra.v", *passes)
            write = write.replace("-noattr ", "")
        script.write_text("\n".join((*passes, write)))
        try:
            run = run_yosys(script, _TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise LowerError(f"yosys did not finish {name} within {_TIMEOUT} s") from error
        if run.returncode or not target.exists():
            raise LowerError(f"yosys failed on {name}: {(run.stdout + run.stderr).strip()[-500:]}")
        text = target.read_text()
        # yosys does not detect that it cannot write everything.
        if text.count("\nendmodule\n") != run.stdout.count(_DUMPED):
            raise LowerError(f"yosys wrote only a part of {name}: is the disk of {tempfile.gettempdir()} full?")
        return _ATTRIBUTE.sub("", text)
