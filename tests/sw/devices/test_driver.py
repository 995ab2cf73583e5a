# SPDX-License-Identifier: Apache-2.0
"""The driver on a small fake platform that each test controls, and on simulated memory with faults."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from hw.spec.control.descriptor import ADDRESS_LIMIT, DESCRIPTOR_WORDS, FIELDS, weights_stride
from hw.spec.control.refusal import Accepted
from hw.spec.control.registers import (
    BY_NAME,
    COMPLETIONS,
    DEFAULT_TIMEOUT,
    ERROR_TEXTS,
    IDENTIFICATION,
    QUEUE_DEPTH,
    VERSION,
    ErrorCode,
    config_digest,
)
from hw.spec.control.registers import offset as at
from hw.spec.memory.faults import Fault
from hw.spec.ops import Wait
from sw.devices import make_config
from sw.devices.arena import Arena
from sw.devices.base import PAGE, DeviceError
from sw.devices.driver import PATIENCE, AcceleratorDevice
from sw.devices.library import build_library
from sw.devices.rtl import RtlDevice
from tests.sw.fixtures.linears import TIMEOUT, free_jobs, make_job, random_activations, random_linear, run_exactly

pytestmark = pytest.mark.simulator

INTERRUPT = next(1 << field.low for field in FIELDS if field.name == "interrupt")
"""The flag in a descriptor's first word."""
CONFIG = make_config(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024)


def bits(name, *fields):
    return sum(BY_NAME[name].field(field).mask for field in fields)


class FakePlatform:
    """Registers in a dictionary, and an accelerator that does not compute.

    Members
    -------
    in_flight: descriptors that it takes from the queue before the first of them is complete.
    at_once: descriptors that complete during one wait for the interrupt.
    took: list of the cycles of each descriptor.
    step: cycles of a wait in which no descriptor completes.
    stuck: number of the next waits in which no descriptor completes.
    moving: register that counts during these waits.
    fault: error code of the next wait.
    reset_steps: cycles of each wait for the end of a reset; None: it does not end.
    """

    def __init__(self, in_flight=3, at_once=1, base=0x1000_0000, pages=256):
        self.memory = Arena(np.zeros(pages * PAGE, np.uint8), base)
        self.in_flight, self.at_once, self.took, self.step = in_flight, at_once, 700, 1000
        self.stuck, self.moving, self.fault = 0, "error_address", 0
        self.reset_steps: tuple[int, ...] | None = ()
        self.values = {
            at("identification"): IDENTIFICATION,
            at("version"): VERSION,
            at("config_digest"): config_digest(CONFIG),
            at("capabilities"): QUEUE_DEPTH | COMPLETIONS << 8 | CONFIG.ports << 16 | 8 << 24,
            at("timeout"): DEFAULT_TIMEOUT,
        }
        self.queue: deque[list[int]] = deque()
        self.accepted = Accepted()
        self.resetting: deque[int] | None = None
        self.cycles = self.completed = self.error = self.unread = self.most_queued = 0
        self.written: list[tuple[str, int]] = []
        self.pushed: list[list[int]] = []
        self.closed, self.seconds = False, 0.0

    def read_register(self, offset):
        status = {"running": bool(self.queue), "resetting": self.resetting is not None, "error": bool(self.error)}
        if offset == at("completed"):
            self.unread = 0
        live = {
            at("status"): bits("status", *(name for name, value in status.items() if value))
            | max(0, len(self.queue) - self.in_flight) << 8,
            at("completed"): self.completed,
            at("error_code"): self.error,
            at("cycles"): self.cycles % (1 << 32),
            at("cycles", 1): self.cycles >> 32,
        }
        return live.get(offset, self.values.get(offset, 0))

    def write_register(self, offset, value):
        self.values[offset] = value
        name = next(item.name for item in BY_NAME.values() if item.offset <= offset < item.end)
        self.written.append((name, value))
        if name == "control" and value & bits("control", "reset"):
            self.queue.clear()
            self.resetting = deque(self.reset_steps or ())
        if name == "control" and value & bits("control", "push"):
            assert len(self.queue) < QUEUE_DEPTH + self.in_flight, "pushed into a full queue"
            if not self.queue:
                self.values[at("started")] = self.cycles % (1 << 32)
            self.pushed.append([self.values.get(at("descriptor", word), 0) for word in range(DESCRIPTOR_WORDS)])
            self.queue.append(self.pushed[-1])
            self.most_queued = max(self.most_queued, len(self.queue))

    def write_registers(self, offsets_and_values):
        for offset, value in offsets_and_values.items():
            self.write_register(offset, value)

    def wait_interrupt(self):
        if self.resetting is not None:
            self._reset()
        elif self.fault:
            self.error, self.fault = self.fault, 0
        elif self.stuck:
            self.stuck -= 1
            self.cycles += self.step
            self.values[at(self.moving)] = self.cycles
        else:
            for _ in range(self.at_once):
                self._complete()
        return True

    def _reset(self):
        self.cycles += self.resetting.popleft() if self.resetting else self.step
        if not self.resetting and self.reset_steps is not None:
            self.resetting, self.error, self.accepted, self.completed = None, 0, Accepted(), 0

    def _complete(self):
        if self.error or not self.queue:
            return
        self.error = self.accepted.take(CONFIG, self.queue[0])
        if self.error:
            return
        self.queue.popleft()
        self.cycles += self.took
        self.values[at("completion_cycles", self.completed % COMPLETIONS)] = self.cycles % (1 << 32)
        self.completed = (self.completed + 1) % (1 << 32)
        self.unread += 1
        assert self.unread <= COMPLETIONS, "a completion was overwritten before the driver read it"

    def clock(self):
        return self.cycles / 1e6

    def close(self):
        self.closed = True


