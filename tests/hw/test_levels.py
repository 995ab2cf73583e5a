# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.resources --levels``: depth of netlists that are known, and of the accelerator."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from hw import resources
from hw.flows.levels import measure_netlist
from hw.flows.lower import LowerError
from tests.hw.documented import config_of, sections_of

pytestmark = pytest.mark.slow

LIMIT = 7
"""Levels that leave about 0.55 ns for each one at 250 MHz."""
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--tile", "4", "--ports", "1", "--port-width", "64", "--max-tokens", "2", "--max-k", "1024")
CLOCK = 1
DOCUMENTED = sections_of("levels_")


def cell(kind: str, inputs: dict[str, list], outputs: dict[str, list], *, hidden: bool = False) -> dict:
    directions = {**dict.fromkeys(inputs, "input"), **dict.fromkeys(outputs, "output")}
    return {"type": kind, "connections": {**inputs, **outputs}, "port_directions": directions, "hide_name": hidden}


def register(data: int, out: int) -> dict:
    return cell("FDRE", {"C": [CLOCK], "CE": ["1"], "D": [data], "R": ["0"]}, {"Q": [out]})


def lut(inputs: list[int], out: int) -> dict:
    return cell(f"LUT{len(inputs)}", {f"I{index}": [net] for index, net in enumerate(inputs)}, {"O": [out]})


def module(cells: dict[str, dict], names: dict[str, list[int]], registers: tuple[str, ...] = ()) -> dict:
    nets = {
        name: {"bits": bits, "hide_name": 0, "attributes": {"gristmill_register": "1"} if name in registers else {}}
        for name, bits in names.items()
    }
    return {"cells": cells, "netnames": nets, "ports": {"clk": {"direction": "input", "bits": [CLOCK]}}}


def test_luts_carries_and_memories_add_up():
    """A register, two LUTs, a carry chain of two, a read of LUT memory, a register."""
    names = ("ADDRA", "ADDRH", "DIA", "WE")
    cells = {
        "a": register(2, 10),
        "$1": lut([10], 11),
        "$2": lut([11, 10], 12),
        "$3": cell("CARRY4", {"CI": ["0"], "S": [12, "0", "0", "0"], "DI": ["0"] * 4}, {"CO": [20, 21, 22, 23]}),
        "$4": cell("CARRY4", {"CI": [23], "S": ["0"] * 4, "DI": ["0"] * 4}, {"O": [30, 31, 32, 33]}),
        "$5": cell("RAM32M16", dict(zip(names, ([33], [10], [11], [12]), strict=True)), {"DOA": [40]}),
        "b": register(40, 41),
    }
    found = measure_netlist(module(cells, {"core.one.a": [10], "core.one.two.b": [41], "sum": [33]}), {"core"})
    assert found.levels == pytest.approx(2 + 2 * 0.12 + 1.2)
    (path,) = [path for path in found.worst if path.levels == found.levels]
    assert (path.start, path.end) == ("core.one.a", "core.one.two.b")
    assert path.through == ("LUT1", "LUT2", "CARRY4", "CARRY4 sum", "RAM32M16")
    # The memory's write port ends paths, its read address does not.
    assert found.end_points == len(["data of a", "data of b", "ADDRH", "DIA", "WE"])
    assert found.histogram == {0: 2, 1: 1, 2: 1, 4: 1}
    assert found.blocks["one"] == found.levels


def test_a_carry_goes_upwards():
    """The highest data of a chain reaches neither its own sum nor a lower one."""
    carry = cell("CARRY4", {"CI": [12], "S": [13, 14, 15, 16], "DI": ["0", "0", "0", 11]}, {"O": [20, 21, 22, 23]})
    cells = {"a": register(2, 10), "$1": lut([10], 11), "$2": carry, "b": register(23, 30)}
    assert measure_netlist(module(cells, {"b": [30]})).levels == 0.12


