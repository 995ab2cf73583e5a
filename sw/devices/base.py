# SPDX-License-Identifier: Apache-2.0
"""What every device offers: memory, and linear layers computed from it and into it.

Software deals in float32 and physical addresses. hw.spec.control.descriptor says how memory is laid out; the results
are those of hw.spec.numerics, bit for bit, on all devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import FLOAT_BYTES, result_pitch, weight_bytes, weights_stride
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.packing import stripe, unstripe
from sw.common.errors import UserError

PAGE = 4096
"""Alignment in bytes of every buffer and of every port's region: no burst of a bus crosses such an address."""


class DeviceError(UserError):
    """A device that did not answer, or was asked for something impossible. The message is one line."""


@dataclass(frozen=True)
class Buffer:
    """Bytes `address` to `address + size - 1` of a device's memory; the address is a multiple of PAGE."""

    address: int
    size: int


@dataclass(frozen=True)
class LinearJob:
    """One layer for one to max_tokens tokens: y[m, n] = sum_k x[m, k] * w[n, k].

    Members
    -------
    name: of the layer, for messages.
    layout: the layer's weight stream.
    tokens: M.
    weights: the weight stream as `weight_image` lays it out.
    activations: float32 [M, layout.k], K padded with zeros; in memory before the job is submitted.
    results: float32 [M, layout.n], each row beginning at a multiple of `result_pitch`: see `read_results`.
    reuse: take the activations of the job before, in the same batch: same buffer, M, K and group size. A job without
        loads them again, which costs time and changes nothing else.
    """

    name: str
    layout: LayerLayout
    tokens: int
    weights: Buffer
    activations: Buffer
    results: Buffer
    reuse: bool = False


class Completion(NamedTuple):
    """What a finished job took.

    Members
    -------
    name: of the layer.
    cycles: from the last result of the job before (or the start of the batch) to this job's last; 0 without hardware.
    beats: of the weight stream.
    seconds: processor time of a simulation since it finished the job before; wall time on a board.
    """

    name: str
    cycles: int
    beats: int
    seconds: float


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Jobs that a device has checked, and may be given as often as wanted: see `Device.prepare`.

    Members
    -------
    jobs: of the batch, in order.
    device: that prepared it.
    frees: buffers that this device had been given back by then.
    code: what the device worked out about the jobs beforehand.
    """

    jobs: tuple[LinearJob, ...]
    device: "Device"
    frees: int
    code: Any


class Device(Protocol):
    """One accelerator and its memory. Also a context manager that closes it.

    Members
    -------
    name: that `sw.devices.open_device` knows it by.
    config: what the hardware can do.
    """

    name: str
    config: AcceleratorConfig

    @property
    def seconds(self) -> float:
        """Wall time so far that was the hardware's own: simulating it, or waiting for its interrupt. The rest of what
        `submit` and `wait` take is the driver's.
        """
        ...

    def alloc(self, size: int) -> Buffer:
        """Takes `size` bytes of memory. Raises DeviceError if that much is not free."""
        ...

    def free(self, buffer: Buffer) -> None:
        """Gives a buffer back, which no unfinished job may use."""
        ...

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        """Copies an array to the start of a buffer."""
        ...

    def read(self, buffer: Buffer, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """Copies an array from the start of a buffer."""
        ...

    def view(self, buffer: Buffer) -> np.ndarray:
        """The buffer itself, uint8 [size], for activations and results that are not to be copied.

        What is written there reaches the jobs that are submitted afterwards; results are there once their batch was
        waited for. Weights go through `write`.
        """
        ...

    def prepare(self, jobs: Sequence[LinearJob]) -> PreparedBatch:
        """Checks a batch and works out what can be known about it, once for any number of submissions.

        Raises DeviceError for impossible jobs.
        """
        ...

    def submit(self, batch: Sequence[LinearJob] | PreparedBatch) -> int:
        """Starts a batch of jobs, which run in order, and returns its ticket at once.

        Hardware works from then on as far as its queue reaches; the rest, and all of a simulation, goes on while
        somebody waits. Raises DeviceError for impossible jobs; the batch then does not run at all.
        """
        ...

    def wait(self, ticket: int, timeout: float) -> list[Completion]:
        """Waits until a batch is done, up to about `timeout` seconds; one completion per job. A ticket is good once.

        Raises DeviceError, which says what was waited for, or why the batch failed: with the layer's name where its
        activations are at fault. The batch goes on after a timeout and may be waited for again; a batch that failed
        is over, and its results are undefined.
        """
        ...

    def close(self) -> None:
        """Stops what runs and gives everything back. Closing twice is harmless, other use an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def result_bytes(layout: LayerLayout, tokens: int) -> int:
    """Size in bytes of a layer's results in memory."""
    return tokens * result_pitch(layout.n)


