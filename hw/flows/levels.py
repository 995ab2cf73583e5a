# SPDX-License-Identifier: Apache-2.0
"""Logic depth: the number of lookup tables between registers, and the deepest paths by name.

The mapping is that of ``synth_xilinx -family xcup -flatten``: the whole design at once, with ABC9. Among yosys's
mappings this is the pessimistic one, because ABC9 saves area on all paths but the slowest. At tile 16 plain ABC, with
which :mod:`hw.flows.synthesis` counts resources, finds about 2 levels less.
"""

import math
import re
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from amaranth.lib import wiring

from hw.flows.lower import LowerError, to_rtlil
from hw.flows.netlist import REGISTER, Netlist
from hw.flows.synthesis import BLOCK_NUMBER, GLUE, MAPPED, container_names, run_mapping
from hw.spec.parts import Target

_PASSES = f"""
setattr -set {REGISTER} 1 t:$dff t:$dffe %u %co:+[Q] w:* %i
synth_xilinx -family xcup -flatten -noiopad -noclkbuf -uram -top top
write_json {MAPPED}
"""
_NUMBER = re.compile(r"\$\d+$|(?<=_)\d+(?![a-z])|(?<=\[)\d+(?=\])")
"""The number in a name that distinguishes equal blocks, elements of an array or bits of a signal."""


@dataclass(frozen=True)
class DeepPath:
    """A path between two registers.

    Attributes
    ----------
    levels : depth of the path
    start, end : the registers, or the memory or slice and its pin, or a port
    through : the cells on the path, in order: the cell's kind, and the source name of its output net if that has one
    """

    levels: float
    start: str
    end: str
    through: tuple[str, ...]


@dataclass
class Depth:
    """The result of :func:`measure_netlist`.

    Attributes
    ----------
    levels : depth of the deepest path
    end_points : number of bits that end a path
    histogram : number of end points by levels, rounded up
    blocks : the deepest path that ends in each block
    worst : the deepest paths, no two between registers that differ by a number only, deepest first
    """

    levels: float = 0.0
    end_points: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    blocks: dict[str, float] = field(default_factory=dict)
    worst: list[DeepPath] = field(default_factory=list)

    def to_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "histogram": {str(level): self.histogram[level] for level in sorted(self.histogram)}}


def measure_depth(component: wiring.Component, target: Target, *, timeout: float = 3600) -> Depth:
    """Map a component with yosys as one flat module, and find its deepest paths; see :func:`measure_netlist`.

    Raises
    ------
    LowerError : yosys failed, took longer than ``timeout`` seconds, or used a cell whose depth is not known
    """
    module = run_mapping(to_rtlil(component, "top", target), _PASSES, timeout)["top"]
    return measure_netlist(module, container_names(component, target))


def measure_netlist(module: Mapping, containers: Collection[str] = (), worst: int = 10) -> Depth:
    """Find the deepest paths of a flat module.

    A LUT or an inverter counts 1, a CARRY4 0.12, a MUXF7 or MUXF8 0.3, the asynchronous read of a LUT memory 1.2. Paths
    start at inputs and at the outputs of registers, RAMs, DSP slices and SRLs, and end at outputs and at these cells'
    inputs, the write ports of LUT memories included.

    Parameters
    ----------
    module : a module of yosys's JSON netlist; nets with the attribute :data:`REGISTER` give registers their names
    containers : instances that are not blocks but contain blocks
    worst : number of paths to list

    Raises
    ------
    LowerError : a kind of cell whose depth is not known, or a loop without a register
    """
    netlist = Netlist(module)
    arrival, before = _arrivals(netlist)
    found = Depth(end_points=len(netlist.ends))
    alike: dict[tuple[str, str], DeepPath] = {}
    for end in sorted(netlist.ends, key=lambda end: -arrival.get(end.net, 0.0)):
        levels, name = round(arrival.get(end.net, 0.0), 2), netlist.end_name(end)
        found.levels = max(found.levels, levels)
        found.histogram[math.ceil(levels)] += 1
        found.blocks.setdefault(_block(name, containers), levels)
        if len(alike) < worst:
            path = _trace(netlist, before, end.net, name, levels)
            alike.setdefault((_NUMBER.sub("*", path.start), _NUMBER.sub("*", path.end)), path)
    found.worst = list(alike.values())
    return found


def _arrivals(netlist: Netlist) -> tuple[dict[int, float], dict[int, tuple[int, str]]]:
    """Levels by net, and for each net the net and the cell before it on its deepest path."""
    arrival: dict[int, float] = {}
    before: dict[int, tuple[int, str]] = {}
    waiting = Counter(netlist.waiting)
    ready = deque(net for net in netlist.arcs if not waiting[net])
    while ready:
        source = ready.popleft()
        for target, cell in netlist.arcs.get(source, ()):
            levels = arrival.get(source, 0.0) + netlist.levels(cell)
            if levels > arrival.get(target, 0.0):
                arrival[target], before[target] = levels, (source, cell)
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    stuck = [net for net, count in waiting.items() if count]
    if stuck:
        name = next((name for net in stuck if (name := netlist.net_name(net))), "a net without a name")
        raise LowerError(f"the netlist has a loop without a register, at {name}")
    return arrival, before


def _trace(netlist: Netlist, before: Mapping[int, tuple[int, str]], net: int, end: str, levels: float) -> DeepPath:
    through = []
    while net in before:
        name = netlist.net_name(net)
        net, cell = before[net]
        through.append(f"{netlist.kind(cell)} {name}".rstrip())
    return DeepPath(levels, netlist.start_name(net), end, tuple(reversed(through)))


def _block(name: str, containers: Collection[str]) -> str:
    """The block that contains a register: the first part of its name that is not a container, without a number."""
    parts = name.split(".")[:-1]
    while parts and parts[0] in containers:
        parts.pop(0)
    return BLOCK_NUMBER.sub("", parts[0]) if parts else GLUE
