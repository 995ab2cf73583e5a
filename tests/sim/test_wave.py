# SPDX-License-Identifier: Apache-2.0
"""``python -m sim.wave`` writes a waveform of a normal bench run, and a save file whose signals are all in it."""

import re
from pathlib import Path

import pytest

from sim import wave
from sim.benches import BENCHES, Bench
from sim.harness import SetupError
from sim.waveform import Scope, Variable, read_scopes, save_file, streams

HERE = Path(__file__).parent
FIFO = Bench("tests.sim.tb_fifo", "fifo", verilog=HERE / "fifo.v")
FAILING = Bench(FIFO.module, FIFO.top, settings={"fail": True}, verilog=FIFO.verilog)


def shown(text: str) -> list[str]:
    """The signals in a save file."""
    return [line for line in text.splitlines() if line[0] not in "@-["]


@pytest.mark.simulator
@pytest.mark.parametrize(("bench", "code"), [(FIFO, 0), (FAILING, 1)], ids=["passes", "fails"])
def test_waveform_of_a_run(bench: Bench, code: int, tmp_path: Path, monkeypatch, capsys):
    """A bench that fails leaves its waveform, too, because it is needed most."""
    monkeypatch.setattr(wave, "BENCHES", [bench])
    assert wave.main(["tb_fifo", "--seed", "7", "--out", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    vcd, save = tmp_path / "tb_fifo.vcd", tmp_path / "tb_fifo.gtkw"
    assert f"waveform: {vcd}" in out and str(save) in out and "seed 7" in err
    assert ("FAILED" in out) == bool(code)
    text = save.read_text()
    there = {scope.full_name(variable) for scope in read_scopes(vcd) for variable in scope.variables}
    assert shown(text) and set(shown(text)) <= there
    assert f'[dumpfile] "{vcd}"' in text
    # The clock has edges, so the waveform is more than a header.
    clock = next(line.split()[3] for line in vcd.read_text().splitlines() if re.search(r"\bclk \$end", line))
    assert sum(line in (f"0{clock}", f"1{clock}") for line in vcd.read_text().splitlines()) > 100


HEADER = """$timescale 1ps $end
 $scope module $rootio $end
  $var wire 1 ! clk $end
  $var wire 1 " i_valid $end
  $var wire 1 # i_ready $end
  $var wire 8 $ i_payload [7:0] $end
  $var wire 4 % level [3:0] $end
 $upscope $end
 $scope module gristmill_top $end
  $var wire 1 ! clk $end
  $var wire 1 " i_valid $end
  $var wire 1 # i_ready $end
  $var wire 8 $ i_payload [7:0] $end
  $var wire 4 % level [3:0] $end
  $var wire 1 & i__valid $end
  $scope module part $end
   $var wire 1 ' o__valid $end
   $var wire 1 ( o__ready $end
   $var wire 9 ) o__payload [8:0] $end
   $var wire 5 * o__payload.size [4:0] $end
  $upscope $end
 $upscope $end
$enddefinitions $end
 $var wire 1 + not_a_header $end
"""


def test_save_file(tmp_path: Path):
    vcd = tmp_path / "top.vcd"
    vcd.write_text(HEADER)
    top, part = "gristmill_top", "gristmill_top.part"
    assert save_file(vcd).splitlines() == [
        f'[dumpfile] "{vcd}"',
        f"[treeopen] {top}.",
        *("@28", f"{top}.clk"),
        *("@800200", "-i", "@22", f"{top}.i_payload[7:0]", "@28", f"{top}.i_valid", "@28", f"{top}.i_ready"),
        *("@1000200", "-i"),
        *("@800200", "-other ports", "@22", f"{top}.level[3:0]", "@1000200", "-other ports"),
        *("@c00200", "-part", "@800200", "-o", "@22", f"{part}.o__payload[8:0]", "@22", f"{part}.o__payload.size[4:0]"),
        *("@28", f"{part}.o__valid", "@28", f"{part}.o__ready", "@1000200", "-o", "@1401200", "-part"),
    ]


def test_streams_of_axi():
    """Each AXI channel has its own members, and no channel takes the members of another one."""
    names = [f"m_axi_hp0_{name}" for name in ("araddr", "arlen", "arvalid", "arready", "rdata", "rvalid", "rready")]
    found = streams([Variable(name, "") for name in [*names, "valid", "ready", "lonely_valid"]])
    assert {item.name: [variable.name[10:] for variable in item.variables] for item in found} == {
        "m_axi_hp0_ar": ["araddr", "arlen", "arvalid", "arready"],
        "m_axi_hp0_r": ["rdata", "rvalid", "rready"],
    }


def test_full_name():
    assert Scope(("a", "b")).full_name(Variable("c", "[1:0]")) == "a.b.c[1:0]"


def test_choose():
    first = next(bench for bench in BENCHES if bench.module.endswith("tb_core"))
    assert wave.choose(BENCHES, first.name) is first
    assert wave.choose(BENCHES, "tb_core") is first
    assert wave.choose(BENCHES, "tb_core and tile=32 and not speed").params["tile"] == 32
    assert wave.choose(BENCHES, "tb_pe", tile=8).params["tile"] == 8
    with pytest.raises(SetupError, match="matches several benches: tb_"):
        wave.choose(BENCHES, "a")
    with pytest.raises(SetupError, match="No bench matches"):
        wave.choose(BENCHES, "nonsense")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nonsense", "No bench matches -k 'nonsense'"), ("", "BENCH names the bench, such as BENCH=tb_fifo; `python -m")],
)
def test_unknown_bench_is_one_line(name: str, message: str, capsys):
    assert wave.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
