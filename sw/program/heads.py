# SPDX-License-Identifier: Apache-2.0
"""Heads whose size is no multiple of a group of the KV cache, padded with zeros when weights are packed.

The rows of q, k and v get zero rows after each head, and o gets columns at the same places. A zero row gives elements
that are 0, so they add 0 to scores, and the padding of the output is 0: no result changes. The factor of the scores
stays that of the model's head size.
"""

from dataclasses import replace

import numpy as np

from hw.spec.memory.geometry import ceil_div
from hw.spec.numerics.block_float import BLOCK
from sw.model.linear import QuantizedLinear
from sw.program.keys import KeyHeads


def padded_size(head_size: int) -> int:
    """Elements of a head in the cache: a multiple of 32."""
    return ceil_div(head_size, BLOCK) * BLOCK


def pad_rows(layer: QuantizedLinear, head_size: int) -> QuantizedLinear:
    """The layer of q, k or v with zero rows after each head."""
    extra = padded_size(head_size) - head_size

    def padded(values: np.ndarray) -> np.ndarray:
        heads = values.reshape(-1, head_size, *values.shape[1:])
        widths = [(0, 0), (0, extra), *[(0, 0)] * (values.ndim - 1)]
        return np.pad(heads, widths).reshape(-1, *values.shape[1:])

    return replace(
        layer,
        q=padded(layer.q),
        scales=padded(layer.scales),
        zero_points=padded(layer.zero_points),
        bias=None if layer.bias is None else padded(layer.bias),
    )


def pad_columns(layer: QuantizedLinear, head_size: int, tile: int) -> QuantizedLinear:
    """The layer o with columns for the padding, whose activations are 0.

    A group may not have columns of two groups of the model, so the groups become shorter unless heads end with groups:
    the greatest parts of a group that fit, and if possible a multiple of the hardware's tile.
    """
    padded, k = padded_size(head_size), np.arange(layer.k)
    places = k // head_size * padded + k % head_size
    columns = layer.k // head_size * padded
    # The model's group of each column, -1 for the padding.
    source = np.full(columns, -1)
    source[places] = k // layer.group_size
    sizes = [size for size in range(layer.group_size, 0, -1) if _fits(source, layer.group_size, size)]
    size = next((size for size in sizes if size % tile == 0), sizes[0])
    # A group of padding alone may have any scale.
    groups = np.maximum(0, _blocks(source, size).max(axis=1))
    q = np.zeros((layer.n, columns), np.uint8)
    if layer.has_integer_zero_points:
        q = layer.zero_points[:, groups].repeat(size, axis=1)[:, :columns]
    q[:, places] = layer.q
    return replace(
        layer, q=q, scales=layer.scales[:, groups], zero_points=layer.zero_points[:, groups], group_size=size
    )


def pad_keys(keys: KeyHeads, head_size: int) -> KeyHeads:
    """What is known about the keys, with zeros in the padding, and factors of 1."""
    extra = [(0, 0), (0, padded_size(head_size) - head_size)]
    bias = None if keys.bias is None else np.pad(keys.bias, extra)
    factors = np.pad(keys.factors, extra, constant_values=1)
    return KeyHeads(bias, np.pad(keys.deviation, extra), np.pad(keys.queries, extra), factors)


def _fits(source: np.ndarray, group_size: int, size: int) -> bool:
    """Whether groups of `size`, a part of the model's, have no columns of two of its groups."""
    if group_size % size:
        return False
    blocks = _blocks(source, size)
    least = np.where(blocks < 0, blocks.max(axis=1, keepdims=True), blocks).min(axis=1)
    return bool((least == blocks.max(axis=1)).all())


def _blocks(source: np.ndarray, size: int) -> np.ndarray:
    """The columns in groups; the last one is filled with padding."""
    return np.pad(source, (0, -len(source) % size), constant_values=-1).reshape(-1, size)
