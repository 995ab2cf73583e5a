# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
"""The ULX3S design: its PLL, its vectors, its simulation, and its command with good and bad reports."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from hw import bitstream
from hw.boards.report_line import DecimalCounter, LineWriter, Number
from hw.boards.selftest import SelfTest, Vectors
from hw.boards.uart import FRAME_BITS, UartTransmitter, uart_divisor
from hw.boards.ulx3s import INPUT_HZ, pll_for
from hw.flows.nextpnr_report import TimingError, check, read_report, timing, utilisation
from hw.flows.selftest import selftest_vectors
from hw.rtl.common.results import result_payload
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import fit_layer
from hw.spec.memory.packing import unpack
from hw.spec.numerics.linear import Activations, linear
from sim.benches import BENCHES


@pytest.mark.parametrize(("tile", "lanes"), [(4, 1), (8, 1), (8, 2), (8, 8)])
def test_vectors_agree_with_the_numerics(tile: int, lanes: int):
    """Weights and activations are decoded from the payloads; their product equals the results to float32 accuracy."""
    config = replace(bitstream.board_config(tile), lanes=lanes)
    vectors = selftest_vectors(config)
    layer = fit_layer(config, 128, 3 * tile - 1, 32)
    raw = b"".join(beat.to_bytes(config.beat_bytes, "little") for beat in vectors.weights)
    weights = unpack(layer, np.frombuffer(raw, np.uint8).reshape(-1, config.beat_bytes))
    rows = [p.to_bytes(tile + 1, "little") for p in vectors.activations]
    table = np.frombuffer(b"".join(rows), np.int8).reshape(-1, config.max_tokens, tile + 1).astype(np.int64)
    x = Activations(table[:, :, :tile].transpose(1, 0, 2).reshape(config.max_tokens, -1), table[0, :, tile])
    y = linear(config, weights, x)
    got = [result_payload(config, config.lanes).from_bits(bits) for bits in vectors.results]
    floats = [value for item in got for value, kept in zip(item.values, bin(item.keep)[:1:-1]) if kept == "1"]
    expected = np.concatenate([y[:, n : n + tile].reshape(-1) for n in range(0, layer.n, tile)])
    assert np.array(floats, np.uint32).tobytes() == expected.tobytes()
    groups = np.repeat(np.arange(layer.groups), 32)
    w = (weights.q.astype(float) - weights.zero_points[:, groups]) * weights.scale_mantissas[:, groups]
    w *= 2.0 ** (weights.exponents - 15)[:, None]
    plain = (x.mantissas * 2.0 ** x.exponents[:, None]) @ w.T
    np.testing.assert_allclose(y, plain, rtol=1e-6)
    assert [item.last for item in got] == [0] * (len(got) - 1) + [1]


def test_simulated_design_is_the_board_s():
    """`make sim` runs the two designs of `make bitstream BOARD=ulx3s`, generated for its part."""
    benches = [bench.params for bench in BENCHES if bench.top == "selftest" and not bench.full]
    assert [params.pop("target") for params in (dict(p) for p in benches)] == ["ecp5", "ecp5"]
    configs = [AcceleratorConfig(**{k: v for k, v in params.items() if k != "target"}) for params in benches]
    assert configs == [bitstream.board_config(4), bitstream.board_config(8)]


@pytest.mark.parametrize("hz", [25_000_000, 100_000_000, 115_000_000, 116_000_000, 120_000_000, 399_000_000])
def test_pll(hz: int):
    pll = pll_for(hz)
    assert hz <= pll.output_hz < hz * 1.02
    assert INPUT_HZ / pll.reference >= 3.125e6
    assert 400e6 <= pll.output_hz * pll.output <= 800e6
    assert max(pll) <= 128


@pytest.mark.parametrize("hz", [24_999_999, 400_000_001])
def test_pll_refuses(hz: int):
    with pytest.raises(ValueError, match="25 to 400 MHz"):
        pll_for(hz)


def test_divisor():
    assert uart_divisor(115e6, 115_200) == 998
    with pytest.raises(ValueError, match="no 115200 baud"):
        uart_divisor(172_800, 115_200)


def _simulate(component, process, **submodules) -> None:
    m = Module()
    m.submodules.dut = component
    for name, part in submodules.items():
        m.submodules[name] = part
    simulator = Simulator(m)
    simulator.add_clock(1e-6)
    simulator.add_testbench(process)
    simulator.run()


@pytest.mark.parametrize("divisor", [1, 3])
def test_uart_frame(divisor: int):
    uart, seen = UartTransmitter(divisor), []

    async def process(ctx):
        for byte in (0x00, 0xA5, 0xFF):
            assert ctx.get(uart.tx) == 1
            ctx.set(uart.bytes.payload, byte)
            ctx.set(uart.bytes.valid, 1)
            await ctx.tick()
            ctx.set(uart.bytes.valid, 0)
            levels = [ctx.get(uart.tx)]
            for _ in range(FRAME_BITS * divisor - 1):
                await ctx.tick()
                levels.append(ctx.get(uart.tx))
            bits = [levels[first : first + divisor] for first in range(0, len(levels), divisor)]
            assert all(len(set(bit)) == 1 for bit in bits), "a bit changes inside its time"
            assert not ctx.get(uart.bytes.ready)
            await ctx.tick()
            assert ctx.get(uart.bytes.ready)
            seen.append([bit[0] for bit in bits])

    _simulate(uart, process)
    assert [sum(b << i for i, b in enumerate(frame[1:9])) for frame in seen] == [0x00, 0xA5, 0xFF]
    assert all(frame[0] == 0 and frame[9] == 1 for frame in seen)


@pytest.mark.parametrize("steps", [0, 9, 10, 99, 100, 1000, 1234])
def test_decimal_counter(steps: int):
    counter = DecimalCounter(3)

    async def process(ctx):
        ctx.set(counter.step, 1)
        for _ in range(steps):
            await ctx.tick()
        ctx.set(counter.step, 0)
        for _ in range(3):
            await ctx.tick()
        assert f"{ctx.get(counter.value):03x}" == f"{steps % 1000:03d}"

    _simulate(counter, process)


@pytest.mark.parametrize(("numbers", "good", "text"), [(0x00042, 1, "a 2 b 4 ok"), (0x30000, 0, "a 0 b 3000 no")])
def test_line_writer(numbers: int, good: int, text: str):
    writer, got = LineWriter(["a ", Number(0, 1), " b ", Number(1, 4), " ", ("ok", "no")], 5), []

    async def process(ctx):
        ctx.set(writer.numbers, numbers)
        ctx.set(writer.good, good)
        ctx.set(writer.start, 1)
        await ctx.tick()
        ctx.set(writer.start, 0)
        for cycle in range(200):
            ctx.set(writer.bytes.ready, cycle % 3 == 0)
            if ctx.get(writer.bytes.valid & writer.bytes.ready):
                got.append(chr(ctx.get(writer.bytes.payload)))
            await ctx.tick()
        assert not ctx.get(writer.busy)

    _simulate(writer, process)
    assert "".join(got) == text


_RESULT = 1 << 8 | 7
"""A transfer with one result, which is 7."""


class _CountingCore(wiring.Component):
    """Accepts all inputs and returns a given number of results, all 7."""

    def __init__(self, results: int):
        self.count = results
        names = ("command", "weights", "activations")
        ports = {name: In(stream.Signature(8)) for name in names}
        result = data.StructLayout({"values": data.ArrayLayout(8, 1), "keep": 1, "last": 1})
        super().__init__({**ports, "results": Out(stream.Signature(result)), "underrun": Out(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        left = Signal(8)
        m.d.comb += [self.command.ready.eq(1), self.weights.ready.eq(1), self.activations.ready.eq(1)]
        m.d.comb += [self.results.valid.eq(left != 0), self.results.payload.as_value().eq(_RESULT)]
        with m.If(self.command.valid):
            m.d.sync += left.eq(self.count)
        with m.Elif(left != 0):
            m.d.sync += left.eq(left - 1)
        return m


@pytest.mark.parametrize(
    ("results", "outcome"), [(3, "pass"), (0, "FAIL"), (2, "FAIL"), (4, "FAIL")], ids=["right", "none", "less", "more"]
)
def test_number_of_results(results: int, outcome: str, monkeypatch: pytest.MonkeyPatch):
    """A core that hangs or returns too many results fails, and the self-test continues with the next run."""
    monkeypatch.setattr("hw.boards.selftest.TIMEOUT_BITS", 8)
    test = SelfTest(_CountingCore(results), Vectors(1, (1, 2), (3,), (_RESULT,) * 3), "t", 1, 5)
    lines, bits = [""], []

    async def process(ctx):
        for _ in range(4_000):
            bit = ctx.get(test.tx)
            if bits or not bit:
                bits.append(bit)
            if len(bits) == FRAME_BITS:
                lines[-1] += chr(sum(b << i for i, b in enumerate(bits[1:9])))
                bits.clear()
                if lines[-1].endswith("\r\n"):
                    lines.append("")
            await ctx.tick()

    _simulate(test, process)
    assert len(lines) > 2, f"no two lines in time: {lines}"
    assert re.fullmatch(rf"t: {results} results, 0 wrong, \d+ cycles: {outcome}\r\n", lines[0]), lines
    assert lines[1] == lines[0]


def _report(**changes) -> dict:
    """A report in nextpnr's format, reduced to the parts that the command reads."""
    steps = [
        {"type": "clk-to-q", "delay": 0.5, "from": {"cell": "a"}, "to": {"cell": "a"}},
        {"type": "routing", "delay": 3.0, "from": {"cell": "a"}, "to": {"cell": "b"}},
        {"type": "setup", "delay": 0.25, "from": {"cell": "b"}, "to": {"cell": "b"}},
    ]
    report = {
        "fmax": {"$glbnet$clk": {"achieved": 120.0, "constraint": 115.0}},
        "utilization": {"TRELLIS_FF": {"used": 7, "available": 83640}},
        "critical_paths": [
            {"from": "<async>", "to": "posedge $glbnet$clk", "path": []},
            {"from": "posedge $glbnet$clk", "to": "posedge $glbnet$clk", "path": steps},
        ],
    }
    return {**report, **changes}


