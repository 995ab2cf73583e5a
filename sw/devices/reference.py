# SPDX-License-Identifier: Apache-2.0
"""The numerics in numpy as a device: what every other device must answer, from the same memory."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.descriptor import FLOAT_BYTES, result_pitch
from hw.spec.layout import unpack
from hw.spec.numerics import Activations, NumericsError, Weights, linear, quantise_activations
from sw.devices.arena import MEMORY_BYTES, Arena, anonymous_memory
from sw.devices.base import Completion, DeviceError, LinearJob, image_beats
from sw.devices.batches import BatchDevice

ROWS_AT_ONCE = 4096


class ReferenceDevice(BatchDevice):
    """Unpacks the weight stream from memory and computes with hw.spec.numerics. There is no hardware: 0 cycles."""

    name = "reference"

    def __init__(self, config: AcceleratorConfig):
        super().__init__(config, Arena(anonymous_memory(MEMORY_BYTES)))

    def run(self, jobs: Sequence[LinearJob]) -> Iterator[Completion]:
        """See BatchDevice."""
        for job in jobs:
            if self.stopping.is_set():
                return
            start = time.thread_time()
            self._compute(job)
            yield Completion(job.name, 0, job.layout.beats, time.thread_time() - start)

    def _compute(self, job: LinearJob) -> None:
        layout, tokens = job.layout, job.tokens
        x = self.memory.view(job.activations)[: FLOAT_BYTES * tokens * layout.k].view(np.float32)
        try:
            activations = quantise_activations(self.config, x.reshape(tokens, layout.k))
        except NumericsError as error:
            raise DeviceError(f"layer {job.name}: {error}") from None
        weights = unpack(layout, image_beats(layout, self.memory.view(job.weights)))
        pitch = result_pitch(layout.n)
        results = self.memory.view(job.results)[: tokens * pitch].view(np.float32).reshape(tokens, -1)
        results[:, : layout.n] = reference_linear(self.config, weights, activations)


def reference_linear(config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
    """hw.spec.numerics.linear, float32 [M, N], some rows at a time: a head of 150,000 rows would take gigabytes."""
    parts = []
    for start in range(0, len(weights.q), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        parts.append(linear(config, Weights(*(values[rows] for values in weights)), activations))
    return np.concatenate(parts, axis=1)
