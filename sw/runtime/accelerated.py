# SPDX-License-Identifier: Apache-2.0
"""What a device computes of a graph: quantized linear layers, and mixtures of experts of which all layers are that."""

from typing import Protocol

from onnxruntime import OrtValue

from sw.devices.base import Device
from sw.graph.experts.match import find_mixtures
from sw.graph.linears import Linears
from sw.ort.cut import Stage, experts_node
from sw.program.load import Progress
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

    progress: called with (layers done, layers in all, name) while weights are packed into the device's memory.

    Members
    -------
    nodes: what `cut` needs, a node for every layer and for every mixture.
    """

    def __init__(self, device: Device, linears: Linears, progress: Progress | None):
        self._device, self._linears, self._progress = device, linears, progress
        self._scratch, self._done = Scratch(device), 0
        self._index = {product: index for index, (_, product) in enumerate(linears.tensors)}
        self._mixtures = [part for part in find_mixtures(linears.file) if part.products <= self._index.keys()]
        inside = {product for part in self._mixtures for product in part.products}
        self._single = [index for product, index in self._index.items() if product not in inside]
        nodes = linears.nodes
        self.nodes = [nodes[index] for index in self._single]
        self.nodes += [experts_node(part.name, [part.input, part.weights], part.output) for part in self._mixtures]

    def place(self, stage: Stage, logits: str) -> list[Runs]:
        """What the device computes after a stage, with its weights in the device's memory. logits: the tensor."""
        count, found = len(self._single), list[Runs]()
        layers = [self._place(self._single[number]) for number in stage.accelerated if number < count]
        if layers:
            # Only the caller reads the logits, so those that it did not request need not be computed.
            heads = frozenset(layer.name for layer in layers if layer.output_name == logits)
            found.append(Batch(self._device, layers, heads, frozenset(stage.outputs)))
        for number in stage.accelerated:
            if number >= count:
                mixture = self._mixtures[number - count]
                experts = [
                    PlacedExpert(*(self._place(self._index[product]) for product in (part.gate, part.up, part.down)))
                    for part in mixture.experts
                ]
                found.append(ExpertBatch(self._device, mixture, experts, self._scratch))
        return found

    def outputs(self, stage: Stage) -> list[tuple[str, str]]:
        """(input, output) of what follows a stage: both have the same element type."""
        nodes = [self.nodes[number] for number in stage.accelerated]
        return [(node.input[0], node.output[0]) for node in nodes]

    def _place(self, index: int) -> Placed:
        if self._progress:
            self._progress(self._done, len(self._linears), self._linears.names[index])
        self._done += 1
        return place(self._device, self._linears[index])