def test_report_is_read(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(_report()))
    report = read_report(path)
    clocks = timing(report, 115e6)
    assert clocks["achieved_mhz"] == 120
    assert clocks["slack_ns"] == 0.362
    assert (clocks["from"], clocks["to"], clocks["logic_ns"], clocks["routing_ns"]) == ("a", "b", 0.75, 3.0)
    check(clocks, path)
    assert utilisation(report) == {"ff": {"used": 7, "available": 83640}}


def test_missed_clock_names_the_path(tmp_path: Path):
    report = _report(fmax={"$glbnet$clk": {"achieved": 114.0, "constraint": 115.0}})
    with pytest.raises(TimingError, match=r"114.00 of 115.00 MHz, slack -0.076 ns from a to b; see .*timing.rpt"):
        check(timing(report, 115e6), tmp_path / "timing.rpt")


@pytest.mark.parametrize("fmax", [{}, {"clk25": {"achieved": 300.0, "constraint": 25.0}}, {"clk": {}}, {"clk": 1}])
def test_unconstrained_clock_is_refused(fmax: dict):
    with pytest.raises(TimingError):
        timing(_report(fmax=fmax), 115e6)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"fmax": 1, "utilization": {}}', '{"fmax": {}}'])
def test_damaged_report_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(TimingError, match="not a report of nextpnr"):
        read_report(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tile", "16"], "tile is 4 or 8, not 16"),
        (["--clock-mhz", "20"], "clock_mhz is from 25 to 400, not 20"),
        (["--clock-mhz", "nan"], "clock_mhz is from 25 to 400, not nan"),
        (["--seeds", "0"], "seeds is at least 1, not 0"),
        (["--board", "icestick"], "invalid choice"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    try:
        code = bitstream.main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bitstream, "_TOOLS", ("no-such-nextpnr",))
    assert bitstream.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no no-such-nextpnr: install")
    assert "pip install" in error
    assert not (tmp_path / "out").exists()


def _fake_tools(monkeypatch: pytest.MonkeyPatch, achieved: dict[int, float]) -> None:
    """Replaces the tools: each placement writes the report of its seed."""

    def run(command: list[str], step: str, work: Path) -> None:
        (work / f"{step}.log").write_text(f"{step} ran\n")
        if match := re.fullmatch(r"nextpnr-(\d+)", step):
            fmax = {"clk": {"achieved": achieved[int(match[1])], "constraint": 115.0}}
            (work / f"report-{match[1]}.json").write_text(json.dumps(_report(fmax=fmax)))
        if step == "ecppack":
            (work / command[-1]).write_bytes(b"bits")

    monkeypatch.setattr(bitstream, "find_tools", lambda: dict.fromkeys(bitstream._TOOLS, "tool"))
    monkeypatch.setattr(bitstream, "_elaborate", lambda *_: 115e6)
    monkeypatch.setattr(bitstream, "_run", run)


def test_seeds_until_the_clock_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _fake_tools(monkeypatch, {3: 110.0, 4: 116.0})
    summary = bitstream.bitstream(4, tmp_path, seed=3, seeds=5)
    assert summary["seed"] == 4
    assert summary["tried_mhz"] == {"3": 110.0, "4": 116.0}
    assert (tmp_path / "gristmill.bit").read_bytes() == b"bits"
    assert (tmp_path / "timing.rpt").read_text() == "nextpnr-4 ran\n"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_missed_clock_leaves_no_bitstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "gristmill.bit").write_bytes(b"of an earlier run")
    (tmp_path / "summary.json").write_text("{}")
    _fake_tools(monkeypatch, {1: 110.0, 2: 112.0})
    assert bitstream.main(["--seeds", "2", "--out", str(tmp_path)]) == 1
    assert "112.00 of 115.00 MHz" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timing.rpt", "work"]
    assert (tmp_path / "timing.rpt").read_text() == "nextpnr-2 ran\n"
