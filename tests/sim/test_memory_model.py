# SPDX-License-Identifier: Apache-2.0
"""The simulated accelerator's memory and protocol checks without the accelerator: speed, order, data, faults, rules."""

import ctypes
import re
import shutil
import subprocess
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import pytest

from hw.spec.memory.faults import Fault
from sim.device.build import DEFINES

HERE = Path(__file__).parent
DEVICE = HERE.parents[1] / "sim" / "device"
SOURCES = ("memory_model.cpp", "memory_simple.cpp", "memory_dram.cpp", "protocol.cpp")
PRESETS = ("ideal", "kv260-2400", "kv260-2133", "hostile")
AR, R, AW, W, B = range(5)
OKAY, SLVERR, DECERR = 0, 2, 3
STATISTICS = (
    *("read_bytes", "write_bytes", "read_bursts", "write_bursts", "refreshes", "row_misses"),
    *(f"port_{port}" for port in range(4)),
    *("shortest_write_burst", "longest_write_burst"),
)
EVENT = np.dtype([("cycle", "u8"), ("kind", "u4"), ("port", "u4"), ("response", "u4"), ("last", "u4")])

# Return type and arguments of the library's functions. shim_* and protocol_* take a handle before these arguments.
_FUNCTIONS = {
    "gm_stream_limit": (c_double, [c_char_p, c_uint32, c_uint32, c_uint64, c_uint64]),
    "shim_open": (c_void_p, [c_char_p, c_uint64, c_uint32, c_uint32]),
    "shim_close": (None, [c_void_p]),
    "shim_map": (c_int, [c_void_p, c_uint64, c_uint64, c_void_p]),
    "shim_unmap": (c_int, [c_void_p, c_uint64]),
    "shim_fault": (None, [c_void_p, c_int, c_uint64, c_uint64]),
    "shim_statistics": (None, [c_void_p, c_void_p]),
    "shim_read": (None, [c_void_p, c_uint32, c_uint64, c_uint32]),
    "shim_write": (None, [c_void_p, c_uint64, c_uint32, c_void_p, c_uint32]),
    "shim_run": (None, [c_void_p, c_uint64]),
    "shim_events": (c_uint64, [c_void_p, POINTER(c_void_p)]),
    "shim_got": (c_uint64, [c_void_p, c_uint32, POINTER(c_void_p)]),
    "protocol_open": (c_void_p, [c_uint32]),
    "protocol_close": (None, [c_void_p]),
    "protocol_ar": (None, [c_void_p, c_bool, c_bool, c_uint64, c_uint32, c_uint32, c_uint32, c_uint32]),
    "protocol_aw": (None, [c_void_p, c_bool, c_bool, c_uint64, c_uint32, c_uint32, c_uint32, c_uint32]),
    "protocol_w": (None, [c_void_p, c_bool, c_bool, c_uint32, c_uint32, c_bool]),
    "protocol_r": (None, [c_void_p, c_bool, c_bool]),
    "protocol_b": (None, [c_void_p, c_bool, c_bool]),
    "protocol_step": (None, [c_void_p]),
    "protocol_problem": (c_char_p, [c_void_p]),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not shutil.which("g++"):
        pytest.skip("no g++ on PATH; install Debian package g++ to run this")
    out = tmp_path_factory.mktemp("memory") / "memory.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{DEVICE}", *DEFINES]
    sources = [str(DEVICE / name) for name in SOURCES]
    command = ["g++", *flags, str(HERE / "memory_shim.cpp"), *sources, "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    loaded = ctypes.CDLL(str(out))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


class _Memory:
    """A memory with one buffer of noise, and a manager that runs bursts."""

    BASE = 0x10_0000

    def __init__(
        self, library: ctypes.CDLL, preset: str = "ideal", *, seed: int = 1, ports: int = 4, size: int = 1 << 19
    ):
        self.library, self.ports, self.port_bytes = library, ports, 16
        self.handle = library.shim_open(preset.encode(), seed, ports, 16)
        self.bytes = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        self.kept: list[np.ndarray] = []
        assert self.map(self.BASE, self.bytes) == 0

    def map(self, address: int, array: np.ndarray, size: int | None = None) -> int:
        self.kept.append(array)
        return self.library.shim_map(self.handle, address, array.nbytes if size is None else size, array.ctypes.data)

    def read(self, port: int, offset: int, beats: int) -> None:
        self.library.shim_read(self.handle, port, self.BASE + offset, beats)

    def write(self, offset: int, data: np.ndarray, strobes: int = 0xFFFF) -> None:
        self.kept.append(data)
        self.library.shim_write(self.handle, self.BASE + offset, data.nbytes // 16, data.ctypes.data, strobes)

    def run(self, cycles: int) -> None:
        self.library.shim_run(self.handle, cycles)

    def fault(self, kind: int, offset: int = 0, size: int = 0) -> None:
        self.library.shim_fault(self.handle, kind, self.BASE + offset, size)

    def events(self, kind: int, port: int = 0) -> np.ndarray:
        """The transfers on a channel, in order."""
        pointer = c_void_p()
        count = self.library.shim_events(self.handle, byref(pointer))
        every = np.frombuffer(ctypes.string_at(pointer, count * EVENT.itemsize), EVENT) if count else np.zeros(0, EVENT)
        return every[(every["kind"] == kind) & (every["port"] == port)]

    def got(self, port: int) -> np.ndarray:
        """Bytes read so far."""
        pointer = c_void_p()
        count = self.library.shim_got(self.handle, port, byref(pointer))
        return np.frombuffer(ctypes.string_at(pointer, count), np.uint8) if count else np.zeros(0, np.uint8)

    def statistics(self) -> dict[str, int]:
        values = (c_uint64 * len(STATISTICS))()
        self.library.shim_statistics(self.handle, values)
        return dict(zip(STATISTICS, values, strict=True))

    def stream(self, bursts: int) -> None:
        """Makes every port read its own part of the buffer in bursts of 4 KiB."""
        part = self.bytes.nbytes // self.ports
        for port in range(self.ports):
            for burst in range(bursts):
                self.read(port, port * part + 4096 * burst % part, 256)


@pytest.fixture
def memory(library: ctypes.CDLL):
    """Makes memories, and closes them at the end."""
    made: list[_Memory] = []

    def make(preset: str = "ideal", **options: int) -> _Memory:
        made.append(_Memory(library, preset, **options))
        return made[-1]

    yield make
    for item in made:
        library.shim_close(item.handle)


@pytest.mark.parametrize(
    ("preset", "ports", "port_bytes", "low", "high"),
    [
        ("ideal", 1, 4, 3.99, 4),
        ("ideal", 4, 16, 63.9, 64),
        ("kv260-2400", 1, 16, 15.9, 16),
        ("kv260-2400", 2, 16, 31.5, 32),
        ("kv260-2400", 4, 8, 31.5, 32),
        ("kv260-2400", 4, 16, 62.3, 64),  # 15.9 GB/s were measured: 63.6
        ("kv260-2133", 4, 16, 53, 58),  # 13.3 GB/s were measured: 53.2
        ("hostile", 4, 16, 20, 50),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_stream_limit(library, preset, ports, port_bytes, low, high, seed):
    assert low <= library.gm_stream_limit(preset.encode(), ports, port_bytes, 400_000, seed) <= high


def test_stream_limit_refuses(library):
    for preset, ports, port_bytes, cycles in (
        (b"ddr5", 4, 16, 100), (b"", 4, 16, 100), (b"ideal", 0, 16, 100), (b"ideal", 5, 16, 100),
        (b"ideal", 4, 32, 100), (b"ideal", 4, 16, 0),
    ):  # fmt: skip
        assert library.gm_stream_limit(preset, ports, port_bytes, cycles, 1) < 0
    assert library.shim_open(b"ddr5", 1, 4, 16) is None
    assert library.shim_open(None, 1, 4, 16) is None


@pytest.mark.parametrize("preset", PRESETS)
def test_reads_are_exact_and_in_order(memory, preset):
    sut = memory(preset)
    sut.stream(32)
    sut.run(40_000)
    part = sut.bytes.nbytes // 4
    for port in range(4):
        assert np.array_equal(sut.got(port), sut.bytes[port * part :][:part])
        events = sut.events(R, port)
        assert np.array_equal(np.flatnonzero(events["last"]), np.arange(255, 32 * 256, 256))
        assert not events["response"].any()
    stats = sut.statistics()
    assert stats["read_bytes"] == sut.bytes.nbytes
    assert stats["read_bursts"] == 128
    assert [stats[f"port_{port}"] for port in range(4)] == [32 * 256] * 4


def test_ideal_cycles(memory):
    sut = memory()
    sut.stream(8)
    sut.write(0, np.zeros(256, np.uint8))
    sut.write(256, np.zeros(256, np.uint8))
    sut.run(3000)
    for port in range(4):
        cycles = sut.events(R, port)["cycle"]
        assert np.array_equal(cycles, np.arange(32, 32 + 8 * 256))
    assert np.array_equal(sut.events(W)["cycle"], np.arange(32))
    assert sut.events(B)["cycle"].tolist() == [15 + 16, 31 + 16]


@pytest.mark.parametrize("preset", ["kv260-2400", "kv260-2133"])
def test_dram_latency(memory, preset):
    """The latency is 200 to 280 ns, as on boards, and less for the next burst, whose row is open."""
    sut = memory(preset)
    latencies = []
    for offset in (0, 4096):
        sut.read(0, offset, 256)
        sut.run(400)
        latencies.append(int(sut.events(R)["cycle"][-256] - sut.events(AR)["cycle"][-1]))
    assert 50 <= latencies[1] < latencies[0] <= 70


def test_dram_refresh(memory):
    """A refresh comes every 7.8 us. With one port it costs nothing, because the read buffer covers the pause."""
    sut = memory("kv260-2400", ports=1)
    sut.stream(100)
    sut.run(19_600)
    stats = sut.statistics()
    assert stats["refreshes"] == 10
    assert stats["row_misses"] >= 50
    gaps = np.diff(sut.events(R)["cycle"].astype(np.int64))
    assert gaps.max() < 110
    sut = memory("kv260-2400")
    sut.stream(100)
    sut.run(19_600)
    assert np.diff(sut.events(R)["cycle"].astype(np.int64)).max() > 1
    assert memory("ideal").statistics()["refreshes"] == 0


def test_dram_turnarounds(memory):
    """Readers get more when results are written in pieces of 1 KiB instead of 64 bytes (9 % more on a board)."""

    def beats(piece: int) -> int:
        sut, data = memory("kv260-2133"), np.zeros(piece, np.uint8)
        sut.stream(200)
        for index in range(20_480 // piece):  # a byte in two cycles
            sut.write(4096 * index % (1 << 16), data)
            sut.run(2 * piece)
        return sum(len(sut.events(R, port)) for port in range(4))

    assert 1.05 < beats(1024) / beats(64) < 1.13


def _hostile_run(memory, seed: int) -> dict[tuple[int, int], np.ndarray]:
    sut = memory("hostile", seed=seed)
    sut.stream(60)
    for index in range(300):
        sut.write(4096 * (index % 16), np.zeros(256, np.uint8))
    sut.run(60_000)
    return {(kind, port): sut.events(kind, port)["cycle"].astype(np.int64) for kind in range(5) for port in range(4)}


def test_hostile_is_reproducible(memory):
    first, again, other = _hostile_run(memory, 5), _hostile_run(memory, 5), _hostile_run(memory, 6)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert all(not np.array_equal(first[key], other[key]) for key in first if len(first[key]))


def test_hostile_is_hostile(memory):
    runs = [_hostile_run(memory, seed) for seed in range(3)]
    for kind in range(5):
        # There are beats without a pause, with a short pause, and with a long pause.
        gaps = np.concatenate([np.diff(run[kind, port]) for run in runs for port in range(4)])
        assert gaps.min() == 1
        assert ((gaps > 1) & (gaps < 50)).any()
        assert gaps.max() >= (1500 if kind in (AR, R) else 50)
    # Ports overtake each other: no port is ahead all the time.
    counts = np.array(
        [[np.searchsorted(runs[0][R, port], cycle) for port in range(4)] for cycle in range(0, 60_000, 100)]
    )
    assert len(set(counts[counts.max(1) > 0].argmax(1).tolist())) >= 2
    sut = memory("hostile")
    latencies = []
    for index in range(200):
        sut.read(index % 4, 0, 1)
        sut.run(5000)
        events = sut.events(R, index % 4)["cycle"][-1] - sut.events(AR, index % 4)["cycle"][-1]
        latencies.append(int(events))
    assert min(latencies) < 30
    assert np.median(latencies) > 100


@pytest.mark.parametrize("preset", PRESETS)
def test_writes(memory, preset):
    """Strobes apply to each byte. B comes once per burst, in order, after the data of the burst."""
    sut, random = memory(preset), np.random.default_rng(1)
    expected = sut.bytes.copy()
    for index in range(40):
        beats = int(random.integers(1, 257))
        data, keep = random.integers(0, 256, 16 * beats, dtype=np.uint8), int(random.integers(1, 17))
        sut.write(4096 * index, data, (1 << keep) - 1)
        expected[4096 * index :][: 16 * beats - 16 + keep] = data[: 16 * beats - 16 + keep]
    sut.run(120_000)
    assert np.array_equal(sut.bytes, expected)
    answers, ends = sut.events(B), sut.events(W)
    assert len(answers) == 40
    assert (answers["cycle"] > ends["cycle"][ends["last"] == 1]).all()
    stats = sut.statistics()
    assert stats["write_bursts"] == 40
    assert stats["write_bytes"] > 0
    assert 0 < stats["shortest_write_burst"] < stats["longest_write_burst"] <= 4096


def test_map_refuses(memory, library):
    sut, page = memory(), np.zeros(4096, np.uint8)
    base, size = sut.BASE, sut.bytes.nbytes
    for address in (base, base - 1, base + size - 1, (1 << 40) - 4095, 1 << 40, 1 << 63):
        assert sut.map(address, page) == 1, hex(address)
    assert sut.map(base + size, page, 0) == 1
    for address in (base - 4096, base + size, (1 << 40) - 4096):
        assert sut.map(address, page) == 0, hex(address)
    assert library.shim_unmap(sut.handle, base + 1) == 1
    assert library.shim_unmap(sut.handle, base) == 0
    assert library.shim_unmap(sut.handle, base) == 1


def test_unmapped(memory, library):
    """A read beat without a mapping gives zeros and DECERR. A write gives DECERR, and its mapped bytes are written."""
    sut, size = memory(), 1 << 19
    sut.read(0, size - 32, 4)
    sut.read(0, 1 << 30, 1)
    sut.run(100)
    assert sut.events(R)["response"].tolist() == [OKAY, OKAY, DECERR, DECERR, DECERR]
    assert np.array_equal(sut.got(0)[:32], sut.bytes[-32:])
    assert not sut.got(0)[32:].any()
    data = np.arange(64, dtype=np.uint8)
    sut.write(size - 32, data)
    sut.write(size - 16, data[:32], 0)  # the beat outside has no strobes
    sut.run(100)
    assert sut.events(B)["response"].tolist() == [DECERR, OKAY]
    assert np.array_equal(sut.bytes[-32:], np.concatenate([data[:16], data[:16]]))
    # A buffer that is unmapped is gone at once, and a buffer that starts in the middle of a beat is found.
    half = np.arange(24, dtype=np.uint8)
    sut.map(sut.BASE + size, half[:8])
    sut.map(sut.BASE + size + 8, half[8:])
    sut.read(1, size, 2)
    sut.run(100)
    assert sut.events(R, 1)["response"].tolist() == [OKAY, DECERR]
    assert np.array_equal(sut.got(1), np.concatenate([half, np.zeros(8, np.uint8)]))
    library.shim_unmap(sut.handle, sut.BASE)
    sut.read(0, 0, 1)
    sut.run(100)
    assert sut.events(R)["response"][-1] == DECERR


@pytest.mark.parametrize("preset", PRESETS)
def test_error_faults(memory, preset):
    sut, before = memory(preset), None
    before = sut.bytes.copy()
    sut.fault(Fault.READ_ERROR, 4096 + 100, 1)
    sut.fault(Fault.WRITE_ERROR, 8191, 10)
    for offset in (4096 - 16, 4096 + 80, 4096 + 96, 4096 + 112):
        sut.read(0, offset, 1)
    for offset in (8176 - 16, 8176, 8192, 8208):
        sut.write(offset, ~before[offset : offset + 16])
    sut.run(20_000)
    assert sut.events(R)["response"].tolist() == [OKAY, OKAY, SLVERR, OKAY]
    assert sut.events(B)["response"].tolist() == [OKAY, SLVERR, SLVERR, OKAY]
    assert np.array_equal(np.flatnonzero(sut.bytes != before), [*range(8160, 8176), *range(8208, 8224)])
    sut.fault(Fault.NONE)
    sut.read(0, 4096, 8)
    sut.run(10_000)
    assert not sut.events(R)["response"][4:].any()


@pytest.mark.parametrize("preset", PRESETS)
def test_silence_faults(memory, preset):
    """A burst without an answer stops only its own port, and is answered when the faults are cleared."""
    sut = memory(preset)
    sut.fault(Fault.READ_SILENT, 4096, 16)
    sut.fault(Fault.WRITE_SILENT, 8192, 16)
    for offset in (0, 4096, 16384):
        sut.read(0, offset, 4)
        sut.read(1, offset + 64, 4)
        sut.write(2 * offset, sut.bytes[:64].copy())
    sut.run(20_000)
    assert len(sut.events(AR)) == 3
    assert len(sut.events(R)) == 4
    assert len(sut.events(R, 1)) == 12
    assert len(sut.events(W)) == 12
    assert len(sut.events(B)) == 1
    sut.fault(Fault.NONE)
    sut.run(20_000)
    assert len(sut.events(R)) == 12
    assert len(sut.events(B)) == 3
    assert not sut.events(R)["response"].any()


@pytest.mark.parametrize("preset", PRESETS)
def test_refusal_faults(memory, preset):
    sut = memory(preset)
    for kind in (Fault.READ_BLOCKED, Fault.WRITE_BLOCKED):
        sut.fault(kind)
    sut.stream(2)
    sut.write(0, np.zeros(64, np.uint8))
    sut.run(10_000)
    assert not any(len(sut.events(kind, port)) for kind in range(5) for port in range(4))
    sut.fault(Fault.NONE)
    sut.run(20_000)
    assert [len(sut.events(R, port)) for port in range(4)] == [512] * 4
    assert len(sut.events(B)) == 1


# One cycle each: channel, valid, ready, then the values of the channel. Ports of 16 bytes.
_AR = ("ar", True, True, 0x1000, 255, 4, 1, 0)
_AW = ("aw", True, True, 0x1000, 1, 4, 1, 0)
_NO_AR = ("ar", False, True, 0, 0, 0, 0, 0)


def _w(ready: bool = True, byte: int = 7, strobes: int = 0xFFFF, last: bool = False) -> tuple:
    return ("w", True, ready, byte, strobes, last)


def _address(
    channel: str, address: int = 0x1000, length: int = 255, size: int = 4, burst: int = 1, id: int = 0, *, ready=True
):
    return (channel, True, ready, address, length, size, burst, id)


@pytest.fixture
def problem(library: ctypes.CDLL):
    """The report of the checks for a list of cycles."""

    def run(cycles: list[tuple]) -> str:
        handle = library.protocol_open(16)
        for channel, *arguments in cycles:
            getattr(library, f"protocol_{channel}")(handle, *arguments)
            library.protocol_step(handle)
        text = library.protocol_problem(handle).decode()
        library.protocol_close(handle)
        return text

    return run


@pytest.mark.parametrize(
    "cycles",
    [
        [_AR, _AR, _NO_AR],
        [_address("ar", ready=False), _address("ar", ready=False), _AR, _NO_AR],
        [_address("ar", 0x1FF0, 0), _address("ar", (1 << 40) - 4096)],
        [_AW, _w(), _w(last=True), _AW, _w(), _w(last=True, strobes=0x000F)],
        [_AW, _AW, _w(), _w(last=True), _w(strobes=0xF000), _w(last=True, strobes=0x0FF0)],
        [_address("aw", length=0, ready=False), _w(False, last=True), _address("aw", length=0), _w(last=True)],
        [("r", True, False)] * 9 + [("r", True, True)],
    ],
)
def test_legal(problem, cycles):
    assert problem(cycles) == ""


@pytest.mark.parametrize(
    ("cycles", "said"),
    [
        ([_NO_AR, _address("ar", ready=False), _NO_AR], "cycle 2: port 0: ARVALID fell before {addr 0x1000, len 255"),
        ([_address("ar", ready=False), _address("ar", 0x2000)], "AR changed from {addr 0x1000"),
        ([_address("ar", ready=False), _address("ar", length=7)], "AR changed"),
        ([_address("ar", 0x1010)], "crosses a 4 KiB boundary"),
        ([_address("ar", 0x1008, 0)], "is not aligned to its beats"),
        ([_address("ar", size=3)], "has beats of another size"),
        (
            [_address("aw", burst=0)],
            "port 0: AW {addr 0x1000, len 255, size 4, burst 0, cache 3, prot 0, id 0} is not an INCR",
        ),
        ([_address("ar", id=1)], "has another ID"),
        ([_address("ar", 0, 256)], "has more than 256 beats"),
        ([_address("ar", 1 << 40, 0)], "ends beyond 40 bits"),
        ([_w()], "W without its AW"),
        ([_AW, _w(), _w(last=True), _w()], "cycle 3: port 0: W without its AW"),
        ([_AW, _w(last=True)], "WLAST is 1 with 2 beats"),
        ([_AW, _w(), _w()], "WLAST is 0 with 1 beats"),
        (
            [_address("aw", length=1, ready=False), _w(False, last=True), _address("aw", length=1), _w(last=True)],
            "WLAST is 1 with 2 beats",
        ),
        ([_AW, _w(False), _w(byte=8)], "W changed before it was taken"),
        ([_AW, _w(False), _w(strobes=0xFF)], "W changed"),
        ([_AW, _w(False), _w(last=True)], "W changed"),
        ([_AW, _w(False), ("w", False, True, 0, 0, False)], "WVALID fell"),
        ([("r", True, False)] * 100_001, "R was not taken for 100000 cycles"),
        ([("b", True, False)] * 100_001, "B was not taken for 100000 cycles"),
    ],
)
def test_broken_rule_is_reported(problem, cycles, said):
    assert said in problem(cycles)


def test_first_report_stays(problem):
    assert problem([_address("ar", 0x1008, 0), _address("ar", 0x1010)]).startswith("cycle 0: port 0: AR {addr 0x1008")


def test_faults_are_those_of_the_contract():
    """Each kind has the same name in C++. The numbers are macros that come from the same source."""
    pairs = re.findall(r"(\w+) = GM_FAULT_(\w+),", (DEVICE / "memory.h").read_text())
    assert [kind for _, kind in pairs] == [fault.name for fault in Fault]
    assert [name for name, _ in pairs[1:]] == [kind for _, kind in pairs[1:]]
    assert [f"-DGM_FAULT_{fault.name}={fault.value}" in DEFINES for fault in Fault] == [True] * len(Fault)
