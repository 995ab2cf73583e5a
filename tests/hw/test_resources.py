# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.resources``: sums are right, the array is in DSP slices, buffers are in the right kind of memory."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hw import resources
from hw.flows.blocks import BLOCKS
from hw.flows.generate import generate
from hw.flows.lower import LowerError, to_rtlil
from hw.flows.synthesis import RESOURCES, blocks_of, container_names, count_cells
from hw.rtl.common.ram import buffer_attributes
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.parts import BOARDS, TARGETS
from tests.hw.documented import sections_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
XCUP = TARGETS["ultrascaleplus"]
SMALL = AcceleratorConfig(tile=4, ports=1, port_width=64, max_tokens=2, max_k=1024)
DOCUMENTED = sections_of("resources_")
OPTIONS = ("--tile", "4", "--ports", "1", "--port-width", "64", "--max-tokens", "2", "--max-k", "1024")


def run(*options: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hw.resources", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_array_is_one_slice_per_element():
    """Also, the skew of its rows is in SRLs, and no part of an adder or a multiplier is in LUTs."""
    (counts,) = resources.measure(SMALL, "kv260", "array").values()
    assert counts["DSP48E2"] == SMALL.tile**2
    assert counts["SRL"] > 0
    assert counts["BRAM36"] == counts["URAM288"] == 0
    # A multiplexer for each bit of a row's weights: new weights or held weights.
    assert counts["LUT"] - counts["SRL"] <= SMALL.tile * SMALL.tile * SMALL.weight_bits


def test_a_column_takes_two_slices():
    (counts,) = resources.measure(SMALL, "kv260", "columns").values()
    assert counts["DSP48E2"] == 2 * SMALL.tile


@pytest.mark.parametrize("max_k", [1024, 8960])
def test_the_activation_buffer_holds_two_times_max_k(max_k):
    """For all tokens: one bank is read while the other one is filled."""
    config = replace(SMALL, max_k=max_k)
    text, _ = generate(config, "activations")
    words = {name: int(last) + 1 for name, last in re.findall(r"reg \[\d+:0\] (\w+) \[(\d+):0\];", text)}
    assert words["mantissas"] == words["sums"] == 2 * config.max_tokens * max_k // config.tile


def test_json():
    done = run(*OPTIONS, "--top", "pe", "--board", "kv260", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["board"] == "kv260" and found["part"] == BOARDS["kv260"].name
    assert "estimate" in found["method"]
    assert found["config"]["tile"] == 4
    assert list(found["total"]) == list(RESOURCES)
    assert found["available"] == {"LUT": 117120, "FF": 234240, "DSP48E2": 1248, "BRAM36": 144, "URAM288": 64}
    assert found["fits"] is True


def test_text():
    done = run(*OPTIONS, "--top", "sequencer")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[2] == list(RESOURCES)
    assert [line[0] for line in lines[-3:]] == ["total", "xck26", "%"]
    assert lines[-2][1:4] == ["117,120", "234,240", "1,248"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--board", "zcu104"), "board is one of kv260, not 'zcu104'"),
        (("--tile", "5"), "tile is one of 4, 8, 16, 32, not 5"),
        (("--top", "wheel"), "block is one of accelerator, "),
    ],
)
def test_bad_value_is_one_line(options: tuple[str, ...], message: str):
    done = run(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_too_small_a_part(monkeypatch, capsys):
    counts = {"array": Counter({"LUT": 200_000, "DSP48E2": 3}), "glue": Counter({"LUT": 1})}
    monkeypatch.setattr(resources, "measure", lambda *_: counts)
    assert resources.main(["--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "error: kv260 is too small for this\n"
    found = json.loads(out)
    assert found["fits"] is False
    assert found["total"]["LUT"] == 200_001 and found["percent"]["LUT"] == 170.77


def test_every_cell_is_counted_or_refused():
    cells = {"LUT6": 3, "INV": 1, "RAM64M8": 2, "SRL16E": 4, "FDRE": 5, "RAMB18E2": 3, "RAMB36E2": 1, "CARRY4": 9}
    assert count_cells(cells) == {"LUT": 3 + 1 + 16 + 4, "SRL": 4, "FF": 5, "BRAM36": 2.5}
    with pytest.raises(LowerError, match=r"\$_DFF_P_"):
        count_cells({"$_DFF_P_": 1})


def blocks(name: str) -> dict[str, str]:
    component = BLOCKS[name](SMALL)
    return blocks_of(to_rtlil(component, "top", XCUP), "top", container_names(component, XCUP))


def test_containers_say_so():
    assert container_names(BLOCKS["accelerator"](SMALL), XCUP) == {"inside", "datapath", "queue", "core", "path"}


def test_blocks_are_those_of_the_architecture():
    found = blocks("accelerator")
    names = {re.sub(r"(\$\d+|_\d+)$", "", name) for name in found}
    assert {"array", "columns", "buffer", "header", "unit", "gatherer", "reader", "writer", "bank"} <= names
    assert not {"core", "datapath", "pe"} & names
    assert {"sequencer", "splitter", "drain", "fork"} <= names
    assert blocks("array") == {}


def test_kind_of_memory_of_buffers():
    """Buffers that fill UltraRAM are in UltraRAM; 16,384 x 23 would use only a third of it."""
    assert buffer_attributes(XCUP, 16384, 256) == {"ram_style": "ultra"}
    assert buffer_attributes(XCUP, 8192, 512) == {"ram_style": "ultra"}
    assert buffer_attributes(XCUP, 16384, 23) == {"ram_style": "block"}
    assert buffer_attributes(XCUP, 512, 16) == {"ram_style": "block"}
    assert buffer_attributes(None, 16384, 256) == {}


def test_board_that_does_not_exist():
    with pytest.raises(ConfigError, match="board is one of kv260, not 'kr260'"):
        resources.measure(SMALL, "kr260")


@pytest.mark.parametrize(
    ("design", "limits"),
    [
        ("tile_16", {"LUT": 22_000, "DSP48E2": 320, "BRAM36": 72, "URAM288": 32}),
        ("tile_16_decoder", {"LUT": 40_000, "DSP48E2": 380, "BRAM36": 72, "URAM288": 32}),
        ("tile_32_decoder", {"LUT": 81_984, "BRAM36": 72, "URAM288": 32}),
    ],
)
def test_documented_figures_are_within_the_limits(design: str, limits: dict[str, int]):
    row = DOCUMENTED[f"resources_{design}"]["figures"]["total"]
    assert {name: row[name] <= limit for name, limit in limits.items()} == dict.fromkeys(limits, True)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_designs_fit(name: str):
    row, limits = DOCUMENTED[name]["figures"]["total"], BOARDS["kv260"].resources
    assert {kind: row[kind] <= limit for kind, limit in limits.items()} == dict.fromkeys(limits, True)