def view_results(device: Device, job: LinearJob) -> np.ndarray:
    """A job's results in the device's memory: float32 [M, N], rows at the results' pitch."""
    size = result_bytes(job.layout, job.tokens)
    rows = device.view(job.results)[:size].view(np.float32).reshape(job.tokens, -1)
    return rows[:, : job.layout.n]


def read_results(device: Device, job: LinearJob) -> np.ndarray:
    """A copy of a finished job's results: float32 [M, N]."""
    return view_results(device, job).copy()


def weight_image(layout: LayerLayout, beats: np.ndarray) -> np.ndarray:
    """A layer's beats as they lie in memory: uint8 [weight_bytes], zeros between the ports' regions."""
    image = np.zeros(weight_bytes(layout), np.uint8)
    for region, part in zip(_regions(layout, image), stripe(layout.config, beats), strict=True):
        region[:] = part
    return image


def image_beats(layout: LayerLayout, image: np.ndarray) -> np.ndarray:
    """Inverse of `weight_image`: uint8 [beats, beat_bytes]."""
    return unstripe(layout.config, np.stack(_regions(layout, image)))


def _regions(layout: LayerLayout, image: np.ndarray) -> list[np.ndarray]:
    """What each port reads."""
    stride, size = weights_stride(layout), layout.beats * layout.config.port_width // 8
    return [image[port * stride :][:size] for port in range(layout.config.ports)]


def check_jobs(config: AcceleratorConfig, jobs: Sequence[LinearJob]) -> None:
    """Raises DeviceError, with the layer's name, if a batch asks for something that no device does."""
    if not jobs:
        raise DeviceError("a batch has at least one job")
    before: LinearJob | None = None
    written: set[int] = set()
    for job in jobs:
        layout = job.layout
        if layout.config != config:
            raise DeviceError(f"layer {job.name} is packed for other hardware (config {layout.config.digest[:16]})")
        if not 1 <= job.tokens <= config.max_tokens:
            raise DeviceError(f"layer {job.name}: M is 1 to max_tokens ({config.max_tokens}), not {job.tokens}")
        for what, buffer, size in (
            ("weights", job.weights, weight_bytes(layout)),
            ("activations", job.activations, FLOAT_BYTES * job.tokens * layout.k),
            ("results", job.results, result_bytes(layout, job.tokens)),
        ):
            if buffer.size < size:
                raise DeviceError(f"layer {job.name}: its {what} take {size:,} bytes, the buffer has {buffer.size:,}")
        if job.activations.address in written or job.activations.address == job.results.address:
            raise DeviceError(f"layer {job.name} reads results of its own batch: submit it in the next one")
        if job.reuse and (before is None or _operands(before) != _operands(job)):
            raise DeviceError(f"layer {job.name} reuses activations, and the job before has others (or none is before)")
        written.add(job.results.address)
        before = job


def _operands(job: LinearJob) -> tuple:
    return job.activations, job.tokens, job.layout.k, job.layout.group_size
