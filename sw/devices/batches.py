# SPDX-License-Identifier: Apache-2.0
"""Batches, tickets and timeouts: what all devices of this package share. A thread runs the batches one by one."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from hw.spec.config import AcceleratorConfig
from sw.devices.arena import Arena
from sw.devices.base import Buffer, Completion, DeviceError, LinearJob, check_jobs


@dataclass(eq=False)
class _Batch:
    jobs: Sequence[LinearJob]
    completions: list[Completion] = field(default_factory=list)
    future: Future | None = None


class BatchDevice(ABC):
    """Memory, checks, tickets and timeouts. A subclass computes: see `run`. Implements sw.devices.base.Device."""

    name: str

    def __init__(self, config: AcceleratorConfig, memory: Arena):
        self.config = config
        self.memory = memory
        self.stopping = threading.Event()
        self._executor = ThreadPoolExecutor(1, f"gristmill-{self.name}")
        self._batches: dict[int, _Batch] = {}
        self._tickets = 0
        self._closed = False

    @abstractmethod
    def run(self, jobs: Sequence[LinearJob]) -> Iterator[Completion]:
        """Computes the jobs of a batch in order, in a thread of its own; yields each one's completion when its results
        are in memory. Looks at `stopping` a few times a second and may then return early.
        """

    def alloc(self, size: int) -> Buffer:
        """See Device."""
        self._check_open()
        return self.memory.alloc(size)

    def free(self, buffer: Buffer) -> None:
        """See Device."""
        self._check_open()
        self.memory.free(buffer)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        """See Device."""
        self._check_open()
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if len(raw) > buffer.size:
            raise DeviceError(f"{len(raw):,} bytes do not fit a buffer of {buffer.size:,}")
        self.memory.view(buffer)[: len(raw)] = raw

    def read(self, buffer: Buffer, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """See Device."""
        self._check_open()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > buffer.size:
            raise DeviceError(f"{size:,} bytes cannot be read from a buffer of {buffer.size:,}")
        return self.memory.view(buffer)[:size].copy().view(dtype).reshape(shape)

    def submit(self, jobs: Sequence[LinearJob]) -> int:
        """See Device."""
        self._check_open()
        check_jobs(self.config, jobs)
        for job in jobs:
            for buffer in (job.weights, job.activations, job.results):
                self.memory.view(buffer)
        batch = _Batch(tuple(jobs))
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
        with suppress(CancelledError, TimeoutError):
            batch.future.exception(timeout)
        self._check_open()
        if not batch.future.done():
            done, total = len(batch.completions), len(batch.jobs)
            name = batch.jobs[min(done, total - 1)].name
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
            self._batches.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"device {self.name} is closed")

    def _work(self, batch: _Batch) -> None:
        for completion in self.run(batch.jobs):
            batch.completions.append(completion)
