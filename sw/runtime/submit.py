# SPDX-License-Identifier: Apache-2.0
"""Runs a batch on a device, and counts what it costs."""

import time
from collections.abc import Sequence

from sw.devices.base import Device, Job, PreparedBatch
from sw.runtime.usage import Usage

TIMEOUT = 3600.0
"""Seconds that a batch may take. In simulation, 16 tokens of a head of 150,000 rows take minutes."""


def run_batch(device: Device, batch: PreparedBatch | Sequence[Job], usage: Usage) -> None:
    """Submits a batch, waits for it, and adds its cycles, beats and times to `usage`. Raises DeviceError as `wait`."""
    start, before = time.perf_counter(), device.seconds
    completions = device.wait(device.submit(batch), TIMEOUT)
    taken, hardware = time.perf_counter() - start, device.seconds - before
    usage.driver += taken - hardware
    usage.device += hardware
    for completion in completions:
        usage.cycles += completion.cycles
        usage.beats += completion.beats
