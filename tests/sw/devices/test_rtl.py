# SPDX-License-Identifier: Apache-2.0
"""Properties of the simulated device only: cycles, a choice of memories, a library that is built and loaded."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw.spec.manifest import Manifest
from sw.common.errors import UserError
from sw.devices import library, make_config
from sw.devices.base import DeviceError
from sw.devices.library import MEMORIES, build_library
from sw.devices.pack import prepare
from sw.devices.rtl import RtlDevice
from tests.sw.fixtures.linears import TIMEOUT, free_jobs, make_job, random_activations, random_linear, run_exactly

pytestmark = pytest.mark.simulator

CONFIG = make_config(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024)


@pytest.fixture(scope="module")
def files():
    return build_library(CONFIG)


def cases(count=8):
    rng = np.random.default_rng(1)
    linears = [random_linear(rng, int(rng.integers(1, 60)), 200, 64, zero_point="fixed") for _ in range(count)]
    return [(linear, random_activations(rng, int(rng.integers(1, 17)), 200)) for linear in linears]


def run(files, memory, seed=1):
    """Cycles of each layer of a batch; the results are checked to be exact."""
    with RtlDevice(CONFIG, files=files, memory=memory, seed=seed) as device:
        return [item.cycles for item in run_exactly(device, cases())]


def test_memories(files):
    """The memory changes only cycles: a slower one takes more, and every run takes the same number."""
    cycles = {memory: run(files, memory) for memory in MEMORIES}
    assert sum(cycles["ideal"]) < sum(cycles["kv260-2400"]) < sum(cycles["hostile"])
    assert cycles["kv260-2400"] != cycles["kv260-2133"]
    for memory in ("ideal", "kv260-2400"):
        assert run(files, memory) == cycles[memory]


def test_seeds(files):
    """The hostile memory behaves the same for the same seed, and differently for every other."""
    cycles = [run(files, "hostile", seed) for seed in (1, 2, 3)]
    assert len({tuple(item) for item in cycles}) == 3
    assert run(files, "hostile", 2) == cycles[1]


def test_short_waits_change_nothing(files, monkeypatch):
    """The simulation can stop in any cycle, and continues with the next one. Only polling takes cycles of its own."""
    plain = run(files, "ideal")
    monkeypatch.setattr(library, "CYCLES_AT_ONCE", 100)
    assert run(files, "ideal") == pytest.approx(plain, abs=20)


def test_counters_and_statistics(files):
    """The counts of reads, writes and beats are exactly those that the layers need."""
    with RtlDevice(CONFIG, files=files, memory="ideal") as device:
        completions = run_exactly(device, cases())
        statistics, counters = device.platform.statistics(), device.counters()
        bus_bytes = CONFIG.ports * CONFIG.port_width // 8
        beats = sum(item.beats for item in completions)
        assert counters["beats"] == beats
        activations = sum(4 * prepare(CONFIG, linear).layout.k * len(x) for linear, x in cases())
        assert statistics.read_bytes == beats * bus_bytes + activations
        assert statistics.write_bytes == sum(4 * linear.n * len(x) for linear, x in cases())
        assert sum(statistics.port_read_beats) * CONFIG.port_width // 8 == statistics.read_bytes
        assert counters["busy"] >= sum(item.cycles for item in completions)
        starved = sum(value for name, value in counters.items() if name.startswith("starved"))
        assert 0 < starved < counters["busy"]
        assert device.platform.memory_limit(10_000) == pytest.approx(bus_bytes, rel=0.01)


def test_prepared_batches_take_no_memory(files):
    """Hardware without the vector unit runs no programs: the descriptors of a prepared batch are pushed."""
    with RtlDevice(CONFIG, files=files, memory="ideal") as device:
        jobs = [make_job(device, *case) for case in cases(3)]
        buffers = dict(device.memory._sizes)
        batch = device.prepare(jobs)
        assert device.memory._sizes == buffers and batch.code.program is None
        assert [item.name for item in device.wait(device.submit(batch), TIMEOUT)] == [job.name for job in jobs]


def test_a_beat_every_cycle():
    """One token, with the shape of Qwen2.5-0.5B's attention: the stream is the limit, with no gap between layers."""
    rng = np.random.default_rng(3)
    with RtlDevice(make_config(tile=16), memory="ideal") as device:
        linear, x = random_linear(rng, 1152, 896, 128), random_activations(rng, 1, 896)
        (alone,) = run_exactly(device, [(linear, x)])
        assert alone.beats == 8_424 < alone.cycles <= 1.04 * alone.beats
        # Three layers are in flight: while one drains, the next computes, and the one after it is fetched. What a
        # layer takes on the bus besides its beats is its activations, in chunks of 32 beats on four ports.
        jobs = [make_job(device, linear, x) for _ in range(2)]
        first, *others = device.wait(device.submit(jobs * 4), TIMEOUT)
        share = 4 * 896 // 64
        # Its weights also wait for the activations of the two layers behind it.
        assert first.cycles <= alone.cycles + 3 * share
        assert all(item.beats <= item.cycles <= item.beats + 64 for item in others)
        assert sum(item.cycles for item in others) <= sum(item.beats for item in others) + len(others) * share
        # Without activations a layer takes only its beats.
        again = replace(jobs[1], activations=jobs[0].activations, reuse=True)
        first, *others = device.wait(device.submit([jobs[0], *[again] * 5]), TIMEOUT)
        assert [item.cycles for item in others] == [item.beats for item in others]
        free_jobs(device, *jobs)


