# SPDX-License-Identifier: Apache-2.0
"""What a device computes of a graph: quantized linear layers, and mixtures of experts of which all layers are that."""

from collections.abc import Mapping
from typing import Protocol

from onnxruntime import OrtValue

from sw.checkpoints.adapter import Adapter
from sw.devices.base import Device
from sw.graph.experts.match import find_mixtures
from sw.graph.linears import Linears
from sw.ort.cut import Stage, experts_node
from sw.program.load import Progress
from sw.runtime.adapters import AdapterBatch, AdapterLayer, adapter_layers
from sw.runtime.experts import ExpertBatch, PlacedExpert, Scratch
from sw.runtime.placement import Batch, Placed, place
from sw.runtime.usage import Usage


class Runs(Protocol):
    """What follows a stage: see Batch.run."""

    def run(
        self, tokens: int, last: bool, values: dict[str, OrtValue], places: dict[str, OrtValue], usage: Usage
    ) -> None: ...


class Accelerated:
    """The layers of a graph on a device.

    logits: the tensor of the logits. progress: called with (layers done, layers in all, name) while weights are packed
    into the device's memory.

    Members
    -------
    nodes: what `cut` needs, a node for every layer and for every mixture.
    """

    def __init__(self, device: Device, linears: Linears, logits: str, progress: Progress | None):
        self._device, self._linears, self._logits, self._progress = device, linears, logits, progress
        self._updates: dict[str, dict[str, AdapterLayer]] = {}
        self._scratch, self._done = Scratch(device), 0
        self._index = {product: index for index, (_, product) in enumerate(linears.tensors)}
        self._mixtures = [part for part in find_mixtures(linears.file) if part.products <= self._index.keys()]
        inside = {product for part in self._mixtures for product in part.products}
        self._single = [index for product, index in self._index.items() if product not in inside]
        nodes = linears.nodes
        self.nodes = [nodes[index] for index in self._single]
        self.nodes += [experts_node(part.name, [part.input, part.weights], part.output) for part in self._mixtures]

    def adapt(self, adapters: Mapping[str, Adapter]) -> None:
        """Prepares adapters by their names. Raises UserError as `adapter_layers` does; experts cannot be adapted."""
        if adapters:
            single = {self._linears.names[index] for index in self._single}
            shapes = {each.name: (each.n, each.k) for each in self._linears.outlines() if each.name in single}
            self._updates = {name: adapter_layers(each, shapes) for name, each in adapters.items()}

    def place(self, stage: Stage) -> tuple[list[Runs], dict[str, AdapterBatch]]:
        """What the device computes after a stage, and after that for an adapter; all is in the device's memory."""
        count, found, adapted = len(self._single), list[Runs](), dict[str, AdapterBatch]()
        layers = [self._place(self._single[number]) for number in stage.accelerated if number < count]
        if layers:
            # Only the caller reads the logits, so those that it did not request need not be computed.
            heads = frozenset(layer.name for layer in layers if layer.output_name == self._logits)
            for name, own in self._updates.items():
                if pairs := [(layer, own[layer.name]) for layer in layers if layer.name in own]:
                    adapted[name] = AdapterBatch(self._device, name, pairs, heads)
            kept = (layer.name for layer in layers if any(layer.name in own for own in self._updates.values()))
            found.append(Batch(self._device, layers, heads, frozenset(stage.outputs), frozenset(kept)))
        for number in stage.accelerated:
            if number >= count:
                mixture = self._mixtures[number - count]
                experts = [
                    PlacedExpert(*(self._place(self._index[product]) for product in (part.gate, part.up, part.down)))
                    for part in mixture.experts
                ]
                found.append(ExpertBatch(self._device, mixture, experts, self._scratch))
        return found, adapted

    def outputs(self, stage: Stage) -> list[tuple[str, str]]:
        """(input, output) of what follows a stage: both have the same element type."""
        nodes = [self.nodes[number] for number in stage.accelerated]
        return [(node.input[0], node.output[0]) for node in nodes]

    def _place(self, index: int) -> Placed:
        if self._progress:
            self._progress(self._done, len(self._linears), self._linears.names[index])
        self._done += 1
        return place(self._device, self._linears[index])
