# SPDX-License-Identifier: Apache-2.0
"""One suite for every device: exact results from the same memory, whatever the shapes, and clear refusals."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sw.devices import make_config, open_device
from sw.devices.base import PAGE, Buffer, DeviceError, image_beats, region_bytes, weight_bytes, weight_image
from sw.devices.reference import ReferenceDevice
from sw.devices.simulated import Memory
from sw.errors import UserError
from sw.pack import prepare
from tests.sw.linears import (
    expected,
    free_job,
    make_job,
    random_activations,
    random_linear,
    read_results,
    same_bits,
)

TIMEOUT = 120
CONFIGS = {
    "tile4": dict(tile=4, ports=1, max_k=1024, max_tokens=5),
    "tile8": dict(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024),
    "tile16": dict(tile=16),
}
# As many lanes of results as no smaller array has; a long build.
FULL = {"tile32": dict(tile=32, zero_point="fixed")}
SHAPES = [
    # n, k, group_size
    (37, 320, 32),
    (40, 320, 64),
    (16, 640, 128),
    (9, 352, 128),  # a short last group
    (7, 256, 256),  # one group over all of K
    (5, 300, 512),  # K is padded
    (1, 8, 32),
]
CASES = [pytest.param(("reference", "tile8"), id="reference")]
CASES += [pytest.param(("rtl", name), id=f"rtl {name}") for name in CONFIGS]
CASES += [pytest.param(("rtl", name), id=f"rtl {name}", marks=pytest.mark.full) for name in FULL]


@pytest.fixture(scope="module", params=CASES)
def device(request):
    backend, config = request.param
    with open_device(backend, **(CONFIGS | FULL)[config]) as opened:
        yield opened


def layer(device, rng, n, k, group_size, **options):
    return random_linear(rng, n, k, group_size, zero_point=device.config.zero_point, **options)


def check(device, cases, reuse=()):
    """Runs (linear, x) as one batch, compares all results, returns the completions."""
    jobs = []
    for index, (linear, x) in enumerate(cases):
        jobs.append(make_job(device, linear, x, jobs[-1] if index in reuse else None))
    completions = device.wait(device.submit(jobs), TIMEOUT)
    for job, (linear, x) in zip(jobs, cases, strict=True):
        y = read_results(device, job)
        assert same_bits(y, expected(device.config, linear, x)), f"{linear.name} {linear.q.shape} M {len(x)}"
    assert [item.name for item in completions] == [linear.name for linear, _ in cases]
    assert [item.beats for item in completions] == [job.layout.beats for job in jobs]
    for buffer in {buffer for job in jobs for buffer in (job.weights, job.activations, job.results)}:
        device.free(buffer)
    return completions


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(device, shape):
    rng = np.random.default_rng(1)
    for tokens in (1, 2, 5):
        (completion,) = check(device, [(layer(device, rng, *shape), random_activations(rng, tokens, shape[1]))])
        assert (completion.cycles > 0) == (device.name == "rtl")


def test_every_m_in_one_batch(device):
    rng = np.random.default_rng(2)
    counts = range(1, device.config.max_tokens + 1)
    check(device, [(layer(device, rng, 11, 96, 32), random_activations(rng, m, 96)) for m in counts])


def test_batch_of_different_shapes(device):
    rng = np.random.default_rng(3)
    cases = []
    for index in range(30):
        k, tokens = int(rng.choice([32, 64, 100, 320])), int(rng.integers(1, device.config.max_tokens + 1))
        linear = layer(device, rng, int(rng.integers(1, 70)), k, int(rng.choice([32, 64, 512])), name=f"layer {index}")
        cases.append((linear, random_activations(rng, tokens, k)))
    completions = check(device, cases)
    if device.name == "rtl":
        # The next layer streams while this one drains, so none takes as long as it would alone.
        apart = [check(device, [case])[0].cycles for case in cases]
        together = [item.cycles for item in completions]
        assert sum(together) < sum(apart)
        assert together[0] == apart[0]


def test_reuse(device):
    rng = np.random.default_rng(4)
    first, second = random_activations(rng, 3, 320), random_activations(rng, 5, 320)
    cases = [(layer(device, rng, n, 320, 64), x) for n, x in ((20, first), (33, first), (8, second), (40, second))]
    check(device, cases, reuse={1, 3})


def test_fewer_bits_than_the_hardware(device):
    rng = np.random.default_rng(5)
    check(device, [(layer(device, rng, 20, 64, 32, bits=2), random_activations(rng, 2, 64))])


def test_zero_tokens_and_rows(device):
    """Zeros give +0, not -0, and leave their neighbours alone."""
    rng = np.random.default_rng(6)
    linear, x = layer(device, rng, 10, 64, 32), random_activations(rng, 3, 64)
    x[1] = 0
    job = make_job(device, linear, x)
    device.wait(device.submit([job]), TIMEOUT)
    y = read_results(device, job)
    assert same_bits(y[1], np.zeros(10, np.float32))
    assert same_bits(y[:, 5], np.zeros(3, np.float32))
    assert np.count_nonzero(y) == 2 * 9
    free_job(device, job)


def test_overflow_is_infinite(device):
    """Too large for float32: infinity with the right sign, in one row only."""
    rng = np.random.default_rng(7)
    linear = layer(device, rng, 6, 64, 32)
    scales = linear.scales.copy()
    scales[2] = 1e30
    linear, x = replace(linear, scales=scales), np.full((2, 64), 1e20, np.float32)
    x[1] = 1
    check(device, [(linear, x)])
    assert np.isinf(expected(device.config, linear, x)[0, 2])


def test_two_batches_in_flight(device):
    """Answered in the other order; each ticket is good once."""
    rng = np.random.default_rng(8)
    cases = [(layer(device, rng, 12, 64, 32), random_activations(rng, 2, 64)) for _ in range(2)]
    jobs = [make_job(device, *case) for case in cases]
    tickets = [device.submit([job]) for job in jobs]
    for index in (1, 0):
        device.wait(tickets[index], TIMEOUT)
        assert same_bits(read_results(device, jobs[index]), expected(device.config, *cases[index]))
        with pytest.raises(DeviceError, match=f"no batch has ticket {tickets[index]}, or its answer was taken already"):
            device.wait(tickets[index], TIMEOUT)
    for job in jobs:
        free_job(device, job)


def test_timeout(device):
    """It says what it waited for, and the batch goes on."""
    rng = np.random.default_rng(9)
    linear, x = layer(device, rng, 400, 1000, 64, name="/model/q_proj"), random_activations(rng, 5, 1000)
    job = make_job(device, linear, x)
    ticket = device.submit([job] * 10)
    message = (
        rf"^device {device.name}: batch {ticket} took longer than 0.001 s,"
        r" \d of 10 jobs are done, waiting for the results of layer /model/q_proj$"
    )
    with pytest.raises(DeviceError, match=message):
        device.wait(ticket, 0.001)
    assert len(device.wait(ticket, TIMEOUT)) == 10
    assert same_bits(read_results(device, job), expected(device.config, linear, x))
    free_job(device, job)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite(device, value):
    """Refused with the layer's name, and the batch does not run."""
    rng = np.random.default_rng(10)
    x = random_activations(rng, 2, 64)
    good = make_job(device, layer(device, rng, 4, 64, 32), x)
    x = x.copy()
    x[1, 3] = value
    bad = make_job(device, layer(device, rng, 4, 64, 32, name="/model/down_proj"), x)
    message = f"^layer /model/down_proj: activations are finite numbers, not {value}" + r" \(token 1, element 3\)$"
    with pytest.raises(UserError, match=message):
        device.submit([good, bad])
    assert np.isnan(read_results(device, good)).all()
    free_job(device, good)
    free_job(device, bad)


