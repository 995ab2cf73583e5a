# SPDX-License-Identifier: Apache-2.0
"""Cuts a graph at its accelerated nodes into stages.

The stage of a node is that of its latest input; the output of an accelerated node is one stage later than its input.
A node that depends only on constants belongs to every stage that reads it, so that onnxruntime can fold it there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx

from sw.graph.file import OnnxFile

EXPERTS = "Experts"
"""Operator of a node that stands for a mixture of experts (sw.graph.experts.match); all its inputs are activations."""


@dataclass
class Stage:
    """Nodes between accelerated layers, in the graph's order.

    Members
    -------
    nodes: the stage's nodes, with those that compute their constants.
    inputs: tensors made elsewhere: the graph's inputs, outputs of earlier stages and of accelerated nodes.
    outputs: tensors that are read outside the stage: by later stages, by accelerated nodes, or as the graph's outputs.
    constants: names of initializers that the nodes read.
    accelerated: indices of the accelerated nodes that follow this stage.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    accelerated: list[int] = field(default_factory=list)


def experts_node(name: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    """The node that stands for a mixture of experts: see EXPERTS."""
    return onnx.NodeProto(name=name, op_type=EXPERTS, input=inputs, output=[output])


def cut(file: OnnxFile, accelerated: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[Stage]:
    """The stages of a graph, in order; after each stage its accelerated nodes run. Nodes that `outputs` do not need are
    removed.

    accelerated: nodes of the graph, with their activations as first input (which may differ from the graph's, if the
    device makes that one itself) and their product as first output. A node with a constant input is not accelerated.
    An EXPERTS node takes the place of all nodes between its inputs and its output.
    """
    places = {node.output[0]: index for index, node in enumerate(accelerated)}
    needed = _needed(file, {name: _activations(accelerated[index]) for name, index in places.items()}, outputs)
    initializers = {tensor.name for tensor in file.graph.initializer}
    constant: dict[str, onnx.NodeProto] = {}
    made = {item.name: 0 for item in file.inputs}
    stages = [Stage()]
    for node in file.graph.node:
        if not needed.intersection(node.output):
            continue
        index = next((places[name] for name in node.output if name in places), None)
        read = _activations(accelerated[index]) if index is not None else list(reads(node))
        dynamic = [made[name] for name in read if name in made]
        if not dynamic:
            constant.update(dict.fromkeys(node.output, node))
            continue
        number = max(dynamic)
        if index is not None:
            stages[number].accelerated.append(index)
            number += 1
            if number == len(stages):
                stages.append(Stage())
        else:
            stages[number].nodes.append(node)
        made.update((name, number) for name in node.output if name)
    for stage in stages:
        _add_constants(stage, constant, initializers)
    _add_borders(stages, accelerated, made, outputs)
    return stages


def reads(node: onnx.NodeProto) -> Iterable[str]:
    """The tensors that a node reads, including those that only its subgraphs read."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            inner = {name for part in graph.node for name in part.output}
            inner |= {item.name for item in [*graph.input, *graph.initializer]}
            yield from (item.name for item in graph.output if item.name not in inner)
            yield from (name for part in graph.node for name in reads(part) if name not in inner)


def _activations(node: onnx.NodeProto) -> Sequence[str]:
    """The tensors that the device reads for an accelerated node."""
    return node.input if node.op_type == EXPERTS else node.input[:1]


def _needed(file: OnnxFile, activations: dict[str, Sequence[str]], outputs: Sequence[str]) -> set[str]:
    """activations: product of an accelerated node -> its activations."""
    needed: set[str] = set()
    ahead = list(outputs)
    while ahead:
        name = ahead.pop()
        if name in needed:
            continue
        needed.add(name)
        node = file.producers.get(name)
        if node is not None:
            ahead += activations[name] if name in activations else reads(node)
    return needed


def _add_constants(stage: Stage, constant: dict[str, onnx.NodeProto], initializers: set[str]) -> None:
    """Puts the nodes that compute a stage's constants before the others."""
    before: dict[int, onnx.NodeProto] = {}

    def visit(node: onnx.NodeProto) -> None:
        for name in reads(node):
            if name in constant and id(constant[name]) not in before:
                visit(constant[name])
                before[id(constant[name])] = constant[name]

    for node in stage.nodes:
        visit(node)
    stage.nodes = [*before.values(), *stage.nodes]
    stage.constants = list(dict.fromkeys(name for node in stage.nodes for name in reads(node) if name in initializers))


def _add_borders(
    stages: list[Stage], accelerated: Sequence[onnx.NodeProto], made: dict[str, int], outputs: Sequence[str]
) -> None:
    readers: dict[str, set[int]] = {name: {-1} for name in outputs}
    for number, stage in enumerate(stages):
        own = {name for node in stage.nodes for name in node.output}
        stage.inputs = list(
            dict.fromkeys(name for node in stage.nodes for name in reads(node) if name in made and name not in own)
        )
        wanted = [*stage.inputs, *(name for index in stage.accelerated for name in _activations(accelerated[index]))]
        for name in wanted:
            readers.setdefault(name, set()).add(number if name not in own else -1)
    for stage in stages:
        own = [name for node in stage.nodes for name in node.output if name]
        stage.outputs = [name for name in own if name in readers and name in made]