class FakeDevice(AcceleratorDevice):
    name = "fake"


def some_jobs(device, count, n=10, **options):
    """Jobs that share everything but their results; they are not computed."""
    rng = np.random.default_rng(1)
    linear, x = random_linear(rng, n, 64, 32, zero_point="fixed", **options), random_activations(rng, 2, 64)
    jobs = [make_job(device, linear, x)]
    for index in range(1, count):
        jobs.append(replace(jobs[0], name=f"layer {index}", results=device.alloc(jobs[0].results.size)))
    return jobs


@pytest.mark.parametrize(
    ("register", "message"),
    [
        ("identification", "^there is no Gristmill accelerator: register identification is 0x7$"),
        ("version", f"^the accelerator's registers have version 7, this software knows {VERSION}$"),
        (
            "config_digest",
            f"^the accelerator was built from config 00000007, and {config_digest(CONFIG):08x} is needed$",
        ),
    ],
)
def test_another_accelerator(register, message):
    """It is refused before any register is written, and the platform is closed."""
    platform = FakePlatform()
    platform.values[at(register)] = 7
    with pytest.raises(DeviceError, match=message):
        FakeDevice(CONFIG, platform)
    assert platform.closed and not platform.written


def test_opening_and_closing():
    """Opening resets and enables both interrupts; closing closes the platform."""
    platform = FakePlatform()
    device = FakeDevice(CONFIG, platform)
    assert platform.written[0] == ("control", bits("control", "reset"))
    assert platform.values[at("interrupt_enable")] == bits("interrupt_enable", "done", "error")
    assert not platform.closed
    device.close()
    device.close()
    assert platform.closed


@pytest.mark.parametrize("in_flight", [1, 3, 30])
@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_more_jobs_than_fit(in_flight, at_once):
    """Forty jobs with a queue of 16 and a ring of 32 completions: no job is lost, and each has its own cycles."""
    platform = FakePlatform(in_flight, at_once)
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 40)
        for _ in range(2):
            completions = device.wait(device.submit(jobs), TIMEOUT)
            assert [item.name for item in completions] == [job.name for job in jobs]
            assert [item.cycles for item in completions] == [platform.took] * 40
            assert {item.beats for item in completions} == {jobs[0].layout.beats}
    assert platform.most_queued == min(QUEUE_DEPTH + in_flight, COMPLETIONS)
    # The queue must be filled again before the last job is complete.
    assert all(words[0] & INTERRUPT for words in platform.pushed)


