# SPDX-License-Identifier: Apache-2.0
"""One suite for every device: exact results for all shapes, and clear messages for bad jobs."""

import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from hw.spec.control.descriptor import FLOAT_BYTES
from sw.common.errors import UserError
from sw.devices import library, make_config, open_device
from sw.devices.base import Buffer, DeviceError, read_results, weight_image
from sw.devices.kv260 import KV260Device
from sw.devices.pack import prepare
from sw.devices.reference import ReferenceDevice
from tests.sw.fixtures.fake_board import FakeBoard
from tests.sw.fixtures.linears import (
    TIMEOUT,
    expected,
    free_jobs,
    make_job,
    random_activations,
    random_linear,
    run_exactly,
    same_bits,
)

CONFIGS = {
    "tile4": dict(tile=4, ports=1, max_k=1024, max_tokens=5),
    "tile8": dict(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024),
    "tile16": dict(tile=16),
}
# It has more lanes of results than any smaller array, and takes long to build.
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
# Results do not depend on the memory, so each hardware may have a different memory.
CASES = [
    pytest.param(("reference", "tile8", "ideal"), id="reference"),
    pytest.param(("rtl", "tile4", "hostile"), id="rtl tile4 hostile"),
    pytest.param(("rtl", "tile8", "ideal"), id="rtl tile8"),
    pytest.param(("rtl", "tile16", "kv260-2400"), id="rtl tile16 kv260"),
    pytest.param(("kv260", "tile4", "hostile"), id="kv260 tile4 hostile"),
]
CASES += [pytest.param(("rtl", name, "kv260-2400"), id=f"rtl {name}", marks=pytest.mark.full) for name in FULL]


@contextmanager
def open_backend(folder, backend, config, memory):
    """A device; for kv260 it is a simulated board, made of files in a folder."""
    options = (CONFIGS | FULL)[config]
    if backend != "kv260":
        with open_device(backend, make_config(**options), memory) as opened:
            yield opened
        return
    with closing(FakeBoard(folder, make_config(**options), memory)) as fake, KV260Device(host=fake) as opened:
        yield opened


@pytest.fixture(scope="module", params=CASES)
def device(request, tmp_path_factory):
    with open_backend(tmp_path_factory.mktemp("board"), *request.param) as opened:
        yield opened


