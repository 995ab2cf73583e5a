# SPDX-License-Identifier: Apache-2.0
"""The numerics in numpy as a device: what every other device must answer, from the same memory."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.layout import unpack
from hw.spec.numerics import Activations, Weights, linear
from sw.devices.base import Completion
from sw.devices.simulated import SimulatedDevice, Staged

ROWS_AT_ONCE = 4096


class ReferenceDevice(SimulatedDevice):
    """Unpacks the weight stream from memory and computes with hw.spec.numerics. There is no hardware: 0 cycles."""

    name = "reference"

    def run(self, staged: Sequence[Staged]) -> Iterator[Completion]:
        """See SimulatedDevice."""
        for item in staged:
            if self.stopping.is_set():
                return
            start = time.thread_time()
            item.results[:] = reference_linear(self.config, unpack(item.job.layout, item.beats), item.activations)
            yield Completion(item.job.name, 0, item.job.layout.beats, time.thread_time() - start)


def reference_linear(config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
    """hw.spec.numerics.linear, float32 [M, N], some rows at a time: a head of 150,000 rows would take gigabytes."""
    parts = []
    for start in range(0, len(weights.q), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        parts.append(linear(config, Weights(*(values[rows] for values in weights)), activations))
    return np.concatenate(parts, axis=1)
