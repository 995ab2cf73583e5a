# SPDX-License-Identifier: Apache-2.0
"""The parts of the board's driver that other devices do not have: files, locks, caches, interrupts, messages."""

import argparse
import os
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hw.spec import kv260 as board
from hw.spec.control.registers import offset
from hw.spec.manifest import Manifest
from sw.common.errors import UserError
from sw.console import options as hardware_options
from sw.devices import kv260, make_config, open_device
from sw.devices.base import Buffer, DeviceError, read_results, view_results
from sw.devices.host import Host
from sw.devices.kv260 import FIRMWARE, WAIT_SECONDS, KV260Device, KV260Platform
from sw.devices.udmabuf import LINE, _merge
from sw.runtime.hardware import LayerShape, choose_config
from tests.sw.fixtures.fake_board import ADDRESS, BUFFER, SIZE, UIO, FakeBoard
from tests.sw.fixtures.linears import (
    TIMEOUT,
    expected,
    free_jobs,
    make_job,
    random_activations,
    random_linear,
    run_exactly,
)
from tests.sw.fixtures.linears import same_bits as equal

pytestmark = pytest.mark.simulator

CONFIG = make_config(tile=4, ports=1, max_k=1024, max_tokens=5)


@pytest.fixture
def fake(tmp_path):
    with closing(FakeBoard(tmp_path / "board", CONFIG)) as made:
        yield made


def case(seed=1, n=37, k=320, tokens=3):
    rng = np.random.default_rng(seed)
    return random_linear(rng, n, k, 32), random_activations(rng, tokens, k)


def test_interrupt(fake, monkeypatch):
    """The driver waits for the interrupt if a layer takes longer than the time of polling."""
    monkeypatch.setattr(kv260, "SPIN_SECONDS", 0)
    with KV260Device(host=fake) as device:
        for count in (1, 2, 3):
            run_exactly(device, [case()])
            assert fake.interrupts == count
        assert not device.platform.polls and device.seconds > 0
        # Nothing runs: the interrupt is low, and one wait is short.
        start = time.monotonic()
        assert not device.platform.wait_interrupt()
        assert WAIT_SECONDS / 2 < time.monotonic() - start < 20 * WAIT_SECONDS


@pytest.mark.parametrize("fault", ["has_interrupt", "interrupt_arrives"])
def test_no_interrupt(fake, fault, monkeypatch):
    """If there is no interrupt, or it never comes, the driver polls the registers."""
    monkeypatch.setattr(kv260, "SPIN_SECONDS", 0)
    setattr(fake, fault, False)
    with KV260Device(host=fake) as device:
        for _ in range(2):
            run_exactly(device, [case()])
        assert device.platform.polls
        assert not device.platform.wait_interrupt()
    assert not fake.interrupts


def test_registers_through_mem(fake, monkeypatch):
    fake.remove(UIO)
    with KV260Device(host=fake, registers="mem") as device:
        run_exactly(device, [case()])
    monkeypatch.setenv("GRISTMILL_REGISTERS", "mem")
    with KV260Device(host=fake) as device:
        assert device.platform.uio is None
    monkeypatch.setenv("GRISTMILL_REGISTERS", "magic")
    with pytest.raises(DeviceError, match=r"^registers are reached through uio or mem, not magic$"):
        KV260Device(host=fake)


def test_one_process_at_a_time(fake):
    """Neither this process nor another one can open the board twice; after closing it can be opened again."""
    name = fake.path(f"/dev/{board.BUFFER_NAME}")
    lock = f"import fcntl; fcntl.flock(open({str(name)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def other_process():
        return subprocess.run([sys.executable, "-c", lock], stderr=subprocess.DEVNULL, check=False).returncode

    message = rf"^another process uses the accelerator; fuser -v /dev/{board.BUFFER_NAME} says which one$"
    with KV260Device(host=fake) as device:
        kept = device.view(device.alloc(10))
        assert other_process() == 1
        with pytest.raises(DeviceError, match=message):
            KV260Device(host=fake)
        run_exactly(device, [case()])
    # This holds even while there is a view of the memory.
    assert other_process() == 0
    kept[:] = 1
    with KV260Device(host=fake) as device:
        run_exactly(device, [case()])


def test_closed(fake):
    device = KV260Device(host=fake)
    device.close()
    device.close()
    for use in (lambda: device.alloc(1), device.counters, lambda: device.platform.write_register(0, 0)):
        with pytest.raises(DeviceError, match=r"is closed$"):
            use()