def layer(device, rng, n, k, group_size, **options):
    return random_linear(rng, n, k, group_size, zero_point=device.config.zero_point, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(device, shape):
    rng = np.random.default_rng(1)
    for tokens in (1, 2, 5):
        (completion,) = run_exactly(device, [(layer(device, rng, *shape), random_activations(rng, tokens, shape[1]))])
        assert (completion.cycles > 0) == (device.name != "reference")


def test_every_m_in_one_batch(device):
    rng = np.random.default_rng(2)
    counts = range(1, device.config.max_tokens + 1)
    run_exactly(device, [(layer(device, rng, 11, 96, 32), random_activations(rng, m, 96)) for m in counts])


def test_batch_of_different_shapes(device):
    rng = np.random.default_rng(3)
    cases = []
    for index in range(30):
        k, tokens = int(rng.choice([32, 64, 100, 320])), int(rng.integers(1, device.config.max_tokens + 1))
        linear = layer(device, rng, int(rng.integers(1, 70)), k, int(rng.choice([32, 64, 512])), name=f"layer {index}")
        cases.append((linear, random_activations(rng, tokens, k)))
    completions = run_exactly(device, cases)
    if device.name != "reference":
        # The next layer streams while this one drains, so a batch takes less than the sum of its single layers.
        apart = [run_exactly(device, [case])[0].cycles for case in cases]
        assert sum(item.cycles for item in completions) < sum(apart)


def test_reuse(device):
    rng = np.random.default_rng(4)
    first, second = random_activations(rng, 3, 320), random_activations(rng, 5, 320)
    cases = [(layer(device, rng, n, 320, 64), x) for n, x in ((20, first), (33, first), (8, second), (40, second))]
    run_exactly(device, cases, reuse={1, 3})


def test_fewer_bits_than_the_hardware(device):
    rng = np.random.default_rng(5)
    run_exactly(device, [(layer(device, rng, 20, 64, 32, bits=2), random_activations(rng, 2, 64))])


def test_more_bits_than_the_hardware(device):
    """Layers of eight bits as two planes and layers of four bits, in the same batch."""
    rng = np.random.default_rng(18)
    x = random_activations(rng, 2, 100)
    layers = [layer(device, rng, 20, 100, 32, bits=bits) for bits in (8, 4, 8)]
    run_exactly(device, [(linear, x) for linear in layers])


def test_prepared_batch(device):
    """It may be submitted many times, with new values in its buffers, but not after one of them was freed."""
    rng = np.random.default_rng(19)
    linear = layer(device, rng, 33, 64, 32)
    first = make_job(device, linear, random_activations(rng, 3, 64))
    batch = device.prepare([first, replace(first, results=device.alloc(first.results.size), reuse=True)])
    for _ in range(3):
        x = random_activations(rng, 3, 64)
        device.write(first.activations, x)
        tickets = [device.submit(batch), device.submit(batch)]
        for ticket in tickets:
            assert len(device.wait(ticket, TIMEOUT)) == 2
        for job in batch.jobs:
            assert same_bits(read_results(device, job), expected(device.config, linear, x))
    with pytest.raises(DeviceError, match="layer reads results of its own batch"):
        device.prepare([replace(first, results=first.activations)])
    with ReferenceDevice(device.config) as other, pytest.raises(DeviceError, match="was prepared for another device"):
        other.submit(batch)
    free_jobs(device, *batch.jobs)
    with pytest.raises(DeviceError, match="no buffer of"):
        device.submit(batch)


def test_weights_that_change(device):
    """A device may cache unpacked weights, but must read them again after a write."""
    rng = np.random.default_rng(20)
    x = random_activations(rng, 1, 64)
    job = make_job(device, layer(device, rng, 20, 64, 32), x)
    for _ in range(2):
        linear = layer(device, rng, 20, 64, 32)
        packed = prepare(device.config, linear)
        device.write(job.weights, weight_image(packed.layout, packed.beats))
        device.wait(device.submit([job]), TIMEOUT)
        assert same_bits(read_results(device, job), expected(device.config, linear, x))
    free_jobs(device, job)
    assert not getattr(device, "_unpacked", None)


def test_interrupted_while_waiting(device, monkeypatch):
    """Ctrl-C in the middle of a batch: that batch is lost, and the next one is exact."""
    rng = np.random.default_rng(21)
    linear, x = layer(device, rng, 400, 640, 64), random_activations(rng, 4, 640)
    job = make_job(device, linear, x)
    owner, name = (device, "_compute") if device.name == "reference" else (device.platform, "wait_interrupt")

    def interrupted(*_):
        raise KeyboardInterrupt

    ticket = device.submit([job] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            device.wait(ticket, TIMEOUT)
    with pytest.raises(DeviceError, match=f"^batch {ticket} was interrupted$"):
        device.wait(ticket, TIMEOUT)
    free_jobs(device, job)
    run_exactly(device, [(linear, x)])


def test_zero_tokens_and_rows(device):
    """Zeros give +0, not -0, and do not change other results."""
    rng = np.random.default_rng(6)
    linear, x = layer(device, rng, 10, 64, 32), random_activations(rng, 3, 64)
    x[1] = 0
    job = make_job(device, linear, x)
    device.wait(device.submit([job]), TIMEOUT)
    y = read_results(device, job)
    assert same_bits(y[1], np.zeros(10, np.float32))
    assert same_bits(y[:, 5], np.zeros(3, np.float32))
    assert np.count_nonzero(y) == 2 * 9
    free_jobs(device, job)


def test_overflow_is_infinite(device):
    """Too large for float32: infinity with the right sign, in one row only."""
    rng = np.random.default_rng(7)
    linear = layer(device, rng, 6, 64, 32)
    scales = linear.scales.copy()
    scales[2] = 1e30
    linear, x = replace(linear, scales=scales), np.full((2, 64), 1e20, np.float32)
    x[1] = 1
    run_exactly(device, [(linear, x)])
    assert np.isinf(expected(device.config, linear, x)[0, 2])


def test_nothing_but_results_is_written(device):
    """Rows of results have a pitch; bytes between the rows and after the last one keep their values."""
    rng = np.random.default_rng(15)
    for n in (1, 31, 32, 33, 70):
        linear, x = layer(device, rng, n, 64, 32), random_activations(rng, 3, 64)
        job = make_job(device, linear, x)
        results, neighbour = device.alloc(job.results.size + 100), device.alloc(4096)
        marks = rng.integers(0, 256, results.size, np.uint8)
        device.write(results, marks)
        device.write(neighbour, marks[:1])
        device.wait(device.submit([replace(job, results=results)]), TIMEOUT)
        raw = device.read(results, np.uint8, [results.size])
        rows = raw[: job.results.size].reshape(3, -1)
        y = np.ascontiguousarray(rows[:, : FLOAT_BYTES * n]).view(np.float32)
        assert same_bits(y, expected(device.config, linear, x))
        rows[:, : FLOAT_BYTES * n] = marks[: job.results.size].reshape(3, -1)[:, : FLOAT_BYTES * n]
        assert np.array_equal(raw, marks)
        assert device.read(neighbour, np.uint8, [1]) == marks[:1]
        for buffer in (results, neighbour):
            device.free(buffer)
        free_jobs(device, job)


def test_tickets(device):
    """Two batches in flight, waited for in reverse order; each ticket is valid once."""
    rng = np.random.default_rng(8)
    cases = [(layer(device, rng, 12, 64, 32), random_activations(rng, 2, 64)) for _ in range(2)]
    jobs = [make_job(device, *case) for case in cases]
    tickets = [device.submit([job]) for job in jobs]
    for index in (1, 0):
        device.wait(tickets[index], TIMEOUT)
        assert same_bits(read_results(device, jobs[index]), expected(device.config, *cases[index]))
        with pytest.raises(DeviceError, match=f"no batch has ticket {tickets[index]}, or its answer was taken already"):
            device.wait(tickets[index], TIMEOUT)
    with pytest.raises(DeviceError, match="no batch has ticket 1000000"):
        device.wait(1_000_000, TIMEOUT)
    free_jobs(device, *jobs)


def test_timeout(device, monkeypatch):
    """The message says what was waited for, and the batch continues."""
    rng = np.random.default_rng(9)
    linear, x = layer(device, rng, 400, 1000, 64, name="/model/q_proj"), random_activations(rng, 5, 1000)
    job = make_job(device, linear, x)
    if device.name == "rtl":
        # Fewer cycles than the batch takes on any hardware, so the simulation checks the time before it is done.
        monkeypatch.setattr(library, "CYCLES_AT_ONCE", 1_000)
    ticket = device.submit([job] * 15)
    message = (
        rf"^device {device.name}: batch {ticket} took longer than 0.001 s,"
        r" \d+ of 15 jobs are done, waiting for the results of layer /model/q_proj$"
    )
    with pytest.raises(DeviceError, match=message):
        device.wait(ticket, 0.001)
    assert len(device.wait(ticket, TIMEOUT)) == 15
    assert same_bits(read_results(device, job), expected(device.config, linear, x))
    free_jobs(device, job)


# Smaller than any number that 8 bits of exponent can scale, with the fewest mantissa bits.
TINY = np.float32(1e-44)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, TINY])
@pytest.mark.parametrize("place", [(0, 0), (1, 63)], ids=["first", "last"])
def test_activations_that_are_refused(device, value, place):
    """The batch fails with the layer's name; the next batch is exact."""
    rng = np.random.default_rng(10)
    x = random_activations(rng, 2, 64)
    good = layer(device, rng, 4, 64, 32), x.copy()
    if value is TINY:
        x[place[0]] = 0
    x[place] = value
    jobs = [
        make_job(device, *good),
        make_job(device, layer(device, rng, 4, 64, 32, name="/model/down_proj"), x),
        make_job(device, *good),
    ]
    ticket = device.submit(jobs)
    reason = "exponent" if value is TINY else "finite" if device.name == "reference" else "infinite or not a number"
    with pytest.raises(DeviceError, match=f"^layer /model/down_proj: .*{reason}"):
        device.wait(ticket, TIMEOUT)
    with pytest.raises(DeviceError, match=f"no batch has ticket {ticket}"):
        device.wait(ticket, TIMEOUT)
    free_jobs(device, *jobs)
    run_exactly(device, [good, good])


