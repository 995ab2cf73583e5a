# SPDX-License-Identifier: Apache-2.0
"""A model's linear layers in a device's memory, and the batches that run those between two stages."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from onnxruntime import OrtValue

from hw.spec.descriptor import FLOAT_BYTES
from hw.spec.layout import LayerLayout
from sw import pack
from sw.devices.base import Buffer, Device, LinearJob, PreparedBatch, result_bytes, view_results, weight_bytes
from sw.devices.base import weight_image as image
from sw.linear import QuantizedLinear
from sw.runtime.stages import float_array
from sw.runtime.usage import Usage

TIMEOUT = 3600.0
"""Seconds that a batch may take. Simulated, 16 tokens of a head of 150,000 rows take minutes."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A layer whose weights are in the device's memory.

    Members
    -------
    name, input_name, output_name: of the model's layer.
    k: the true in_features. planes: see sw.pack.PreparedLayer.
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

    last_only: layers of which a caller may want the last token alone, the head.
    """

    def __init__(self, device: Device, layers: Sequence[Placed], last_only: frozenset[str]):
        self._device = device
        tokens = device.config.max_tokens
        self._groups: list[tuple[Buffer, list[tuple[Placed, Buffer]]]] = []
        for _, same in groupby(sorted(layers, key=_operands), key=_operands):
            members = [(layer, device.alloc(result_bytes(layer.layout, tokens))) for layer in same]
            layout = members[0][0].layout
            self._groups.append((device.alloc(FLOAT_BYTES * tokens * layout.k), members))
        self._last_only = last_only
        self._runs: dict[tuple[int, bool], _Run] = {}

    def run(
        self, tokens: int, last: bool, values: dict[str, OrtValue], places: dict[str, OrtValue], usage: Usage
    ) -> None:
        """From the activations in `values` to the results in it.

        last: compute the last token alone where `last_only` allows it. places: gets the tensors that calls with the same
        `tokens` and `last` always have in the same place.
        """
        run = self._runs.get((tokens, last))
        if run is None:
            run = self._runs[tokens, last] = self._prepare(tokens, last, values)
            places.update(run.fixed)
        start = time.perf_counter()
        run.take(values)
        taken, device = time.perf_counter(), self._device.seconds
        completions = self._device.wait(self._device.submit(run.batch), TIMEOUT)
        waited, device = time.perf_counter(), self._device.seconds - device
        run.give(values)
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
            run.add_input(first, like, view.reshape(rows, first.planes, -1))
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
    fixed: tensors that lie where onnxruntime and the device both reach them, or are copied from and to one place.
    """

    batch: PreparedBatch

    def __init__(self) -> None:
        self.fixed: dict[str, OrtValue] = {}
        self._before: list[Callable[[dict[str, OrtValue]], None]] = []
        self._after: list[Callable[[], None]] = []

    def add_input(self, layer: Placed, like: np.ndarray, view: np.ndarray) -> None:
        """like: the activations of this call. view: [M, planes, padded K] in the device's memory."""
        name, k = layer.input_name, layer.k
        rows = len(view)
        view[:, :, k:] = 0

        def copy(values: dict[str, OrtValue]) -> None:
            if values[name].data_ptr() != address:
                view[:, :, :k] = float_array(values[name]).reshape(-1, 1, k)[-rows:]

        direct = view.shape[1:] == (1, k) and rows * k == like.size and like.dtype == np.float32
        address = view.ctypes.data if direct else 0
        if direct:
            self.fixed[name] = OrtValue.ortvalue_from_numpy(view.reshape(like.shape))
        self._before.append(copy)

    def add_output(self, layer: Placed, shape: Sequence[int], dtype: np.dtype, view: np.ndarray) -> None:
        """view: [M, N] in the device's memory."""
        bias = layer.bias
        if dtype == np.float32 and view.flags.c_contiguous:
            array = view.reshape(shape)
            if bias is not None:
                self._after.append(lambda: np.add(view, bias, out=view))
        else:
            array = np.empty(shape, dtype)
            rows = array.reshape(view.shape)
            if bias is not None:
                self._after.append(lambda: np.add(view, bias, out=rows, casting="same_kind"))
            else:
                self._after.append(lambda: np.copyto(rows, view, casting="same_kind"))
        self.fixed[layer.output_name] = OrtValue.ortvalue_from_numpy(array)
        self._outputs = [*getattr(self, "_outputs", []), layer.output_name]

    def take(self, values: dict[str, OrtValue]) -> None:
        """Puts activations where the device reads them, if they are not there already."""
        for copy in self._before:
            copy(values)

    def give(self, values: dict[str, OrtValue]) -> None:
        """Makes results what the graph expects."""
        for finish in self._after:
            finish()
        for name in self._outputs:
            values[name] = self.fixed[name]


def _operands(layer: Placed) -> tuple:
    """What layers that share activations have in common: the tensor, and how it lies in memory."""
    return layer.input_name, layer.planes, layer.layout.k, layer.layout.group_size
