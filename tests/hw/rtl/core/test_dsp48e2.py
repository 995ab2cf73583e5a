# SPDX-License-Identifier: Apache-2.0
# Amaranth makes a component's ports at run time, so pyright's reports about them are wrong here, as in hw/rtl.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportIncompatibleMethodOverride=false
"""The element in a DSP48E2 slice computes the same as the portable element: tested in simulation, and proven.

A result depends only on the inputs of the four cycles before it, because there is no feedback. So a proof that starts
from arbitrary register values and checks the fifth cycle is valid for every cycle of every run. The proofs are for
weights of up to 4 bits; with 8 bits a SAT solver does not finish, and simulation is used instead.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from hw.flows.lower import to_rtlil
from hw.rtl.core import dsp48e2
from hw.rtl.core.array import SystolicArray
from hw.rtl.core.dsp48e2 import Dsp48e2, has_dsp48e2
from hw.rtl.core.pe import WORD, DspProcessingElement, ProcessingElement
from hw.spec.config import AcceleratorConfig
from hw.spec.parts import TARGETS

pytestmark = pytest.mark.slow

XCUP = TARGETS["ultrascaleplus"]
SMALL = AcceleratorConfig(tile=4, ports=1, port_width=64, max_tokens=2, max_k=1024)
CONFIGS = {
    "default": AcceleratorConfig(),
    "int2": AcceleratorConfig(tile=4, weight_bits=2, activation_bits=8, ports=1, port_width=64),
}

# The slice of the previous series, for which yosys has a complete model. Both have all functions that are used here.
# They differ in the multiplier (25 bits instead of 27), in OPMODE's two highest bits, which must be 0, and in the names
# that are checked below.
SERIES_7 = """
module DSP48E2(
  input CLK, input [29:0] A, input [17:0] B, input [47:0] C, input [26:0] D, input [47:0] PCIN,
  input CEA1, CEA2, CEB1, CEB2, CEM, CEP, CEAD, CEC, CED, CEINMODE, CECTRL, CEALUMODE, CECARRYIN, CARRYIN,
  input RSTA, RSTB, RSTC, RSTD, RSTM, RSTP, RSTINMODE, RSTCTRL, RSTALUMODE, RSTALLCARRYIN,
  input [4:0] INMODE, input [8:0] OPMODE, input [3:0] ALUMODE, input [2:0] CARRYINSEL,
  output [47:0] P, PCOUT);
  parameter AREG = 1, ACASCREG = 1, BREG = 1, BCASCREG = 1, MREG = 1, PREG = 1, ADREG = 1, CREG = 1, DREG = 1;
  parameter INMODEREG = 1, OPMODEREG = 1, ALUMODEREG = 1, CARRYINREG = 1, CARRYINSELREG = 1;
  parameter USE_MULT = "MULTIPLY", USE_SIMD = "ONE48", AMULTSEL = "A", BMULTSEL = "B";
  wire [47:0] p, pcout;
  DSP48E1 #(
    .AREG(AREG), .ACASCREG(ACASCREG), .BREG(BREG), .BCASCREG(BCASCREG), .MREG(MREG), .PREG(PREG), .ADREG(ADREG),
    .CREG(CREG), .DREG(DREG), .INMODEREG(INMODEREG), .OPMODEREG(OPMODEREG), .ALUMODEREG(ALUMODEREG),
    .CARRYINREG(CARRYINREG), .CARRYINSELREG(CARRYINSELREG), .USE_MULT(USE_MULT), .USE_SIMD(USE_SIMD)
  ) slice (
    .CLK(CLK), .A(A), .B(B), .C(C), .D(D[24:0]), .PCIN(PCIN), .ACIN(30'b0), .BCIN(18'b0),
    .CEA1(CEA1), .CEA2(CEA2), .CEB1(CEB1), .CEB2(CEB2), .CEM(CEM), .CEP(CEP), .CEAD(CEAD), .CEC(CEC), .CED(CED),
    .CEINMODE(CEINMODE), .CECTRL(CECTRL), .CEALUMODE(CEALUMODE), .CECARRYIN(CECARRYIN), .CARRYIN(CARRYIN),
    .RSTA(RSTA), .RSTB(RSTB), .RSTC(RSTC), .RSTD(RSTD), .RSTM(RSTM), .RSTP(RSTP), .RSTINMODE(RSTINMODE),
    .RSTCTRL(RSTCTRL), .RSTALUMODE(RSTALUMODE), .RSTALLCARRYIN(RSTALLCARRYIN),
    .INMODE(INMODE), .OPMODE(OPMODE[6:0]), .ALUMODE(ALUMODE), .CARRYINSEL(CARRYINSEL),
    .CARRYCASCIN(1'b0), .MULTSIGNIN(1'b0), .P(p), .PCOUT(pcout));
  wire same_modes = OPMODE[8:7] == 0 && AMULTSEL == "A" && BMULTSEL == "B" && A[29:24] == {6{A[24]}};
  assign P = same_modes ? p : ~p;
  assign PCOUT = same_modes ? pcout : ~pcout;
