# SPDX-License-Identifier: Apache-2.0
"""Resources on an UltraScale+ part, block by block, as mapped by yosys: LUTs, registers, DSP slices, memories."""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from amaranth.hdl import Fragment
from amaranth.lib import wiring

from hw.flows.lower import INSIDE, LowerError, to_rtlil
from hw.flows.tools import run_yosys
from hw.rtl.common.block import Block
from hw.spec.parts import Target

RESOURCES = ("LUT", "FF", "DSP48E2", "BRAM36", "URAM288", "SRL")
"""Counted resources. LUT is all lookup tables, including those that are memory and the SRLs."""

MAPPED = "mapped.json"
"""The file that the passes of :func:`run_mapping` write."""
GLUE = "glue"
"""The name for the logic between the blocks of containers."""
_MODULE = re.compile(r"^module \\(\S+)\n(.*?)^end\n", re.MULTILINE | re.DOTALL)
BLOCK_NUMBER = re.compile(r"(\$\d+|_\d+)$")
"""Suffix that Amaranth adds to a name that is already used, and number of one of several equal blocks."""
_CELL = re.compile(r"^  cell \\(\S+) \\(\S+)$", re.MULTILINE)

# The same as `synth_xilinx -family xcup -flatten -uram` up to the LUTs. There synth_xilinx would call ABC9, which stops
# with a failed assertion on these designs (yosys 0.70). ABC does the same, but has no model of delays.
_PASSES = """
read_verilog -lib -specify +/xilinx/cells_sim.v
read_verilog -lib +/xilinx/cells_xtra.v
hierarchy -check -top {top}
synth_xilinx -family xcup -flatten -noiopad -noclkbuf -uram -top {top} -run prepare:map_luts
opt_expr -mux_undef -noclkinv
abc -luts 2:2,3,6:5,10,20
clean
xilinx_srl -fixed -minlen 3
techmap -map +/xilinx/lut_map.v -map +/xilinx/cells_map.v -D LUT_WIDTH=6
xilinx_dffopt
opt_lut_ins -tech xilinx
clean
tee -q -o {out} stat -json
"""

# LUTs that a memory cell takes: AMD UG574, "Distributed RAM".
_LUT_MEMORY = {"RAM32X1S": 1, "RAM64X1S": 1, "RAM128X1S": 2, "RAM256X1S": 4, "RAM512X1S": 8}
_LUT_MEMORY |= {"RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM256X1D": 8}
_LUT_MEMORY |= {"RAM32M": 4, "RAM64M": 4, "RAM32M16": 8, "RAM64M8": 8}
_COSTS: dict[str, dict[str, float]] = {
    # An inverter is usually merged into the next LUT; here each one counts.
    **{name: {"LUT": 1} for name in ("LUT1", "LUT2", "LUT3", "LUT4", "LUT5", "LUT6", "INV")},
    **{name: {"LUT": luts} for name, luts in _LUT_MEMORY.items()},
    **{name: {"LUT": 1, "SRL": 1} for name in ("SRL16E", "SRLC32E")},
    **{name: {"FF": 1} for name in ("FDRE", "FDSE", "FDCE", "FDPE")},
    "DSP48E2": {"DSP48E2": 1},
    "RAMB18E2": {"BRAM36": 0.5},
    "RAMB36E2": {"BRAM36": 1},
    "URAM288": {"URAM288": 1},
    # These have their own sites beside the LUTs of a slice.
    **{name: {} for name in ("CARRY4", "CARRY8", "MUXF7", "MUXF8", "MUXF9", "GND", "VCC", "$scopeinfo")},
}  # fmt: skip


def count_cells(cells: dict[str, int]) -> Counter:
    """Resources of cells, given as kind of cell -> count.

    Raises
    ------
    LowerError : a kind of cell whose cost is not known
    """
    total: Counter = Counter()
    for kind, count in cells.items():
        if kind not in _COSTS:
            raise LowerError(f"yosys mapped something to {kind}, which is not known here")
        for resource, cost in _COSTS[kind].items():
            # Half a block of memory counts, too, although Counter is declared for int.
            total[resource] += cost * count  # pyright: ignore[reportArgumentType]
    return total