def test_a_batch_after_one_that_fails(device):
    """It was submitted before the failure was known, and is exact."""
    rng = np.random.default_rng(16)
    linear, x = layer(device, rng, 20, 320, 64), random_activations(rng, 3, 320)
    good, spoilt = make_job(device, linear, x), x.copy()
    spoilt[2, 100] = np.nan
    bad = make_job(device, replace(linear, name="bad"), spoilt)
    tickets = [device.submit(jobs) for jobs in ([bad, good], [good], [bad], [good])]
    for index, ticket in enumerate(tickets):
        if index % 2:
            device.wait(ticket, TIMEOUT)
            assert same_bits(read_results(device, good), expected(device.config, linear, x))
        else:
            with pytest.raises(DeviceError, match=r"^layer bad: "):
                device.wait(ticket, TIMEOUT)
    free_jobs(device, good, bad)


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
        (dict(results=small), "its results take 256 bytes, the buffer has 8"),
        (dict(results=Buffer(1 << 31, 256)), "no buffer of 256 bytes is allocated at address 0x80000000"),
        (dict(activations=job.results, results=job.results), "its activations take 512 bytes, the buffer has 256"),
        (dict(results=job.activations), "layer layer reads results of its own batch, and does not wait for them"),
        (dict(reuse=True), r"reuses activations, and the job before has others \(or none is before\)"),
        (dict(layout=foreign), f"layer layer is packed for other hardware \\(config {other.digest[:16]}\\)"),
    ]
    for change, message in changes:
        with pytest.raises(DeviceError, match=message):
            device.submit([replace(job, **change)])
    with pytest.raises(DeviceError, match="reuses activations"):
        device.submit([job, replace(job, tokens=1, reuse=True)])
    # The second job would read results of the first one, and a device may read all activations at the start.
    chained = replace(job, results=job.activations, activations=job.weights)
    with pytest.raises(DeviceError, match="layer layer reads results of its own batch, and does not wait for them"):
        device.submit([chained, job])
    with pytest.raises(DeviceError, match="at least one job"):
        device.submit([])
    device.free(small)
    free_jobs(device, job)


