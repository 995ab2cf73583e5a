# SPDX-License-Identifier: Apache-2.0
"""Groups of float linear layers of a graph: the layers that share an input, and the input's source."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sw.graph.file import OnnxFile
from sw.graph.float_linears import FloatSite, constant_shape
from sw.graph.nodes import SHAPES, is_output, readers
from sw.graph.norms import weight_of


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and so share a scale of its channels.

    Members
    -------
    input_name: the tensor, [..., K].
    sites: the layers.
    gamma: the constant that scales every channel of the tensor, if only the layers depend on it; or "".
    only_readers: whether the layers are the only readers of the tensor's values.
    """

    input_name: str
    sites: Sequence[FloatSite] = field(default_factory=list)
    gamma: str = ""
    only_readers: bool = False

    @property
    def k(self) -> int:
        """Number of channels."""
        return self.sites[0].k


def group_sites(file: OnnxFile, sites: Sequence[FloatSite]) -> list[Group]:
    """The sites by the tensor that they read, in the graph's order."""
    by_input: dict[str, list[FloatSite]] = {}
    for site in sites:
        by_input.setdefault(site.node.input[0], []).append(site)
    groups = []
    for name, members in by_input.items():
        nodes = {id(site.node) for site in members}
        alone = not is_output(file, name) and all(
            id(node) in nodes or node.op_type in SHAPES for node in readers(file, name)
        )
        gamma = _gamma(file, name) if alone else ""
        groups.append(Group(name, members, gamma, alone))
    return groups


def _gamma(file: OnnxFile, name: str) -> str:
    """The constant whose elements scale only the channels of tensor `name`; or ""."""
    node = file.producers.get(name)
    if node is None or node.output[0] != name:
        return ""
    # A fourth input of the skipping norm is a bias before it, which the weight scales as well.
    gamma = weight_of(node)
    if not gamma and node.op_type == "Mul":
        gamma = next((part for part in node.input if file.is_constant(part)), "")
    if not gamma or not is_own(file, gamma):
        return ""
    shape = constant_shape(file, gamma)
    # A single factor for all channels is not a norm's weight.
    return gamma if len(shape) and shape[-1] == np.prod(shape) > 1 else ""


def is_own(file: OnnxFile, name: str) -> bool:
    """Whether a constant is read in one place only, so that a new value changes nothing else.

    It need not be an initializer: if an exporter merged equal tensors, they are read through Identity nodes.
    """
    return (
        file.is_constant(name)
        and len(readers(file, name)) == 1
        and not any(item.name == name for item in (*file.graph.output, *file.graph.input))
    )