def open_files(fake):
    """Descriptors of this board's files. Others come and go: those of earlier tests, and of onnxruntime's threads."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, as the one of this loop
            found[entry.name] = entry.readlink()
    return {name: path for name, path in found.items() if path.is_relative_to(fake.root)}


def test_nothing_stays_open(fake):
    """No file is open after closing, nor after a failure, early or late."""
    before = open_files(fake)
    # Whoever still has the closed device.
    with KV260Device(host=fake) as device:
        # The buffer, its mapping, its two attributes, and the registers.
        assert len(open_files(fake)) == len(before) + 5
    assert open_files(fake) == before
    assert not len(device.memory.memory)
    for plant in (lambda: fake.overrides.update({offset("version"): 99}), lambda: fake.remove(UIO)):
        plant()
        with pytest.raises(DeviceError):
            KV260Device(host=fake)
        assert open_files(fake) == before


def test_views(fake):
    """Activations and results without a copy: caches are cleaned by submit and invalidated by wait."""
    linear, x = case(tokens=2)
    with KV260Device(host=fake) as device:
        job = make_job(device, linear, x)
        batch = device.prepare([job])
        for seed in (3, 4):
            x = random_activations(np.random.default_rng(seed), 2, linear.k)
            device.view(job.activations).view(np.float32).reshape(2, -1)[:, : linear.k] = x
            device.wait(device.submit(batch), TIMEOUT)
            assert equal(np.ascontiguousarray(view_results(device, job)), expected(CONFIG, linear, x))


def test_caches(fake):
    """A batch cleans and invalidates the caches over its own operands and results, and no other data is lost."""
    cases = [case(seed, n=5, tokens=1) for seed in (5, 6)]
    with KV260Device(host=fake) as device:
        jobs = [make_job(device, *item) for item in cases]
        neighbour = device.alloc(100)
        fake.commands.clear()
        ticket = device.submit(jobs)
        # These writes are only in the caches while the accelerator runs.
        device.view(neighbour)[:] = 7
        device.view(jobs[0].activations)[:] = 9
        device.wait(ticket, TIMEOUT)
        for job, item in zip(jobs, cases):
            assert equal(read_results(device, job), expected(CONFIG, *item))
        assert (device.view(neighbour) == 7).all() and (device.view(jobs[0].activations) == 9).all()
        invalidated = [(start, size) for name, start, size, _ in fake.commands if name == "sync_for_cpu"]
        assert invalidated == [(job.results.address - ADDRESS, job.results.size) for job in jobs]
        assert [name for name, *_ in fake.commands] == ["sync_for_device", "sync_for_cpu", "sync_for_cpu"]
        # The results' caches too: otherwise older data in them could overwrite results in memory.
        (_, start, size, _), *_ = fake.commands
        for job in jobs:
            for buffer in (job.activations, job.results):
                assert start <= buffer.address - ADDRESS < buffer.address - ADDRESS + buffer.size <= start + size


def test_later_batches_clean_what_was_viewed(fake):
    """The first batch cleans the caches over everything; later ones only over what the processor may have written."""
    linear, x = case(tokens=2)
    with KV260Device(host=fake) as device:
        job = make_job(device, linear, x)
        batch = device.prepare([job])

        def cleaned() -> list[tuple[int, int]]:
            fake.commands.clear()
            device.wait(device.submit(batch), TIMEOUT)
            assert equal(
                device.read(job.results, np.float32, (2, job.pitch // 4))[:, : linear.n], expected(CONFIG, linear, x)
            )
            return [(start, size) for name, start, size, _ in fake.commands if name == "sync_for_device"]

        def covers(commands: list[tuple[int, int]], buffer: Buffer) -> bool:
            first = buffer.address - ADDRESS
            return any(start <= first and first + buffer.size <= start + size for start, size in commands)

        first = cleaned()
        assert covers(first, job.activations) and covers(first, job.results)
        assert cleaned() == []
        for seed in (3, 4):
            x = random_activations(np.random.default_rng(seed), 2, linear.k)
            device.view(job.activations).view(np.float32).reshape(2, -1)[:, : linear.k] = x
            later = cleaned()
            assert covers(later, job.activations) and not covers(later, job.results)
        x = random_activations(np.random.default_rng(5), 2, linear.k)
        device.write(job.activations, x)
        device.view(job.results)
        assert covers(cleaned(), job.results)


def test_the_fake_board_has_caches(fake):
    """Without the kernel's syncs the results are wrong: so the tests find a missing sync."""
    fake.syncs = False
    with KV260Device(host=fake) as device:
        job = make_job(device, *case())
        try:
            device.wait(device.submit([job]), TIMEOUT)
        except DeviceError:
            return
        assert not equal(read_results(device, job), expected(CONFIG, *case()))