def test_bad_jobs(device):
    rng = np.random.default_rng(11)
    job = make_job(device, layer(device, rng, 8, 64, 32), random_activations(rng, 2, 64))
    other = make_config(tile=16, max_k=64)
    foreign = prepare(other, random_linear(rng, 8, 64, 32)).layout
    small = device.alloc(8)
    too_many = device.config.max_tokens + 1
    changes = [
        (dict(tokens=0), rf"M is 1 to max_tokens \({device.config.max_tokens}\), not 0"),
        (dict(tokens=too_many), f", not {too_many}"),
        (dict(weights=small), r"its weights take [\d,]+ bytes, the buffer has 8"),
        (dict(activations=small), "its activations take 512 bytes, the buffer has 8"),
        (dict(results=small), "its results take 64 bytes, the buffer has 8"),
        (dict(results=Buffer(1 << 31, 64)), "no buffer of 64 bytes is allocated at address 0x80000000"),
        (dict(activations=job.results, results=job.results), "its activations take 512 bytes, the buffer has 64"),
        (dict(results=job.activations), "layer layer reads results of its own batch"),
        (dict(reuse=True), r"reuses activations, and the job before has others \(or none is before\)"),
        (dict(layout=foreign), f"layer layer is packed for other hardware \\(config {other.digest[:16]}\\)"),
    ]
    for change, message in changes:
        with pytest.raises(DeviceError, match=message):
            device.submit([replace(job, **change)])
    with pytest.raises(DeviceError, match="reuses activations"):
        device.submit([job, replace(job, tokens=1, reuse=True)])
    # The second job would read what the first one writes, and a device may read everything at the start.
    chained = replace(job, results=job.activations, activations=job.weights)
    with pytest.raises(DeviceError, match="layer layer reads results of its own batch"):
        device.submit([chained, job])
    with pytest.raises(DeviceError, match="at least one job"):
        device.submit([])
    device.free(small)
    free_job(device, job)


