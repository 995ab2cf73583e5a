# SPDX-License-Identifier: Apache-2.0
"""A model's linear layers in a device's memory, and the batches that run those between two stages."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from onnxruntime import OrtValue

from hw.spec.control.descriptor import FLOAT_BYTES
from hw.spec.memory.geometry import LayerLayout
from sw.devices import pack
from sw.devices.base import Buffer, Device, LinearJob, PreparedBatch, result_bytes, view_results, weight_bytes
from sw.devices.base import weight_image as image
from sw.model.linear import QuantizedLinear
from sw.ort.stages import float_array
from sw.runtime.usage import Usage

TIMEOUT = 3600.0
"""Seconds that a batch may take. Simulated, 16 tokens of a head of 150,000 rows take minutes."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A layer whose weights are in the device's memory.

    Members
    -------
    name, input_name, output_name: of the model's layer.
    k: the true in_features. planes: see sw.devices.pack.PreparedLayer.
    bias: float32 [N] that its ONNX node adds, or None.
    """

    name: str
    input_name: str
    output_name: str
    k: int
    planes: int
    layout: LayerLayout
    weights: Buffer
    bias: np.ndarray | None


def place(device: Device, linear: QuantizedLinear) -> Placed:
    """Packs a layer and writes its weights. Raises UserError if the hardware cannot run it, or has no room."""
    prepared = pack.prepare(device.config, linear)
    weights = device.alloc(weight_bytes(prepared.layout))
    device.write(weights, image(prepared.layout, prepared.beats))
    return Placed(
        linear.name,
        linear.input_name,
        linear.output_name,
        linear.k,
        prepared.planes,
        prepared.layout,
        weights,
        linear.bias if linear.bias_in_node else None,
    )


class Batch:
    """The layers that follow one stage: submitted together, and one behind the other where they share activations.

    last_only: layers of which a caller may want the last token alone, the head. made: tensors that the stage before
    makes, in a place of our choice.
    """

    def __init__(self, device: Device, layers: Sequence[Placed], last_only: frozenset[str], made: frozenset[str]):
        self._device = device
        tokens = device.config.max_tokens
        self._groups: list[tuple[Buffer, list[tuple[Placed, Buffer]]]] = []

        def operands(layer: Placed) -> tuple:
            """What layers that share activations have in common: the tensor's rows, and how they lie in memory."""
            shape = layer.planes, layer.layout.k, layer.layout.group_size
            return layer.input_name, layer.name in last_only, *shape

        for _, same in groupby(sorted(layers, key=operands), key=operands):
            members = [(layer, device.alloc(result_bytes(layer.layout, tokens))) for layer in same]
            layout = members[0][0].layout
            self._groups.append((device.alloc(FLOAT_BYTES * tokens * layout.k), members))
        self._last_only, self._made = last_only, made
        self._runs: dict[tuple[int, bool], _Run] = {}

    def run(
        self, tokens: int, last: bool, values: dict[str, OrtValue], places: dict[str, OrtValue], usage: Usage
    ) -> None:
        """From the activations in `values` to the results in it.

        last: compute the last token alone where `last_only` allows it. places: gets the tensors that calls with the
        same `tokens` and `last` always have in the same place.
        """
        start = time.perf_counter()
        run = self._runs.get((tokens, last))
        if run is None:
            run = self._runs[tokens, last] = self._prepare(tokens, last, values)
            places.update(run.fixed)
            values.update(run.fixed)
        run.take(values)
        taken, device = time.perf_counter(), self._device.seconds
        completions = self._device.wait(self._device.submit(run.batch), TIMEOUT)
        waited, device = time.perf_counter(), self._device.seconds - device
        run.give()
        usage.conversion += taken - start + time.perf_counter() - waited
        usage.driver += waited - taken - device
        usage.device += device
        for completion in completions:
            usage.cycles += completion.cycles
            usage.beats += completion.beats

    def _prepare(self, tokens: int, last: bool, values: dict[str, OrtValue]) -> "_Run":
        run = _Run()
        jobs = []
        for activations, members in self._groups:
            first = members[0][0]
            like = float_array(values[first.input_name])
            only_last = last and first.name in self._last_only
            rows = 1 if only_last else tokens
            view = self._device.view(activations)[: FLOAT_BYTES * rows * first.layout.k].view(np.float32)
            direct = first.input_name in self._made and first.input_name not in run.fixed
            run.add_input(first, like, view.reshape(rows, first.planes, -1), direct)
            for index, (layer, results) in enumerate(members):
                job = LinearJob(layer.name, layer.layout, rows, layer.weights, activations, results, index > 0)
                shape = (*like.shape[:-2], rows, layer.layout.n) if like.ndim > 1 else (rows, layer.layout.n)
                run.add_output(layer, shape, like.dtype, view_results(self._device, job))
                jobs.append(job)
        run.batch = self._device.prepare(jobs)
        return run


class _Run:
    """A batch for one number of tokens: what is copied before and after, and what need not be.

    Members
    -------
    batch: as the device prepared it.
    fixed: tensors that are always in the same place.
    """

    batch: PreparedBatch

    def __init__(self) -> None:
        self.fixed: dict[str, OrtValue] = {}
        self._before: list[tuple[str, np.ndarray]] = []
        self._after: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def add_input(self, layer: Placed, value: np.ndarray, view: np.ndarray, direct: bool) -> None:
        """value: the activations of this call. view: [M, planes, padded K] in the device's memory.

        direct: whether the tensor may lie there from now on.
        """
        rows, planes, padded = view.shape
        view[:, :, layer.k :] = 0
        source = value.reshape(-1, 1, layer.k)[-rows:]
        if direct and (planes, padded) == (1, layer.k) and source.size == value.size and value.dtype == np.float32:
            view[:] = source
            self.fixed[layer.input_name] = OrtValue.ortvalue_from_numpy(view.reshape(value.shape))
        else:
            self._before.append((layer.input_name, view[:, :, : layer.k]))

    def add_output(self, layer: Placed, shape: Sequence[int], dtype: np.dtype, view: np.ndarray) -> None:
        """shape, dtype: of the tensor. view: [M, N] in the device's memory."""
        if dtype == np.float32 and view.flags.c_contiguous:
            rows = view
        else:
            rows = np.empty(view.shape, dtype)
        if rows is not view or layer.bias is not None:
            self._after.append((rows, view, layer.bias))
        self.fixed[layer.output_name] = OrtValue.ortvalue_from_numpy(rows.reshape(shape))

    def take(self, values: dict[str, OrtValue]) -> None:
        """Puts activations where the device reads them, if they are not there already."""
        for name, view in self._before:
            rows, _, k = view.shape
            view[:] = float_array(values[name]).reshape(-1, 1, k)[-rows:]

    def give(self) -> None:
        """Makes results what the graph expects."""
        # What is too large for float16 becomes infinite, as in onnxruntime; a layer that gets it refuses it by name.
        with np.errstate(over="ignore"):
            for rows, view, bias in self._after:
                if bias is None:
                    rows[:] = view
                else:
                    np.add(view, bias, out=rows, casting="same_kind")
