# SPDX-License-Identifier: Apache-2.0
"""A device in this process: memory as numpy arrays, batches computed one after the other by a thread."""

import bisect
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics import Activations, NumericsError, quantise_activations
from sw.devices.base import PAGE, Buffer, Completion, DeviceError, LinearJob, check_jobs, image_beats
from sw.errors import UserError

MEMORY_BYTES = 4 << 30
"""Address space; what is not allocated takes no memory."""


class Memory:
    """Allocates PAGE-aligned buffers from addresses 0 to `capacity` - 1, the lowest that is free."""

    def __init__(self, capacity: int = MEMORY_BYTES):
        self._capacity = capacity
        self._starts: list[int] = []
        self._bytes: dict[int, np.ndarray] = {}

    def alloc(self, size: int) -> Buffer:
        """A buffer of zeros. Raises DeviceError if no gap is large enough."""
        if size < 1:
            raise DeviceError(f"a buffer has at least 1 byte, not {size}")
        address = 0
        for start in self._starts:
            if start - address >= size:
                break
            address = start + -(-len(self._bytes[start]) // PAGE) * PAGE
        if address + size > self._capacity:
            raise DeviceError(f"the device's memory ({self._capacity:,} bytes) has no room for {size:,} more")
        bisect.insort(self._starts, address)
        self._bytes[address] = np.zeros(size, np.uint8)
        return Buffer(address, size)

    def free(self, buffer: Buffer) -> None:
        """Raises DeviceError for a buffer that is not allocated."""
        self.view(buffer)
        self._starts.remove(buffer.address)
        del self._bytes[buffer.address]

    def view(self, buffer: Buffer) -> np.ndarray:
        """The buffer's bytes: uint8 [size], writable. Raises DeviceError for a buffer that is not allocated."""
        values = self._bytes.get(buffer.address)
        if values is None or len(values) != buffer.size:
            raise DeviceError(f"no buffer of {buffer.size:,} bytes is allocated at address {buffer.address:#x}")
        return values


@dataclass(eq=False)
class Staged:
    """A job with copies of what it reads. results: float32 [M, N], the device's memory itself."""

    job: LinearJob
    beats: np.ndarray
    activations: Activations
    results: np.ndarray


@dataclass(eq=False)
class _Batch:
    staged: list[Staged]
    completions: list[Completion] = field(default_factory=list)
    future: Future | None = None


class SimulatedDevice(ABC):
    """Memory, checks, tickets and timeouts. A subclass computes: see `run`. Implements sw.devices.base.Device.

    The hardware's activation unit is simulated in software: float32 becomes integers when a batch is submitted.
    """

    name: str

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.stopping = threading.Event()
        self._memory = Memory()
        self._executor = ThreadPoolExecutor(1, f"gristmill-{self.name}")
        self._batches: dict[int, _Batch] = {}
        self._tickets = 0
        self._closed = False

    @abstractmethod
    def run(self, staged: Sequence[Staged]) -> Iterator[Completion]:
        """Computes the jobs of a batch in order, in a thread of its own; yields each one's completion when its results
        are in memory. Looks at `stopping` a few times a second and may then return early.
        """

    def alloc(self, size: int) -> Buffer:
        """See Device."""
        self._check_open()
        return self._memory.alloc(size)

    def free(self, buffer: Buffer) -> None:
        """See Device."""
        self._check_open()
        self._memory.free(buffer)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        """See Device."""
        self._check_open()
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if len(raw) > buffer.size:
            raise DeviceError(f"{len(raw):,} bytes do not fit a buffer of {buffer.size:,}")
        self._memory.view(buffer)[: len(raw)] = raw

    def read(self, buffer: Buffer, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """See Device."""
        self._check_open()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > buffer.size:
            raise DeviceError(f"{size:,} bytes cannot be read from a buffer of {buffer.size:,}")
        return self._memory.view(buffer)[:size].copy().view(dtype).reshape(shape)

    def submit(self, jobs: Sequence[LinearJob]) -> int:
        """See Device."""
        self._check_open()
        check_jobs(self.config, jobs)
        staged: list[Staged] = []
        for job in jobs:
            staged.append(self._stage(job, staged[-1] if job.reuse else None))
        batch = _Batch(staged)
        batch.future = self._executor.submit(self._work, batch)
        self._tickets += 1
        self._batches[self._tickets] = batch
        return self._tickets

    def wait(self, ticket: int, timeout: float) -> list[Completion]:
        """See Device."""
        self._check_open()
        batch = self._batches.get(ticket)
        if batch is None or batch.future is None:
            raise DeviceError(f"no batch has ticket {ticket}, or its answer was taken already")
        wait([batch.future], timeout)
        if not batch.future.done():
            done, total = len(batch.completions), len(batch.staged)
            name = batch.staged[min(done, total - 1)].job.name
            raise DeviceError(
                f"device {self.name}: batch {ticket} took longer than {timeout:g} s,"
                f" {done} of {total} jobs are done, waiting for the results of layer {name}"
            )
        del self._batches[ticket]
        batch.future.result()
        return batch.completions

    def close(self) -> None:
        """See Device."""
        if not self._closed:
            self._closed = True
            self.stopping.set()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._memory = Memory()
            self._batches.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"device {self.name} is closed")

    def _stage(self, job: LinearJob, before: Staged | None) -> Staged:
        layout, tokens = job.layout, job.tokens
        beats = image_beats(layout, self._memory.view(job.weights))
        results = self._memory.view(job.results)[: 4 * tokens * layout.n].view(np.float32).reshape(tokens, layout.n)
        if before is not None:
            return Staged(job, beats, before.activations, results)
        x = self.read(job.activations, np.float32, (tokens, layout.k))
        try:
            return Staged(job, beats, quantise_activations(self.config, x), results)
        except NumericsError as error:
            raise UserError(f"layer {job.name}: {error}") from None

    def _work(self, batch: _Batch) -> None:
        for completion in self.run(batch.staged):
            batch.completions.append(completion)