@pytest.mark.parametrize("near", [0, 100, 5000])
def test_merged_ranges(near):
    """All requested lines, as whole lines, ascending and disjoint; for near 0 no other line."""
    rng = np.random.default_rng(near)
    for _ in range(50):
        starts = rng.integers(0, 200, 8) * LINE
        ranges = [(int(start), int(size)) for start, size in zip(starts, rng.integers(1, 1000, 8))]
        merged = _merge(ranges, near)
        wanted = {line for start, size in ranges for line in range(start // LINE, -(-(start + size) // LINE))}
        found = [line for start, end in merged for line in range(start // LINE, end // LINE)]
        assert wanted <= set(found) and len(set(found)) == len(found)
        assert near or wanted == set(found)
        assert all(after[0] - before[1] > near for before, after in pairwise(merged))


FAULTS = {
    "no buffer": (
        lambda fake: fake.remove(BUFFER),
        "^there is no buffer udmabuf-gristmill: load the app",
    ),
    "no UIO": (lambda fake: fake.remove(UIO), "^there is no UIO device gristmill: load the app: sudo xmutil"),
    "no address": (lambda fake: fake.put(f"{BUFFER}/phys_addr", "?"), "has no phys_addr and size$"),
    "no size": (lambda fake: fake.remove(f"{BUFFER}/size"), "has no phys_addr and size$"),
    "not aligned": (lambda fake: fake.put(f"{BUFFER}/phys_addr", "0x10000800"), "0x10000800 is no multiple of 4096$"),
    "beyond": (lambda fake: fake.put(f"{BUFFER}/phys_addr", "0xfffff00000"), "beyond what a descriptor addresses"),
    "empty": (lambda fake: fake.put(f"{BUFFER}/size", "0"), "it has 0 bytes, and 4,096 to 4,294,967,296 can be"),
    "larger than it is": (lambda fake: fake.put(f"{BUFFER}/size", str(2 * SIZE)), "cannot be mapped"),
    "coherent": (
        lambda fake: fake.put(f"{BUFFER}/dma_coherent", "1"),
        "says dma-coherent, and the accelerator",
    ),
    "damaged map": (lambda fake: fake.put(f"{UIO}/maps/map0/size", "big"), "maps/map0 has no address and size$"),
    "small map": (
        lambda fake: fake.put(f"{UIO}/maps/map0/size", "0x100"),
        "maps 256 bytes, and the registers take 512",
    ),
    "no device": (lambda fake: fake.remove("/dev/uio4"), "^/dev/uio4 is not there: load the app again$"),
    "no manifest": (
        lambda fake: fake.remove(f"{FIRMWARE}/manifest.json"),
        "copy that of the bitstream there, or",
    ),
    "damaged manifest": (
        lambda fake: fake.put(f"{FIRMWARE}/manifest.json", "{"),
        "not a manifest .JSONDecodeError.",
    ),
    "may not": (lambda fake: fake.denied.add("/dev/uio4"), "^/dev/uio4: permission denied; run it with sudo"),
    "may not sync": (
        lambda fake: fake.denied.add(f"{BUFFER}/sync_for_cpu"),
        "sync_for_cpu: permission denied; run it with sudo, or: sudo chmod a[+]rw /sys",
    ),
    "other hardware": (
        lambda fake: fake.overrides.__setitem__(offset("config_digest"), 5),
        "^the accelerator was built from config 00000005, and [0-9a-f]{8} is needed$",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fake, fault):
    """The error is one line with the fix; the lock is released."""
    plant, message = FAULTS[fault]
    plant(fake)
    with pytest.raises(DeviceError, match=message) as failed:
        KV260Device(host=fake)
    assert "\n" not in str(failed.value)


def test_other_names(fake):
    """Older kernels put the address before a UIO device's name, and in an older module the class has another name."""
    fake.put(f"{UIO}/name", f"a0000000.{board.UIO_NAME}\n")
    fake.put("/sys/class/uio/uio0/name", "axi-pmon\n")
    fake.path("/sys/class/u-dma-buf").rename(fake.path("/sys/class/udmabuf"))
    with KV260Device(host=fake) as device:
        run_exactly(device, [case()])


def test_sync_that_fails(fake, monkeypatch):
    with KV260Device(host=fake) as device:
        job = make_job(device, *case())
        monkeypatch.setattr("tests.sw.fixtures.fake_board.SIZE", 4096)
        with pytest.raises(DeviceError, match=r"/sync_for_device failed \(Invalid argument\)$"):
            device.wait(device.submit([job]), TIMEOUT)
        monkeypatch.undo()
        free_jobs(device, job)
        run_exactly(device, [case()])


def test_open_device(fake, monkeypatch, tmp_path):
    """The manifest gives the hardware's config; options that contradict it are refused."""
    monkeypatch.setattr(kv260, "Host", lambda: fake)
    with open_device("kv260") as device:
        assert device.config == CONFIG and device.name == "kv260"
    with open_device("kv260", CONFIG) as device:
        run_exactly(device, [case()])
    with pytest.raises(UserError, match=r"^the board's hardware has tile 4, and 16 is asked for$"):
        open_device("kv260", make_config())
    path = tmp_path / "other.json"
    text = fake.path(f"{FIRMWARE}/manifest.json").read_text()
    path.write_text(text.replace('"block": "accelerator"', '"block": "core"'))
    monkeypatch.setenv("GRISTMILL_MANIFEST", str(path))
    with pytest.raises(UserError, match=r"other\.json: block core is not the whole accelerator$"):
        open_device("kv260")
    fake.path(f"{FIRMWARE}/manifest.json").rename(path)
    with open_device("kv260") as device:
        assert device.config == Manifest.load(path).config


def parse(*arguments):
    parser = hardware_options.Parser()
    hardware_options.add_device_options(parser, "")
    hardware_options.add_hardware_options(parser, max_tokens=7)
    return parser.parse_args(arguments)


def test_hardware_options(fake, monkeypatch):
    """With the board's device the hardware options are the board's; an option that contradicts them is refused."""
    monkeypatch.setattr(kv260, "Host", lambda: fake)
    values, config = hardware_options.hardware_options(parse("--device", "kv260"))
    assert config == CONFIG and values == CONFIG.to_dict()
    for same in (["--tile", "4"], ["--weight-bits", "auto"], ["--tile=4", "--max-tokens=5"]):
        assert hardware_options.hardware_options(parse("--device", "reference,kv260", *same))[1] == CONFIG
    long = LayerShape("down", 8960, 32, 128, 4, np.zeros(1), False)
    message = r"^layer down: K is at most max_k \(1,024\), not 8,960; hardware built with --max-k 8960 takes it$"
    with pytest.raises(UserError, match=message):
        choose_config([long], values)
    with pytest.raises(UserError, match=r"^the board's hardware has max_tokens 5, and 7 is asked for$"):
        hardware_options.hardware_options(parse("--device", "kv260", "--tile=4", "--max-tokens=7"))
    # With another device the board is not accessed.
    monkeypatch.setattr(kv260, "Host", lambda: pytest.fail("a board was looked for"))
    assert hardware_options.hardware_options(parse("--device", "reference"))[1].max_tokens == 7
    host = ["--operators", "host"]
    for options, lanes in (([], 4), (["--operators", "linear"], 2), (host, 2), (["--lanes", "8"], 8)):
        values, config = hardware_options.hardware_options(parse("--device", "reference", "--tile", "32", *options))
        assert config.lanes == choose_config([], values | dict(weight_bits=4, max_k=1024)).lanes == lanes
    assert isinstance(parse("--device", "rtl"), argparse.Namespace)


@pytest.mark.parametrize("config", [CONFIG, make_config(operators="decoder", score_words=1024)])
def test_host_on_a_board(config, monkeypatch):
    """With --operators host a board keeps its hardware, whatever it is, and the linear layers alone run on it."""
    monkeypatch.setattr(hardware_options, "board_config", lambda: config)
    chosen = hardware_options.chosen_devices(parse("--device", "kv260", "--operators", "host"), ["kv260"])
    assert chosen.host and chosen.known == config and chosen.hardware == config.to_dict()
    assert not hardware_options.chosen_devices(parse("--device", "kv260"), ["kv260"]).host
    other = "linear" if config.has_vector_unit else "decoder"
    with pytest.raises(UserError, match=rf"^the board's hardware has operators \w+, and {other} is asked for$"):
        hardware_options.chosen_devices(parse("--device", "kv260", "--operators", other), ["kv260"])


def test_real_files(tmp_path):
    """Real files of this machine: registers are little-endian words of the mapped file; messages name missing files."""
    path = tmp_path / "registers"
    path.write_bytes(bytes(range(32)) + bytes(4064))
    host = Host(tmp_path)
    fd = host.open("/registers", os.O_RDWR, "")
    try:
        window = host.map_registers(fd, 4096)
        assert window[1] == 0x07060504
        window[2] = 0xFFFF_FFFE
        assert path.read_bytes()[4:16] == bytes([4, 5, 6, 7, 0xFE, 0xFF, 0xFF, 0xFF, 12, 13, 14, 15])
        window.release()
        with pytest.raises(DeviceError, match=r"^1,048,576 bytes of a device cannot be mapped"):
            host.map(fd, 1 << 20)
    finally:
        os.close(fd)
    with pytest.raises(DeviceError, match=r"^/dev/x is not there: make it$"):
        host.open("/dev/x", os.O_RDONLY, "make it")
    with pytest.raises(DeviceError, match=r"^/dev/x is not there"):
        Host(Path(tmp_path)).open("/dev/x", os.O_RDWR, "make it")
    with pytest.raises(DeviceError, match="there is no buffer"):
        KV260Platform(host)
