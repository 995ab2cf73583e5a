# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.vivado`` from end to end with the recorder as Vivado, and its messages for faults."""

import json
import os
import shutil
from pathlib import Path

import pytest

from hw import vivado
from hw.flows.generate import generate
from hw.flows.tools import ToolError
from hw.flows.vivado_report import ReportError, check_platform, check_timing, read_facts, read_utilisation
from hw.spec.config import AcceleratorConfig
from hw.spec.manifest import Manifest
from tests.constraints.recorder import Record, install_tools, overlay_complaints

pytestmark = pytest.mark.slow

OPTIONS = ["--tile", "4", "--max-tokens", "2", "--max-k", "256", "--max-group-size", "32"]
PRODUCTS = ["gristmill", "gristmill.bit", "gristmill.hwh", "gristmill.xsa", "summary.json"]
FACTS = {"setup_slack_ns": "0.1", "setup_from": "a", "setup_to": "b", "hold_slack_ns": "0.01", "hold_from": "c",
         "hold_to": "d", "pulse_width_slack_sum_ns": "0.000", "failed_nets": "0", "control_address": "0x00A0000000",
         "control_bytes": "64K", "clock_mhz": "249.9975"}  # fmt: skip


@pytest.fixture(scope="module")
def generated() -> tuple[str, Manifest]:
    return generate(AcceleratorConfig(operators="decoder", tile=4, max_tokens=2, max_k=256, max_group_size=32))


@pytest.fixture
def tools(tmp_path: Path, generated: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with the recorder as Vivado; the accelerator is generated once for all tests."""
    folder = tmp_path / "bin"
    install_tools(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def generate(config: AcceleratorConfig, target: str) -> tuple[str, Manifest]:
        assert target == "ultrascaleplus"
        assert config == generated[1].config
        return generated

    monkeypatch.setattr(vivado, "generate", generate)
    return folder


def without_products(out: Path) -> bool:
    return not [name for name in PRODUCTS if (out / name).exists()]


def test_bitstream(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], generated: tuple[str, Manifest]):
    out = tmp_path / "kv 260"
    assert vivado.main(["bitstream", *OPTIONS, "--out", str(out)]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == sorted([*PRODUCTS, "logs", "reports", "work"])
    app = out / "gristmill"
    compiled = {"gristmill.dtbo"} if shutil.which("dtc") else set()
    assert {path.name for path in app.iterdir()} == compiled | {
        *("gristmill.bit.bin", "gristmill.dts", "shell.json", "manifest.json")
    }
    assert overlay_complaints((app / "gristmill.dts").read_text(), generated[1], 250_000_000) == []
    assert json.loads((app / "shell.json").read_text()) == {"shell_type": "XRT_FLAT", "num_slots": "1"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["timing"]["setup"]["slack_ns"] == 0.121
    assert summary["utilisation"]["bram36"] == {"used": 30.5, "available": 144}
    assert summary["clock_hz"] == 250_000_000
    assert summary["config_digest"] == generated[1].config.digest
    calls = [words[0] for words in Record.read(tools / "record.txt").facts["call"]]
    assert calls.index("launch_runs") < calls.index("report_timing_summary") < calls.index("write_hw_platform")
    assert "0.121 ns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "value", "found"),
    [
        ("SETUP", "-0.042", "setup slack -0.042 ns from system_i/accelerator/inst/from_reg/C to"),
        ("HOLD", "-0.001", "hold slack -0.001 ns"),
        ("PULSE", "-0.2", "pulse is too short"),
        ("NETS", "3", "3 nets have no route"),
        ("RUN", "synth_1", "run synth_1 ended as"),
        ("RUN", "impl_1", "run impl_1 ended as"),
        ("NO_PATHS", "1", "its clock is not constrained"),
        ("MHZ", "333.33", "divider makes 333.33 MHz of the 250 MHz wanted"),
    ],
)
def test_bad_design_gives_no_product(
    tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    value: str,
    found: str,
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "gristmill.xsa").write_text("of an earlier run")
    monkeypatch.setenv(f"RECORDER_{fault}", value)
    assert vivado.main(["bitstream", *OPTIONS, "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert found in error
    assert without_products(out)


def test_ip(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert vivado.main(["ip", *OPTIONS, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "ip" / "component.xml").exists()


def test_without_vivado(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(vivado, "generate", lambda config, target: pytest.fail("work before the tools were looked for"))
    for product in ("bitstream", "ip"):
        assert vivado.main([product, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "no vivado" in error
        assert "2023.1 to 2026.1" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("version", "status"), [("2022.2", 2), ("2023.1", None), ("2026.1", None), ("2027.1", None)])
def test_versions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    status: int | None,
):
    install_tools(tmp_path / "bin", version)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    if status:
        with pytest.raises(ToolError, match=f"Vivado {version} is too old") as caught:
            vivado.find_tools(("vivado",))
        assert caught.value.status == status
    else:
        vivado.find_tools(("vivado",))
        assert ("newer" in capsys.readouterr().err) == (version == "2027.1")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--tile", "5"], "tile is one of"),
        (["--clock-mhz", "0"], "clock_mhz is from 10 to 600"),
        (["--clock-mhz", "nan"], "clock_mhz is from 10 to 600"),
        (["--jobs", "0"], "jobs is at least 1"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], found: str):
    assert vivado.main(["bitstream", *options, "--out", str(tmp_path / "out")]) == 2
    assert found in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("control_address", "0xA0010000"), ("control_address", ""), ("control_bytes", "4K"), ("clock_mhz", "99.999")],
)
def test_other_platform_is_refused(name: str, value: str):
    check_platform(FACTS, 250_000_000)
    with pytest.raises(ReportError, match=name.split("_")[0]):
        check_platform({**FACTS, name: value}, 250_000_000)


@pytest.mark.parametrize(
    ("name", "value"),
    [("setup_slack_ns", "-0.001"), ("setup_slack_ns", "nan"), ("hold_slack_ns", ""), ("failed_nets", "1")],
)
def test_slack_is_judged(name: str, value: str):
    check_timing(FACTS, Path("timing.rpt"))
    with pytest.raises(ReportError):
        check_timing({**FACTS, name: value}, Path("timing.rpt"))


def test_damaged_facts(tmp_path: Path):
    with pytest.raises(ReportError, match="not the facts"):
        read_facts(tmp_path / "facts.txt")
    (tmp_path / "facts.txt").write_text("no tab here\n")
    with pytest.raises(ReportError, match="not the facts"):
        read_facts(tmp_path / "facts.txt")


def test_utilisation_of_older_and_newer_tables():
    text = (
        "| CLB LUTs*                  | 63886 |     0 |   1182240 |  5.40 |\n"
        "| CLB Registers              | 44099 |     2 |          0 |   2364480 |  1.87 |\n"
        "| DSPs      |    1 |     0 |          0 |      1248 | <0.01 |\n"
    )
    assert read_utilisation(text) == {
        "lut": {"used": 63886, "available": 1182240},
        "ff": {"used": 44099, "available": 2364480},
        "bram36": None,
        "uram": None,
        "dsp": {"used": 1, "available": 1248},
    }
