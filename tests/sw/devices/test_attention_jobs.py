# SPDX-License-Identifier: Apache-2.0
"""Batches of attention that no device runs: scores that nothing reads, and appends to other memory than the caches."""

import numpy as np
import pytest

from hw.spec.config import SCORE_UNIT
from hw.spec.control.refusal import Accepted
from hw.spec.control.registers import CACHE_UNIT, ErrorCode, offset
from hw.spec.memory.kv_cache import KeyCache, ValueCache
from hw.spec.ops import Wait
from sw.bench_decoder import InstantDevice, InstantPlatform
from sw.devices import make_config
from sw.devices.base import PAGE, Buffer, DeviceError
from sw.devices.batches import BatchDevice
from sw.devices.driver import AcceleratorDevice
from sw.devices.jobs import AppendJob, Job, Keys, Rows, ScoresJob, Values, ValuesJob, View, check_jobs
from sw.devices.reference import ReferenceDevice
from tests.sw.fixtures.linears import TIMEOUT

CONFIG = make_config(operators="decoder", tile=8, max_tokens=8, max_k=2048, score_words=8 * SCORE_UNIT)
SIZE, POSITIONS = 32, 64


@pytest.fixture(params=[ReferenceDevice, InstantDevice])
def device(request):
    with request.param(CONFIG) as opened:
        yield opened


class Head:
    """A KV head with its caches in one buffer, and rows of queries, keys and values."""

    def __init__(self, device: BatchDevice, allow: bool = True):
        keys, values = KeyCache(CONFIG, SIZE, POSITIONS, 8), ValueCache(CONFIG, SIZE, POSITIONS)
        places, start = [], 0
        for size in (keys.bytes, values.bytes, values.exponent_bytes):
            places.append((start, size))
            start += -(-size // PAGE) * PAGE
        self.region = device.alloc(start)
        parts = [Buffer(self.region.address + first, size) for first, size in places]
        self.keys, self.values = Keys(keys, parts[0]), Values(values, parts[1], parts[2])
        device.write(parts[0], keys.image())
        device.write(parts[1], values.image())
        self.rows = Rows(device.alloc(8 * 128), 128)
        device.write(self.rows.buffer, np.ones(8 * SIZE, np.float32))
        self.output = Rows(device.alloc(8 * 128), 128)
        if allow:
            device.allow_appends(self.region)

    def append(self, keys: bool = True) -> AppendJob:
        name, place = ("append keys", self.keys) if keys else ("append values", self.values)
        return AppendJob(name, 2, self.rows, place, 0)

    def scores(self, bank: int, total: int = 2, name: str = "scores") -> ScoresJob:
        return ScoresJob(f"{name} {bank}", 2, self.rows, self.keys, View(total), 0.5, bank, Wait.WEIGHTS)

    def weighted(self, bank: int, total: int = 2) -> ValuesJob:
        return ValuesJob(f"values {bank}", 2, self.values, total, self.output, bank, Wait.ACTIVATIONS)


def test_banks(device):
    """The check of jobs refuses what the hardware refuses: scores that overwrite others, and values without scores. It
    refuses a batch that leaves a bank full, too: the next batch would find it so."""
    head = Head(device)
    good = [head.scores(0), head.scores(1), head.weighted(0), head.scores(0), head.weighted(1), head.weighted(0)]
    device.prepare(good)
    cases: list[tuple[list[Job], str, bool]] = [
        (
            [head.scores(0), head.scores(0, name="again")],
            "again 0 overwrites scores of bank 0 that no job has read",
            True,
        ),
        ([head.scores(1), head.scores(0), head.scores(1)], "scores 1 overwrites scores of bank 1 that no job", True),
        ([head.weighted(0)], "values 0 reads scores that no job before it computes", True),
        ([head.scores(1), head.weighted(0)], "values 0 reads scores that no job before it computes", True),
        ([head.scores(0), head.weighted(0), head.weighted(0)], "values 0 reads scores that no job before it", True),
        ([head.scores(0, 2), head.weighted(0, 3)], "values 0 reads scores that no job before it computes", True),
        (
            [head.scores(0), head.scores(1), head.weighted(1)],
            "scores 0 computes scores, and no job of its batch",
            False,
        ),
    ]
    for jobs, message, refused in [(good, "", False), *cases]:
        accepted = Accepted()
        codes = [accepted.take(CONFIG, job.descriptor().to_words()) for job in jobs]
        assert (codes[-1] == ErrorCode.SHAPE) == refused, message
        assert not any(codes[:-1])
        assert message or not accepted.banks
        if message:
            with pytest.raises(DeviceError, match=f"^layer {message}"):
                device.prepare(jobs)


@pytest.mark.parametrize("keys", [True, False])
def test_appends_outside(device, keys):
    """Without allow_appends nothing is appended; and only to the one buffer that it names."""
    head = Head(device, allow=False)
    job = head.append(keys)
    place = job.place.stream.address
    message = (
        f"^layer {job.name} appends to a cache at the addresses {place:#x} to .*, and those that allow_appends has"
    )
    with pytest.raises(DeviceError, match=f"{message} given are none$"):
        device.submit([job])
    device.allow_appends(head.region)
    prepared = device.prepare([job])
    device.wait(device.submit(prepared), TIMEOUT)
    other = Head(device)
    last = other.region.address + other.region.size - 1
    for batch in ([job], prepared):
        with pytest.raises(DeviceError, match=f"{message} given are {other.region.address:#x} to {last:#x}$"):
            device.submit(batch)
    device.wait(device.submit([other.append(keys)]), TIMEOUT)
    device.allow_appends(head.region)
    device.wait(device.submit(prepared), TIMEOUT)
    for write in job.writes():
        first, end = write.buffer.address, write.buffer.address + write.size
        for allowed in (range(first + 1, end), range(first, end - 1), range(end, end + write.size)):
            with pytest.raises(DeviceError, match="appends to a cache at the addresses"):
                check_jobs(CONFIG, [job], allowed)
    device.free(head.region)
    with pytest.raises(DeviceError, match=r"given are none$"):
        device.submit([other.append(keys)])


def test_no_change_while_a_batch_runs(device):
    head = Head(device)
    ticket = device.submit([head.append()])
    with pytest.raises(DeviceError, match=r"^a batch is not done, and the addresses of appends cannot change before$"):
        device.allow_appends(None)
    device.wait(ticket, TIMEOUT)
    device.allow_appends(None)


def test_registers():
    """The hardware has the same bounds, in its units; none when it is opened."""
    with InstantDevice(CONFIG) as device:
        values = device.platform._values

        def bounds() -> tuple[int, int]:
            return values[offset("cache_first")] * CACHE_UNIT, values[offset("cache_end")] * CACHE_UNIT

        head = Head(device)
        assert bounds() == (head.region.address, head.region.address + head.region.size)
        count = device.platform.accesses
        device.allow_appends(head.region)
        assert device.platform.accesses == count
        device.allow_appends(None)
        assert bounds() == (0, 0)
        device.allow_appends(head.region)
    # Another program may have left bounds.
    platform = InstantPlatform(CONFIG)
    platform._values |= {offset("cache_first"): 7, offset("cache_end"): 9}
    with AgainDevice(CONFIG, platform):
        assert platform._values[offset("cache_first")] == platform._values[offset("cache_end")] == 0


class AgainDevice(AcceleratorDevice):
    name = "again"