endmodule
"""
CELLS = """
import sys
from pathlib import Path
from pyosys import libyosys
text = Path(libyosys.__file__).with_name("share").joinpath("xilinx/cells_sim.v").read_text()
"""


class Both(wiring.Component):
    """Both elements side by side, and whether they agree. Activations are sign-extended as in the array."""

    def __init__(self, config: AcceleratorConfig, column: int, *, first: bool):
        self.config, self.column, self.first = config, column, first
        self.portable = ProcessingElement(config, column, first=first)
        self.dsp = DspProcessingElement(config, column, first=first)
        super().__init__(
            {
                "activation": In(config.activation_bits),
                "weights": In(self.portable.signature.members["weights_in"].shape),
                "psum": In(DspProcessingElement.word),
                "same": Out(1),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.portable, m.submodules.dsp = portable, dsp = self.portable, self.dsp
        for element in (portable, dsp):
            m.d.comb += [
                element.activation_in.eq(self.activation.as_signed()),
                element.weights_in.eq(self.weights),
                element.psum_in.eq(0 if self.first else self.psum),
            ]
        m.d.comb += self.same.eq(
            (dsp.psum_out[:WORD] == portable.psum_out)
            & (dsp.activation_out[:WORD] == portable.activation_out)
            & (dsp.weights_out == portable.weights_out)
        )
        return m


def prove(component: wiring.Component, platform, folder: Path) -> bool:
    """Whether ``same`` is 1 in the fifth cycle, from any state of the registers and for all inputs."""
    text = to_rtlil(component, "both", platform)
    Path(folder, "both.il").write_text(text)
    Path(folder, "dsp48e2.v").write_text(SERIES_7)
    model = ["read_verilog +/xilinx/cells_sim.v", f"read_verilog {folder}/dsp48e2.v"] if platform else []
    script = [
        *model,
        f"read_rtlil {folder}/both.il",
        "hierarchy -check -top both",
        "proc; flatten; setattr -unset init w:*; opt -full; clean",
        "sat -prove same 1 -seq 5 -prove-skip 4 -verify",
    ]
    Path(folder, "prove.ys").write_text("\n".join(script))
    command = "import sys; from pyosys import libyosys; libyosys.run_pass('script ' + sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", command, f"{folder}/prove.ys"], capture_output=True, text=True, timeout=300, check=False
    )
    print(run.stdout[-3000:], run.stderr[-500:])
    return run.returncode == 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("first", [False, True])
def test_twin_is_proven_equal(name: str, first: bool, tmp_path: Path):
    config = CONFIGS[name]
    assert prove(Both(config, config.tile - 1, first=first), None, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("first", [False, True])
def test_primitive_is_proven_equal(name: str, first: bool, tmp_path: Path):
    """The model has the registers, modes and constant inputs of the real instance."""
    assert prove(Both(CONFIGS[name], 1, first=first), XCUP, tmp_path)


class _Late(Dsp48e2):
    """A slice with an additional register."""

    def _twin(self, m: Module) -> None:
        inner = Dsp48e2(cascade=self.cascade)
        m.submodules.inner = inner
        m.d.comb += [inner.a.eq(self.a), inner.b.eq(self.b), inner.pcin.eq(self.pcin)]
        m.d.sync += [self.p.eq(inner.p), self.pcout.eq(inner.pcout)]


class _Narrow(Dsp48e2):
    """A slice with a multiplier of 15 bits."""

    def _twin(self, m: Module) -> None:
        inner = Dsp48e2(cascade=self.cascade)
        m.submodules.inner = inner
        m.d.comb += [inner.a.eq(self.a[:15].as_signed()), inner.b.eq(self.b), inner.pcin.eq(self.pcin)]
        m.d.comb += [self.p.eq(inner.p), self.pcout.eq(inner.pcout)]


@pytest.mark.parametrize("wrong", [_Late, _Narrow])
def test_proof_finds_a_wrong_twin(wrong: type, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hw.rtl.core.pe.Dsp48e2", wrong)
    assert not prove(Both(CONFIGS["default"], 0, first=False), None, tmp_path)


@pytest.mark.parametrize("change", [("_PRODUCT_AND_CASCADE", 0b00_000_01_01), ("_PRODUCT_AND_CASCADE", 0b11_001_01_01)])
def test_proof_finds_a_wrong_mode(change: tuple[str, int], tmp_path: Path, monkeypatch):
    """Modes without the cascade, and with another operand."""
    monkeypatch.setattr(dsp48e2, *change)
    assert not prove(Both(CONFIGS["default"], 0, first=False), XCUP, tmp_path)


class _Arrays(wiring.Component):
    """An array of each kind, with the same inputs."""

    def __init__(self, config: AcceleratorConfig):
        self.arrays = {kind.__name__: SystolicArray(config, kind) for kind in (ProcessingElement, DspProcessingElement)}
        one = self.arrays["ProcessingElement"]
        inputs = {name: In(one.signature.members[name].shape) for name in ("activations", "load", "words")}
        shape = one.signature.members["psums"].shape
        super().__init__(inputs | {name: Out(shape) for name in self.arrays})

    def elaborate(self, platform) -> Module:
        m = Module()
        for name, array in self.arrays.items():
            m.submodules[name] = array
            m.d.comb += [
                array.activations.eq(self.activations),
                array.load.eq(self.load),
                array.words.eq(self.words),
                getattr(self, name).eq(array.psums),
            ]
        return m


@pytest.mark.parametrize("weight_bits", [2, 4, 5, 8])
def test_elements_agree_in_simulation(weight_bits: int):
    """Extreme values of all three inputs, then random ones."""
    config = AcceleratorConfig(tile=4, weight_bits=weight_bits, ports=1, port_width=64)
    random, both, cycles = np.random.default_rng(weight_bits), Both(config, 2, first=False), 300
    bits = len(both.activation)
    corners = ([0, 1, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1], [0, (1 << len(both.weights)) - 1])
    psums = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 48) - 1]
    inputs = [(a, b, c) for a in corners[0] for b in corners[1] for c in psums]
    inputs += [
        tuple(
            int.from_bytes(random.bytes(8), "little") % (1 << len(port))
            for port in (both.activation, both.weights, both.psum)
        )
        for _ in range(cycles - len(inputs))
    ]

    async def drive(context):
        for cycle, values in enumerate(inputs):
            for port, value in zip((both.activation, both.weights, both.psum), values):
                context.set(port, value)
            assert cycle < 4 or context.get(both.same), cycle
            await context.tick()

    simulator = Simulator(both)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()


def test_arrays_give_the_same_psums():
    """Extreme and random values, all columns, a new slice every cycle or two: equal to each other and to numpy."""
    random, config, cycles = np.random.default_rng(7), SMALL, 160
    top = _Arrays(config)
    tile, bound = config.tile, config.activation_max
    activations = random.integers(-bound, bound, (cycles, tile), endpoint=True)
    activations[::3] = random.choice([-bound, 0, bound], activations[::3].shape)
    weights = random.integers(0, config.weight_max, (cycles, tile, tile), endpoint=True)
    weights[::4] = config.weight_max
    loads = random.integers(0, 1, cycles, endpoint=True)
    loads[0] = 1
    # At tile 4 a slice is one word here, with row 0 lowest.
    assert len(top.words) == tile * tile * config.weight_bits
    words = [
        sum(int(q) << (index * config.weight_bits) for index, q in enumerate(slice_.ravel())) for slice_ in weights
    ]
    seen: dict[str, list[list[int]]] = {name: [] for name in top.arrays}

    async def drive(context):
        for cycle in range(cycles):
            for row in range(tile):
                context.set(top.activations[row], int(activations[cycle, row]))
            context.set(top.load, int(loads[cycle]))
            context.set(top.words, words[cycle])
            for name in seen:
                seen[name].append([context.get(getattr(top, name)[column]) for column in range(tile)])
            await context.tick()

    simulator = Simulator(top)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    latency = top.arrays["ProcessingElement"].latency
    current = np.maximum.accumulate(np.where(loads, np.arange(cycles), 0))
    expected = np.einsum("tr,trc->tc", activations, weights[current])
    for name in seen:
        columns = np.array(seen[name])
        for column in range(tile):
            wait = latency + column
            assert np.array_equal(columns[wait:, column], expected[: cycles - wait, column]), (name, column)


def test_only_ultrascale_plus_has_it():
    class Platform:
        family = "series7"

    assert has_dsp48e2(XCUP)
    assert not has_dsp48e2(None)
    assert not has_dsp48e2(Platform())
    array = SystolicArray(SMALL)
    assert "DSP48E2" not in to_rtlil(array, "array")
    assert to_rtlil(SystolicArray(SMALL), "array", XCUP).count("cell \\DSP48E2 ") == SMALL.tile * SMALL.tile


def test_cascade_stays_in_its_column(tmp_path: Path):
    """PCOUT is connected only to the next slice's PCIN, and the last slice's result leaves through P."""
    Path(tmp_path, "array.il").write_text(to_rtlil(SystolicArray(SMALL), "array", XCUP))
    script = [
        "read_verilog -lib +/xilinx/cells_xtra.v",
        f"read_rtlil {tmp_path}/array.il",
        "hierarchy -check -top array",
        "proc; flatten; opt -full; clean",
        f"write_json {tmp_path}/array.json",
    ]
    Path(tmp_path, "array.ys").write_text("\n".join(script))
    command = "import sys; from pyosys import libyosys; libyosys.run_pass('script ' + sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", command, f"{tmp_path}/array.ys"], check=True, capture_output=True, timeout=120
    )
    cells = json.loads(Path(tmp_path, "array.json").read_text())["modules"]["array"]["cells"].values()
    slices = [cell["connections"] for cell in cells if cell["type"] == "DSP48E2"]
    assert len(slices) == SMALL.tile**2
    cascades = [tuple(one["PCIN"]) for one in slices if set(one["PCIN"]) != {"0"}]
    sources = {tuple(one["PCOUT"]) for one in slices}
    assert len(cascades) == SMALL.tile * (SMALL.tile - 1)
    assert len(set(cascades)) == len(cascades) and set(cascades) <= sources
    cascaded = {bit for wires in cascades for bit in wires}
    used = {
        bit
        for cell in cells
        for port, bits in cell["connections"].items()
        if port not in ("PCIN", "PCOUT")
        for bit in bits
    }
    assert not cascaded & used
