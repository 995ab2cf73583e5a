# SPDX-License-Identifier: Apache-2.0
"""Brings the rows of quantized layers into the order that the epilogues need. No value changes, only its place."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.planes import plane_count
from sw.model.linear import QuantizedLinear


def can_join(config: AcceleratorConfig, layers: Sequence[QuantizedLinear]) -> bool:
    """Whether layers with the same activations can be one layer: the same groups and the same number of planes."""
    return len({(layer.k, layer.group_size, plane_count(config, layer.bits)) for layer in layers}) == 1


def join(name: str, layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One layer with the rows of all of them, one layer after the other; see `can_join`. Its results are theirs."""
    if len(layers) == 1:
        return replace(layers[0], name=name)
    zero_points = [layer.zero_points for layer in layers]
    if len({values.dtype for values in zero_points}) > 1:
        zero_points = [values.astype(np.float32) for values in zero_points]
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = np.concatenate([np.zeros(layer.n, np.float32) if layer.bias is None else layer.bias for layer in layers])
    return QuantizedLinear(
        name,
        np.concatenate([layer.q for layer in layers]),
        np.concatenate([layer.scales for layer in layers]),
        np.concatenate(zero_points),
        layers[0].group_size,
        max(layer.bits for layer in layers),
        bias,
    )


def interleave(name: str, gate: QuantizedLinear, up: QuantizedLinear) -> QuantizedLinear:
    """One layer with the rows gate 0, up 0, gate 1, up 1, ...: the pairs of columns that SiLU(gate) * up takes."""
    order = np.arange(2 * gate.n).reshape(2, gate.n).T.reshape(-1)
    return join(name, [gate, up]).with_rows(order)


def rotated_rows(heads: int, head_size: int, rotated: int, interleaved: bool) -> np.ndarray:
    """The rows of q or k, ordered so that the elements of a rotated pair are neighbours: int64 [heads * head_size].

    rotated: number of a head's first elements that are rotated. interleaved: they are neighbours already. Scores do not
    change if the elements of queries and keys have the same order.
    """
    head = np.arange(head_size)
    if not interleaved:
        head[:rotated] = head[:rotated].reshape(2, rotated // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_size + head).reshape(-1)


def rotary_rows(cosines: np.ndarray, sines: np.ndarray, head_size: int) -> np.ndarray:
    """The table of hw.spec.ops.epilogue: float32 [positions, head_size] with cosine and sine of every pair in turn.

    cosines, sines: [positions, rotated / 2]. The pairs of the other elements of a head are turned by 0.
    """
    table = np.zeros((len(cosines), head_size // 2, 2), np.float32)
    table[:, :, 0] = 1
    table[:, : cosines.shape[1]] = np.stack([cosines, sines], axis=-1)
    return table.reshape(len(cosines), head_size)