def container_names(component: wiring.Component, target: Target | None) -> set[str]:
    """Names of the submodules that only hold blocks: ``INSIDE`` around AXI ports, and the containers."""
    found, waiting = {INSIDE}, [Fragment.get(component, target)]
    while waiting:
        for fragment, name, _ in waiting.pop().subfragments:
            if any(isinstance(origin, Block) and origin.container for origin in fragment.origins or ()):
                found.add(name)
                waiting.append(fragment)
    return found


def blocks_of(rtlil: str, top: str, containers: Collection[str]) -> dict[str, str]:
    """Module by name of each block: what the containers hold, or nothing if ``top`` is a block itself."""
    cells = {match[1]: _CELL.findall(match[2]) for match in _MODULE.finditer(rtlil)}
    if not any(name in containers for _, name in cells[top]):
        return {}
    found, waiting = {}, [top]
    while waiting:
        for module, name in cells[waiting.pop()]:
            if module not in cells:
                continue
            if name in containers:
                waiting.append(module)
            else:
                found[name] = module
    return found


def run_mapping(rtlil: str, passes: str, timeout: float) -> dict[str, dict]:
    """Run passes of yosys on a design; returns what they write about each module into the JSON file :data:`MAPPED`.

    Raises
    ------
    LowerError : yosys failed, or took longer than ``timeout`` seconds
    """
    with tempfile.TemporaryDirectory() as folder:
        source, script, out = (Path(folder, name) for name in ("design.il", "design.ys", MAPPED))
        source.write_text(rtlil)
        script.write_text(f"read_rtlil {source.name}\n{passes}")
        try:
            run = run_yosys(script, timeout)
        except subprocess.TimeoutExpired as error:
            raise LowerError(f"yosys did not finish within {timeout:g} s") from error
        if run.returncode or not out.exists():
            raise LowerError(f"yosys failed: {(run.stdout + run.stderr).strip()[-300:]}")
        try:
            return json.loads(out.read_text())["modules"]
        except (ValueError, KeyError) as error:
            # yosys does not notice when it cannot write everything.
            place = tempfile.gettempdir()
            raise LowerError(f"yosys wrote only a part of its output: is the disk of {place} full?") from error


def synthesise(component: wiring.Component, target: Target, *, timeout: float = 3600) -> dict[str, Counter]:
    """:data:`RESOURCES` by block; blocks whose names differ only in a number are added.

    Each block is flattened and mapped by itself, and nothing is optimised across its border, so the sum is a little
    more than the whole design would need. Vivado maps in another way: these are estimates.

    Raises
    ------
    LowerError : yosys failed, took longer than ``timeout`` seconds, or used a cell that is not known here
    """
    top = "top"
    text = to_rtlil(component, top, target)
    blocks = blocks_of(text, top, container_names(component, target))
    keep = "".join(f"setattr -mod -set keep_hierarchy 1 {module}\n" for module in sorted(set(blocks.values())))
    found = run_mapping(text, keep + _PASSES.format(top=top, out=MAPPED), timeout)
    modules = {name.lstrip("\\"): data for name, data in found.items()}
    return _collect({name: data["num_cells_by_type"] for name, data in modules.items()}, blocks, top)


def _collect(modules: dict[str, dict[str, int]], blocks: dict[str, str], top: str) -> dict[str, Counter]:
    """Adds the resources inside each block, for all its instances."""

    def inside(module: str, without: frozenset[str] = frozenset()) -> Counter:
        # A block that consists of wires only has no module any more.
        cells = dict(modules.get(module, {}))
        total: Counter = Counter()
        for name in set(cells) & set(modules):
            count = cells.pop(name)
            if name not in without:
                total.update({kind: amount * count for kind, amount in inside(name).items()})
        total.update(count_cells(cells))
        return total

    found: dict[str, Counter] = {}
    for name, module in sorted(blocks.items()):
        found.setdefault(BLOCK_NUMBER.sub("", name), Counter()).update(inside(module))
    found[GLUE if blocks else top] = inside(top, frozenset(blocks.values()))
    return found