def test_memory(device):
    """Buffers are page-aligned, apart, zero at first, and return what was written to them."""
    buffers = [device.alloc(size) for size in (1, 4096, 4097, 10)]
    assert all(buffer.address % PAGE == 0 for buffer in buffers)
    assert all(a.address + a.size <= b.address for a, b in pairwise(buffers))
    values = np.arange(1000, dtype=np.int32).reshape(10, 100)
    device.write(buffers[2], values)
    assert np.array_equal(device.read(buffers[2], np.int32, (10, 100)), values)
    assert np.array_equal(device.read(buffers[2], np.int32, [5]), values[0, :5])
    assert not device.read(buffers[3], np.uint8, [10]).any()
    with pytest.raises(DeviceError, match="44 bytes do not fit a buffer of 10"):
        device.write(buffers[3], values[0, :11])
    with pytest.raises(DeviceError, match="12 bytes cannot be read from a buffer of 10"):
        device.read(buffers[3], np.float32, [3])
    with pytest.raises(DeviceError, match="a buffer has at least 1 byte, not 0"):
        device.alloc(0)
    with pytest.raises(DeviceError, match="has no room for"):
        device.alloc(1 << 40)
    for buffer in buffers:
        device.free(buffer)
        with pytest.raises(DeviceError, match=r"no buffer of .* is allocated at address"):
            device.free(buffer)
        with pytest.raises(DeviceError, match=r"no buffer of .* is allocated at address"):
            device.write(buffer, np.zeros(1, np.uint8))


def test_memory_is_reused():
    memory = Memory(8 * PAGE)
    first, second, third = memory.alloc(2 * PAGE), memory.alloc(PAGE + 1), memory.alloc(PAGE)
    memory.free(second)
    # The gap of two pages holds this, and not the one after.
    assert memory.alloc(2 * PAGE) == replace(second, size=2 * PAGE)
    assert memory.alloc(3 * PAGE).address == third.address + PAGE
    with pytest.raises(DeviceError, match=r"the device's memory \(32,768 bytes\) has no room for 1 more"):
        memory.alloc(1)
    memory.free(first)
    assert memory.alloc(1).address == 0


def test_weights_are_striped():
    """Each port's bytes of every beat lie in a page-aligned range of their own."""
    config = make_config(tile=16)
    prepared = prepare(config, random_linear(np.random.default_rng(12), 40, 320, 64))
    image = weight_image(prepared.layout, prepared.beats)
    stride = region_bytes(prepared.layout)
    assert stride % PAGE == 0
    assert len(image) == weight_bytes(prepared.layout) == 4 * stride
    for port in range(4):
        region = image[port * stride :][: prepared.layout.beats * 16].reshape(-1, 16)
        assert np.array_equal(region, prepared.beats[:, 16 * port : 16 * port + 16])
    assert np.array_equal(image_beats(prepared.layout, image), prepared.beats)


def test_closed():
    device = ReferenceDevice(make_config(tile=8))
    rng = np.random.default_rng(13)
    job = make_job(device, random_linear(rng, 4, 64, 32), random_activations(rng, 1, 64))
    device.close()
    device.close()
    uses = [
        lambda: device.alloc(1),
        lambda: device.free(job.results),
        lambda: device.write(job.results, np.zeros(1)),
        lambda: device.read(job.results, np.uint8, [1]),
        lambda: device.submit([job]),
        lambda: device.wait(1, 1),
    ]
    for use in uses:
        with pytest.raises(DeviceError, match="device reference is closed"):
            use()


@pytest.mark.parametrize("backend", ["reference", "rtl"])
def test_close_stops_the_work(backend):
    rng = np.random.default_rng(14)
    with open_device(backend, **CONFIGS["tile8"]) as device:
        linear = layer(device, rng, 1000, 1000, 64)
        device.submit([make_job(device, linear, random_activations(rng, 16, 1000))] * 1000)
        start = time.monotonic()
    assert time.monotonic() - start < 5


def test_open_device():
    with open_device("reference", tile=8) as device:
        assert device.config.tile == 8
    with pytest.raises(UserError, match=r"^no device is named fpga; there are reference, rtl$"):
        open_device("fpga")
    with pytest.raises(
        UserError, match=r"^no device is named kv260 \(the board's driver is not written yet\); there are"
    ):
        open_device("kv260", tile=16)
    with pytest.raises(UserError, match=r"^tile is one of 4, 8, 16, 32, not 5$"):
        open_device("reference", tile=5)
    with pytest.raises(UserError, match=r"^a config has the fields .*, not .*tilde"):
        open_device("reference", tilde=16)
