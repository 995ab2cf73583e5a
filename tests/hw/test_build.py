# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.build``: the same bytes every time, complete files only, one clear line for each bad option."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hw import build
from hw.flows.blocks import BLOCKS
from hw.flows.lower import LowerError
from hw.spec.manifest import Manifest
from hw.spec.simulation import CLOCKS_NEEDED, GATED_CLOCK

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--tile", "4", "--ports", "1", "--port-width", "64", "--max-tokens", "2", "--max-k", "1024")


def run(*options: str, seed: str = "0", timeout: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hw.build", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("core")
    done = run(*SMALL, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 24
    assert "4 x 4 PEs" in done.stdout
    return out


@pytest.mark.slow
def test_same_bytes_in_another_process(core: Path, tmp_path: Path):
    assert run(*SMALL, "--out", str(tmp_path), seed="4711").returncode == 0
    for name in ("gristmill.v", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (core / name).read_bytes(), name


def test_writes_two_files_and_nothing_else(core: Path):
    assert sorted(path.name for path in core.iterdir()) == ["gristmill.v", "manifest.json"]


def test_manifest_belongs_to_the_verilog(core: Path):
    manifest = Manifest.load(core / "manifest.json")
    text = (core / "gristmill.v").read_bytes()
    assert manifest.verilog_sha256 == hashlib.sha256(text).hexdigest()
    assert manifest.config.tile == 4
    assert f"module {manifest.top}(".encode() in text
    parts = ("payload", "valid", "ready")
    for name in (*manifest.ports, *(f"{stream}_{part}" for stream in manifest.streams for part in parts)):
        assert re.search(rf"^  (input|output) (\[\d+:0\] )?{name};$", text.decode(), re.MULTILINE), name


TOP = "gristmill_accelerator"
YOSYS = """
import sys
from pyosys import libyosys as ys
design = ys.Design()
ys.run_pass(f"read_verilog -defer {sys.argv[1]}", design)
ys.run_pass(f"hierarchy -check -top {sys.argv[2]}", design)
ys.run_pass("proc; check -assert", design)
"""


@pytest.mark.slow
def test_yosys_reads_it(core: Path):
    done = subprocess.run(
        [sys.executable, "-c", YOSYS, str(core / "gristmill.v"), TOP],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


@pytest.mark.skipif(not shutil.which("iverilog"), reason="no iverilog on PATH; install Debian package iverilog")
def test_icarus_reads_it(core: Path, tmp_path: Path):
    done = subprocess.run(
        [
            "iverilog",
            "-g2005",
            "-Wall",
            "-s",
            "gristmill_accelerator",
            "-o",
            str(tmp_path / "out"),
            str(core / "gristmill.v"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_generic_verilog_has_no_primitives(core: Path):
    text = (core / "gristmill.v").read_text()
    assert "DSP48" not in text and "(*" not in text


@pytest.mark.slow
def test_target_has_its_primitives(tmp_path: Path):
    """The array is in DSP slices, and memories have attributes for their kind; only the simulated device has several
    clocks; the manifest is the same."""
    targets = ("generic", "ultrascaleplus", "simulation")
    for target in targets:
        assert run(*SMALL, "--top", "core", "--target", target, "--out", str(tmp_path / target)).returncode == 0
    texts = {target: (tmp_path / target / "gristmill.v").read_text() for target in targets}
    assert texts["ultrascaleplus"].count("  DSP48E2 #(") == 16
    assert "// Made for ultrascaleplus" in texts["ultrascaleplus"].splitlines()[2]
    assert set(re.findall(r"\(\*.*?\*\)", texts["ultrascaleplus"])) == {'(* ram_style = "block" *)'}
    clocks = {target: set(re.findall(r"posedge (\w+)", text)) for target, text in texts.items()}
    assert clocks == {"generic": {"clk"}, "ultrascaleplus": {"clk"}, "simulation": {"clk", GATED_CLOCK.format(0)}}
    assert [name for name, text in texts.items() if f"output {CLOCKS_NEEDED};" in text] == ["simulation"]
    manifests = [Manifest.load(tmp_path / target / "manifest.json") for target in texts]
    assert manifests[0].config.digest == manifests[1].config.digest
    assert (manifests[0].ports, manifests[0].streams) == (manifests[1].ports, manifests[1].streams)
    assert manifests[1].verilog_sha256 == hashlib.sha256(texts["ultrascaleplus"].encode()).hexdigest()


@pytest.mark.full
@pytest.mark.parametrize("block", list(BLOCKS))
def test_every_block_alone(block: str, tmp_path: Path):
    done = run(*SMALL, "--top", block, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Manifest.load(tmp_path / "manifest.json").block == block


@pytest.mark.parametrize(
    "options",
    [("--max-k", "32", "--max-group-size", "32"), ("--max-k", "512"), ("--max-group-size", "64")],
    ids=" ".join,
)
def test_small_limits_are_legal(options: tuple[str, ...], tmp_path: Path):
    done = run("--tile", "8", "--top", "pe", *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tile", "5"), "tile is one of 4, 8, 16, 32, not 5"),
        (("--tile", "-8"), "tile is one of 4, 8, 16, 32, not -8"),
        (("--weight-bits", "1"), "weight_bits is one of 2, 3, 4, 5, 6, 7, 8, not 1"),
        (("--activation-bits", "17"), "activation_bits is one of 8, 9, 10, 11, 12, 13, 14, 15, 16, not 17"),
        (("--zero-point", "float"), "zero_point is one of integer, fixed, not 'float'"),
        (("--ports", "3"), "ports is one of 1, 2, 4, not 3"),
        (("--port-width", "256"), "port_width is one of 32, 64, 128, not 256"),
        (("--max-tokens", "65"), "max_tokens is a whole number from 1 to 64, not 65"),
        (("--max-k", "32784"), "max_k is a whole number from 32 to 32,768, not 32784"),
        (("--max-k", "100"), "max_k is a multiple of the tile (16), not 100"),
        (("--score-words", "100"), "score_words is a multiple of 64, not 100"),
        (("--score-words", "4096", "--weight-bits", "5"), "a KV cache takes weight_bits of 4 or 8, not 5"),
        (("--score-words", "4096", "--max-k", "256"), "max_k is at least 512 with score_words, not 256"),
        (("--max-group-size", "48"), "max_group_size is one of 32, 64, 128, 256, not 48"),
        (("--top", "wheel"), "block is one of accelerator, core, pe, "),
        (("--target", "asic"), "target is one of generic, ultrascaleplus, ecp5, simulation, not 'asic'"),
    ],
)
def test_bad_value_is_one_line(options: tuple[str, ...], message: str, tmp_path: Path):
    done = run(*options, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tile", "x"), "argument --tile: invalid int value: 'x'"),
        (("--max-k",), "argument --max-k: expected one argument"),
        (("--colour", "red"), "unrecognized arguments: --colour red"),
    ],
)
def test_bad_option_is_named(options: tuple[str, ...], message: str, tmp_path: Path):
    done = run(*options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"error: {message}")
    assert "Traceback" not in done.stderr


def test_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "out").write_text("in the way")
    done = run(*SMALL, "--top", "pe", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "out") in done.stderr
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.parametrize("failure", [LowerError("yosys failed on core: whatever"), KeyboardInterrupt()], ids=repr)
def test_failure_leaves_the_old_files(failure: BaseException, core: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(core, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(component, *_):
        # Amaranth warns about unused components, but this one is unused on purpose.
        component._MustUse__silence = True
        raise failure

    monkeypatch.setattr("hw.flows.generate.to_verilog", fail)
    code = build.main([*SMALL, "--max-tokens", "3", "--out", str(out)])
    assert code == (2 if isinstance(failure, LowerError) else 130)
    assert capsys.readouterr().err == ("error: yosys failed on core: whatever\n" if code == 2 else "")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_full_disk_leaves_no_part_of_a_file(core: Path, tmp_path: Path, monkeypatch, capsys):
    """The write of the second file fails: the first is complete, and no part of the second remains."""
    out = tmp_path / "out"
    shutil.copytree(core, out)
    old = (out / "manifest.json").read_bytes()
    write_text = Path.write_text

    def write(self: Path, text: str, *arguments, **options):
        if self.name == "manifest.json":
            write_text(self, text[:100])
            raise OSError(28, "No space left on device", str(self))
        return write_text(self, text, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write)
    assert build.main([*SMALL, "--top", "pe", "--out", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["gristmill.v", "manifest.json"]
    assert (out / "manifest.json").read_bytes() == old
    assert (out / "gristmill.v").read_text().endswith("endmodule\n")


@pytest.mark.slow
def test_interrupt_leaves_nothing(tmp_path: Path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "hw.build", "--tile", "32", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process in a shell's background ignores SIGINT, and its children inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not out.exists()
