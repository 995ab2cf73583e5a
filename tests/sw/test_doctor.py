# SPDX-License-Identifier: Apache-2.0
"""The doctor reports a board without faults as ok, and reports each injected fault at the right check."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from hw.spec.control.registers import offset
from hw.spec.memory.faults import Fault
from sw import doctor
from sw.board import layers as doctor_layers
from sw.board.checks import OK, UNKNOWN, WRONG, examine
from sw.common.errors import UserError
from sw.devices import make_config
from sw.devices.kv260 import FIRMWARE, KV260Device
from tests.sw.fixtures.fake_board import (
    BUFFER,
    DDR_CLOCK,
    DEVICE_TREE,
    FPGA,
    OVERLAY,
    SIZE,
    UIO,
    FakeBoard,
    SimulatedWindow,
)

pytestmark = pytest.mark.simulator

CONFIG = make_config(operators="decoder", tile=4, ports=1, max_k=1024, max_tokens=5)
WIDER = make_config(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024)
CHECKS = [
    "app",
    "firmware",
    "registers",
    "buffer",
    "memory clock",
    "manifest",
    "exclusive use",
    "identification",
    "version",
    "configuration",
    "fabric clock",
    "interrupt",
    "self-test",
    "programs",
    "memory rate",
]


@pytest.fixture(autouse=True)
def short_layers(monkeypatch):
    monkeypatch.setattr(doctor_layers, "STREAM_N", 512)
    monkeypatch.setattr(doctor_layers, "INTERRUPT_SECONDS", 0.1)


@pytest.fixture
def fake(tmp_path):
    with closing(FakeBoard(tmp_path / "board", CONFIG, "kv260-2400")) as made:
        yield made


def run(fake, monkeypatch, capsys, *arguments):
    """Exit status and stdout of the command line."""
    monkeypatch.setattr(doctor, "Host", lambda: fake)
    status = doctor.main(arguments)
    return status, capsys.readouterr().out


def test_a_board_without_faults(fake, monkeypatch, capsys):
    status, text = run(fake, monkeypatch, capsys)
    lines = text.splitlines()
    assert status == 0
    assert len(lines) == len(CHECKS) and all(line.startswith("ok ") for line in lines), text
    assert "250.0 MHz, measured with the cycle counter" in text
    status, text = run(fake, monkeypatch, capsys, "--json")
    answer = json.loads(text)
    assert status == 0 and answer["well"] is True
    assert [item["check"] for item in answer["checks"]] == CHECKS
    assert all(item["status"] == OK and not item["fix"] for item in answer["checks"])
    # The board is free again.
    KV260Device(host=fake).close()


def test_other_hardware(tmp_path):
    """The self-test adapts to the hardware: fixed zero points, two ports, fewer bits."""
    with closing(FakeBoard(tmp_path, WIDER)) as fake:
        assert {finding.status for finding in examine(fake)} == {OK}


def test_slow_memory(tmp_path):
    """Results are right, but the weights come late, as if there were other traffic on the memory."""
    with closing(FakeBoard(tmp_path, WIDER, "hostile")) as fake:
        findings = list(examine(fake))
    (finding,) = [item for item in findings if item.status == WRONG]
    assert finding.check == "memory rate"
    assert "% of the ports' bandwidth" in finding.text and "other traffic" in finding.fix


def hardware(name, value, word=0):
    return lambda fake: fake.overrides.update({offset(name, word): value})


def spoilt(name, value):
    return lambda fake: setattr(fake, name, value)


def other_manifest(fake):
    path = fake.path(f"{FIRMWARE}/manifest.json")
    other = make_config(tile=8)
    values = json.loads(path.read_text()) | {"config": other.to_dict(), "config_digest": other.digest}
    path.write_text(json.dumps(values))


# Fault: (a function that injects it, the check that is wrong, part of its line, part of its fix).
FAULTS = {
    "another app": (lambda fake: fake.path(OVERLAY).rename(fake.path(OVERLAY).with_name("k26-starter-kits")),
        "app", "overlays are k26-starter-kits", "sudo xmutil loadapp gristmill"),
    "fabric empty": (lambda fake: fake.put(f"{FPGA}/state", "unknown\n"),
        "app", "the FPGA manager's state is 'unknown'", "sudo xmutil loadapp gristmill"),
    "no Kria": (lambda fake: fake.remove(FPGA), "app", "no Kria?", "sudo xmutil loadapp"),
    "app not installed": (lambda fake: fake.remove(f"{FIRMWARE}/gristmill.dtbo"),
        "app", "has no gristmill.dtbo", "copy the app folder"),
    "another bitstream": (lambda fake: fake.put(f"{DEVICE_TREE}/fpga-full/firmware-name", "other.bit.bin\0"),
        "firmware", "names 'other.bit.bin'", "sudo xmutil loadapp gristmill"),
    "no UIO driver": (lambda fake: fake.remove(UIO), "registers", "no UIO device named gristmill", "of_id=generic-uio"),
    "no permission": (spoilt("denied", {"/dev/uio4"}), "registers", "uio4: permission denied; run it with sudo", ""),
    "other address": (lambda fake: fake.put(f"{UIO}/maps/map0/addr", "0xb0000000"),
        "registers", "at 0xb0000000 instead of 0xa0000000", "copy the app folder"),
    "no module": (lambda fake: fake.remove(BUFFER), "buffer", "no u-dma-buf named", "sudo modprobe u-dma-buf"),
    "small buffer": (lambda fake: fake.put(f"{BUFFER}/size", str(SIZE // 4)),
        "buffer", "instead of 536,870,912", "the loaded overlay has another size than <0x20000000>"),
    "high buffer": (lambda fake: fake.put(f"{BUFFER}/phys_addr", "0x800000000"),
        "buffer", "0x800000000, not below 4 GiB", "dma-mask = <32>"),
    "unaligned buffer": (lambda fake: fake.put(f"{BUFFER}/phys_addr", "0x10000100"),
        "buffer", "no multiple of 4096", "load the app again"),
    "buffer said to be coherent": (lambda fake: fake.put(f"{BUFFER}/dma_coherent", "1"),
        "buffer", "dma-coherent", "load the app again"),
    "buffer without permission": (spoilt("denied", {f"{BUFFER}/sync_for_device"}), "buffer", "permission denied", ""),
    "slow memory clock": (lambda fake: fake.put(DDR_CLOCK, "400000000"), "memory clock", "1,600 MT/s", "bootfw"),
    "no manifest": (lambda fake: fake.remove(f"{FIRMWARE}/manifest.json"), "manifest", "no manifest there", ""),
    "damaged manifest": (lambda fake: fake.put(f"{FIRMWARE}/manifest.json", "[]"), "manifest", "not a manifest", ""),
    "other design": (hardware("identification", 0xDEADBEEF), "identification", "0xdeadbeef", "copy the app folder"),
    "old registers": (hardware("version", 0), "version", "have version 0, this software", "build the bitstream"),
    "other hardware": (hardware("config_digest", 1), "configuration", "from config 00000001", "copy the manifest"),
    "other hardware's manifest": (other_manifest, "configuration", "the manifest has", "copy the manifest"),
    "slow clock": (spoilt("clock_hz", 100e6), "fabric clock", "100.0 MHz, measured", "xlnx,fclk"),
    "clock a little fast": (spoilt("clock_hz", 260e6), "fabric clock", "260.0 MHz, measured", "xlnx,fclk"),
    "no interrupt": (spoilt("has_interrupt", False), "interrupt", "polls the registers", "interrupts = <0 89 4>"),
    "interrupt elsewhere": (spoilt("interrupt_arrives", False), "interrupt", "none came in", "/proc/interrupts"),
    "a wrong bit": (spoilt("flips", True), "self-test", "results of layer M 1 are wrong", "slack"),
    "bus errors": (lambda fake: fake.simulated.fault(Fault.READ_ERROR),
        "interrupt", "memory answered a read with SLVERR or DECERR", "address map"),
}  # fmt: skip
# Fault: other checks that are wrong because of it.
ALSO = {
    "a wrong bit": {"programs", "memory rate"},
    "bus errors": {"self-test", "programs", "memory rate"},
    "high buffer": {"interrupt", "self-test", "programs", "memory rate"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults(fault, fake, monkeypatch, capsys):
    """The line names the fault and its fix, no other check is wrong, and no line is missing."""
    plant, check, text, fix = FAULTS[fault]
    plant(fake)
    status, out = run(fake, monkeypatch, capsys, "--json")
    answer = json.loads(out)
    findings = {item["check"]: item for item in answer["checks"]}
    assert status == 1 and answer["well"] is False
    assert sorted(findings) == sorted(CHECKS) and len(answer["checks"]) == len(CHECKS)
    assert findings[check]["status"] == WRONG, findings[check]
    assert text in findings[check]["text"] and fix in findings[check]["fix"], findings[check]
    wrong = {name for name, item in findings.items() if item["status"] == WRONG}
    assert wrong == {check} | ALSO.get(fault, set()), [findings[name] for name in wrong]
    for item in findings.values():
        assert item["status"] != UNKNOWN or "not checked, because of: " in item["text"], item


def test_in_use(fake, monkeypatch, capsys):
    """If another process uses the board, the doctor does not access it."""
    with KV260Device(host=fake):
        fake.commands.clear()
        status, text = run(fake, monkeypatch, capsys)
        assert not fake.commands
    assert status == 1
    assert "exclusive use   another process uses the accelerator; fuser -v /dev/udmabuf-gristmill" in text
    assert "cannot tell self-test" in text


def test_registers_are_not_accessed(fake, monkeypatch):
    """If the design is not loaded, an access could stop the machine."""
    fake.put(f"{FPGA}/state", "write error")
    monkeypatch.setattr(SimulatedWindow, "__getitem__", lambda *_: pytest.fail("a register was read"))
    assert [finding.status for finding in examine(fake)].count(WRONG) == 1


def test_without_root(fake, monkeypatch, capsys):
    """A check that needs root is reported as "cannot tell", not as wrong."""
    for name in (DDR_CLOCK, f"{DEVICE_TREE}/fpga-full", "/sys/kernel/config/device-tree"):
        fake.remove(name)
    status, text = run(fake, monkeypatch, capsys)
    assert status == 0
    assert text.count("cannot tell") == 3 and "cannot tell memory clock" in text and "sudo xmutil listapps" in text


def test_another_clock(fake, monkeypatch, capsys):
    """A bitstream that is timed for a slower clock."""
    fake.clock_hz = 200e6
    assert run(fake, monkeypatch, capsys, "--clock-mhz", "200")[0] == 0
    with pytest.raises(UserError, match=r"^--clock-mhz is above 0, not -1$"):
        run(fake, monkeypatch, capsys, "--clock-mhz=-1")


def test_documentation():
    """docs/bring-up.md has a row for every check, and shows the lines of a board without faults."""
    text = (Path(__file__).parents[2] / "docs" / "bring-up.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    names = [name.strip() for row in rows for name in row.split(",")]
    for check in CHECKS:
        assert check in names and f"\nok          {check:<16}" in text, check


WITHOUT = """
import sys
from pathlib import Path
missing = ("amaranth", "gguf", "jinja2", "onnx", "onnxruntime", "rich", "tokenizers")
sys.modules.update(dict.fromkeys(missing))
from sw import doctor
from sw.devices.host import Host
doctor.Host = lambda: Host(Path(sys.argv[1]))
sys.exit(doctor.main(["--json"]))
"""


def test_numpy_is_enough(tmp_path):
    """Driver and doctor need no other package than numpy. The machine is an empty folder."""
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and not done.stderr, done.stderr
    answer = json.loads(done.stdout)
    assert [item["check"] for item in answer["checks"]] == CHECKS and not answer["well"]