def test_counters_wrap():
    """The low word of the cycle counter, and the count of completions, wrap to 0 in the middle of a batch."""
    platform = FakePlatform()
    with FakeDevice(CONFIG, platform) as device:
        platform.cycles = 3 * (1 << 32) - 5 * platform.took // 2
        platform.completed = device._completed = (1 << 32) - 8
        for count in (5, 20):
            completions = device.wait(device.submit(some_jobs(device, count)), TIMEOUT)
            assert [item.cycles for item in completions] == [platform.took] * count
    assert platform.completed == 17


def test_descriptor_window():
    """Words that are in the window already are not written again."""
    platform = FakePlatform(at_once=100)
    with FakeDevice(CONFIG, platform) as device:
        jobs, written = some_jobs(device, 3), []

        def run(*batch):
            platform.written.clear()
            device.wait(device.submit(batch), TIMEOUT)
            names = [name for name, _ in platform.written]
            written.append((names.count("descriptor"), names.count("control")))
            interrupts = [False] * (len(batch) - 1) + [True]
            words = [job.descriptor(last).to_words() for job, last in zip(batch, interrupts)]
            assert platform.pushed[-len(batch) :] == words

        run(jobs[0])
        run(jobs[0])
        run(jobs[0], jobs[0])
        run(jobs[1])
        run(jobs[0], jobs[1], jobs[2], jobs[2])
    # All words; none; the flags, set and cleared, as only a batch's last descriptor has an interrupt; the address of
    # the results; this address three times, and the flags.
    assert written == [(DESCRIPTOR_WORDS, 1), (0, 1), (2, 2), (1, 1), (5, 4)]


@pytest.mark.parametrize("wait", Wait)
def test_wait(wait):
    """A job's wait is in its descriptor."""
    with FakeDevice(CONFIG, FakePlatform(at_once=100)) as device:
        job = replace(some_jobs(device, 1)[0], wait=wait)
        assert job.descriptor().wait == wait


@pytest.mark.parametrize("culprit", range(3))
def test_refused_descriptor(culprit):
    """The accelerator does not say which descriptor it refused, but the driver does."""
    platform = FakePlatform()
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 3)
        jobs[1] = replace(jobs[1], reuse=True)
        bad = device.prepare(jobs)
        # One beat more in the header.
        bad.code.descriptors[culprit][3] += 1
        text = ERROR_TEXTS[ErrorCode.SHAPE]
        with pytest.raises(DeviceError, match=f"^layer {jobs[culprit].name}: {text}$"):
            device.wait(device.submit(bad), TIMEOUT)
        # It was reset, and the fault has no effect on the next batch.
        assert not platform.error and not platform.queue
        assert len(device.wait(device.submit(jobs), TIMEOUT)) == 3


def test_address_that_no_descriptor_holds():
    """The batch is refused before the accelerator gets any of it."""
    # The memory extends beyond the largest address of a descriptor.
    platform = FakePlatform(base=ADDRESS_LIMIT - 128 * PAGE)
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 2)
        while (results := device.alloc(jobs[0].results.size)).address < ADDRESS_LIMIT:
            pass
        bad = [jobs[0], replace(jobs[1], results=results)]
        text = f"descriptor field results is at least 0 and less than {ADDRESS_LIMIT}, not {results.address}"
        with pytest.raises(DeviceError, match=f"^layer layer 1: {text}$"):
            device.submit(bad)
        assert not platform.pushed
        assert len(device.wait(device.submit(jobs), TIMEOUT)) == 2


def test_unknown_error_code():
    """Hardware may be newer than this software."""
    platform = FakePlatform()
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 2)
        for batch, culprit in ((jobs, "one of the layers from layer to layer 1"), (jobs[1:], "layer layer 1")):
            platform.fault = 15
            with pytest.raises(DeviceError, match=f"^{culprit}: error code 15$"):
                device.wait(device.submit(batch), TIMEOUT)
            assert len(device.wait(device.submit(batch), TIMEOUT)) == len(batch)


def test_error_and_descriptors_from_before():
    """An old error, and descriptors of an abandoned batch, are cleared before the next batch."""
    platform = FakePlatform()
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 2)
        platform.error = 5
        assert len(device.wait(device.submit(jobs), TIMEOUT)) == 2
        platform.queue.append([0] * DESCRIPTOR_WORDS)
        assert len(device.wait(device.submit(jobs), TIMEOUT)) == 2


