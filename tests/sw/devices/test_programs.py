# SPDX-License-Identifier: Apache-2.0
"""Prepared batches as programs, on the simulated accelerator and on the simulated board."""

import gc
import re
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from hw.spec.control.descriptor import result_pitch
from hw.spec.control.program import DESCRIPTOR_BYTES, program_image
from hw.spec.control.registers import BY_NAME, COMPLETIONS, ERROR_TEXTS, ErrorCode, offset
from hw.spec.memory.faults import Fault
from sw.devices import library, make_config
from sw.devices.base import DeviceError, read_results
from sw.devices.kv260 import KV260Device
from sw.devices.library import build_library
from sw.devices.rtl import RtlDevice
from tests.sw.fixtures.fake_board import FakeBoard
from tests.sw.fixtures.linears import TIMEOUT, expected, make_job, random_activations, random_linear, same_bits

pytestmark = pytest.mark.simulator

CONFIG = make_config(tile=4, ports=1, max_k=1024, max_tokens=5, operators="decoder")
START = BY_NAME["control"].field("start").mask
PUSH = BY_NAME["control"].field("push").mask
INTERRUPT = 1 << 9


@contextmanager
def open_backend(folder, backend, memory="ideal"):
    if backend == "rtl":
        with RtlDevice(CONFIG, memory=memory, files=build_library(CONFIG)) as device:
            yield device
        return
    with closing(FakeBoard(folder, CONFIG, memory)) as board, KV260Device(host=board) as device:
        yield device


@pytest.fixture
def device(tmp_path):
    with open_backend(tmp_path, "rtl") as opened:
        opened.registers.write("timeout", 2000)
        yield opened


def cases(count, n=12, k=64, salt=1):
    rng = np.random.default_rng(salt)
    return [
        (random_linear(rng, n, k, 32, name=f"layer {index}"), random_activations(rng, 1 + index % 3, k))
        for index in range(count)
    ]


def check(device, jobs, layers):
    for job, (linear, x) in zip(jobs, layers, strict=True):
        assert same_bits(read_results(device, job), expected(CONFIG, linear, x)), job.name


def written(device):
    """The registers that are written from now on: offsets and values, in order."""
    writes, original = [], device.platform.write_registers

    def write_registers(offsets_and_values):
        writes.extend(offsets_and_values.items())
        original(offsets_and_values)

    device.platform.write_registers = write_registers
    return writes


@pytest.mark.parametrize("backend", ["rtl", "kv260"])
@pytest.mark.parametrize("memory", ["ideal", "hostile"])
def test_submitted_often(tmp_path, backend, memory):
    """A program runs any number of times, with new activations, and batches that are pushed may be in between."""
    with open_backend(tmp_path, backend, memory) as device:
        layers = cases(6)
        jobs = [make_job(device, *case) for case in layers]
        batch, other = device.prepare(jobs), device.prepare(jobs[:2])
        writes = written(device)
        for salt in range(3):
            layers = [(linear, x) for (linear, _), (_, x) in zip(layers, cases(6, salt=salt))]
            for job, (_, x) in zip(jobs, layers):
                device.write(job.activations, x)
            completions = device.wait(device.submit(batch), TIMEOUT)
            assert [item.name for item in completions] == [job.name for job in jobs]
            assert [item.beats for item in completions] == [job.layout.beats for job in jobs]
            assert all(item.cycles > 0 for item in completions)
            check(device, jobs, layers)
        # Address and length once, and a start for each submission.
        assert [place for place, _ in writes] == [
            *(offset("program_address", word) for word in range(2)),
            offset("program_length"),
            *[offset("control")] * 3,
        ]
        assert {value for place, value in writes if place == offset("control")} == {START}
        writes.clear()
        for tried in (jobs, other, batch, jobs[:1]):
            device.wait(device.submit(tried), TIMEOUT)
            check(device, jobs, layers)
        commands = [value for place, value in writes if place == offset("control")]
        assert commands == [*[PUSH] * len(jobs), START, START, PUSH]


