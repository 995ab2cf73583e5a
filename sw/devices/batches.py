# SPDX-License-Identifier: Apache-2.0
"""Batches, tickets and timeouts, for all devices of this package.

A device has no thread of its own. `submit` starts the hardware, and the thread that calls `wait` drives the device. A
batch starts when all earlier batches are done, independent of which thread waits for them. A model's token is a hundred
small batches; to pass each to another thread and back would cost more than the rest of the software's work for it.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Self, TypeVar

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import CACHE_UNIT
from hw.spec.memory.geometry import ceil_div
from sw.devices.arena import Arena
from sw.devices.base import Buffer, Completion, DeviceError, Job, PreparedBatch
from sw.devices.jobs import NO_APPENDS, AppendJob, Moving, check_jobs

Code = TypeVar("Code")


@dataclass(frozen=True, eq=False)
class Prepared(PreparedBatch, Generic[Code]):
    """A prepared batch.

    Members
    -------
    code: data that the device computed from the jobs in advance.
    moving: the jobs at the position to which the batch was moved.
    together: whether jobs that are complete at the same look have one completion.
    appends: the addresses that AppendJobs could write when the batch was checked; None: it has no such jobs.
    """

    code: Code
    moving: Moving
    together: bool = False
    appends: range | None = None


@dataclass(eq=False)
class _Running:
    """A batch that was submitted. work: the result of `run`; failure: the exception if the batch failed."""

    ticket: int
    batch: Prepared
    work: Iterator[Completion | None]
    completions: list[Completion] = field(default_factory=list)
    done: bool = False
    failure: BaseException | None = None


class BatchDevice(ABC, Generic[Code]):
    """Memory, checks, tickets and timeouts. A subclass computes, in `run`. Implements sw.devices.base.Device."""

    name: str

    def __init__(self, config: AcceleratorConfig, memory: Arena):
        self.config = config
        self.memory = memory
        self._turn = threading.Lock()
        self._queue: deque[_Running] = deque()
        self._batches: dict[int, _Running] = {}
        self._tickets = count(1)
        self._frees = 0
        self._appends = NO_APPENDS
        self._closed = False

    @property
    @abstractmethod
    def seconds(self) -> float:
        """See Device."""

    @abstractmethod
    def run(self, batch: Prepared[Code]) -> Iterator[Completion | None]:
        """Computes the jobs of a batch in order. Yields a job's completion when its results are in memory. Also yields
        None, first directly after the start and then a few times a second. If the device is closed, it is not resumed.
        """

    @abstractmethod
    def encode(self, jobs: Sequence[Job], often: bool) -> Code:
        """Data that the device computes from a batch in advance: `Prepared.code`.

        often: the batch was prepared, so it may be submitted several times.
        """

    def moved(self, batch: Prepared[Code]) -> None:
        """Called after a batch was moved, while it is not running: changes `Prepared.code` in place."""

    def appends_changed(self, allowed: range) -> None:
        """Called before the addresses of AppendJobs change, while no batch is running."""

    def alloc(self, size: int) -> Buffer:
        """See Device."""
        self._check_open()
        return self.memory.alloc(size)

    def free(self, buffer: Buffer) -> None:
        """See Device."""
        self._check_open()
        if buffer.address in self._appends:
            self.allow_appends(None)
        self._frees += 1
        self.memory.free(buffer)

    def view(self, buffer: Buffer) -> np.ndarray:
        """See Device."""
        self._check_open()
        return self.memory.view(buffer)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        """See Device."""
        self._check_open()
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if len(raw) > buffer.size:
            raise DeviceError(f"{len(raw):,} bytes do not fit a buffer of {buffer.size:,}")
        self._part(buffer)[: len(raw)] = raw

    def read(self, buffer: Buffer, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """See Device."""
        self._check_open()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > buffer.size:
            raise DeviceError(f"{size:,} bytes cannot be read from a buffer of {buffer.size:,}")
        return self._part(buffer)[:size].copy().view(dtype).reshape(shape)

    def prepare(self, jobs: Sequence[Job], *, together: bool = False) -> Prepared[Code]:
        """See Device."""
        return self._prepare(jobs, often=True, together=together)

    def move(self, batch: PreparedBatch, by: int) -> None:
        """See Device."""
        self._check_open()
        assert isinstance(batch, Prepared) and batch.device is self, "this device has prepared it"
        with self._turn:
            if any(running.batch is batch for running in tuple(self._queue)):
                raise DeviceError(f"the batch from layer {batch.jobs[0].name} is not done, and cannot move before")
            if by != batch.moving.by:
                batch.moving.move(by)
                self.moved(batch)

    def allow_appends(self, buffer: Buffer | None) -> None:
        """See Device."""
        self._check_open()
        allowed = NO_APPENDS
        if buffer is not None:
            self.memory.view(buffer)
            allowed = range(buffer.address, buffer.address + ceil_div(buffer.size, CACHE_UNIT) * CACHE_UNIT)
        if allowed == self._appends:
            return
        with self._turn:
            if self._queue:
                raise DeviceError("a batch is not done, and the addresses of appends cannot change before")
            self.appends_changed(allowed)
            self._appends = allowed

    def submit(self, batch: Sequence[Job] | PreparedBatch) -> int:
        """See Device."""
        self._check_open()
        if not isinstance(batch, PreparedBatch):
            batch = self._prepare(batch, often=False)
        elif batch.device is not self:
            raise DeviceError(f"the batch from layer {batch.jobs[0].name} was prepared for another device")
        elif batch.frees != self._frees:
            self._check_buffers(batch.jobs)
        assert isinstance(batch, Prepared), "this device has prepared it"
        if batch.appends is not None and batch.appends != self._appends:
            check_jobs(self.config, batch.moving.jobs, self._appends)
        running = _Running(next(self._tickets), batch, self.run(batch))
        self._batches[running.ticket] = running
        self._queue.append(running)
        # The batch starts now if it is the first of the queue; otherwise it starts when the earlier ones are done.
        if self._turn.acquire(blocking=False):
            try:
                if self._queue and self._queue[0] is running:
                    self._step(running)
            finally:
                self._turn.release()
        return running.ticket

    def wait(self, ticket: int, timeout: float) -> list[Completion]:
        """See Device."""
        self._check_open()
        batch = self._batches.get(ticket)
        if batch is None:
            raise DeviceError(f"no batch has ticket {ticket}, or its answer was taken already")
        deadline = time.monotonic() + timeout
        while not batch.done:
            if time.monotonic() > deadline or not self._turn.acquire(timeout=max(0, deadline - time.monotonic())):
                raise DeviceError(self._late(batch, timeout))
            try:
                self._check_open()
                if not batch.done:
                    self._step(self._queue[0])
            finally:
                self._turn.release()
        self._batches.pop(ticket, None)
        if batch.failure is not None:
            raise batch.failure
        return batch.completions

    def close(self) -> None:
        """See Device."""
        if not self._closed:
            self._closed = True
            with self._turn:
                for batch in self._queue:
                    batch.work.close()  # type: ignore[attr-defined]
                self._queue.clear()
                self._batches.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepare(self, jobs: Sequence[Job], often: bool, together: bool = False) -> Prepared[Code]:
        self._check_open()
        jobs = tuple(jobs)
        check_jobs(self.config, jobs, self._appends)
        self._check_buffers(jobs)
        code = self.encode(jobs, often)
        appends = self._appends if any(isinstance(job, AppendJob) for job in jobs) else None
        return Prepared(jobs, self, self._frees, code, Moving(jobs), together, appends)

    def _part(self, buffer: Buffer) -> np.ndarray:
        """The bytes of a buffer, or of a part of one: uint8 [size]."""
        self.memory.check(buffer)
        return self.memory.bytes(buffer.address, buffer.size)

    def _step(self, batch: _Running) -> None:
        """Drives the first batch of the queue until it yields None or is done. The caller holds the lock."""
        try:
            for completion in batch.work:
                if completion is None:
                    return
                batch.completions.append(completion)
            batch.done = True
        except BaseException as error:
            batch.done = True
            interrupted = not isinstance(error, Exception)
            batch.failure = DeviceError(f"batch {batch.ticket} was interrupted") if interrupted else error
            if interrupted:
                raise
        finally:
            if batch.done:
                self._queue.popleft()

    def _late(self, batch: _Running, timeout: float) -> str:
        done, jobs = sum(completion.jobs for completion in batch.completions), batch.batch.jobs
        return (
            f"device {self.name}: batch {batch.ticket} took longer than {timeout:g} s, {done} of {len(jobs)} jobs are"
            f" done, waiting for the results of layer {jobs[min(done, len(jobs) - 1)].name}"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"device {self.name} is closed")

    def _check_buffers(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for access in (*job.reads(), *job.writes()):
                self.memory.check(access.buffer)
