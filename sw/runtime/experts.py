# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on a device: it computes the chosen experts' linear layers; their numerics are in
sw.model.experts.

The tokens of a call are grouped by expert. Each expert that at least one token chose is read once, in ascending order,
with the rows of its tokens; the weights of all others are not read. EPS-MoE (arXiv 2410.12247) submits experts one
after the other as well. One batch has gate and up of all chosen experts, and one has down. SwiGLU between them and the
weighted sum after them are computed on the host.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnxruntime import OrtValue

from hw.spec.control.descriptor import FLOAT_BYTES
from sw.devices.base import Buffer, Device, LinearJob, result_bytes
from sw.graph.experts.match import Mixture
from sw.model.experts import add_weighted, swiglu
from sw.ort.stages import float_array
from sw.runtime.placement import Placed
from sw.runtime.submit import run_batch
from sw.runtime.usage import Usage


class PlacedExpert(NamedTuple):
    """An expert whose weights are in the device's memory."""

    gate: Placed
    up: Placed
    down: Placed


class Scratch:
    """Memory for the rows of one mixture at a time: all mixtures of a decoder share it."""

    def __init__(self, device: Device):
        self._device = device
        self._buffers: dict[str, Buffer] = {}

    def buffer(self, kind: str, size: int) -> Buffer:
        """The buffer of a kind, which has at least `size` bytes. Raises DeviceError if the memory is full."""
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.size < size:
            if buffer is not None:
                self._device.free(buffer)
            buffer = self._buffers[kind] = self._device.alloc(size)
        return buffer


class Chosen(NamedTuple):
    """An expert, and the tokens that chose it: int [R], ascending. first: rows of the experts before it."""

    expert: int
    tokens: np.ndarray
    first: int


def choose(weights: np.ndarray) -> list[Chosen]:
    """The experts that at least one token chose, in ascending order. weights: float32 [M, experts]."""
    found, first = [], 0
    for expert in np.flatnonzero((weights != 0).any(axis=0)):
        tokens = np.flatnonzero(weights[:, expert])
        found.append(Chosen(int(expert), tokens, first))
        first += len(tokens)
    return found


class ExpertBatch:
    """One mixture. It runs as sw.runtime.placement.Batch does."""

    def __init__(self, device: Device, mixture: Mixture, experts: Sequence[PlacedExpert], scratch: Scratch):
        self._device, self._mixture, self._experts, self._scratch = device, mixture, experts, scratch
        # Rows of all experts of a call, at most. Experts may have different formats, and so sizes of rows.
        self._rows = device.config.max_tokens * mixture.used
        read = {"x": self._layers("gate", "up"), "hidden": self._layers("down")}
        self._pitch = {kind: max(FLOAT_BYTES * layer.layout.k for layer in layers) for kind, layers in read.items()}
        for kind in ("gate", "up", "down"):
            self._pitch[kind] = max(result_bytes(layer.layout, 1) for layer in self._layers(kind))
        if any(_operands(expert.gate) != _operands(expert.up) for expert in experts):
            self._pitch["x of up"] = self._pitch["x"]
        for kind in self._pitch:
            # An error about memory is better before the first token than after it.
            self._buffer(kind)

    def _layers(self, *kinds: str) -> list[Placed]:
        return [getattr(expert, kind) for expert in self._experts for kind in kinds]

    def _buffer(self, kind: str) -> Buffer:
        """The memory of a kind of rows. A layer's own rows may be shorter than the pitch; they follow each other."""
        return self._scratch.buffer(kind, self._rows * self._pitch[kind])

    def _floats(self, kind: str, part: Chosen, row_bytes: int) -> np.ndarray:
        """An expert's rows in this memory: float32 [R, row_bytes / 4]."""
        start, rows = part.first * self._pitch[kind], len(part.tokens)
        view = self._device.view(self._buffer(kind))[start : start + rows * row_bytes]
        return view.view(np.float32).reshape(rows, -1)

    def run(
        self, tokens: int, last: bool, values: dict[str, OrtValue], places: dict[str, OrtValue], usage: Usage
    ) -> None:
        """Computes the mixture's output from its input and weights in `values`, and adds it to `values`."""
        start = time.perf_counter()
        like = float_array(values[self._mixture.input])
        x = like.reshape(tokens, -1)
        weights = float_array(values[self._mixture.weights]).astype(np.float32).reshape(tokens, -1)
        chosen = choose(weights)
        inputs = [job for part in chosen for job in self._gate_and_up(part, x)]
        usage.conversion += time.perf_counter() - start
        if inputs:
            run_batch(self._device, inputs, usage)
        start = time.perf_counter()
        outputs = [self._down(part) for part in chosen]
        usage.conversion += time.perf_counter() - start
        if outputs:
            run_batch(self._device, outputs, usage)
        start = time.perf_counter()
        total = np.zeros((tokens, self._experts[0].down.layout.n), np.float32)
        for part in chosen:
            results = self._results("down", self._experts[part.expert].down, part)
            add_weighted(total, part.tokens, weights[part.tokens, part.expert], results)
        with np.errstate(over="ignore"):
            result = total.reshape(*like.shape[:-1], -1).astype(like.dtype)
        values[self._mixture.output] = OrtValue.ortvalue_from_numpy(result)
        usage.conversion += time.perf_counter() - start

    def _gate_and_up(self, part: Chosen, x: np.ndarray) -> list[LinearJob]:
        gate, up, _ = self._experts[part.expert]
        rows = x[part.tokens]
        first = self._job("gate", gate, part, self._fill("x", gate, part, rows), False)
        if _operands(gate) == _operands(up):
            return [first, self._job("up", up, part, first.activations, True)]
        return [first, self._job("up", up, part, self._fill("x of up", up, part, rows), False)]

    def _down(self, part: Chosen) -> LinearJob:
        gate, up, down = self._experts[part.expert]
        hidden = swiglu(self._results("gate", gate, part), self._results("up", up, part))
        return self._job("down", down, part, self._fill("hidden", down, part, hidden), False)

    def _fill(self, kind: str, layer: Placed, part: Chosen, rows: np.ndarray) -> Buffer:
        """Writes a layer's activations, float32 [R, K], as its format needs them."""
        view = self._floats(kind, part, FLOAT_BYTES * layer.layout.k).reshape(len(rows), layer.planes, -1)
        view[:, :, : layer.k] = rows[:, None]
        view[:, :, layer.k :] = 0
        return self._buffer(kind).part(part.first * self._pitch[kind])

    def _results(self, kind: str, layer: Placed, part: Chosen) -> np.ndarray:
        """What a layer made: float32 [R, N]."""
        return self._floats(kind, part, result_bytes(layer.layout, 1))[:, : layer.layout.n]

    def _job(self, kind: str, layer: Placed, part: Chosen, activations: Buffer, reuse: bool) -> LinearJob:
        results = self._buffer(kind).part(part.first * self._pitch[kind])
        return LinearJob(layer.name, layer.layout, len(part.tokens), layer.weights, activations, results, reuse)


def _operands(layer: Placed) -> tuple[int, int, int]:
    """Layers for which this is equal can read the same activations."""
    return layer.planes, layer.layout.k, layer.layout.group_size