@pytest.mark.parametrize("kind", ["DSP48E2", "RAMB36E2", "URAM288", "SRL16E"])
def test_slices_and_memories_end_paths(kind: str):
    clock = "CLKARDCLK" if kind == "RAMB36E2" else "CLK"
    cells = {
        "a": register(2, 10),
        "$1": lut([10], 11),
        "block.x": cell(kind, {"A": [11], "CEA": [11], clock: [CLOCK]}, {"P": [12]}),
        "$2": lut([12], 13),
        "b": register(13, 14),
    }
    found = measure_netlist(module(cells, {"b": [14]}))
    assert found.histogram == {0: 1, 1: 3}
    assert {path.end for path in found.worst} >= {"b", "block.x.A", "block.x.CEA"}


def test_a_register_has_the_name_that_its_block_gives_it():
    """Not that of a port of a block it goes to, whose name may be longer."""
    cells = {"$1": register(10, 10)}
    names = {"core.sequencer.state": [10], "core.fork.part.from_sequencer": [10]}
    assert measure_netlist(module(cells, names, ("core.sequencer.state",))).worst[0].end == "core.sequencer.state"
    assert measure_netlist(module(cells, names)).worst[0].end == "core.fork.part.from_sequencer"


def test_of_equal_paths_one_is_listed():
    cells = {}
    for index in range(4):
        cells[f"$a{index}"] = register(10 + index, 10 + index)
    names = {"unit.rows_0.x": [10], "unit.rows_1.x": [11], "unit.y": [12, 13]}
    assert [path.end for path in measure_netlist(module(cells, names)).worst] == ["unit.rows_0.x", "unit.y[0]"]


def test_a_loop_is_refused():
    cells = {"$1": lut([11], 10), "$2": lut([10], 11)}
    with pytest.raises(LowerError, match=r"a loop without a register, at core\.x$"):
        measure_netlist(module(cells, {"core.x": [10]}))


def test_an_unknown_cell_is_refused():
    with pytest.raises(LowerError, match=r"\$_DFF_P_, whose depth is not known"):
        measure_netlist(module({"x": cell("$_DFF_P_", {"D": [2]}, {"Q": [3]})}, {}))


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hw.resources", "--levels", *OPTIONS, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_json():
    done = run("--top", "sequencer", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["config"]["tile"] == 4 and "no Vivado" in found["method"]
    assert sum(found["histogram"].values()) == found["end_points"] > 100
    assert found["levels"] == max(found["blocks"].values()) == found["worst"][0]["levels"] >= 2
    assert max(map(int, found["histogram"])) == math.ceil(found["levels"])
    levels = [path["levels"] for path in found["worst"]]
    assert levels == sorted(levels, reverse=True) and len(levels) == 10
    assert all(path["start"] and path["end"] for path in found["worst"])


def test_text(capsys):
    assert resources.main(["--levels", *OPTIONS, "--top", "splitter"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tile 4 on kv260: levels of yosys's mapping")
    (block, levels), count = lines[3].split(), lines.index("deepest paths, one of each kind")
    assert block in lines[3] and lines[count + 2].split()[0] == levels


def test_bad_block_is_one_line():
    done = run("--top", "wheel")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: block is one of accelerator, ") and done.stderr.count("\n") == 1


def test_failure_of_yosys_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise LowerError("yosys did not finish within 3600 s")

    monkeypatch.setattr(resources, "measure_levels", fail)
    assert resources.main(["--levels", "--top", "pe"]) == 2
    assert capsys.readouterr() == ("", "error: yosys did not finish within 3600 s\n")


def test_documented_designs():
    """No design is measured twice; both tiles are there, and those without a vector unit with both zero points."""
    configs = [config_of(section) for section in DOCUMENTED.values()]
    assert len(set(configs)) == len(configs)
    assert {config.tile for config in configs if config.has_vector_unit} == {16, 32}
    linear = {(config.tile, config.zero_point) for config in configs if not config.has_vector_unit}
    assert linear == {(tile, zero_point) for tile in (16, 32) for zero_point in ("integer", "fixed")}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_depth_is_within_the_limit(name: str):
    found = DOCUMENTED[name]["figures"]
    assert found["levels"] == max(found["blocks"].values()) <= LIMIT
    assert sum(found["histogram"].values()) == found["end_points"]