@pytest.mark.parametrize("timeout", [5_000, 100_000])
def test_giving_up(timeout):
    """Nothing moves, and the accelerator does not detect it: the message counts open transfers. Then it works again."""
    platform = FakePlatform()
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 3)
        device.registers.write("timeout", timeout)
        platform.values[at("reads_under_way")] = 2 | 3 << 8
        platform.values[at("writes_under_way")] = 4
        platform.stuck = 1 << 32
        before = platform.cycles
        message = r"^nothing moved for [\d,]+ cycles while waiting for layer layer; memory owes 5 reads and 4 writes$"
        with pytest.raises(DeviceError, match=message):
            device.wait(device.submit(jobs), TIMEOUT)
        assert PATIENCE * timeout < platform.cycles - before <= PATIENCE * timeout + 3 * platform.step
        platform.stuck = 0
        assert len(device.wait(device.submit(jobs), TIMEOUT)) == 3


@pytest.mark.parametrize(
    ("timeout", "moving"),
    [(1000, "beats"), (1000, "reads_under_way"), (1000, "writes_under_way"), (0, "error_address")],
)
def test_patience(timeout, moving):
    """While anything moves, or if the timeout is off, the driver does not give up."""
    platform = FakePlatform()
    with FakeDevice(CONFIG, platform) as device:
        device.registers.write("timeout", timeout)
        platform.stuck, platform.moving = 10 * PATIENCE, moving
        assert len(device.wait(device.submit(some_jobs(device, 2)), TIMEOUT)) == 2
        assert platform.cycles > 10 * PATIENCE * 1000


def test_reset_that_does_not_end():
    """Opening reports it. A batch reports it, too, and works after the reset has ended."""
    message = r"^nothing moved for [\d,]+ cycles while waiting for the reset to end; memory owes 0 reads and 0 writes$"
    platform = FakePlatform()
    platform.step, platform.reset_steps = DEFAULT_TIMEOUT, None
    with pytest.raises(DeviceError, match=message):
        FakeDevice(CONFIG, platform)
    assert platform.closed
    platform.reset_steps = ()
    with FakeDevice(CONFIG, platform) as device:
        jobs = some_jobs(device, 2)
        platform.reset_steps = None
        platform.fault = 6
        with pytest.raises(DeviceError, match=f"^one of the layers from layer to layer 1: .*; {message[1:]}"):
            device.wait(device.submit(jobs), TIMEOUT)
        with pytest.raises(DeviceError, match=message):
            device.wait(device.submit(jobs), TIMEOUT)
        platform.reset_steps = ()
        assert len(device.wait(device.submit(jobs), TIMEOUT)) == 2


def test_reset_that_ends_during_a_long_wait():
    """The interrupt line is low, so a wait takes its full time. The reset ends during the wait: this is no failure."""
    platform = FakePlatform()
    platform.reset_steps = (1, 2 * PATIENCE * DEFAULT_TIMEOUT)
    with FakeDevice(CONFIG, platform) as device:
        assert len(device.wait(device.submit(some_jobs(device, 2)), TIMEOUT)) == 2


def test_stopping_in_the_middle():
    """Closing resets running jobs, so that nothing is written to memory that may have a new owner."""
    platform = FakePlatform()
    device = FakeDevice(CONFIG, platform)
    jobs = some_jobs(device, 40)
    platform.stuck, platform.moving = 1 << 32, "beats"
    ticket = device.submit(jobs)
    # `submit` starts the batch, without `wait`.
    assert platform.queue
    with pytest.raises(DeviceError, match="0 of 40 jobs are done"):
        device.wait(ticket, 0.01)
    assert platform.queue
    device.close()
    assert [value for name, value in platform.written if name == "control"][-1] == bits("control", "reset")
    assert not platform.queue and platform.resetting is None and platform.closed


@pytest.fixture(scope="module")
def files():
    return build_library(CONFIG)


@pytest.fixture
def device(files):
    """A device with a short timeout for memory."""
    with RtlDevice(CONFIG, files=files, memory="ideal") as opened:
        opened.registers.write("timeout", 2000)
        yield opened


