# SPDX-License-Identifier: Apache-2.0
"""The interface of every device: memory, and jobs that read their operands from it and write results to it.

Software uses float32 and physical addresses. hw.spec.control.descriptor defines the layout of memory. The results are
those of hw.spec.numerics, bit for bit, on all devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import result_pitch, weight_bytes, weights_stride
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.packing import stripe, unstripe
from sw.devices.jobs import PAGE, Buffer, DeviceError, Job, LinearJob

__all__ = [
    "PAGE",
    "Buffer",
    "Completion",
    "Device",
    "DeviceError",
    "Job",
    "LinearJob",
    "PreparedBatch",
    "image_beats",
    "read_results",
    "result_bytes",
    "view_results",
    "weight_bytes",
    "weight_image",
]


class Completion(NamedTuple):
    """The cost of a finished job, or of several that follow each other.

    Members
    -------
    name: the last job's name.
    cycles: cycles from the last result of the previous completion (or the start of the batch) to the last result of
        this one; 0 without hardware.
    beats: beats of the weight streams.
    seconds: processor time of a simulation since the previous completion; wall time on a board.
    jobs: number of jobs; more than one only in batches that were prepared `together`.
    """

    name: str
    cycles: int
    beats: int
    seconds: float
    jobs: int = 1


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Jobs that a device has checked. They may be submitted any number of times: see `Device.prepare`.

    Members
    -------
    jobs: the batch's jobs, in order, as they were prepared.
    device: the device that prepared it.
    frees: number of buffers that had been freed on this device at that time.
    """

    jobs: tuple[Job, ...]
    device: "Device"
    frees: int


class Device(Protocol):
    """One accelerator and its memory. Also a context manager that closes it.

    Members
    -------
    name: the device's name for `sw.devices.open_device`.
    config: the hardware's config.
    """

    name: str
    config: AcceleratorConfig

    @property
    def seconds(self) -> float:
        """Wall time of the hardware so far: the time to simulate it, or to wait for its interrupt. The rest of the time
        of `submit` and `wait` is the driver's.
        """
        ...

    def alloc(self, size: int) -> Buffer:
        """Allocates `size` bytes of memory. Raises DeviceError if there is no free region of this size."""
        ...

    def free(self, buffer: Buffer) -> None:
        """Frees a buffer. No unfinished job may use it."""
        ...

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        """Copies an array to the start of a buffer, which may be a part of an allocated one."""
        ...

    def read(self, buffer: Buffer, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """Copies an array from the start of a buffer, which may be a part of an allocated one."""
        ...

    def view(self, buffer: Buffer) -> np.ndarray:
        """The buffer itself, uint8 [size], for access to activations and results without a copy.

        Data that is written to it is visible to jobs that are submitted afterwards. Results are valid after `wait` has
        returned for their batch. Weights must be written with `write`.
        """
        ...

    def prepare(self, jobs: Sequence[Job], *, together: bool = False) -> PreparedBatch:
        """Checks a batch and computes everything that does not change between submissions.

        together: one completion for all jobs that are complete when the driver looks, so that it reads few registers.
        Raises DeviceError for impossible jobs.
        """
        ...

    def move(self, batch: PreparedBatch, by: int) -> None:
        """Moves a prepared batch to the position `by` after that of its jobs: they are now `job.moved(by)`.

        Raises DeviceError if a job is not possible there, or if the batch was submitted and is not done.
        """
        ...

    def allow_appends(self, buffer: Buffer | None) -> None:
        """Lets AppendJobs write this buffer, and nothing else: a guard for all other memory. None: nothing.

        Raises DeviceError if a batch is not done, or if the buffer is not allocated.
        """
        ...

    def submit(self, batch: Sequence[Job] | PreparedBatch) -> int:
        """Starts a batch of jobs, which run in order, and returns its ticket at once.

        Hardware then works on the jobs that fit into its queue. The others, and all jobs of a simulation, make progress
        only during a call of `wait`. Raises DeviceError for impossible jobs; then no job of the batch runs.
        """
        ...

    def wait(self, ticket: int, timeout: float) -> list[Completion]:
        """Waits until a batch is done, up to about `timeout` seconds; one completion per job. A ticket is valid once.

        Raises DeviceError after a timeout or if the batch failed. The message says what was waited for, or why the
        batch failed, with the layer's name if its activations are the cause. After a timeout the batch continues, and
        `wait` may be called again. A batch that failed is over, and its results are undefined.
        """
        ...

    def close(self) -> None:
        """Stops all jobs and frees all resources. Closing twice is harmless; any other use after it is an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def result_bytes(layout: LayerLayout, tokens: int) -> int:
    """Size in bytes of a layer's results in memory."""
    return tokens * result_pitch(layout.n)


def view_results(device: Device, job: LinearJob) -> np.ndarray:
    """A job's results in the device's memory: float32 [M, N], with the pitch of the results between rows."""
    size = result_bytes(job.layout, job.tokens)
    rows = device.view(job.results)[:size].view(np.float32).reshape(job.tokens, -1)
    return rows[:, : job.layout.n]


def read_results(device: Device, job: LinearJob) -> np.ndarray:
    """A copy of a finished job's results: float32 [M, N]."""
    return view_results(device, job).copy()


def weight_image(layout: LayerLayout, beats: np.ndarray) -> np.ndarray:
    """A layer's beats in the layout of memory: uint8 [weight_bytes], with zeros between the ports' regions."""
    image = np.zeros(weight_bytes(layout), np.uint8)
    for region, part in zip(_regions(layout, image), stripe(layout.config, beats), strict=True):
        region[:] = part
    return image


def image_beats(layout: LayerLayout, image: np.ndarray) -> np.ndarray:
    """Inverse of `weight_image`: uint8 [beats, beat_bytes]."""
    return unstripe(layout.config, np.stack(_regions(layout, image)))


def _regions(layout: LayerLayout, image: np.ndarray) -> list[np.ndarray]:
    """The bytes that each port reads."""
    stride, size = weights_stride(layout), layout.beats * layout.config.port_width // 8
    return [image[port * stride :][:size] for port in range(layout.config.ports)]
