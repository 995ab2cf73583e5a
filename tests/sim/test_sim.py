# SPDX-License-Identifier: Apache-2.0
"""Every bench of sim/benches.py as a test, and tests that the runner detects failures."""

import shutil
from pathlib import Path

import pytest

from sim import harness, run
from sim.benches import BENCHES, Bench

HERE = Path(__file__).parent
FIFO = Bench("tests.sim.tb_fifo", "fifo", verilog=HERE / "fifo.v")
SEED = 20240607
LOG_LINES = 100
"""Number of lines of a failing bench's log that are shown."""

pytestmark = pytest.mark.simulator

needs_icarus = pytest.mark.skipif(
    not shutil.which("iverilog"), reason="no iverilog on PATH; install Debian package iverilog to run this"
)


def _marks(bench: Bench) -> list[pytest.MarkDecorator]:
    """A long bench may take as long as its own limit, which says what it waited for, and its builds."""
    return [pytest.mark.full, pytest.mark.timeout(bench.timeout + 900)] if bench.full else []


def _bench_params():
    """Every bench on Verilator, and the first one on Icarus too."""
    for bench in BENCHES:
        yield pytest.param(bench, "verilator", id=f"{bench.name}-verilator", marks=_marks(bench))
    for bench in BENCHES[:1]:
        yield pytest.param(bench, "icarus", id=f"{bench.name}-icarus", marks=needs_icarus)


@pytest.mark.parametrize(("bench", "simulator"), list(_bench_params()))
def test_bench(bench: Bench, simulator: str):
    result = harness.run_bench(bench, simulator, SEED)
    if not result.ok:
        print(*result.log.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n")
    options = f"--sim {simulator}{' --full' * bench.full} --seed {SEED}"
    assert result.ok, f"{run.summary([result])}\nrepeat with: python -m sim.run -k '{bench.name}' {options}"


@pytest.mark.parametrize("simulator", ["verilator", pytest.param("icarus", marks=needs_icarus)])
def test_stream_helpers(simulator: str):
    result = harness.run_bench(FIFO, simulator, SEED)
    assert result.ok, run.summary([result])
    assert len(result.passed) == 6


def _main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], benches: list[Bench], *argv: str):
    monkeypatch.setattr(run, "BENCHES", benches)
    code = run.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _variant(**settings: object) -> Bench:
    return Bench(FIFO.module, FIFO.top, settings=settings, verilog=FIFO.verilog)


def test_failing_bench_fails_the_run(monkeypatch, capsys):
    code, out, _ = _main(monkeypatch, capsys, [FIFO, _variant(fail=True)], "--seed", "7")
    assert code == 1
    assert "FAILED sim/tb_fifo[fail=True] verilator test_deliberately_wrong: a FIFO after reset must be full" in out
    assert "build/sim/runs/sim-tb_fifo-fail=True.verilator/run.log" in out
    assert "2 benches: 12 tests passed, 1 failed" in out
    assert "--seed 7 repeats this run" in out


def test_passing_bench_passes_the_run(monkeypatch, capsys):
    code, out, _ = _main(monkeypatch, capsys, [FIFO])
    assert code == 0, out
    assert "1 benches: 6 tests passed, 0 failed" in out


def test_bench_without_tests_fails():
    result = harness.run_bench(Bench("sim.bench.packing", "fifo", verilog=FIFO.verilog), "verilator", SEED)
    assert not result.ok
    assert "simulation" in result.failed


def test_hung_bench_is_killed_and_says_what_it_waited_for():
    bench = Bench(FIFO.module, FIFO.top, settings={"hang": True}, verilog=FIFO.verilog, timeout=8)
    result = harness.run_bench(bench, "verilator", SEED)
    assert "not done after 8 s; it waited for pigs to fly" in result.failed["simulation"]


def test_verilator_warning_fails_the_build(tmp_path: Path):
    verilog = tmp_path / "careless.v"
    verilog.write_text("module careless(input [7:0] a, output [3:0] y); assign y = a; endmodule\n")
    result = harness.run_bench(Bench("tests.sim.tb_fifo", "careless", verilog=verilog), "verilator", SEED)
    assert list(result.failed) == ["verilator build"]
    assert "WIDTHTRUNC" in result.failed["verilator build"]
    assert not list(harness.BUILD.glob("built/careless-verilator-????????????????"))


@pytest.mark.parametrize(
    ("top", "tile", "reason"),
    [
        ("pe", 3, "exit code 2: error: tile is one of 4, 8, 16, 32, not 3"),
        ("no_such_block", 4, "exit code 2: error: block is one of accelerator, core, pe, "),
    ],
)
def test_refused_parameters_fail_the_bench(top: str, tile: int, reason: str):
    result = harness.run_bench(Bench("sim.tb.core.tb_pe", top, {"tile": tile}), "verilator", SEED)
    assert list(result.failed) == ["hw.build"]
    assert result.failed["hw.build"].startswith(reason)
    assert not result.passed


def test_missing_icarus_names_the_package(monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(HERE))
    code, _, err = _main(monkeypatch, capsys, [FIFO], "--sim", "icarus")
    assert code == 2
    assert err == "error: Simulator icarus needs iverilog on PATH; install Debian package iverilog\n"


def test_unknown_simulator_is_refused(monkeypatch, capsys):
    code, _, err = _main(monkeypatch, capsys, [FIFO], "--sim", "modelsim")
    assert code == 2
    assert err == "error: Simulator must be one of verilator, icarus, not 'modelsim'\n"


def test_nothing_to_run_is_not_a_pass(monkeypatch, capsys):
    code, _, err = _main(monkeypatch, capsys, [FIFO], "-k", "nonsense")
    assert code == 2
    assert err == "error: No bench matches -k 'nonsense'\n"


def test_select():
    pe4, pe8 = (Bench("sim.tb.core.tb_pe", "pe", {"tile": tile}) for tile in (4, 8))
    core = Bench("sim.tb.core.tb_core", "core", {"tile": 16, "ports": 4}, full=True)
    benches = [pe4, pe8, core]
    assert run.select(benches) == [pe4, pe8]
    assert run.select(benches, full=True) == benches
    assert run.select(benches, full=True, words="tb_core or tile=8") == [pe8, core]
    assert run.select(benches, words="pe and not tile=8") == [pe4]
    fifo = Bench("sim.tb.common.tb_fifo", "fifo")
    assert run.select([fifo, *benches], words="core/") == [pe4, pe8]
    assert [bench.params["tile"] for bench in run.select(benches, full=True, tile=32)] == [32, 32]
    # 8 lanes do not fit every tile.
    wide = Bench("sim.tb.core.tb_core", "core", {"tile": 32, "lanes": 8})
    assert [bench.params for bench in run.select([wide], tile=4)] == [{"tile": 4}]