def test_one_interrupt(device):
    """Only the last descriptor of a program requests an interrupt, also if there are more than the queue holds."""
    jobs = [make_job(device, *case) for case in cases(2)]
    for batch, count in ((device.prepare(jobs * 20), 1), (device._prepare(jobs * 20, often=False), 40)):
        flags = [words[0] & INTERRUPT for words in batch.code.descriptors]
        assert flags[-1] and sum(map(bool, flags)) == count


@pytest.mark.parametrize("at_once", [300, 4000, 100_000])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_long_program(device, monkeypatch, at_once, slow):
    """A program of more jobs than the hardware keeps cycles: all are complete, and the sum of the cycles is right.

    If the driver looks at it often, it knows the cycles of all jobs; if it looks only at the end, those of the last
    ones. In between some are lost. slow: the program goes on for a long time while the driver reads a register.
    """
    monkeypatch.setattr(library, "CYCLES_AT_ONCE", at_once)
    layers = cases(3)
    jobs = [make_job(device, *case) for case in layers]
    count = 3 * COMPLETIONS + 3
    before = device.registers.read("busy")
    batch = device.prepare(jobs * (count // 3))
    if slow:
        read, platform = device.platform.read_register, device.platform

        def read_register(place):
            platform._call(platform._library.gm_run, 100)
            return read(place)

        monkeypatch.setattr(platform, "read_register", read_register)
    completions = device.wait(device.submit(batch), TIMEOUT)
    busy = device.registers.read("busy") - before
    check(device, jobs, layers)
    assert len(completions) == count
    assert device.registers.read("completed") == count
    known = [item.cycles > 0 for item in completions]
    assert all(known[-COMPLETIONS:])
    least, most = {300: (count, count), 4000: (COMPLETIONS + 1, count - 1), 100_000: (COMPLETIONS, COMPLETIONS)}[
        at_once
    ]
    assert slow or least <= sum(known) <= most
    assert sum(item.cycles for item in completions) == pytest.approx(busy, abs=4)


def test_memory_of_programs(device):
    """The memory of a program is free when its batch is deleted, and not before it has run."""
    layers = cases(4)
    jobs = [make_job(device, *case) for case in layers]
    free = device.alloc(1)
    device.free(free)
    for _ in range(3):
        batch = device.prepare(jobs)
        program = batch.code.program
        assert program.address == free.address
        ticket = device.submit(batch)
        del batch
        gc.collect()
        # The program may be running: its memory is not given away.
        other = device.alloc(1)
        assert other.address != free.address
        device.view(other)[:] = 255
        device.wait(ticket, TIMEOUT)
        check(device, jobs, layers)
        device.free(other)
        again = device.alloc(1)
        assert again == free
        device.free(again)


@pytest.mark.parametrize("stored", [True, False], ids=["program", "pushed"])
@pytest.mark.parametrize("culprit", [0, 2, 4])
def test_errors_of_one_descriptor(device, stored, culprit):
    """The hardware says which descriptor failed, also after other programs and batches and if operands are shared."""
    layers = cases(5)
    jobs = [make_job(device, *case) for case in layers]
    device.wait(device.submit(device.prepare(jobs[:3])), TIMEOUT)
    device.wait(device.submit(jobs[:2]), TIMEOUT)
    shared = [replace(job, activations=jobs[0].activations, tokens=1) for job in jobs]
    bad = device.prepare(shared) if stored else device._prepare(shared, often=False)
    words = bad.code.descriptors
    words[culprit][3] += 1
    if stored:
        device.write(bad.code.program, program_image(words))
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"^layer layer {culprit}: {ERROR_TEXTS[ErrorCode.SHAPE]}$"):
            device.wait(device.submit(bad), TIMEOUT)
    # Activations that are not finite.
    x = np.full(jobs[culprit].activations.size // 4, np.inf, np.float32)
    device.write(jobs[culprit].activations, x)
    place = f"at address {jobs[culprit].activations.address:#x}"
    message = f"^layer layer {culprit}: {ERROR_TEXTS[ErrorCode.NON_FINITE]} {place}$"
    with pytest.raises(DeviceError, match=message):
        device.wait(device.submit(device.prepare(jobs) if stored else jobs), TIMEOUT)
    device.write(jobs[culprit].activations, layers[culprit][1])
    device.wait(device.submit(device.prepare(jobs)), TIMEOUT)
    check(device, jobs, layers)


@pytest.mark.parametrize("culprit", [0, 3])
@pytest.mark.parametrize("what", ["descriptor", "weights", "results"])
def test_bus_errors(device, what, culprit):
    """The address tells which layer failed: that of an operand, or that of its descriptor."""
    layers = cases(5)
    jobs = [make_job(device, *case) for case in layers]
    batch = device.prepare(jobs)
    place = batch.code.program.address + DESCRIPTOR_BYTES * culprit if what == "descriptor" else None
    place = place or getattr(jobs[culprit], what).address
    fault = Fault.WRITE_ERROR if what == "results" else Fault.READ_ERROR
    code = ErrorCode.WRITE_BUS if what == "results" else ErrorCode.READ_BUS
    name = f"the descriptor of layer layer {culprit}" if what == "descriptor" else f"layer layer {culprit}"
    device.platform.fault(fault, place, 1)
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"^{re.escape(f'{name}: {ERROR_TEXTS[code]} at address {place:#x}')}$"):
            device.wait(device.submit(batch), TIMEOUT)
    device.platform.fault(Fault.NONE)
    device.wait(device.submit(batch), TIMEOUT)
    check(device, jobs, layers)


def test_buffers_that_are_used_several_times(device):
    """Two layers write to the same buffer, and only the longer one reaches the fault: the message names that one."""
    jobs = [make_job(device, *case) for case in cases(6)]
    pitch = result_pitch(jobs[0].layout.n)
    jobs[5] = replace(jobs[5], tokens=3)
    jobs[0] = replace(jobs[0], tokens=1, results=jobs[5].results)
    place = jobs[5].results.address + 2 * pitch
    device.platform.fault(Fault.WRITE_ERROR, place, 1)
    message = f"^layer layer 5: {ERROR_TEXTS[ErrorCode.WRITE_BUS]} at address {place:#x}$"
    for batch in (device.prepare(jobs), jobs):
        with pytest.raises(DeviceError, match=message):
            device.wait(device.submit(batch), TIMEOUT)


def test_abandoned_program(device):
    """The memory of a program that failed is not given away before memory has answered everything."""
    batch = device.prepare([make_job(device, *case) for case in cases(3)])
    place = batch.code.program.address
    device.platform.fault(Fault.READ_BLOCKED)
    with pytest.raises(
        DeviceError, match=f"^the descriptor of layer layer 0: .* at address {place:#x}; nothing moved for"
    ):
        device.wait(device.submit(batch), TIMEOUT)
    del batch
    gc.collect()
    assert device.alloc(1).address != place
    device.platform.fault(Fault.NONE)
    device._reset()
    assert device.alloc(1).address == place


def test_reset_in_the_middle(device, monkeypatch):
    """A program that is abandoned in the middle does not disturb the next one."""
    monkeypatch.setattr(library, "CYCLES_AT_ONCE", 50)
    layers = cases(12, n=30)
    jobs = [make_job(device, *case) for case in layers]
    batch = device.prepare(jobs)
    ticket = device.submit(batch)
    with pytest.raises(DeviceError, match=r"of 12 jobs are done, waiting for the results of layer layer \d+$"):
        device.wait(ticket, 0)
    device._reset()
    assert device.registers.read("completed") == device.registers.read("status") == 0
    # The abandoned batch waits for descriptors that no longer exist; it is not resumed.
    device._queue.clear()
    device.wait(device.submit(batch), TIMEOUT)
    check(device, jobs, layers)
