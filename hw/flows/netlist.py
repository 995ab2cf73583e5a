# SPDX-License-Identifier: Apache-2.0
"""A mapped netlist from yosys's ``write_json``: the arcs from net to net through cells, and the bits that end paths."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hw.flows.lower import LowerError

REGISTER = "gristmill_register"
"""Attribute of the nets that registers of the source drive. A net has a name in every block that it passes through."""

_LUTS = ("LUT1", "LUT2", "LUT3", "LUT4", "LUT5", "LUT6", "INV")
_CARRIES = ("CARRY4", "CARRY8")
_MEMORY = re.compile(r"RAM\d+(X|M)\d*[SD]?\d*")
_MEMORY_LEVELS = 1.2
LEVELS = {**dict.fromkeys(_LUTS, 1.0), **dict.fromkeys(_CARRIES, 0.12), **dict.fromkeys(("MUXF7", "MUXF8"), 0.3)}
"""Levels of each kind of cell: approximately its delay, in units of the delay of a LUT and the route to it. The
asynchronous read of a LUT memory counts 1.2."""

_CLOCK_PINS = {
    **dict.fromkeys(("FDRE", "FDSE", "FDCE", "FDPE"), ("C",)),
    **dict.fromkeys(("SRL16E", "SRLC32E", "DSP48E2", "URAM288"), ("CLK",)),
    **dict.fromkeys(("RAMB18E2", "RAMB36E2"), ("CLKARDCLK", "CLKBWRCLK")),
}
"""Cells at which paths start and end, and their clock pins, which carry no data."""
_CONSTANTS = ("GND", "VCC", "$scopeinfo")
_NOT_SOURCE = re.compile(r"^\$|\$(auto|abc|techmap|flatten|procdff|procmux)\$")


@dataclass(frozen=True)
class End:
    """A bit at which paths end.

    Attributes
    ----------
    net : number of the bit's net
    cell : name of the cell, or of the output port
    pin : the cell's pin; empty if it is a port
    """

    net: int
    cell: str
    pin: str


def _bits(cell: Mapping, port: str) -> list[int]:
    """Nets of a port, without constants, which are strings."""
    return [bit for bit in cell["connections"].get(port, ()) if isinstance(bit, int)]


def _ports(cell: Mapping, direction: str) -> list[str]:
    return [port for port, way in cell["port_directions"].items() if way == direction]


def _carry_arcs(cell: Mapping) -> Iterator[tuple[int, int]]:
    """Arcs of a carry chain. A bit depends on the bits below it; a sum does not depend on its own DI."""
    pins = cell["connections"]
    before = _bits(cell, "CI") + _bits(cell, "CYINIT") + _bits(cell, "CI_TOP")
    for index, (select, data) in enumerate(zip(pins["S"], pins["DI"], strict=True)):
        own = [bit for bit in (select,) if isinstance(bit, int)]
        both = [bit for bit in (select, data) if isinstance(bit, int)]
        for port, sources in (("O", before + own), ("CO", before + both)):
            target = pins[port][index] if index < len(pins.get(port, ())) else None
            if isinstance(target, int):
                yield from ((source, target) for source in sources)
        before = before + both


def _address(cell: Mapping, output: str) -> list[str]:
    """Address pins of a read port (AMD UG974): DOA has ADDRA, the DPO of a RAM64X1D DPRA0 and so on, O and SPO A0."""
    if output.startswith("DO"):
        return [f"ADDR{output[2:]}"]
    prefix = "DPRA" if output == "DPO" else "A"
    return [name for name in _ports(cell, "input") if name.rstrip("0123456789") == prefix]


def _write_pins(cell: Mapping) -> list[str]:
    """Data, enable and address pins of the write port, which shares the address pins of the last read port."""
    inputs = _ports(cell, "input")
    addresses = [name for name in inputs if name.startswith("ADDR")]
    written = [max(addresses)] if addresses else [name for name in inputs if re.fullmatch(r"A\d*", name)]
    return [name for name in inputs if name in written or re.fullmatch(r"D|DI[A-H]?|WE", name)]


def _arcs(cell: Mapping) -> Iterator[tuple[int, int]]:
    """Pairs of nets: a change of the first reaches the second through the cell."""
    if cell["type"] in _CARRIES:
        yield from _carry_arcs(cell)
        return
    for output in _ports(cell, "output"):
        inputs = _address(cell, output) if _MEMORY.fullmatch(cell["type"]) else _ports(cell, "input")
        for target in _bits(cell, output):
            yield from ((source, target) for port in inputs for source in _bits(cell, port))


class Netlist:
    """One flat module.

    Attributes
    ----------
    arcs : by net, the nets that it reaches through a cell, with the cell's name
    waiting : by net, the number of arcs that lead to it
    ends : every bit at which paths end

    Raises
    ------
    LowerError : a kind of cell whose depth is not known
    """

    def __init__(self, module: Mapping):
        self._cells, self._nets = module["cells"], module["netnames"]
        self.arcs: dict[int, list[tuple[int, str]]] = {}
        self.waiting: Counter[int] = Counter()
        self.ends: list[End] = []
        for name, cell in self._cells.items():
            if cell["type"] not in _CONSTANTS:
                self._add(name, cell)
        for name, port in module["ports"].items():
            if port["direction"] == "output":
                self.ends += [End(bit, name, "") for bit in port["bits"] if isinstance(bit, int)]
        self._names = self._net_names()

    def _add(self, name: str, cell: Mapping) -> None:
        kind = cell["type"]
        if kind in _CLOCK_PINS:
            pins = [pin for pin in _ports(cell, "input") if pin not in _CLOCK_PINS[kind]]
        elif kind in LEVELS or _MEMORY.fullmatch(kind):
            pins = _write_pins(cell) if _MEMORY.fullmatch(kind) else []
            for source, target in _arcs(cell):
                self.arcs.setdefault(source, []).append((target, name))
                self.waiting[target] += 1
        else:
            raise LowerError(f"yosys mapped a cell to {kind}, whose depth is not known")
        self.ends += [End(bit, name, pin) for pin in pins for bit in _bits(cell, pin)]

    def _net_names(self) -> dict[int, str]:
        """The source name of each net that has one: a register's own name, or else the innermost name."""
        best: dict[int, tuple[tuple, str]] = {}
        for name, net in self._nets.items():
            if net.get("hide_name") or _NOT_SOURCE.search(name):
                continue
            rank = (REGISTER in net["attributes"], name.count("."), -len(name))
            low, several = net.get("offset", 0), len(net["bits"]) > 1
            for index, bit in enumerate(net["bits"]):
                if isinstance(bit, int) and (bit not in best or rank > best[bit][0]):
                    best[bit] = rank, f"{name}[{index + low}]" if several else name
        return {bit: name for bit, (_, name) in best.items()}

    def kind(self, cell: str) -> str:
        """The primitive of a cell."""
        return self._cells[cell]["type"]

    def levels(self, cell: str) -> float:
        """The levels of a cell."""
        return LEVELS.get(self.kind(cell), _MEMORY_LEVELS)

    def net_name(self, net: int) -> str:
        """A net's name in the source; empty if it has none."""
        return self._names.get(net, "")

    def end_name(self, end: End) -> str:
        """The register, or the memory or slice with its pin, or the port."""
        cell = self._cells.get(end.cell)
        if cell is None:
            return end.cell
        if cell["type"].startswith("FD"):
            return next((self._names[bit] for bit in _bits(cell, "Q") if bit in self._names), end.cell)
        if not _NOT_SOURCE.search(end.cell):
            return f"{end.cell}.{end.pin}"
        # The cell's name is from yosys, so use the source name of one of its nets.
        ports = _ports(cell, "output") + _ports(cell, "input")
        near = next((self._names[bit] for port in ports for bit in _bits(cell, port) if bit in self._names), "")
        return f"{near} ({cell['type']}.{end.pin})"

    def start_name(self, net: int) -> str:
        """The register or memory that drives a net at which a path starts, or the input port."""
        if net in self._names:
            return self._names[net]
        for name, cell in self._cells.items():
            if any(net in _bits(cell, port) for port in _ports(cell, "output")):
                return self.end_name(End(net, name, "out"))
        return f"net {net}"