def test_write_and_read(device):
    """Arrays of any shape and type at the start of a buffer, and no byte beyond its end."""
    buffer, neighbour = device.alloc(4010), device.alloc(10)
    values = np.arange(1000, dtype=np.int32).reshape(10, 100)
    device.write(neighbour, np.arange(10, dtype=np.uint8))
    device.write(buffer, values)
    assert np.array_equal(device.read(buffer, np.int32, (10, 100)), values)
    assert np.array_equal(device.read(buffer, np.int32, [5]), values[0, :5])
    device.write(buffer, values.T)
    assert np.array_equal(device.read(buffer, np.int32, (100, 10)), values.T)
    # `read` returns a copy.
    device.read(neighbour, np.uint8, [10])[:] = 0
    assert device.read(neighbour, np.uint8, [10]).tolist() == list(range(10))
    with pytest.raises(DeviceError, match=r"^44 bytes do not fit a buffer of 10$"):
        device.write(neighbour, values[0, :11])
    with pytest.raises(DeviceError, match=r"^12 bytes cannot be read from a buffer of 10$"):
        device.read(neighbour, np.float32, [3])
    with pytest.raises(DeviceError, match=r"^no buffer of 11 bytes is allocated at address"):
        device.write(replace(neighbour, size=11), np.zeros(1, np.uint8))
    # A part of a buffer.
    device.write(buffer.part(8), values[1, :3])
    assert np.array_equal(device.read(buffer, np.int32, [6])[2:5], values[1, :3])
    assert np.array_equal(device.read(replace(buffer.part(8), size=12), np.int32, [3]), values[1, :3])
    for used in (buffer, neighbour):
        device.free(used)


def test_two_threads(device):
    """Each thread writes, submits and waits on its own; each reads its own results."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(8):
                cases = [
                    (layer(device, rng, int(rng.integers(1, 40)), 64, 32), random_activations(rng, 2, 64))
                    for _ in range(2)
                ]
                run_exactly(device, cases)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in (20, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


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
        with pytest.raises(DeviceError, match=r"^device reference is closed$"):
            use()


@pytest.mark.parametrize("backend", ["reference", "rtl", "kv260"])
def test_close_stops_the_work(backend, tmp_path):
    """It stops soon, and every waiting thread gets an error: for the running batch and for the next one."""
    rng = np.random.default_rng(14)
    answers: dict[int, BaseException | list] = {}

    with open_backend(tmp_path, backend, "tile8", "kv260-2400") as device:
        linear = layer(device, rng, 1000, 1000, 64)
        job = make_job(device, linear, random_activations(rng, 16, 1000))

        def wait(ticket: int) -> None:
            try:
                answers[ticket] = device.wait(ticket, TIMEOUT)
            except BaseException as error:
                answers[ticket] = error

        threads = [threading.Thread(target=wait, args=[device.submit([job] * 1000)], daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        start = time.monotonic()
    for thread in threads:
        thread.join(start + 5 - time.monotonic())
    assert not any(thread.is_alive() for thread in threads)
    for ticket in (1, 2):
        assert isinstance(answers[ticket], DeviceError) and str(answers[ticket]) == f"device {backend} is closed"


def test_closed_devices_hold_no_memory():
    """A view that somebody has stays readable, all else is given back."""
    device = ReferenceDevice(make_config(tile=8))
    kept = device.view(device.alloc(8))
    kept[:] = 5
    device.close()
    device.close()
    assert not len(device.memory.memory) and (kept == 5).all()
    with pytest.raises(DeviceError, match="closed"):
        device.alloc(1)


def test_open_device():
    with open_device("reference", make_config(tile=8)) as device:
        assert device.config.tile == 8
    with pytest.raises(UserError, match=r"^no device is named fpga; there are reference, rtl, kv260$"):
        open_device("fpga")
    with pytest.raises(UserError, match=r"^tile is one of 4, 8, 16, 32, not 5$"):
        make_config(tile=5)
    with pytest.raises(UserError, match=r"^a config has the fields .*, not .*tilde"):
        make_config(tilde=16)
    message = r"^memory is one of ideal, kv260-2400, kv260-2133, hostile, not ddr5$"
    with pytest.raises(UserError, match=message):
        open_device("rtl", memory="ddr5")