def test_small_layers_overlap():
    """Layers that end before their first results leave: several of them are in flight at the same time."""
    rng = np.random.default_rng(4)
    with RtlDevice(make_config(tile=16), memory="ideal") as device:
        linear, x = random_linear(rng, 64, 896, 128), random_activations(rng, 1, 896)
        (alone,) = run_exactly(device, [(linear, x)])
        jobs = [make_job(device, linear, x) for _ in range(2)]
        _, *others = device.wait(device.submit(jobs * 10), TIMEOUT)
        assert sum(item.cycles for item in others) <= 1.15 * sum(item.beats for item in others)
        assert alone.cycles > 1.4 * alone.beats
        free_jobs(device, *jobs)


def test_wrong_files(files, tmp_path):
    library, manifest = files
    other = make_config(tile=16)
    message = f"hardware of config {CONFIG.digest[:16]}, and {other.digest[:16]} is needed"
    with pytest.raises(DeviceError, match=message):
        RtlDevice(other, files=files)
    with pytest.raises(DeviceError, match="no manifest there"):
        RtlDevice(CONFIG, files=(library, tmp_path / "manifest.json"))
    values = json.loads(manifest.read_text())
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({**values, "config": {**values["config"], "max_k": 512}}))
    with pytest.raises(DeviceError, match="the config does not match its digest"):
        RtlDevice(CONFIG, files=(library, changed))
    changed.write_text(json.dumps({**values, "block": "core"}))
    assert Manifest.load(changed).config == CONFIG
    with pytest.raises(DeviceError, match="block core is not the whole accelerator"):
        RtlDevice(CONFIG, files=(library, changed))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(DeviceError, match=r"broken\.so cannot be loaded"):
        RtlDevice(CONFIG, files=(broken, manifest))


def test_unknown_memory(files):
    """It is detected before anything is built."""
    with pytest.raises(UserError, match=r"^memory is one of ideal, kv260-2400, kv260-2133, hostile, not ddr5$"):
        RtlDevice(make_config(tile=32, max_tokens=7), memory="ddr5")


def test_registers_out_of_range(files):
    with RtlDevice(CONFIG, files=files) as device:
        with pytest.raises(DeviceError, match=r"answered with error 3 when register 0x200 was read$"):
            device.platform.read_register(0x200)
        with pytest.raises(DeviceError, match=r"answered with error 3 when register 0x1000 was written$"):
            device.platform.write_register(0x1000, 1)
    with pytest.raises(DeviceError, match=r"^the simulated accelerator is closed$"):
        device.platform.read_register(0)


def test_missing_compiler(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^the simulated device could not be built: .*g\+\+.*install Debian package g\+\+$"
    ):
        build_library(make_config(tile=8, max_tokens=3))
    assert capfd.readouterr().err == ""


def test_missing_builder(monkeypatch, tmp_path):
    """An installation of sw without sim, for example on a board."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named sim' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match=r"^the simulated device could not be built: No module named sim$"):
        build_library(CONFIG)


def test_builder_runs_anywhere(files, monkeypatch, tmp_path):
    """It runs in any directory, and takes the library from the cache the second time."""
    monkeypatch.chdir(tmp_path)
    assert build_library(CONFIG) == files
    assert not list(tmp_path.iterdir())
    assert all(Path(path).is_absolute() for path in files)
