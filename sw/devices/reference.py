# SPDX-License-Identifier: Apache-2.0
"""The numpy definition of the numerics as a device: every other device must give the same results."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.packing import unpack
from hw.spec.numerics.linear import Activations, NumericsError, Weights
from hw.spec.ops import LINEAR, VECTOR
from hw.spec.ops.base import State
from hw.spec.ops.epilogue import write_outputs
from sw.common.arrays import slices
from sw.devices.arena import MEMORY_BYTES, Arena, anonymous_memory
from sw.devices.base import Buffer, Completion, DeviceError, Job, LinearJob, image_beats
from sw.devices.batches import BatchDevice, Prepared
from sw.devices.jobs import Access, AttentionJob, VectorJob


class ReferenceDevice(BatchDevice[None]):
    """Unpacks weight streams from memory and computes with hw.spec.numerics. Cycles are 0, as there is no hardware.

    Unpacked weights are kept, about 1.2 bytes each, until their buffer is written or freed.
    """

    name = "reference"

    def __init__(self, config: AcceleratorConfig):
        super().__init__(config, Arena(anonymous_memory(MEMORY_BYTES)))
        self._seconds = 0.0
        self._state = State()
        self._unpacked: dict[Buffer, tuple[LayerLayout, Weights]] = {}

    @property
    def seconds(self) -> float:
        """See Device: the time of the arithmetic."""
        return self._seconds

    def close(self) -> None:
        """See Device."""
        super().close()
        self._unpacked.clear()
        self.memory.close()

    def free(self, buffer: Buffer) -> None:
        """See Device."""
        super().free(buffer)
        self._unpacked.pop(buffer, None)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        """See Device."""
        super().write(buffer, values)
        if self._unpacked.pop(buffer, None) is None:
            written = Access("", buffer, buffer.size)
            for other in [other for other in self._unpacked if written.overlaps([Access("", other, other.size)])]:
                del self._unpacked[other]

    def encode(self, jobs: Sequence[Job], often: bool) -> None:
        """See BatchDevice: nothing, jobs are computed as they are."""

    def run(self, batch: Prepared[None]) -> Iterator[Completion | None]:
        """See BatchDevice."""
        self._state = State()
        for job in batch.moving.jobs:
            # The caller of `wait` may have reached its timeout.
            yield None
            start, processor = time.perf_counter(), time.thread_time()
            self._compute(job)
            self._seconds += time.perf_counter() - start
            yield Completion(job.name, 0, job.beats, time.thread_time() - processor)

    def _compute(self, job: Job) -> None:
        """Like `Op.execute` of hw.spec.ops, with weights that are unpacked once."""
        fields, memory, state = vars(job.descriptor()), _Bytes(self.memory), self._state
        try:
            if isinstance(job, AttentionJob):
                job.op.execute(self.config, fields, memory, state)
            elif isinstance(job, LinearJob) and not job.reuse:
                state.activations = LINEAR.read_activations(self.config, fields, memory)
        except NumericsError as error:
            raise DeviceError(f"layer {job.name}: {error}") from None
        if isinstance(job, LinearJob):
            assert state.activations is not None, "check_jobs refuses the first job if it reuses activations"
            values = reference_linear(self.config, self._weights(job), state.activations)
            write_outputs(fields, values, memory, state)
        elif isinstance(job, VectorJob):
            VECTOR.execute(self.config, fields, memory, state)
        for access in job.writes():
            self._unpacked.pop(access.buffer, None)

    def _weights(self, job: LinearJob) -> Weights:
        layout, weights = self._unpacked.get(job.weights, (None, None))
        if weights is None or layout != job.layout:
            weights = _unpack(job.layout, image_beats(job.layout, self.memory.view(job.weights)))
            self._unpacked[job.weights] = job.layout, weights
        return weights


class _Bytes:
    """Memory by addresses. Implements hw.spec.ops.base.Memory."""

    def __init__(self, memory: Arena):
        self.view = memory.bytes


def _unpack(layout: LayerLayout, beats: np.ndarray) -> Weights:
    """Like hw.spec.memory.packing.unpack, with less memory: some tiles at a time, scales and zero points in 16 bits."""
    parts = []
    for rows in slices(layout.n):
        shape = LayerLayout(layout.config, layout.k, rows.stop - rows.start, layout.group_size)
        first = rows.start // layout.config.tile * layout.tile_beats
        part = unpack(shape, beats[first : first + shape.beats])
        narrow = part.zero_points.astype(np.int16), part.scale_mantissas.astype(np.int16)
        parts.append((part.q, *narrow, part.exponents))
    return Weights(*(np.concatenate(values) for values in zip(*parts)))


def reference_linear(config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
    """hw.spec.numerics.linear, float32 [M, N], some rows at a time: a head of 150,000 rows would take gigabytes."""
    some = (Weights(*(values[rows] for values in weights)) for rows in slices(len(weights.q)))
    return np.concatenate([LINEAR.compute(config, part, activations) for part in some], axis=1)
