# SPDX-License-Identifier: Apache-2.0
"""Places a model's linear layers in a device's memory, and runs the layers between two stages as a batch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from onnxruntime import OrtValue

from hw.spec.control.descriptor import FLOAT_BYTES
from hw.spec.memory.geometry import LayerLayout
from sw.devices import pack
from sw.devices.base import Buffer, Device, LinearJob, PreparedBatch, result_bytes, view_results
from sw.model.linear import QuantizedLinear
from sw.ort.stages import float_array
from sw.runtime.submit import run_batch
from sw.runtime.usage import Usage


@dataclass(frozen=True, eq=False)
class Placed:
    """A layer whose weights are in the device's memory.

    Members
    -------
    name, input_name, output_name: names of the model's layer, its input tensor and its output tensor.
    k: in_features without padding. planes: see sw.devices.pack.PreparedLayer.
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
    """Packs a layer and writes its weights. Raises UserError if the hardware cannot run it or its memory is full."""
    prepared, weights = pack.load(device, linear)
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
    """The layers that follow one stage: one submission, in which layers that share activations are adjacent.

    last_only: layers for which a caller may request the last token alone (the head). made: tensors that the stage
    before makes; they can be written to a place that the batch chooses. kept: layers whose results the host will
    change, so that they must not stay in the device's memory.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[Placed],
        last_only: frozenset[str],
        made: frozenset[str],
        kept: frozenset[str] = frozenset(),
    ):
        self._device, self._kept = device, kept
        tokens = device.config.max_tokens
        self._groups: list[tuple[Buffer, list[tuple[Placed, Buffer]]]] = []

        def operands(layer: Placed) -> tuple:
            """The key that layers with shared activations have in common: the tensor, and its layout in memory."""
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
        """Computes results from the activations in `values`, and adds them to `values`.

        last: compute the last token alone where `last_only` allows it. places: receives the tensors that have the same
        place in all calls with the same `tokens` and `last`.
        """
        start = time.perf_counter()
        run = self._runs.get((tokens, last))
        if run is None:
            run = self._runs[tokens, last] = self._prepare(tokens, last, values)
            places.update(run.fixed)
            values.update(run.fixed)
        run.take(values)
        taken = time.perf_counter()
        run_batch(self._device, run.batch, usage)
        waited = time.perf_counter()
        run.give()
        usage.conversion += taken - start + time.perf_counter() - waited

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
                run.add_output(layer, shape, like.dtype, view_results(self._device, job), layer.name in self._kept)
                jobs.append(job)
        run.batch = self._device.prepare(jobs)
        return run


class _Run:
    """A batch for one number of tokens, with the tensors that are copied before and after it.

    Members
    -------
    batch: as the device prepared it.
    fixed: tensors that have the same place in every call.
    """

    batch: PreparedBatch

    def __init__(self) -> None:
        self.fixed: dict[str, OrtValue] = {}
        self._before: list[tuple[str, np.ndarray]] = []
        self._after: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def add_input(self, layer: Placed, value: np.ndarray, view: np.ndarray, direct: bool) -> None:
        """value: the activations of this call. view: [M, planes, padded K] in the device's memory.

        direct: whether later calls may place the tensor there without a copy.
        """
        rows, planes, padded = view.shape
        view[:, :, layer.k :] = 0
        source = value.reshape(-1, 1, layer.k)[-rows:]
        if direct and (planes, padded) == (1, layer.k) and source.size == value.size and value.dtype == np.float32:
            view[:] = source
            self.fixed[layer.input_name] = OrtValue.ortvalue_from_numpy(view.reshape(value.shape))
        else:
            self._before.append((layer.input_name, view[:, :, : layer.k]))

    def add_output(self, layer: Placed, shape: Sequence[int], dtype: np.dtype, view: np.ndarray, copy: bool) -> None:
        """shape, dtype: shape and element type of the tensor. view: [M, N] in the device's memory. copy: whether the
        tensor must be in the host's.
        """
        if dtype == np.float32 and view.flags.c_contiguous and not copy:
            rows = view
        else:
            rows = np.empty(view.shape, dtype)
        if rows is not view or layer.bias is not None:
            self._after.append((rows, view, layer.bias))
        self.fixed[layer.output_name] = OrtValue.ortvalue_from_numpy(rows.reshape(shape))

    def take(self, values: dict[str, OrtValue]) -> None:
        """Copies activations to where the device reads them, if they are not there already."""
        for name, view in self._before:
            rows, _, k = view.shape
            view[:] = float_array(values[name]).reshape(-1, 1, k)[-rows:]

    def give(self) -> None:
        """Converts results to the tensors that the graph expects."""
        # A value too large for float16 becomes infinite, as in onnxruntime; the layer that reads it raises an error.
        with np.errstate(over="ignore"):
            for rows, view, bias in self._after:
                if bias is None:
                    rows[:] = view
                else:
                    np.add(view, bias, out=rows, casting="same_kind")