def layers(count=3):
    rng = np.random.default_rng(5)
    names = ("q_proj", "k_proj", "v_proj")
    linears = [random_linear(rng, 40, 320, 64, zero_point="fixed", name=name) for name in names[:count]]
    return [(linear, random_activations(rng, 3, 320)) for linear in linears]


READ_FAULTS = {
    Fault.READ_ERROR: "memory answered a read with SLVERR or DECERR",
    Fault.READ_SILENT: "memory did not answer a read in time",
}
WRITE_FAULTS = {
    Fault.WRITE_ERROR: "memory answered a write with SLVERR or DECERR",
    Fault.WRITE_SILENT: "memory did not answer a write in time",
}
FAULTS = [(fault, text, what) for fault, text in READ_FAULTS.items() for what in ("weights", "activations")]
FAULTS += [(fault, text, "results") for fault, text in WRITE_FAULTS.items()]


@pytest.mark.parametrize("culprit", range(3))
@pytest.mark.parametrize(("fault", "text", "what"), FAULTS)
def test_faults(device, fault, text, what, culprit):
    """A fault in one layer's operand: the message names the layer and an address in it; later results are exact."""
    jobs = [make_job(device, *case) for case in layers()]
    buffer = getattr(jobs[culprit], what)
    place = buffer.address + 512
    if what == "weights":
        # Every port reads its own region.
        place += culprit % CONFIG.ports * weights_stride(jobs[culprit].layout)
    device.platform.fault(fault, place, 1)
    with pytest.raises(DeviceError) as failed:
        device.wait(device.submit(jobs), TIMEOUT)
    start, _, rest = str(failed.value).partition(f": {text} at address ")
    assert start == f"layer {jobs[culprit].name}", failed.value
    number, _, reset = rest.partition("; ")
    # The address is that of the burst, which holds the place of the fault.
    assert buffer.address <= int(number, 16) <= place < int(number, 16) + PAGE
    if fault in (Fault.READ_SILENT, Fault.WRITE_SILENT):
        assert reset.startswith("nothing moved for ") and "while waiting for the reset to end; memory owes" in reset
    else:
        assert not reset
    device.platform.fault(Fault.NONE)
    free_jobs(device, *jobs)
    run_exactly(device, layers())


@pytest.mark.parametrize("fault", [Fault.READ_BLOCKED, Fault.WRITE_BLOCKED])
def test_blocked(device, fault):
    """A memory that accepts no address: the error names the first one, and the reset ends only after it is accepted."""
    jobs = [make_job(device, *case) for case in layers()]
    device.platform.fault(fault)
    what, buffer = ("read", jobs[0].activations) if fault == Fault.READ_BLOCKED else ("write", jobs[0].results)
    message = (
        rf"^layer q_proj: memory did not answer a {what} in time at address {buffer.address:#x}; nothing moved for"
        r" [\d,]+ cycles while waiting for the reset to end; memory owes \d+ reads and \d+ writes$"
    )
    with pytest.raises(DeviceError, match=message):
        device.wait(device.submit(jobs), TIMEOUT)
    # The memory still accepts no address.
    with pytest.raises(DeviceError, match=r"^nothing moved for .* while waiting for the reset to end"):
        device.wait(device.submit(jobs), TIMEOUT)
    device.platform.fault(Fault.NONE)
    free_jobs(device, *jobs)
    run_exactly(device, layers())


def test_fault_between_batches(device):
    """Every second batch of many fails, and no result is wrong."""
    for fault in (Fault.READ_ERROR, Fault.WRITE_ERROR, Fault.READ_SILENT, Fault.WRITE_SILENT):
        cases = layers()
        jobs = [make_job(device, *case) for case in cases]
        device.platform.fault(fault)
        with pytest.raises(DeviceError, match=r"^(layer|one of the layers) "):
            device.wait(device.submit(jobs), TIMEOUT)
        device.platform.fault(Fault.NONE)
        for _ in range(2):
            run_exactly(device, cases)
        free_jobs(device, *jobs)


def test_slow_is_no_fault(files):
    """A hostile memory sometimes does not answer for 2,000 cycles, which is less than the default timeout."""
    with RtlDevice(CONFIG, files=files, memory="hostile", seed=3) as device:
        for _ in range(5):
            run_exactly(device, layers())
