# SPDX-License-Identifier: Apache-2.0
"""What only the simulated device has: cycles, stalls, a core that can get stuck, a library to be built and loaded."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import sw.devices.rtl as rtl
from hw.spec.layout import LayerLayout
from hw.spec.manifest import Field, Port
from hw.spec.numerics import Activations
from sw.devices import make_config
from sw.devices.base import DeviceError
from sw.devices.library import ALWAYS, build_library
from sw.devices.rtl import RtlDevice, activation_payload, gather_results, result_count
from sw.errors import UserError
from tests.sw.linears import expected, make_job, random_activations, random_linear, read_results, same_bits

CONFIG = make_config(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024)
STREAMS = ("command", "weights", "activations", "results")


@pytest.fixture(scope="module")
def files():
    return build_library(CONFIG)


def run(device, seed=1, count=8):
    """A batch of layers whose results are checked; cycles of each."""
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(count):
        linear = random_linear(rng, int(rng.integers(1, 60)), 200, 64, zero_point=device.config.zero_point)
        cases.append((linear, random_activations(rng, int(rng.integers(1, 17)), 200)))
    jobs = [make_job(device, *case) for case in cases]
    completions = device.wait(device.submit(jobs), 120)
    for job, case in zip(jobs, cases, strict=True):
        assert same_bits(read_results(device, job), expected(device.config, *case))
    return [item.cycles for item in completions]


def test_stalls_change_cycles_alone(files):
    with RtlDevice(CONFIG, files=files) as device:
        plain = run(device)
        assert run(device) == plain
    for stream in STREAMS:
        with RtlDevice(CONFIG, files=files, stalls={stream: 60_000}, seed=7) as device:
            assert sum(run(device)) > sum(plain)
    seeds = []
    for seed in range(3):
        with RtlDevice(CONFIG, files=files, stalls=dict.fromkeys(STREAMS, 30_000), seed=seed) as device:
            seeds.append(run(device))
    assert seeds[0] != seeds[1] != seeds[2]


def test_short_calls_change_nothing(files, monkeypatch):
    """The simulation stops between any two results and goes on in the very next cycle."""
    with RtlDevice(CONFIG, files=files) as device:
        plain = run(device)
        for cycles in (1, 50, 1000):
            monkeypatch.setattr(rtl, "CYCLES_AT_ONCE", cycles)
            assert run(device) == plain


@pytest.mark.parametrize("stream", STREAMS)
def test_stuck(files, stream):
    """The core waits for one stream for ever: the message says how far all have come."""
    with RtlDevice(CONFIG, files=files, stalls={stream: ALWAYS}, patience=500) as device:
        with pytest.raises(DeviceError) as refused:
            run(device, count=1)
        text = str(refused.value)
        assert text.startswith("layer layer: the core moved nothing for 500 cycles, and these streams still wait: ")
        assert f"{stream} 0 of " in text
        # It was reset: nothing of the stuck layer is left.
        device._stalls = {}
        assert run(device) == run(device)


def test_a_beat_every_cycle():
    """One token, the shape of Qwen2.5-0.5B's attention: the stream is the limit."""
    rng = np.random.default_rng(3)
    config = make_config(tile=16)
    with RtlDevice(config) as device:
        linear, x = random_linear(rng, 1152, 896, 128), random_activations(rng, 1, 896)
        job = make_job(device, linear, x)
        (alone,) = device.wait(device.submit([job]), 120)
        assert same_bits(read_results(device, job), expected(config, linear, x))
        assert alone.beats < alone.cycles <= 1.03 * alone.beats
        # Without a gap from layer to layer.
        many = device.wait(device.submit([job] * 4), 120)
        assert sum(item.cycles for item in many) <= 1.03 * 4 * alone.beats


def test_wrong_files(files, tmp_path):
    library, manifest = files
    other = make_config(tile=16)
    message = f"hardware of config {CONFIG.digest[:16]}, and {other.digest[:16]} is needed"
    with pytest.raises(DeviceError, match=message):
        RtlDevice(other, files=files)
    with pytest.raises(DeviceError, match="no manifest there"):
        RtlDevice(CONFIG, files=(library, tmp_path / "manifest.json"))
    values = json.loads(manifest.read_text())
    values["config"]["max_k"] = 512
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(values))
    with pytest.raises(DeviceError, match="the config does not match its digest"):
        RtlDevice(CONFIG, files=(library, changed))
    del values["streams"]["weights"]
    values["config"]["max_k"] = 1024
    changed.write_text(json.dumps(values))
    with pytest.raises(DeviceError, match="block core has no stream weights"):
        RtlDevice(CONFIG, files=(library, changed))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(DeviceError, match=r"broken\.so cannot be loaded"):
        RtlDevice(CONFIG, files=(broken, manifest))


def test_unknown_stream(files):
    with pytest.raises(UserError, match="no stream is named wights: the core has command, weights"):
        RtlDevice(CONFIG, files=files, stalls={"wights": 5})


def test_missing_compiler(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^the simulated device could not be built: .*g\+\+.*install Debian package g\+\+$"
    ):
        build_library(make_config(tile=8, max_tokens=3))
    assert capfd.readouterr().err == ""


def test_missing_builder(monkeypatch, tmp_path):
    """An installation of sw without sim, a board's for example."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named sim' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match=r"^the simulated device could not be built: No module named sim$"):
        build_library(CONFIG)


def test_builder_runs_anywhere(files, monkeypatch, tmp_path):
    """From any directory, and the second time from the cache."""
    monkeypatch.chdir(tmp_path)
    assert build_library(CONFIG) == files
    assert not list(tmp_path.iterdir())
    assert all(Path(path).is_absolute() for path in files)


@pytest.mark.parametrize("bits", range(8, 17))
def test_activation_payload(bits):
    """Every element lies where the manifest says, slice by slice, all tokens of a slice in a row."""
    config = make_config(tile=4, activation_bits=bits)
    rng = np.random.default_rng(bits)
    mantissas = rng.integers(-config.activation_max, config.activation_max + 1, (3, 12))
    exponents = np.array([-128, 5, 127])
    fields = {"mantissas": Field(0, 4 * bits, True, 4), "exponent": Field(4 * bits, 8, True)}
    port = Port("in", 4 * bits + 8, fields)
    payload = activation_payload(config, port, Activations(mantissas, exponents))
    words = [int.from_bytes(row.tobytes(), "little") for row in payload]
    assert len(words) == 9
    for index, word in enumerate(words):
        part, token = divmod(index, 3)
        for element in range(4):
            assert (word >> (element * bits)) % 2**bits == mantissas[token, 4 * part + element] % 2**bits
        assert word >> (4 * bits) == exponents[token] % 256


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 21, 24])
def test_gather_results(lanes, n):
    layout = LayerLayout(make_config(tile=8), 32, n, 32)
    y = np.random.default_rng(n).integers(0, 1 << 32, (3, n), np.uint32)
    transfers = []
    for tile in range(0, n, 8):
        for token in range(3):
            columns = y[token, tile : min(tile + 8, n)]
            for first in range(0, len(columns), lanes):
                part = columns[first : first + lanes]
                transfers.append(np.pad(part, (0, lanes - len(part))))
    assert len(transfers) == result_count(layout, 3, lanes)
    assert same_bits(gather_results(layout, 3, np.array(transfers)), y.view(np.float32))
